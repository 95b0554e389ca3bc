"""Losses and gradients of every objective on this number of ranks, for several ZeRO stages and micro-batch sizes.

python invariance_worker.py MODELS TAGGER URL OUT    # MODELS: a JSON dict of paths; TAGGER: a token classifier; URL: a
                                                     # server of token rewards; OUT: a file that rank 0 writes
"""

from __future__ import annotations

import dataclasses
import json
import random
import sys
import tempfile
from collections.abc import Container
from pathlib import Path

import torch
from loop_helpers import TinyModels, small_run, watched_gradients

from rto_fast import build, distributed, trainer
from rto_fast.backend.train_engine import TrainEngine
from rto_fast.config import DPOConfig, RMConfig, RTOConfig
from rto_fast.contract import Request, Rollout
from rto_fast.logs.run_logger import RunLogger
from rto_fast.models.attention import PACKED
from rto_fast.models.load import load_policy, load_scalar
from rto_fast.models.packing import Placement
from rto_fast.scoring.score import score_rollout
from rto_fast.supervised.dpo import OBJECTIVES
from rto_fast.supervised.loop import train_step
from rto_fast.supervised.pair_objectives import Referenced
from rto_fast.supervised.prepare import prepare
from rto_fast.supervised.reference_cache import reference_logps
from rto_fast.supervised.reward_model import RewardModel, TokenRewardModel
from rto_fast.supervised.sft import SFT
from rto_fast.supervised.stage import Row
from rto_fast.trainer import compute_targets
from rto_fast.updates.online import BestWorstBatch, OutcomeBatch
from rto_fast.updates.ppo import TrainBatch

CASES = ((2, 1), (2, 512), (2, 4096), (3, 1), (3, 512))
"""(ZeRO stage, tokens of a micro-batch): every sequence alone, some together, all together."""
RESPONSES = (1, 7)
"""Responses of a whole iteration: fewer than ranks, and an odd number."""
SEQUENCES = 23
"""An odd number, of very unequal lengths, so that ranks hold unequal numbers of micro-batches."""


def rollout(empty: Container[int] = ()) -> Rollout:
    """Truncated at 100 tokens; empty: the responses that have none."""
    rng = random.Random(5)
    lens = [rng.choice((1, 3, 20, 60, 100)) * (i not in empty) for i in range(SEQUENCES)]
    prompts = [tuple(rng.randrange(4, 80) for _ in range(rng.randint(1, 9))) for _ in lens]
    requests = [Request(p, row=0, sample_index=i, response_index=0, seed=i) for i, p in enumerate(prompts)]
    responses = [[rng.randrange(4, 80) for _ in range(n)] for n in lens]
    return Rollout.from_lists(requests, responses, [[-1.0] * n for n in lens], [n == 100 for n in lens], version=0)


