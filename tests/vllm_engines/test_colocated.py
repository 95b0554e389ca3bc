"""Real vLLM on this machine: its log-probs are the trainer's after every sync, and a broken sync stops the run."""

from __future__ import annotations

import gc
import json
import re
import signal
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loop_helpers import ROOT, make_tiny_models, small_run, write_rows
from recipe_helpers import flags_of
from rollout_helpers import quiet, reference_logp, requests_of
from safetensors.torch import load_file
from sleep_helpers import PARTS, RULES, SleepingMemory
from transformers import AutoModelForCausalLM

from rto_fast import trainer
from rto_fast.config import RTOConfig
from rto_fast.contract import Request
from rto_fast.errors import ConfigError, DeviceLost, EngineFailure, RolloutError, SyncError
from rto_fast.generate import GenerateConfig, generate
from rto_fast.rollout.engine import GREEDY, Sampling, sample_seed
from rto_fast.rollout.make_engine import make_engine
from rto_fast.rollout.transformers_engine import TransformersEngine
from rto_fast.rollout.vllm_engines import colocated, load_weights, support
from rto_fast.rollout.vllm_engines.colocated import VLLMEngine
from rto_fast.rollout.vllm_engines.support import installed

CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not installed(), reason="vLLM is not installed (make install-vllm)"),
]
VLLM = {"rollout_engine": "vllm", "vllm_max_sequences": 16, "policy_lr": 0.01}
RESUMABLE = {"iterations": 3, "save_every": 1, "resume": "auto"}
HEADS = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
"""The smallest heads that vLLM's attention on a CPU has."""
ROUNDING = 5e-5
"""Nats by which fp32 log-probs of these models may differ from fp64; on one kind of processor it was 2.4e-5."""


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return make_tiny_models(tmp_path_factory.mktemp("tied"), tied=True, **HEADS)


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return make_tiny_models(tmp_path_factory.mktemp("untied"), **HEADS)


@pytest.fixture(params=["tied", "untied"])
def models(request, tied, untied):
    return tied if request.param == "tied" else untied


