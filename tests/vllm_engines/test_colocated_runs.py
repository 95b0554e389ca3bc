"""A colocated vLLM in whole runs: the memory it leaves to the trainer, broken syncs, engines that die, and resume."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from engine_helpers import (
    MARKS,
    RESUMABLE,
    ROUNDING,
    VLLM,
    assert_same_weights,
    figures,
    moved,
    partial,
    rows,
    run_of,
    skipped,
    stale,
)
from loop_helpers import ROOT, small_run
from rollout_helpers import quiet, requests_of
from sleep_helpers import PARTS, RULES, SleepingMemory

from rto_fast import trainer
from rto_fast.errors import DeviceLost, RolloutError, SyncError
from rto_fast.rollout.engine import Sampling
from rto_fast.rollout.vllm_engines import load_weights
from rto_fast.rollout.vllm_engines.colocated import VLLMEngine

pytestmark = MARKS


@pytest.fixture(scope="module")
def whole(tied, tmp_path_factory, one_rank):
    """Folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    trainer.train(run_of(tied, folder, **RESUMABLE))
    return folder


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