def rl(paths: dict[str, str], stage: int, budget: int, folder: Path) -> dict[str, tuple]:
    """Updates of one train batch: policy and critic, the policy with the PTX loss beside it, online token rewards."""
    config = RTOConfig(
        policy=paths["policy"], dpo_model=paths["dpo"], reward_model=(paths["reward"],), data=paths["prompts"],
        output_dir=str(folder), dtype="fp32", rollout_batch=SEQUENCES, train_batch=SEQUENCES, iterations=1,
        max_prompt_length=16, max_response_length=100, gradient_checkpointing=False, data_cache=False,
        zero_stage=stage, micro_tokens=budget, score_tokens=max(budget, 64), max_grad_norm=0.0, entropy_coef=0.01,
        truncation="bootstrap", ptx_coef=0.5, ptx_data=paths["texts"], online="prime", online_beta=0.5,
    )  # fmt: skip
    run = build.build(config)
    drawn = rollout()
    scores, _ = score_rollout(drawn, run.texts(drawn), run.scorers, config, run.placement, lambda n: None)
    targets = compute_targets(drawn, scores, config, config.beta2)
    index = list(range(len(drawn)))
    batch = TrainBatch(dataclasses.replace(run, ptx=None), drawn, scores, targets, index)
    with_ptx = TrainBatch(run, drawn, scores, targets, index)
    three_a_prompt = dataclasses.replace(drawn, sample_index=drawn.sample_index // 3)
    outcomes, pairs = (OutcomeBatch(run, drawn, scores, index), BestWorstBatch(run, three_a_prompt, scores, index))
    out = {}
    for name, engine, update in (
        ("policy", run.policy, batch.update_policy),
        ("critic", run.critic, batch.update_critic),
        ("ptx", run.policy, with_ptx.update_policy),
        ("prime", run.online, outcomes.update),
        ("online dpo", run.online, pairs.update),
    ):
        with watched_gradients(engine) as gradients:
            stats = update(0)
        out[name] = (stats.loss if stats.ptx_loss is None else stats.ptx_loss, dict(gradients), len(batch.micro))
    run.logger.close()
    return out


def supervised(paths: dict[str, str], stage: int, budget: int, folder: Path) -> dict[str, tuple]:
    """One step of SFT, reward model and DPO on the same rows."""
    rng = random.Random(6)
    rows = [
        Row(
            [rng.randrange(4, 80) for _ in range(rng.randint(1, 9))],
            tuple([rng.randrange(4, 80) for _ in range(rng.choice((1, 4, 30, 80)))] for _ in range(2)),
        )
        for _ in range(15)
    ]
    single = [Row(row.prompt, row.responses[:1]) for row in rows]
    config = DPOConfig(
        model=paths["policy"], data="none", output_dir=str(folder), dtype="fp32", batch=len(rows), zero_stage=stage,
        micro_tokens=budget, gradient_checkpointing=False, max_grad_norm=0.0,
    )  # fmt: skip
    placement = Placement(distributed.device(), "sdpa", lockstep=stage == 3, micro_tokens=budget)
    loading = {"dtype": torch.float32, "attention": PACKED, "argument": "model"}
    reference = load_policy(paths["dpo_ref"], **loading)
    table = reference_logps(reference, rows, placement)
    makes = {
        "sft": lambda: SFT(load_policy(paths["policy"], **loading), single, []),
        "rm": lambda: RewardModel(load_scalar(paths["reward"], **loading), rows, []),
        "q_rm": lambda: TokenRewardModel(load_scalar(paths["reward"], **loading), rows, [], RMConfig(objective="q_rm")),
        "dpo": lambda: Referenced(
            load_policy(paths["policy"], **loading), rows, [], config, OBJECTIVES["dpo"].loss, (table, table[:0])
        ),
    }
    logger = RunLogger(folder, stage="test", total_steps=1, rank=distributed.rank(), config={})
    out = {}
    for name, make in makes.items():
        engine = TrainEngine((objective := make()).model, config, peak_lr=1e-3, total_steps=1)
        with watched_gradients(engine) as gradients, logger.phase("train"):
            metrics, applied = train_step(config, objective, engine, placement, logger, 0)
        assert applied
        assert distributed.rank() or logger._phases.take()[1]["train"] == sum(r.tokens for r in objective.train)
        out[name] = (metrics["train/loss"], dict(gradients), 0)
    logger.close()
    return out


GUIDED = ("tgdpo", "tis_dpo")
"""Objectives whose tokens a guide weighs."""
GUIDED_ROWS = 11


def guided_settings(paths: dict[str, str], objective: str) -> dict[str, object]:
    """Settings of a step of such an objective; both bounds of TIS-DPO are met."""
    own: dict[str, object] = {"tgdpo_alpha": 0.6}
    if objective == "tis_dpo":
        own = {"guide_base": paths["policy"], "tis_low": -0.3, "tis_high": 0.4}
    return {
        "model": paths["policy"], "reference": paths["dpo_ref"], "guide_model": paths["dpo"], "data": paths["pairs"],
        "objective": objective, "beta": 0.3, "batch": GUIDED_ROWS, "max_rows": GUIDED_ROWS,
        "eval_fraction": 0.0, "dtype": "fp32", "max_length": 64, "gradient_checkpointing": False, "max_grad_norm": 0.0,
        "data_cache": False, "data_workers": 1,
    } | own  # fmt: skip


def guided(paths: dict[str, str], objective: str, stage: int, budget: int, folder: Path) -> tuple:
    """One step, from the data and models on; beside the others' figures the rows that it takes."""
    settings = guided_settings(paths, objective) | {"zero_stage": stage, "micro_tokens": budget}
    config = DPOConfig(output_dir=str(folder), **settings)
    common = prepare(config)
    made = OBJECTIVES[objective].stage(config, common)
    engine = TrainEngine(made.model, config, peak_lr=1e-3, total_steps=1)
    logger = RunLogger(folder, stage="test", total_steps=1, rank=distributed.rank(), config={})
    with watched_gradients(engine) as gradients, logger.phase("train"):
        metrics, applied = train_step(config, made, engine, common.placement, logger, 0)
    logger.close()
    assert applied
    return metrics["train/loss"], dict(gradients), [made.train[i] for i in range(len(made.train))]


def length(prompts: list[str], responses: list[str], prompt: list[str]) -> list[tuple[float, dict[str, float]]]:
    """A reward function that, as users' may, fails on an empty batch; `prompt` is a column of the data."""
    assert responses
    assert all(text.endswith(column) for text, column in zip(prompts, prompt, strict=True))
    return [(len(r) / 50, {"prompt": len(p) / 7}) for r, p in zip(responses, prompt, strict=True)]


def whole_iteration(paths: dict[str, str], responses: int, folder: Path) -> tuple:
    """One turn of the loop from sampling on, with an odd number of responses or fewer of them than ranks."""
    settings = small_run(
        TinyModels(**paths), folder, rollout_batch=responses, train_batch=responses, iterations=1, zero_stage=3,
        reward_fn=("invariance_worker:length",), micro_tokens=40, score_tokens=40, online="prime",
    )  # fmt: skip
    run = build.build(RTOConfig(**settings))
    seen = []
    metrics = trainer.rto_iteration(run, 0, lambda rollout, texts: seen.append(rollout) or {})
    tokens = run.logger._phases.tokens if distributed.rank() == 0 else {}
    run.logger.close()
    return seen[0], metrics | {f"tokens of {phase}": count for phase, count in tokens.items()}


def places(token_ids: list[list[int]]) -> list[list[float]]:
    """A function of token rewards."""
    return [[i / 7 for i in range(len(ids))] for ids in token_ids]


EMPTY = (2, 3, 22)
"""Responses without a token, of those that are given token rewards."""


def token_rewards(
    paths: dict[str, str], tagger: str, url: str, stage: int, responses: int, folder: Path
) -> tuple:  # fmt: skip
    """(a rollout, what every kind of source says of it, what is paid); also where a rank has no response of its own."""
    sources = (
        f"logratio:{paths['dpo_ref']}:{paths['dpo']}", "endogenous", f"scalar:{paths['reward']}",
        f"scalar-diff:{paths['reward']}", "fn:invariance_worker:places", f"url:{url}", f"logratio:{paths['dpo_ref']}",
        f"endogenous:{paths['dpo']}", f"scalar:{tagger}",
    )  # fmt: skip
    config = RTOConfig(**small_run(
        TinyModels(**paths), folder, zero_stage=stage, score_tokens=64, max_response_length=100,
        token_reward=("dpo", *sources), dpo_model=(paths["dpo"], paths["dpo_ref"]), dpo_pessimism=0.5,
    ))  # fmt: skip
    run = build.build(config)
    drawn = rollout(EMPTY).select(range(responses))
    scores, _ = score_rollout(drawn, run.texts(drawn), run.scorers, config, run.placement, lambda n: None)
    dense = compute_targets(drawn, scores, config, config.beta2).dense
    run.logger.close()
    return drawn, scores.tokens, dense


def main() -> None:
    paths, tagger, url, target = json.loads(sys.argv[1]), *sys.argv[2:4], Path(sys.argv[4])
    distributed.init()
    torch.set_num_threads(1)
    found = {}
    for stage, budget in CASES:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(distributed.broadcast_object(folder))
            found[stage, budget] = rl(paths, stage, budget, root / "rl")
            found[stage, budget] |= supervised(paths, stage, budget, root / "supervised")
            for name in GUIDED:
                found[stage, budget][name] = guided(paths, name, stage, budget, root / name)
            distributed.barrier()
    for responses in RESPONSES:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(distributed.broadcast_object(folder))
            found[responses] = whole_iteration(paths, responses, root / "loop")
            distributed.barrier()
    for stage in (2, 3):
        for responses in (1, SEQUENCES):
            with tempfile.TemporaryDirectory() as folder:
                root = Path(distributed.broadcast_object(folder))
                made = token_rewards(paths, tagger, url, stage, responses, root / "tokens")
                found["token rewards", stage, responses] = made
                distributed.barrier()
    if distributed.rank() == 0:
        torch.save(found, target)


if __name__ == "__main__":
    main()