@pytest.fixture(scope="module")
def whole(tied, tmp_path_factory, one_rank):
    """Folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    trainer.train(run_of(tied, folder, **RESUMABLE))
    return folder


@pytest.fixture
def make(one_rank):
    """make(path, dtype, max_sequences) -> engine, closed at the end."""
    made = []

    def engine(path, dtype=torch.float32, max_sequences=64):
        made.append(VLLMEngine(path, CPU, dtype, max_length=64, max_sequences=max_sequences))
        return made[-1]

    yield engine
    for one in made:
        one.close()


def moved(path: str, by: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(path)
    return {n: p.detach() * (1 + by * torch.randn(p.shape, generator=generator)) for n, p in model.named_parameters()}


def run_of(models, folder: Path, **settings) -> RTOConfig:
    return RTOConfig(**small_run(models, folder, **(VLLM | {"iterations": 3} | settings)))


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().split("\n")[:-1]]


def figures(folder: Path) -> list[dict]:
    """The metrics that two equal runs share."""
    measured = ("time/", "rate/", "memory/", "run/", "sync/seconds")
    return [{k: v for k, v in row.items() if not k.startswith(measured)} for row in rows(folder)]


def assert_same_weights(a: Path, b: Path) -> None:
    ours, theirs = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


# Log-probs


def test_no_response_ends_before_its_least_length(tied, make):
    engine, requests, stops, least = make(tied.policy), requests_of(24, 80), tuple(range(1, 10)), 5  # EOS is 1
    assert int(engine.generate(requests, Sampling(16, 0.7, stops), quiet).response_lens.min()) <= least
    rollout = engine.generate(requests, Sampling(16, 0.7, stops, least), quiet)
    assert int(rollout.response_lens.min()) == least + 1
    truth = reference_logp(tied.policy, rollout, 0.7, stops, least)
    torch.testing.assert_close(rollout.sampler_logp.double(), truth, atol=ROUNDING, rtol=0)


def test_log_probs_before_and_after_a_push(models, make, tmp_path):
    engine, requests, sampling = make(models.policy), requests_of(12, 80), Sampling(16, 0.7, (2,))
    first = engine.generate(requests, sampling, quiet)
    torch.testing.assert_close(
        first.sampler_logp.double(), reference_logp(models.policy, first, 0.7), atol=ROUNDING, rtol=0
    )
    weights = moved(models.policy, 0.3)
    stats = engine.push(weights.items(), 4)
    assert stats.bytes == sum(4 * w.numel() for w in weights.values())
    assert stats.digests.keys() == weights.keys()
    model = AutoModelForCausalLM.from_pretrained(models.policy)
    model.load_state_dict(weights, strict=False)
    model.save_pretrained(tmp_path)
    second = engine.generate(requests, sampling, quiet)
    assert (first.version, second.version) == (0, 4)
    assert (reference_logp(models.policy, second, 0.7) - second.sampler_logp).abs().max() > 0.1
    torch.testing.assert_close(
        second.sampler_logp.double(), reference_logp(tmp_path, second, 0.7), atol=ROUNDING, rtol=0
    )
    turned = engine.generate(requests[::-1], sampling, quiet).select(range(11, -1, -1))
    assert torch.equal(turned.tokens, second.tokens)
    assert torch.equal(turned.sampler_logp, second.sampler_logp)
    alone = engine.generate(requests[5:6], sampling, quiet)
    assert torch.equal(alone.response_tokens, second.select([5]).response_tokens)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_tokens_come_from_the_policys_softmax(tied, make, temperature):
    """Chi-square of 20,000 first tokens against the exact distribution, before and after a push."""
    engine, prompt = make(tied.policy, max_sequences=512), (1, 7, 9)
    model = AutoModelForCausalLM.from_pretrained(tied.policy, dtype=torch.float64)
    for version in (0, 1):
        if version:
            weights = moved(tied.policy, 0.2)
            engine.push(weights.items(), version)
            model.load_state_dict(weights, strict=False)
        requests = [Request(prompt, 0, i, 0, sample_seed(version, i, 0, 0)) for i in range(20_000)]
        tokens = engine.generate(requests, Sampling(1, temperature, ()), quiet).response_tokens
        with torch.no_grad():
            p = torch.softmax(model(torch.tensor([prompt])).logits[0, -1] / temperature, -1)
        counts, expected = torch.bincount(tokens, minlength=len(p)).double(), 20_000 * p
        rare = expected < 5
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None].clamp(min=1e-9)])
        statistic, freedom = float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1
        assert statistic < freedom + 4 * (2 * freedom) ** 0.5 + 8, (statistic, freedom)


def test_sampling_stops_when_enough_prompts_are_whole(tied, make):
    """The kept prompts are those whose longest response is shortest; what was dropped leaves no trace."""
    engine, sampling, spent = make(tied.policy), Sampling(30, 1.0, tuple(range(2, 10))), []
    requests = [replace(q, sample_index=i // 2) for i, q in enumerate(requests_of(24, 80))]
    full = engine.generate(requests, sampling, quiet)
    longest = full.response_lens.view(12, 2).max(1).values
    kept = engine.generate(requests, sampling, lambda tokens, ended: spent.append(tokens), keep=7)
    shortest = set(longest.sort(stable=True).indices[:7].tolist())
    expected = full.select([i for i in range(24) if i // 2 in shortest])
    assert torch.equal(kept.tokens, expected.tokens)
    assert torch.equal(kept.sampler_logp, expected.sampler_logp)
    assert torch.equal(kept.truncated, expected.truncated)
    assert sum(spent) < full.response_lens.sum()
    engine.push(moved(tied.policy, 0.0).items(), 1)  # no request holds on to the cache
    again = engine.generate(requests, sampling, quiet)
    assert torch.equal(again.tokens, full.tokens)
    assert len(engine.generate(requests, sampling, quiet, keep=0)) == 0


def test_flat_log_probs_are_the_same_bits(tied, make, monkeypatch):
    """vLLM's flat lists hold what its objects hold, one dict a token."""
    import vllm

    engine, requests, sampling, asked = make(tied.policy), requests_of(12, 80), Sampling(16, 0.7, (2,)), []
    flat = engine.generate(requests, sampling, quiet)
    plain = vllm.SamplingParams

    def unflat(**settings):
        asked.append(settings.pop("flat_logprobs"))
        return plain(**settings)

    def logps(objects, tokens):
        return [at[token].logprob for at, token in zip(objects or (), tokens, strict=True)]

    monkeypatch.setattr(vllm, "SamplingParams", unflat)
    monkeypatch.setattr(colocated, "_logps", logps)
    whole = engine.generate(requests, sampling, quiet)
    assert asked == [True] * len(requests)
    assert torch.equal(whole.tokens, flat.tokens)
    assert torch.equal(whole.sampler_logp, flat.sampler_logp)


