"""The arithmetic of `rto-fast memory` with adapters, beside the numbers and bytes of models that are really built."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from loop_helpers import save_llama, small_run
from torch.profiler import ProfilerActivity, profile

from rto_fast import cli
from rto_fast.config import ALL_LINEAR, Lora, RTOConfig
from rto_fast.errors import ConfigError
from rto_fast.memory import fit
from rto_fast.memory.command import MemoryConfig
from rto_fast.memory.fit import remedies, shortage
from rto_fast.memory.host import host_phases
from rto_fast.memory.phases import MERGING, kept_of, models_of, phases
from rto_fast.memory.seconds import checkpoint_bytes, seconds
from rto_fast.memory.shapes import adapted, shape_of
from rto_fast.models.attention import PACKED
from rto_fast.models.load import load_policy, new_scalar
from rto_fast.models.save import export

peft = pytest.importorskip("peft")
LOADING = {"dtype": torch.float32, "attention": PACKED, "argument": "model"}
KINDS = {"plain": {}, "dora": {"dora": True}, "some": {"targets": ("q_proj", "down_proj")}}


def lora(**settings) -> Lora:
    return Lora(**({"rank": 3, "alpha": 8, "dropout": 0.0, "targets": (ALL_LINEAR,), "rslora": False, "dora": False,
                    "seed": 0} | settings))  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, str]:
    """Folders of untied and tied Llamas, and of a GPT-2, whose maps are no nn.Linear."""
    from transformers import GPT2Config, GPT2LMHeadModel

    root, ids = tmp_path_factory.mktemp("bases"), {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    for name in ("untied", "tied"):
        save_llama(root / name, seed=1, vocab=87, ids=ids, tied=name == "tied")
    shape = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    GPT2LMHeadModel(GPT2Config(vocab_size=87, **shape, **ids)).save_pretrained(root / "gpt2")
    return {name: str(root / name) for name in ("untied", "tied", "gpt2")}


def trained(model) -> list[int]:
    return [p.numel() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize(
    ("base", "kind"), [("untied", "plain"), ("tied", "dora"), ("untied", "some"), ("gpt2", "plain"), ("gpt2", "dora")]
)
@pytest.mark.parametrize("scalar", [False, True], ids=["causal", "scalar"])
def test_counts_are_those_of_the_adapted_model(bases, tmp_path, base, kind, scalar):
    """A new adapter is counted from the config, one in a folder from its file."""
    asked = lora(**KINDS[kind])
    model = (new_scalar if scalar else load_policy)(bases[base], lora=asked, **LOADING)
    shape = adapted(shape_of(bases[base], "policy", scalar=scalar), bases[base], "policy", asked)
    assert shape.trained == sum(trained(model))
    assert shape.largest_trained == max(trained(model))
    assert kept_of(MemoryConfig(), shape, trained=True) == sum(p.numel() for p in model.parameters())
    layers = {name.partition(".base_layer")[0]: p for name, p in model.named_parameters() if ".base_layer.w" in name}
    assert shape.adapted == max(p.numel() for p in layers.values())
    export(model, tmp_path, write=True)
    assert adapted(shape_of(str(tmp_path), "policy", scalar=scalar), str(tmp_path), "policy", None) == shape


def test_a_module_that_the_model_has_not_is_named():
    with pytest.raises(ConfigError, match=r"lora_targets: policy .* has no module 'q_prj'; did you mean q_proj\?"):
        models_of(MemoryConfig(lora_rank=4, lora_targets=("q_prj",)))


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory) -> dict[str, str]:
    """Adapters of a DPO model and a reward model on a copy of the policy's folder."""
    root = tmp_path_factory.mktemp("adapters")
    shutil.copytree(tiny.policy, root / "copy")
    found = {name: str(root / name) for name in ("copy", "dpo", "rm", "policy")}
    export(load_policy(found["copy"], lora=lora(), **LOADING), root / "dpo", write=True)
    export(load_policy(found["copy"], lora=lora(), **LOADING), root / "policy", write=True)
    export(new_scalar(found["copy"], lora=lora(), **LOADING), root / "rm", write=True)
    for name in ("dpo", "rm", "policy"):
        for file in Path(tiny.policy).glob("token*"):
            shutil.copy(file, root / name)
    return found


