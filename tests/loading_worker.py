"""Models loaded by rank 0 and spread, beside models that every rank loads whole and DeepSpeed takes apart.

python loading_worker.py bits MODELS OUT      # MODELS: a JSON list of JSON dicts of paths; OUT: rank 0 writes it
python loading_worker.py peak MODELS OUT      # bytes of host memory of every rank while it loads the first of them
python loading_worker.py host MODELS OUT      # bytes of all ranks at most while a run with the first of them is built
python loading_worker.py refused MODELS OUT   # the error of every rank that loads each one's reward model
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
from invariance_worker import SEQUENCES, rollout
from loop_helpers import TinyModels, small_run
from memory_worker import forget_peak, resident

from rto_fast import build, distributed
from rto_fast.backend import frozen, train_engine
from rto_fast.config import RTOConfig
from rto_fast.memory.host import host_phases
from rto_fast.memory.phases import Machine, models_of
from rto_fast.models import load
from rto_fast.scoring.score import score_rollout
from rto_fast.trainer import compute_targets
from rto_fast.updates.ppo import TrainBatch

STAGES = {"zero 3": {"zero_stage": 3}, "frozen alone": {"zero_stage": 2, "partition_frozen": "yes"}}
"""What is spread: every model, or the frozen ones beside a ZeRO-2 policy."""
CASES = ((0, "zero 3", "fp32"), (0, "zero 3", "bf16"), (0, "frozen alone", "bf16"), (1, "zero 3", "bf16"),
         (1, "frozen alone", "fp32"))  # fmt: skip
"""(which of the models, stage, dtype)"""


@contextlib.contextmanager
def loaded_whole() -> Iterator[None]:
    """Every rank loads whole models, and DeepSpeed alone takes them apart."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(load, "_on_one", return_value=False))
        for module in (frozen, train_engine):
            stack.enter_context(mock.patch.object(module, "spread"))
        yield


def weights(run: build.Run) -> dict[str, torch.Tensor]:
    engines = {"policy": run.policy, "critic": run.critic}
    return {f"{kind} {name}": t.float().clone() for kind, engine in engines.items() for name, t in engine.weights()}


def seen(paths: dict[str, str], folder: Path, **settings: Any) -> list[dict[str, torch.Tensor]]:
    """The weights as loaded, every tensor of Scores, and the weights after an update of policy and critic."""
    changed = small_run(
        TinyModels(**paths), folder, micro_tokens=100, score_tokens=100, rollout_batch=SEQUENCES,
        train_batch=SEQUENCES, max_response_length=100, dpo_ref=paths["dpo_ref"], sync_proof=False, policy_lr=1e-2,
        weight_decay=0.3, **settings,
    )  # fmt: skip
    config = RTOConfig(**changed)
    run, drawn = build.build(config), rollout()
    out = [weights(run)]
    found, _ = score_rollout(drawn, run.texts(drawn), run.scorers, config, run.placement, lambda n: None)
    out.append(dataclasses.asdict(found))
    batch = TrainBatch(run, drawn, found, compute_targets(drawn, found, config, config.beta2), list(range(len(drawn))))
    batch.update_policy(0)
    batch.update_critic(0)
    run.logger.close()
    return [*out, weights(run)]


def shared_folder() -> Path:
    return Path(distributed.broadcast_object(tempfile.mkdtemp()))


def bits(models: list[dict[str, str]]) -> dict[str, list[dict[str, torch.Tensor]]]:
    found = {}
    for i, stage, dtype in CASES:
        settings = STAGES[stage] | {"dtype": dtype}
        found[f"{i} {stage} {dtype} spread"] = seen(models[i], shared_folder() / "run", **settings)
        with loaded_whole():
            found[f"{i} {stage} {dtype} whole"] = seen(models[i], shared_folder() / "run", **settings)
    return found


def peak(models: list[dict[str, str]]) -> dict[str, list[float]]:
    """[rank] -> bytes above those before, at most, while a frozen policy is loaded, and until it is partitioned.

    The second one is small and comes first: it leaves behind what every model does.
    """
    large, tiny = models
    reached: list[float] = []

    def into(paths: dict[str, str]) -> frozen.FrozenModel:
        config = RTOConfig(**small_run(TinyModels(**paths), "none", zero_stage=3))
        _, loading = load.place(config, distributed.device(), 100, 100)
        policy = load.load_policy(paths["policy"], argument="policy", **loading)
        reached.append(resident("VmHWM"))
        return frozen.frozen(policy, config)

    into(tiny)
    out = {}
    for way, context in (("spread", contextlib.nullcontext), ("whole", loaded_whole)):
        forget_peak()
        distributed.barrier()
        before = resident("VmRSS")
        with context():
            model = into(large)
        out[f"{way}, load"] = distributed.gather_objects(reached.pop() - before)
        out[f"{way}, all"] = distributed.gather_objects(resident("VmHWM") - before)
        model.module.destroy()
        del model
    return out


def host(models: list[dict[str, str]]) -> tuple[float, float]:
    """(measured, by the arithmetic); a run with the second models comes first."""
    large, tiny = (
        RTOConfig(**small_run(
            TinyModels(**paths), shared_folder() / "run", zero_stage=3, advantage="reinforce_pp", reward_model=(),
            reward_fn=("invariance_worker:length",), sync_proof=False,
        )) for paths in models
    )  # fmt: skip
    build.build(tiny).logger.close()
    forget_peak()
    distributed.barrier()
    with most_of_all_ranks() as most:
        build.build(large).logger.close()
        distributed.barrier()
    machine = Machine(distributed.world_size(), device=0, reserve=0, kind="cpu")
    return most[-1] - most[0], host_phases(large, models_of(large), machine)[0].total


@contextlib.contextmanager
def most_of_all_ranks() -> Iterator[list[float]]:
    """[bytes of all ranks at first, at most since then]; rank 0 looks every few milliseconds."""
    ranks = [psutil.Process(pid) for pid in distributed.gather_objects(os.getpid())]
    most = [float(sum(rank.memory_info().rss for rank in ranks))] * 2
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.002):
            most[1] = max(most[1], sum(rank.memory_info().rss for rank in ranks))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()


def refused(models: list[dict[str, str]]) -> list[list[tuple[str, str]]]:
    """[model][rank] -> (type, message) of the error; at last those of a fault that rank 0 alone meets."""

    def error_of(path: str) -> tuple[str, str]:
        config = RTOConfig(**small_run(TinyModels(**models[0]), "none", zero_stage=3))
        _, loading = load.place(config, distributed.device(), 100, 100)
        try:
            load.load_scalar(path, argument="reward_model", **loading)
        except Exception as error:
            return type(error).__name__, str(error)
        return "", "it loaded"

    found = [distributed.gather_objects(error_of(paths["reward"])) for paths in models]
    if distributed.rank() == 0:
        load.ScalarModel = mock.Mock(side_effect=MemoryError("no room"))
    return [*found, distributed.gather_objects(error_of(str(Path(models[0]["policy"]).with_name("reward"))))]


def main() -> None:
    mode, models, target = sys.argv[1], [json.loads(text) for text in json.loads(sys.argv[2])], Path(sys.argv[3])
    distributed.init()
    torch.set_num_threads(1)
    found = {"bits": bits, "peak": peak, "host": host, "refused": refused}[mode](models)
    if distributed.rank() == 0:
        torch.save(found, target)


if __name__ == "__main__":
    main()