def test_a_step_takes_few_tokens(tied, make):
    """Or as many as there are sequences, of which each gives one."""
    for sequences, tokens in ((64, 4096), (5000, 5000)):
        engine = make(tied.policy, max_sequences=sequences)
        assert engine.llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens == tokens


def test_a_fault_while_requests_are_dropped(tied, make, monkeypatch):
    engine, requests = make(tied.policy), [replace(q, sample_index=i // 2) for i, q in enumerate(requests_of(24, 80))]
    core = engine.llm.llm_engine
    plain = core.abort_request

    def abort(names):
        plain(names)
        monkeypatch.setattr(core, "step", broken)

    def broken():
        raise RuntimeError("cancelled")

    monkeypatch.setattr(core, "abort_request", abort)
    with pytest.raises(EngineFailure, match=r"sampling with vLLM failed .*cancelled"):
        engine.generate(requests, Sampling(30, 1.0, tuple(range(2, 10))), quiet, keep=7)


def test_log_probs_must_be_those_of_the_tokens(tied, make, monkeypatch):
    from vllm.logprobs import FlatLogprobs

    engine, plain = make(tied.policy), FlatLogprobs.append_fast

    def shifted(flat, token_ids, *args):
        plain(flat, [token + 1 for token in token_ids], *args)

    monkeypatch.setattr(FlatLogprobs, "append_fast", shifted)
    with pytest.raises(EngineFailure, match="not those of the tokens"):
        engine.generate(requests_of(2, 80), Sampling(2, 1.0, ()), quiet)


# Pushes


def test_a_push_leaves_nothing_behind(tied, make):
    """No tensor of a push outlives it; else a long run would hold every version of its policy."""
    engine, pushed = make(tied.policy), []
    for version in range(3):
        weights = moved(tied.policy, 0.1)
        pushed += [weakref.ref(w) for w in weights.values()]
        engine.push(weights.items(), version)
        del weights
    with pytest.raises(SyncError):
        engine.push(iter([("model.norm.weight", torch.ones(3))]), 3)
    engine.push(moved(tied.policy, 0.1).items(), 4)
    gc.collect()
    assert len(pushed) > 50
    assert not [p for p in pushed if p() is not None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.layers.1.self_attn.k_proj.weight"), r"model\.layers\.1\.self_attn"),
        (lambda w: w.pop("model.norm.weight"), r"model\.norm"),
        (lambda w: w.update(extra=torch.zeros(2)), "extra: pushed, but"),
        (lambda w: w.update({"model.norm.weight": torch.zeros(3)}), r"model\.norm\.weight: pushed with shape \[3\]"),
    ],
)
def test_a_push_of_other_weights_is_refused(tied, make, change, message):
    engine, weights = make(tied.policy), moved(tied.policy, 0.1)
    change(weights)
    with pytest.raises(SyncError, match=message):
        engine.push(weights.items(), 1)
    with pytest.raises(SyncError, match="incomplete"):
        engine.generate(requests_of(2, 80), Sampling(2, 1.0, ()), quiet)


def test_too_little_memory_for_one_sequence(tied, one_rank):
    with pytest.raises(ConfigError, match=r"vllm_memory_share: vLLM does not start .*memory"):
        VLLMEngine(tied.policy, CPU, torch.float32, max_length=64, memory_share=1e-8)


def test_a_model_that_cannot_be_split(tied, one_rank):
    with pytest.raises(ConfigError, match="vllm_tensor_parallel: 2 attention heads cannot be split over 3 ranks"):
        VLLMEngine(tied.policy, CPU, torch.float32, max_length=64, tensor_parallel=3)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_step_that_hangs_ends_the_process(tied, make, monkeypatch):
    """One that returns late, for that matter, gives way to a new engine; here both come to pass."""
    engine, codes = make(tied.policy), []

    def leave(code):
        codes.append(code)
        raise SystemExit  # ends the watchdog's thread alone

    engine.timeout_s, step = 0.2, engine.llm.llm_engine.step
    monkeypatch.setattr("os._exit", leave)
    monkeypatch.setattr(engine.llm.llm_engine, "step", lambda: (time.sleep(2), step())[1])
    with pytest.raises(EngineFailure, match=r"one step of vLLM took longer than 0\.2 s"):
        engine.generate(requests_of(2, 80), Sampling(2, 1.0, ()), quiet)
    assert codes == [3]


def test_temperatures(tied, make):
    engine, requests = make(tied.policy), requests_of(6, 80)
    likeliest = TransformersEngine(tied.policy, CPU, torch.float32, 0).generate(
        requests, Sampling(8, GREEDY, ()), quiet
    )
    assert torch.equal(engine.generate(requests, Sampling(8, GREEDY, ()), quiet).tokens, likeliest.tokens)
    with pytest.raises(ValueError, match=r"temperature: vLLM samples at 0\.01 or more, got 0\.005"):
        engine.generate(requests, Sampling(8, 0.005, ()), quiet)


def test_weights_that_diverged(tied, make):
    engine, weights = make(tied.policy), moved(tied.policy, 0.1)
    weights["model.norm.weight"][3] = float("nan")
    engine.push(weights.items(), 1)
    with pytest.raises(RolloutError, match="not finite at prompt row"):
        engine.generate(requests_of(2, 80), Sampling(4, 1.0, ()), quiet)


# Memory


@pytest.fixture
def memory_of(monkeypatch):
    """memory_of(version) -> the stand-in that all engines of the test sleep and wake in."""
    from vllm import LLM
    from vllm.v1.worker.gpu_worker import Worker

    def stand_in(version: str) -> SleepingMemory:
        memory, workers = SleepingMemory(version, lambda: [spoil(w) for w in workers]), []

        def touching(name, *parts):
            plain = getattr(Worker, name)

            def method(worker, *args, **kwargs):
                workers[:] = [worker]
                memory.touch(*parts)
                return plain(worker, *args, **kwargs)

            monkeypatch.setattr(Worker, name, method)

        touching("reload_weights", "weights")
        touching("execute_model", *PARTS)
        monkeypatch.setattr(LLM, "sleep", lambda llm, level=1: memory.sleep(level))
        monkeypatch.setattr(LLM, "wake_up", lambda llm, tags=None: memory.wake_up(tags))
        return memory

    return stand_in


@torch.no_grad()
def spoil(worker) -> None:
    for parameter in worker.model_runner.get_model().parameters():
        parameter.fill_(float("nan"))


@pytest.mark.parametrize("version", RULES)
def test_a_run_leaves_the_device_to_the_trainer(tied, tmp_path, one_rank, monkeypatch, memory_of, whole, version):
    """Whatever the version's rules: nothing is mapped while the trainer trains, and the results are the same."""
    memory, plain, trained = memory_of(version), trainer.updates, []

    def updates(*args):
        trained.append(any(memory.mapped.values()))
        return plain(*args)

    monkeypatch.setattr(trainer, "updates", updates)
    trainer.train(run_of(tied, tmp_path / "run", **RESUMABLE))
    assert trained == [False] * 3
    assert memory.copies == 0
    assert figures(tmp_path / "run") == figures(whole)
    assert_same_weights(tmp_path / "run" / "policy", whole / "policy")
    assert all(memory.mapped.values())  # it was closed awake


def test_vllm_itself_accepts_the_order(tied, make):
    """The installed version's own sleep and wake, which on a CPU move no memory: requests run once both parts wake."""
    engine, requests, sampling = make(tied.policy), requests_of(4, 80), Sampling(8, 1.0, ())
    before = engine.generate(requests, sampling, quiet)
    for version in (1, 2):
        engine.sleep()
        engine.sleep()
        assert (engine.asleep, engine.blank) == (True, True)
        with pytest.raises(RolloutError, match="dropped the engine's weights"):
            engine.wake()
        with pytest.raises(RolloutError, match="asleep"):
            engine.generate(requests, sampling, quiet)
        engine.push(moved(tied.policy, 0.0).items(), version)
        with pytest.raises(RolloutError, match="asleep"):
            engine.generate(requests, sampling, quiet)
        engine.wake()
        assert not engine.llm.llm_engine.engine_core.is_sleeping()
        again = engine.generate(requests, sampling, quiet)
        assert torch.equal(again.tokens, before.tokens)
    engine.sleep()


def test_a_wake_without_room_ends_the_run(tied, tmp_path, one_rank, memory_of, monkeypatch):
    """Another engine would find no more of it, so none is started."""
    memory, made, init = memory_of("0.31"), [], VLLMEngine.__init__
    plain = memory.wake_up

    def wake_up(tags=None):
        if memory.log.count("sleep 2") == 5:
            raise RuntimeError("CUDA Error: out of memory at cumem_allocator.cpp:119")
        plain(tags)

    memory.wake_up = wake_up
    monkeypatch.setattr(VLLMEngine, "__init__", lambda engine, *a, **k: (made.append(engine), init(engine, *a, **k))[1])
    with pytest.raises(RolloutError, match=r"waking vLLM's weights ran out of memory.*last checkpoint is whole"):
        trainer.train(run_of(tied, tmp_path / "run", **RESUMABLE))
    assert len(made) == 1


def test_a_broken_context_is_not_renewed(tied, tmp_path, one_rank, monkeypatch):
    breaks(monkeypatch, 1, "CUDA error: an illegal memory access was encountered")
    made, init = [], VLLMEngine.__init__
    monkeypatch.setattr(VLLMEngine, "__init__", lambda engine, *a, **k: (made.append(engine), init(engine, *a, **k))[1])
    with pytest.raises(DeviceLost, match=r"sampling with vLLM broke the CUDA context.*illegal memory access"):
        trainer.train(run_of(tied, tmp_path / "run", **RESUMABLE))
    assert len(made) == 1


# Whole runs


def test_every_token_agrees_after_each_of_three_steps(tied, untied, tmp_path, launch):
    """Each iteration's log-probs are those after the step and the sync before it; two ranks, one launch."""
    fp32 = [("fp32", zero, name) for zero in (2, 3) for name in ("tied", "untied")]
    cases = [*fp32, ("bf16", 3, "tied")]
    runs = [
        small_run({"tied": tied, "untied": untied}[name], tmp_path / f"{dtype}-{zero}-{name}", **VLLM, iterations=4,
                  zero_stage=zero, dtype=dtype, report_samples=0)
        for dtype, zero, name in cases
    ]  # fmt: skip
    result = launch([ROOT / "tests" / "vllm_worker.py", json.dumps(runs)], ranks=2)
    assert result.returncode == 0, result.output
    for settings in runs:
        log, exact = rows(Path(settings["output_dir"])), settings["dtype"] == "fp32"
        assert len(log) == 4, settings
        assert all(row["sampler/logp_diff_max"] < (ROUNDING if exact else 0.25) for row in log), (settings, log)
        assert log[-1]["kl/response"] > 0.1, settings  # the weights did move
        assert all(row["sync/bytes"] > 0 for row in log), settings


@pytest.fixture
def killed_before():
    """The shared memory of a split engine that was killed, under the name that vLLM gives to all of them."""
    files = [Path(f"/dev/shm/-tp:0-[0-1]-cpushm_{rank}") for rank in range(2)]
    ours = [file for file in files if not file.exists()]
    for file in ours:
        file.touch()
    yield files
    for file in ours:
        file.unlink()


def test_ranks_that_share_an_engine_agree_with_the_trainer(tied, untied, tmp_path, launch, whole, killed_before):
    """As above, with half of every matrix on each of two ranks; the vocabulary of 87 fills 64 rows and 23.

    What is sampled is what one rank alone samples; dropping the longest and a push that lacks a tensor act the same.
    What a killed run left in shared memory stops nothing, and these runs leave nothing there.
    """
    cases = {(2, "tied"): {}, (3, "untied"): {"rollout_oversample": 0.5}}
    runs = [
        small_run({"tied": tied, "untied": untied}[name], tmp_path / f"{zero}-{name}", **VLLM, vllm_tensor_parallel=2,
                  iterations=4, zero_stage=zero, report_samples=0, **more)
        for (zero, name), more in cases.items()
    ]  # fmt: skip
    lost = "model.layers.1.mlp.up_proj.weight"
    broken = runs[0] | {"output_dir": str(tmp_path / "broken"), "loses": lost}
    result = launch([ROOT / "tests" / "vllm_worker.py", json.dumps([*runs, broken])], ranks=2)
    assert result.returncode == 0, result.output
    for settings in runs:
        log = rows(Path(settings["output_dir"]))
        assert len(log) == 4, settings
        assert all(row["sampler/logp_diff_max"] < ROUNDING for row in log), (settings, log)
        assert log[-1]["kl/response"] > 0.1, settings  # the weights did move
        assert all(row.get("rollout/dropped", 0) == 8 * settings.get("rollout_oversample", 0) for row in log)
    first, alone = rows(tmp_path / "2-tied")[0], rows(whole)[0]
    assert first["response/length"] == alone["response/length"]
    assert first["reward/score"] == pytest.approx(alone["reward/score"], abs=1e-4)
    assert re.search(r"version 2: .*(up_proj|gate_up)", (tmp_path / "broken" / "error").read_text())
    assert all(file.exists() for file in killed_before)
    assert not list(Path("/dev/shm").glob("rto-*"))


def skipped(monkeypatch, engine_class=VLLMEngine):
    """The second push of the run says that all went well and does nothing."""
    plain, last = engine_class.push, []

    def push(engine, weights, version):
        if version > 1:
            engine.version = version
            return last[-1]
        last.append(plain(engine, weights, version))
        return last[-1]

    monkeypatch.setattr(engine_class, "push", push)


def partial(monkeypatch, engine_class=VLLMEngine):
    """One matrix of a fused one does not arrive."""
    plain = engine_class.push

    def push(engine, weights, version):
        kept = ((n, t) for n, t in weights if engine.version < 1 or not n.endswith("1.mlp.up_proj.weight"))
        return plain(engine, kept, version)

    monkeypatch.setattr(engine_class, "push", push)


def stale(monkeypatch, engine_class=VLLMEngine):
    """The engine gets the weights of the push before."""
    plain, kept = engine_class.push, []

    def push(engine, weights, version):
        now = [(n, t.clone()) for n, t in weights]
        kept.append(now)
        return plain(engine, iter(kept[-2] if engine.version >= 1 else now), version)

    monkeypatch.setattr(engine_class, "push", push)


@pytest.mark.parametrize(("dtype", "lr"), [("fp32", 1e-2), ("bf16", 5e-7)])
@pytest.mark.parametrize(
    ("fault", "message"),
    [(skipped, "other bytes than sent"), (partial, r"up_proj|gate_up"), (stale, "other bytes than sent")],
)
def test_a_broken_sync_stops_the_run(tied, tmp_path, one_rank, monkeypatch, fault, message, dtype, lr):
    fault(monkeypatch)
    config = run_of(tied, tmp_path / "run", dtype=dtype, policy_lr=lr, warmup_ratio=0.0)
    with pytest.raises(SyncError, match=message):
        trainer.train(config)


def test_a_head_that_keeps_its_packed_copy_is_found_at_the_start(tied, tmp_path, one_rank, monkeypatch):
    """All bytes arrive, vLLM says nothing, and the tied head multiplies by the old ones: only log-probs show it."""
    monkeypatch.setattr(load_weights, "_repack_head", lambda model: None)
    with pytest.raises(SyncError, match="the sampler is not the policy: after a push of moved weights"):
        trainer.train(run_of(tied, tmp_path / "run"))


def breaks(monkeypatch, times: int, message: str = "the worker is gone") -> None:
    """vLLM's worker dies at its fifth step of the second rollout, `times` times."""
    from vllm.v1.worker.gpu_worker import Worker

    generate, execute, state = VLLMEngine.generate, Worker.execute_model, {"left": times, "steps": None}

    def counted(engine, *args):
        state["steps"] = 0 if engine.version == 1 else None
        return generate(engine, *args)

    def execute_model(worker, *args, **kwargs):
        if state["steps"] is not None and state["left"]:
            state["steps"] += 1
            if state["steps"] == 5:
                state["left"] -= 1
                raise RuntimeError(message)
        return execute(worker, *args, **kwargs)

    monkeypatch.setattr(VLLMEngine, "generate", counted)
    monkeypatch.setattr(Worker, "execute_model", execute_model)


def test_an_engine_that_dies_is_replaced_once(tied, tmp_path, one_rank, monkeypatch, whole):
    breaks(monkeypatch, 1)
    made, init = [], VLLMEngine.__init__
    monkeypatch.setattr(VLLMEngine, "__init__", lambda engine, *a, **k: (made.append(engine), init(engine, *a, **k))[1])
    trainer.train(run_of(tied, tmp_path / "run", **RESUMABLE))
    assert len(made) == 2
    assert figures(tmp_path / "run") == figures(whole)
    assert_same_weights(tmp_path / "run" / "policy", whole / "policy")


def test_an_engine_that_dies_twice_stops_the_run_and_it_resumes(tied, tmp_path, one_rank, monkeypatch, whole):
    with monkeypatch.context() as patch:
        breaks(patch, 2)
        with pytest.raises(RolloutError, match=r"failed twice in a row.*the worker is gone.*checkpoint is whole"):
            trainer.train(run_of(tied, tmp_path / "run", **RESUMABLE))
    trainer.train(run_of(tied, tmp_path / "run", **RESUMABLE))
    assert [r["step"] for r in rows(tmp_path / "run")] == [1, 2, 3]
    assert figures(tmp_path / "run") == figures(whole)
    assert_same_weights(tmp_path / "run" / "policy", whole / "policy")


def test_killed_and_resumed(tied, tmp_path, launch, one_rank, whole):
    """SIGKILL in the second rollout or a little after; what is resumed ends with the same weights, bit for bit."""
    folder = tmp_path / "run"
    settings = small_run(tied, folder, **VLLM, **RESUMABLE)
    run = launch.start([ROOT / "tests" / "vllm_worker.py", json.dumps([settings])])
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or not rows(folder):
        assert run.processes[0].is_alive(), run.output()
        assert time.monotonic() < deadline, run.output()
        time.sleep(0.01)
    run.kill()
    assert run.processes[0].exitcode == -signal.SIGKILL
    assert not (folder / "policy").exists()
    trainer.train(run_of(tied, folder, **RESUMABLE))
    assert figures(folder) == figures(whole)
    assert_same_weights(folder / "policy", whole / "policy")


# Which engine


def test_answers_to_a_benchmark(tied, tmp_path, launch):
    """`rto_fast.generate` with vLLM, from the command line; greedy answers are the transformers engine's."""
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": f"A {w} fox ran."} for w in ("sad", "proud", "calm")])
    settings = {"model": tied.policy, "data": data, "dtype": "fp32", "max_response_length": 8, "greedy": True,
                "generator": "x", "min_response_length": 6}  # fmt: skip
    other = generate(GenerateConfig(**settings, rollout_engine="transformers", output=str(tmp_path / "other.jsonl")))
    ours = tmp_path / "vllm.jsonl"
    result = launch(["-m", "rto_fast.generate", *flags_of(settings | {"rollout_engine": "vllm", "output": ours})])
    assert result.returncode == 0, result.output
    assert ours.read_text() == other.read_text()
    assert ours.read_text().count("\n") == 3


def test_auto_takes_vllm_where_it_knows_the_model(tied, tiny, one_rank, monkeypatch):
    config = RTOConfig(max_prompt_length=16, max_response_length=8, vllm_max_sequences=4)
    engine = make_engine(config, tied.policy, CPU, torch.float32, 0)
    assert isinstance(engine, VLLMEngine)
    engine.close()
    assert isinstance(make_engine(config, tiny.policy, CPU, torch.float32, 0), TransformersEngine)  # heads of 8
    with pytest.raises(ConfigError, match="no attention for heads of 8"):
        VLLMEngine(tiny.policy, CPU, torch.float32, max_length=24)
    monkeypatch.setattr(support, "installed", lambda: "0.25.1")
    with pytest.raises(ConfigError, match=r"vLLM 0\.25\.1 is too old \(0\.26 or newer is needed\)"):
        VLLMEngine(tied.policy, CPU, torch.float32, max_length=24)