RUNS = {
    "one base": {},
    "critic on its own base": {"lora_critic": "own"},
    "critic from the policy": {"critic": "policy"},
    "policy is an adapter": {"policy": "policy"},
    "whole DPO model": {"dpo_model": "whole"},
    "whole reward model": {"reward_model": "whole"},
    "online": {"online": "prime"},
    "ZeRO-3": {"zero_stage": 3},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_runs_numbers_are_those_that_are_counted(tiny, folders, tmp_path, monkeypatch, one_rank, name):
    """Weights of all models without those that are shared, and what each optimiser has."""
    from rto_fast import build

    asked = dict(RUNS[name])
    others = {("policy", "policy"): folders["policy"], ("dpo_model", "whole"): tiny.dpo,
              ("reward_model", "whole"): (tiny.reward,)}  # fmt: skip
    asked = {key: others.get((key, value), value) for key, value in asked.items()}
    config = RTOConfig(**small_run(tiny, tmp_path, dpo_model=folders["dpo"], reward_model=(folders["rm"],), lora_rank=3,
                                   lora_alpha=8) | asked)  # fmt: skip
    loaded = build.load(config, build.check(config))
    models = models_of(config)
    engines = {"policy": loaded.policy, "critic": loaded.critic, "online DPO": loaded.online}
    for argument, shape in models.trained:
        sizes = [getattr(p, "ds_numel", p.numel()) for p in engines[argument].model.parameters() if p.requires_grad]
        assert shape.trained == sum(sizes)
        if config.zero_stage == 2:
            held = engines[argument].deepspeed.optimizer.single_partition_of_fp32_groups
            assert shape.trained == sum(p.numel() for p in held)
    kept = [kept_of(config, s, trained=True) for _, s in models.trained]
    kept += [kept_of(config, s, trained=False) for _, s in models.frozen]
    seen = [p for e in engines.values() if e for p in e.model.parameters()]
    seen += [p for frozen in loaded.scorers.frozen for p in frozen.module.parameters()]
    sizes = {id(p) if config.zero_stage == 3 else p.data_ptr(): getattr(p, "ds_numel", p.numel()) for p in seen}
    assert sum(kept) == sum(sizes.values())
    own = {"whole DPO model": {"dpo_model"}, "whole reward model": {"reward_model"}}.get(name, set())
    assert {argument for argument, s in models.frozen if not s.on_base} == own


EIGHT = {"policy": "llama-3-8b", "dpo_model": "llama-3-8b", "reward_model": ("llama-3-8b",), "lora_rank": 16}
OF_8B = 8.030261248
"""Billions of parameters."""


def found(config: MemoryConfig) -> dict[str, dict[str, float]]:
    """GB of each part, by phase."""
    return {p.name: {k: v / 1e9 for k, v in p.parts.items()}
            for p in phases(config, models_of(config), config.machine)}  # fmt: skip


def test_an_adapter_of_8b():
    """Of rank 16, by hand: q and o 2·4096, k and v 4096 + 1024, three maps of 4096 + 14336, in 32 layers."""
    models = models_of(MemoryConfig(**EIGHT))
    numbers = 32 * 16 * (2 * 2 * 4096 + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert models.policy.adapter == numbers == 41_943_040
    assert models.critic.trained == numbers + 4096
    assert [s.on_base for _, s in models.frozen] == [True] * 3


def test_one_base_of_8b_on_one_device():
    """One copy of 16.06 GB; every other model adds 84 MB, every trained one 12 bytes a number."""
    whole = MemoryConfig(**EIGHT | {"lora_rank": 0}, ranks=1)
    assert found(whole)["load"]["reference"] == pytest.approx(16.06, abs=0.01)
    parts = found(MemoryConfig(**EIGHT, ranks=1))
    adapter = 0.04194304
    update = parts["policy update"]
    assert update["policy weights"] == pytest.approx(2 * (OF_8B + adapter))
    for name in ("reference", "dpo_model"):
        assert update[name] == pytest.approx(2 * adapter)
    for name, numbers in (("critic", adapter + 4096e-9), ("policy", adapter)):
        assert update[f"{name} fp32 weights"] == pytest.approx(4 * numbers)
        assert update[f"{name} moments"] == pytest.approx(8 * numbers)
    assert update["critic weights"] == update["reward_model"] == pytest.approx(2 * (adapter + 4096e-9))
    assert update["gradients"] == pytest.approx(4 * adapter)
    head = 128256 * 4096 * (4 + 2) / 1e9  # d(weight) of a trained head
    assert found(whole)["policy update"]["lm_head"] - update["lm_head"] == pytest.approx(head)
    assert update["activations"] == found(whole)["policy update"]["activations"]


def test_8b_fits_one_card_of_80_gb_and_1b_one_of_24():
    """With everything by default, vLLM's 0.4 of the device included; whole weights fit neither without other flags."""
    small = {
        key: {"llama-3-8b": "llama-3.2-1b", ("llama-3-8b",): ("llama-3.2-1b",)}.get(v, v) for key, v in EIGHT.items()
    }
    for asked, room in ((EIGHT, 79.6), (small, 23.5)):
        adapters, whole = (MemoryConfig(**asked | {"lora_rank": r}, ranks=1, device_gib=room) for r in (16, 0))
        assert shortage(adapters, models_of(adapters), adapters.machine) is None
        assert shortage(whole, models_of(whole), whole.machine) is not None


def test_zero_3_takes_the_base_apart_once():
    """Every rank has its part of the base and of each adapter. A forward gathers what its model has; the base once."""
    two, three = (found(MemoryConfig(**EIGHT, zero_stage=stage)) for stage in (2, 3))
    adapter = 0.04194304
    assert three["load"]["policy weights"] == pytest.approx(2 * (OF_8B + adapter) / 8)
    for name in ("reference", "dpo_model"):
        assert three["load"][name] == pytest.approx(2 * adapter / 8)
        assert two["load"][name] == pytest.approx(2 * adapter)
    assert three["load"]["critic weights"] == pytest.approx(2 * (adapter + 4096e-9) / 8)
    assert "gathered weights" not in two["scoring"]
    others = 4 * adapter + 2 * 4096e-9  # reference, DPO model, reward model and critic
    assert three["scoring"]["gathered weights"] == pytest.approx(2 * (1.05 + others))


def test_whole_frozen_models_beside_a_base_in_parts_have_weights_of_their_own():
    config = MemoryConfig(**EIGHT, zero_stage=3, partition_frozen="no")
    parts = found(config)
    assert parts["load"]["reference"] == parts["load"]["dpo_model"] == pytest.approx(2 * OF_8B)
    assert parts["load"]["critic weights"] == pytest.approx(2 * (0.04194304 + 4096e-9) / 8)
    assert parts["scoring"]["gathered weights"] == pytest.approx(2 * (1.05 + 0.04194304 + 4096e-9))


def test_models_on_the_base_do_not_park():
    parked = MemoryConfig(**EIGHT | {"reward_model": ("llama-3.2-1b",)}, ranks=1, park_frozen=True)
    parts = found(parked)
    assert "reward_model" not in parts["policy update"]
    assert {"reference", "dpo_model"} <= parts["policy update"].keys()
    assert parts["scoring"]["reward_model"] == pytest.approx(
        2 * shape_of("llama-3.2-1b", "x", scalar=True).parameters / 1e9
    )
    hosts = {p.name: p.parts for p in host_phases(parked, models_of(parked), parked.machine)}
    assert {"reward_model", "reference", "dpo_model"} & hosts["training"].keys() == {"reward_model"}


def test_a_critic_of_its_own_has_a_base():
    shared, own = (found(MemoryConfig(**EIGHT, lora_critic=kind)) for kind in ("shared", "own"))
    more = own["load"]["critic weights"] - shared["load"]["critic weights"]
    assert more == pytest.approx(2 * (OF_8B - 128256 * 4096e-9))


def test_proposed_flags_make_adapters_fit():
    config = MemoryConfig(policy="llama-3-70b", dpo_model="llama-3-70b", reward_model=("llama-3-8b",), lora_rank=16)
    models = models_of(config)
    assert shortage(config, models, config.machine) is not None
    flags = remedies(config, models, config.machine)
    assert flags
    mended = cli.parse(config, " ".join(flags).split())
    assert shortage(mended, models_of(mended), mended.machine) is None


def test_seconds_and_checkpoints_are_those_of_adapters():
    """Two of eight products less a token and parameter: no gradient of a frozen matrix. A checkpoint has no base."""
    ours, whole = MemoryConfig(**EIGHT), MemoryConfig(**EIGHT | {"lora_rank": 0})
    models = models_of(ours)
    assert checkpoint_bytes(ours, models) == 14 * (2 * 41_943_040 + 4096)
    times = [seconds(c, models_of(c), c.machine, c.rates) for c in (ours, whole)]
    assert times[0]["policy update"] == pytest.approx(times[1]["policy update"] * 6 / 8, rel=0.05)
    assert times[0]["scoring"] < times[1]["scoring"]  # nothing is gathered over the links


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_takes_so_many_copies_of_a_matrix(dora, dtype):
    """All that is allocated on a CPU while PEFT merges into a copy. In bf16 a CPU has fp32 beside it."""
    model = torch.nn.Sequential(torch.nn.Linear(256, 512, bias=False, dtype=dtype))
    settings = peft.LoraConfig(r=4, target_modules=["0"], use_dora=dora)
    peft.inject_adapter_in_model(settings, model, adapter_name="default")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    now, most = 0, 0
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        model[0].merge(safe_merge=True)
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    copies = most / (256 * 512 * dtype.itemsize)
    assert MERGING - 2 < copies < MERGING + 0.2


def test_a_run_with_adapters_is_asked_before_it_loads(tiny, folders, tmp_path, monkeypatch, one_rank):
    from rto_fast import build

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 << 20, 4 << 20))
    plain = fit.check_device
    monkeypatch.setattr(build, "check_device", lambda config, _, ranks: plain(config, torch.device("cuda"), ranks))
    monkeypatch.setattr(build, "load_policy", lambda *a, **k: pytest.fail("it loaded a model"))
    asked = small_run(tiny, tmp_path / "run", dpo_model=folders["dpo"], lora_rank=3, lora_alpha=8)
    with pytest.raises(ConfigError, match=r"memory: on 1 device of 0.0 GiB"):
        build.build(RTOConfig(**asked))
    assert not (tmp_path / "run").exists()


