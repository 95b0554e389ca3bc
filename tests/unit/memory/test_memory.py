"""The arithmetic of `rto-fast memory`, beside counted models, measured memory and the figures of known runs."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys

import psutil
import pytest
import torch
from launches import START, environment
from loop_helpers import ROOT, make_tiny_models, small_run
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rto_fast import commands
from rto_fast.config import RTOConfig
from rto_fast.errors import ConfigError
from rto_fast.memory import fit, host
from rto_fast.memory.command import MemoryConfig, conclusions, show
from rto_fast.memory.fit import largest_micro_tokens, largest_share, remedies, require_fit, shortage
from rto_fast.memory.host import host_phases
from rto_fast.memory.phases import GIB, models_of, phases
from rto_fast.memory.seconds import checkpoint_bytes, seconds
from rto_fast.memory.shapes import shape_from, shape_of

SMALL = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "llama": {"intermediate_size": 48, "num_key_value_heads": 2},
    "qwen2": {"intermediate_size": 48, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 16},
    "gemma2": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 16},
    "mistral": {"intermediate_size": 48, "num_key_value_heads": 2},
    "gpt_neox": {"intermediate_size": 48},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scalar", [False, True], ids=["causal", "scalar"])
def test_counts_are_those_of_the_loaded_model(family, scalar):
    config = AutoConfig.for_model(family, **SMALL, **FAMILIES[family], num_labels=1, pad_token_id=0)
    auto = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    sizes = [p.numel() for p in auto.from_config(config).parameters()]
    shape = shape_from(config, "policy", scalar=scalar)
    assert shape.parameters == sum(sizes)
    assert shape.layers == 2
    assert shape.keys == FAMILIES[family].get("num_key_value_heads", 4) * (FAMILIES[family].get("head_dim") or 8)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama-3.2-1b", 1_235_814_400), ("llama-3-8b", 8_030_261_248), ("llama-3-70b", 70_553_706_496)],
)
def test_known_models_have_their_published_sizes(name, parameters):
    assert shape_of(name, "policy").parameters == parameters


def test_a_config_file_is_enough(tiny, tmp_path):
    text = (tmp_path / "config.json").write_bytes((ROOT / tiny.policy / "config.json").read_bytes())
    assert text
    assert shape_of(str(tmp_path / "config.json"), "policy") == shape_of(tiny.policy, "policy")


def test_a_missing_model_is_named(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"dpo_model: no model at 'nowhere'.*llama-3-8b"):
        models_of(MemoryConfig(dpo_model="nowhere"))


def gib(config: MemoryConfig) -> dict[str, float]:
    return {p.name: p.total / GIB for p in phases(config, models_of(config), config.machine)}


def test_whole_frozen_models_do_not_fit_beside_vllm_and_partitioned_ones_do():
    """8B and 1B on 8 x 80 GB: 53.8 GiB lie there before vLLM, which asks for 31.9 of the 24.5 that are left."""
    whole = MemoryConfig(partition_frozen="no")
    figures = gib(whole)
    assert figures["load"] - 1.3 == pytest.approx(53.8, abs=0.1)
    assert figures["vLLM start"] > 79.6
    assert figures["policy update"] > 79.0
    assert remedies(whole, models_of(whole), whole.machine) == ["--partition-frozen yes"]
    spread = MemoryConfig()
    assert gib(spread)["vLLM start"] == pytest.approx(26.9 + 31.8, abs=0.1)
    assert gib(spread)["policy update"] == pytest.approx(54, abs=3)
    assert shortage(spread, models_of(spread), spread.machine) is None


@pytest.mark.parametrize(
    "settings",
    [
        {"ranks": 1},
        {"ranks": 2},
        {"partition_frozen": "no"},
        {"gradient_checkpointing": False, "micro_tokens": 65536},
        {"vllm_memory_share": 0.7},
        {"vllm_memory_share": 0.1},
        {"policy": "llama-3-70b", "dpo_model": "llama-3-70b", "ranks": 32},
        {"rollout_engine": "transformers", "partition_frozen": "no", "micro_tokens": 1 << 18},
    ],
)
def test_the_proposed_flags_make_it_fit(settings):
    config = MemoryConfig(**settings)
    models = models_of(config)
    with pytest.raises(
        ConfigError, match=r"memory: on \d+ devices? of 79.6 GiB .* GiB held.* it fits with --"
    ) as error:
        require_fit(config, models, config.machine)
    flags = remedies(config, models, config.machine)
    assert " ".join(flags) in str(error.value)
    mended = commands.cli.parse(config, " ".join(flags).split())
    mended.validate()
    assert shortage(mended, models, mended.machine) is None
    for flag in flags:  # each of them is needed, the engine's for tensor parallelism
        less = commands.cli.parse(config, " ".join(f for f in flags if f != flag).split())
        assert "--rollout-engine" in flag or shortage(less, models, less.machine) is not None, flag


def test_what_fits_nowhere_says_so():
    config = MemoryConfig(device_gib=4.0)
    with pytest.raises(ConfigError, match="no flag makes it fit"):
        require_fit(config, models_of(config), config.machine)


def test_the_largest_settings_fit_and_a_little_more_does_not():
    config = MemoryConfig()
    models, machine = models_of(config), config.machine
    tokens, share = largest_micro_tokens(config, models, machine), largest_share(config, models, machine)
    for name, value, more in (("micro_tokens", tokens, tokens + 1024), ("vllm_memory_share", share, share + 0.01)):
        assert shortage(dataclasses.replace(config, **{name: value}), models, machine) is None
        assert shortage(dataclasses.replace(config, **{name: more}), models, machine) is not None


@pytest.mark.parametrize("settings", [{"zero_stage": 3}, {"offload": True}, {"gradient_checkpointing": True}])
def test_flags_that_save_memory_do(settings):
    plain = MemoryConfig(gradient_checkpointing=False)
    less = dataclasses.replace(plain, **settings)
    assert gib(less)["policy update"] < gib(plain)["policy update"] - 5


def test_activations_are_computed_again_where_the_run_does(monkeypatch):
    auto, on, off = (gib(MemoryConfig(gradient_checkpointing=how)) for how in ("auto", True, False))
    assert auto == on != off
    monkeypatch.setattr("rto_fast.config.base.SMALL_MODEL", 10**10)
    assert gib(MemoryConfig()) == off


def test_parked_models_leave_the_device_outside_scoring():
    plain, parked = MemoryConfig(ranks=1), MemoryConfig(ranks=1, park_frozen=True)
    assert gib(plain)["policy update"] - gib(parked)["policy update"] == pytest.approx(32.2, abs=0.2)
    of_one = 8.03e9 * 2 / GIB  # in scoring they come one at a time
    assert gib(plain)["scoring"] - gib(parked)["scoring"] == pytest.approx(32.2 - of_one, abs=0.2)


@pytest.mark.parametrize(("kind", "of_one"), [("int8", 1 + 4 * 3.1e-4), ("nf4", 0.5625)])
def test_frozen_models_in_few_bits(kind, of_one):
    """8B has 6.98 billion numbers in linear maps; two tables of 0.525 billion stay in bf16, as do norms.

    Of a whole model one matrix and what is none are there beside them while the error is measured.
    """
    plain, coded = MemoryConfig(ranks=1), MemoryConfig(ranks=1, frozen_dtype=kind)
    before, after = ({p.name: p.parts for p in phases(c, models_of(c), c.machine)} for c in (plain, coded))
    inner = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    saved = before["load"]["reference"] - after["load"]["reference"]
    assert saved == pytest.approx((2 - of_one) * inner, rel=1e-3)
    assert after["policy update"]["dpo_model"] == after["load"]["reference"]
    name = "a whole model, a matrix at a time"
    assert {phase: parts[name] for phase, parts in after.items() if name in parts} == {
        "error of frozen weights": before["load"]["reference"] - 2 * inner + 2 * 4096 * 14336
    }
    assert after["scoring"]["a decoded matrix"] == 4096 * 14336 * {"int8": 10, "nf4": 2}[kind]
    hosts = [
        {p.name: p.total for p in host_phases(c, models_of(c), c.machine)}["training"]
        for c in (MemoryConfig(ranks=1, park_frozen=True, frozen_dtype=k) for k in ("off", kind))
    ]
    assert hosts[0] - hosts[1] > 2 * saved


def on_host(config: MemoryConfig) -> dict[str, float]:
    return {p.name: p.total / GIB for p in host_phases(config, models_of(config), config.machine)}


def test_host_memory_of_a_node():
    """8B is 15.0 GiB: one copy is read for ranks that partition it, one is kept by each rank that parks it."""
    processes = 8 * 3
    spread = on_host(MemoryConfig(zero_stage=3))
    assert spread["loading"] == pytest.approx(processes + 15.0, abs=0.1)
    assert spread["training"] == processes
    parked = on_host(MemoryConfig(park_frozen=True))
    assert parked["training"] == pytest.approx(processes + 8 * (2 * 14.96 + 2.3), abs=0.5)
    far = MemoryConfig(zero_stage=3, ranks=16, offload=True)
    assert far.machine.on_node == 8
    assert on_host(far)["training"] == pytest.approx(processes + (4 + 8 + 4 + 2) * (8.03 + 1.236) / 2 / 1.0737, abs=0.5)
    assert on_host(far)["loading"] < on_host(far)["training"]


def test_zero_3_holds_its_gradients_in_every_phase():
    """DeepSpeed allocates them with the optimiser: 4 P / R."""
    two, three = (gib(MemoryConfig(zero_stage=stage, partition_frozen="yes")) for stage in (2, 3))
    weights, gradients = (8.03 + 1.236) * 2 * 7 / 8 / 1.0737, (8.03 + 1.236) * 4 / 8 / 1.0737
    assert two["load"] - three["load"] == pytest.approx(weights - gradients, abs=0.1)


@pytest.mark.parametrize(
    ("settings", "room", "phase", "remedy"),
    [
        ({"park_frozen": True}, 200, "loading|training", "it fits with --partition-frozen yes --park-frozen False"),
        ({"zero_stage": 3}, 30, "loading", "no flag makes it fit"),
        ({"offload": True}, 150, "training", "no flag makes it fit"),
    ],
)
def test_too_little_host_memory_is_refused_with_what_lacks(settings, room, phase, remedy):
    config = MemoryConfig(**settings, host_gib=room)
    with pytest.raises(
        ConfigError, match=rf"({phase}) asks for .* of a node's host memory beside 24.0 GiB held, .* {remedy}"
    ):
        require_fit(config, models_of(config), config.machine)
    roomy = dataclasses.replace(config, host_gib=400.0)
    assert shortage(roomy, models_of(roomy), roomy.machine) is None


def test_the_host_is_asked_at_the_start(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (79 << 30, 80 << 30))
    config = RTOConfig(**small_run(tiny, tmp_path, park_frozen=True, partition_frozen="no"))
    fit.check_device(config, torch.device("cuda"), 1)
    monkeypatch.setattr(fit, "host_free", lambda: 1000.0)
    with pytest.raises(ConfigError, match=r"of a node's host memory beside 3\.0 GiB held"):
        fit.check_device(config, torch.device("cuda"), 1)


def test_free_host_memory_is_a_containers_where_it_has_a_limit(monkeypatch, tmp_path):
    for name, text in (("max", "9000\n"), ("current", "5000\n"), ("stat", "anon 2000\nfile 3000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr(host, "GROUP", tmp_path)
    assert host.host_free() == 9000 - 5000 + 3000
    (tmp_path / "memory.max").write_text("max\n")
    assert host.host_free() == pytest.approx(psutil.virtual_memory().available, rel=0.5)


def test_a_run_that_cannot_fit_is_refused_on_a_gpu_alone(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 << 20, 4 << 20))
    config = RTOConfig(**small_run(tiny, tmp_path))
    fit.check_device(config, torch.device("cpu"), 1)
    fit.check_device(dataclasses.replace(config, memory_check=False), torch.device("cuda"), 1)
    with pytest.raises(ConfigError, match=r"memory: on 1 device of 0.0 GiB"):
        fit.check_device(config, torch.device("cuda"), 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (79 << 30, 80 << 30))
    fit.check_device(config, torch.device("cuda"), 1)


def test_the_trainer_asks_before_it_loads(tiny, tmp_path, monkeypatch, one_rank):
    from rto_fast import build

    def refuse(config, device, ranks):
        raise ConfigError("memory: too little")

    monkeypatch.setattr(build, "check_device", refuse)
    monkeypatch.setattr(build, "load_policy", lambda *a, **k: pytest.fail("it loaded a model"))
    with pytest.raises(ConfigError, match="too little"):
        build.build(RTOConfig(**small_run(tiny, tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_seconds_and_checkpoint():
    """One 8B forward over 8 x 262,144 tokens at 400 TFLOP/s on 8 devices, counted by hand."""
    config = MemoryConfig()
    models = models_of(config)
    assert checkpoint_bytes(config, models) / 1e9 == pytest.approx(14 * (8.03 + 1.236), rel=1e-3)
    times = seconds(config, models, config.machine, config.rates)
    tokens, computed = 1024 * 2048 / 8, 8.03e9 - 128256 * 4096 / 2
    assert times["policy update"] == pytest.approx(8 * tokens * computed / 4e14 + 8 * 2 * 2 * 8.03e9 / 2e11, rel=0.1)
    with_ptx = seconds(dataclasses.replace(config, ptx_coef=1.0), models, config.machine, config.rates)
    assert with_ptx["policy update"] - times["policy update"] == pytest.approx(8 * tokens * computed / 4e14, rel=0.1)
    assert with_ptx["critic update"] == times["critic update"]
    faster = dataclasses.replace(config, tflops=800.0)
    assert seconds(config, models, config.machine, faster.rates)["scoring"] < times["scoring"]


def test_the_command_says_whether_it_fits(capsys):
    show(MemoryConfig())
    text = capsys.readouterr().out
    assert text.rstrip().endswith("it fits")
    assert "loading, host of 8 ranks" in text
    assert "training, host of 8 ranks" in text
    for phase in ("load", "vLLM start", "rollout", "scoring", "policy update", "critic update", "checkpoint"):
        assert phase in text
    config = MemoryConfig(ranks=1)
    assert conclusions(config, models_of(config))[-1].startswith("it fits with --")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "settings"),
    [(1, {}), (2, {"partition_frozen": "yes"}), (1, {"lora_rank": 8})],
    ids=["one", "two", "one base"],
)
def test_measured_memory_is_within_a_tenth(tiny, tmp_path, monkeypatch, ranks, settings):
    """A 230 MB policy with sampler, reference and DPO model, on CPUs: resident memory at each phase's peak.

    With adapters the DPO model's weights are the policy's, in a folder of their own. The ranks are forks of a process
    that starts here: malloc reads its settings once.
    """
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed leaves the process
    large = make_tiny_models(
        tmp_path / "models", rows=16, hidden_size=768, intermediate_size=2048, num_hidden_layers=8,
        num_attention_heads=12, num_key_value_heads=4,
    )  # fmt: skip
    settings |= {
        "rollout_batch": 4, "train_batch": 4, "gradient_checkpointing": True, "micro_tokens": 112, "score_tokens": 112,
        "rollout_tokens": 112, "sync_proof": False, "advantage": "reinforce_pp", "reward_model": (),
        "reward_fn": ("invariance_worker:length",), "report": False,
    }  # fmt: skip
    if "lora_rank" in settings:
        pytest.importorskip("peft")
        shutil.rmtree(large.dpo)
        shutil.copytree(large.policy, large.dpo)
    runs = [json.dumps(small_run(m, tmp_path / n, **settings)) for m, n in ((tiny, "tiny"), (large, "large"))]
    args = [ROOT / "tests" / "memory_worker.py", *runs, tmp_path / "found.json"]
    wrong: list[str] = []
    for _ in range(3):  # on a busy machine what was freed may leave the process late
        fresh = subprocess.run([sys.executable, "-c", START, str(ranks), *map(str, args)], env=environment(),
                               capture_output=True, text=True)  # fmt: skip
        assert fresh.returncode == 0, fresh.stdout + fresh.stderr
        found = json.loads((tmp_path / "found.json").read_text())
        assert all(rank.keys() == {"rollout", "scoring", "policy update"} for rank in found)
        wrong = [
            f"{phase}: {peak / 2**20:.0f} MiB, {expected / 2**20:.0f}"
            for rank in found for phase, (peak, expected) in rank.items() if peak != pytest.approx(expected, rel=0.1)
        ]  # fmt: skip
        if not wrong:
            return
        for run in ("tiny", "large"):
            shutil.rmtree(tmp_path / run)
    pytest.fail("; ".join(wrong))


def test_an_online_dpo_model_is_a_trained_one():
    """Of the policy's shape it takes the policy's place again, and none among the frozen models."""
    off, on = MemoryConfig(), MemoryConfig(online="prime")
    frozen, online = models_of(off), models_of(on)
    assert [name for name, _ in online.trained] == ["policy", "critic", "online DPO"]
    assert [name for name, _ in online.frozen] == [name for name, _ in frozen.frozen if name != "dpo_model"]
    assert checkpoint_bytes(on, online) == checkpoint_bytes(off, frozen) + 14 * frozen.policy.parameters
    before, after = ({p.name: p.parts for p in phases(c, m, c.machine)} for c, m in ((off, frozen), (on, online)))
    for part in ("weights", "fp32 weights", "moments"):
        assert after["scoring"][f"online DPO {part}"] == before["scoring"][f"policy {part}"]
    assert after.keys() - before.keys() == {"online DPO update"}
    spent, longer, late = (
        seconds(c, models_of(c), c.machine, c.rates) for c in (off, on, dataclasses.replace(on, online_order="after"))
    )
    assert longer["scoring"] > late["scoring"] > 0
    assert longer["online DPO update"] == pytest.approx(spent["policy update"] / off.ppo_epochs)
    twice = MemoryConfig(online="prime", ppo_epochs=2)
    assert seconds(twice, online, twice.machine, twice.rates)["online DPO update"] == longer["online DPO update"]