def test_what_a_push_to_vllm_takes():
    """The adapter alone needs no merged matrix on the device, and the base waits in the host's memory."""
    runs = {push: MemoryConfig(lora_rank=16, lora_push=push, ranks=2) for push in ("adapter", "merged")}
    dora = MemoryConfig(lora_rank=16, lora_dora=True, ranks=2)
    parts = {}
    for name, config in (runs | {"dora": dora}).items():
        models = models_of(config)
        sent = next(p for p in phases(config, models, config.machine) if p.name == "weights to the sampler")
        (training,) = (p for p in host_phases(config, models, config.machine) if p.name == "training")
        parts[name] = sent.parts.get("a merged matrix", 0), training.parts.get("vLLM's base while it sleeps", 0)
        weights = models.policy.parameters
    assert parts["adapter"] == (0, 2 * 2 * weights), "two ranks, two bytes a number"
    assert parts["merged"][0] > 5 * 2 * 14336 * 4096 - 1
    assert parts["merged"][1] == parts["dora"][1] == 0
    assert parts["dora"][0] == parts["merged"][0]


def test_a_push_of_the_adapter_alone_takes_its_bytes():
    for push in ("adapter", "merged"):
        config = MemoryConfig(lora_rank=16, lora_push=push)
        models = models_of(config)
        took = seconds(config, models, config.machine, config.rates)["weights to the sampler"]
        pushed = models.policy.adapter if push == "adapter" else models.policy.parameters
        assert took == pytest.approx(2 * 2 * pushed / config.rates.memory), "read and written, two bytes a number"
