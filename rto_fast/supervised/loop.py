"""The loop that SFT, reward model and DPO share.

Packed train batches over rows, evaluation, checkpoints.

What differs between them is a `Stage` (stage.py): which sequences a row has, and what their loss is.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rto_fast import distributed
from rto_fast.backend.checkpoints import Checkpoints, checkpoint_bytes
from rto_fast.backend.saving import Saving
from rto_fast.backend.train_engine import TrainEngine
from rto_fast.config import SupervisedConfig
from rto_fast.data.chat_template import ChatTemplate
from rto_fast.data.order import rows_of_step
from rto_fast.errors import Diverged
from rto_fast.logs.run_logger import RunLogger
from rto_fast.models.packing import Placement, balance, micro_batches, my_share
from rto_fast.models.save import save_model
from rto_fast.supervised.stage import Row, RowBatch, Stage, Sums


def steps_of(config: SupervisedConfig, rows: int) -> int:
    return max(1, math.ceil(config.epochs * rows / config.batch))


def batch_rows(config: SupervisedConfig, rows: int, step: int) -> list[int]:
    """Rows of an optimiser step."""
    return rows_of_step(f"rows/{config.seed}", rows, config.batch, step)


def fit(
    config: SupervisedConfig,
    stage: Stage,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    placement: Placement,
    checkpoints: Checkpoints,
    logger: RunLogger,
    found: tuple[int, dict[str, Any]] | None,
) -> Path:
    """Trains, evaluates and exports; returns the Hugging Face folder (`output_dir/model`).

    found: the checkpoint to go on from, as Checkpoints.read gives it.
    """
    total = steps_of(config, len(stage.train))
    engine = TrainEngine(stage.model, config, peak_lr=config.peak_lr, total_steps=total)
    bad_steps, bad_in_a_row, start = 0, 0, 0
    if found:
        start, state = found
        checkpoints.load(start, {"model": engine})
        bad_steps, bad_in_a_row = state["bad_steps"], state["bad_in_a_row"]

    def save() -> None:
        with logger.phase("checkpoint"):
            state = {"bad_steps": bad_steps, "bad_in_a_row": bad_in_a_row}
            checkpoints.save(step + 1, {"model": engine}, state, {})

    with Saving(config) as saving, logger:
        logger.message(saving.plan(checkpoint_bytes(config, [engine.model])))
        for step in range(start, total):
            with logger.phase("train"):
                metrics, applied = train_step(config, stage, engine, placement, logger, step)
            bad_steps += not applied
            bad_in_a_row = 0 if applied else bad_in_a_row + 1
            metrics["bad_steps"] = float(bad_steps)
            if step + 1 == total:
                metrics |= conclude(stage, engine, placement, logger)
            logger.log(step + 1, metrics)
            if not applied:
                logger.warn(f"skipped step {step + 1}: loss {metrics['train/loss']}, gradient norm "
                            f"{metrics['train/grad_norm']}")  # fmt: skip
                if config.max_bad_steps and bad_in_a_row >= config.max_bad_steps:
                    raise Diverged(f"{bad_in_a_row} non-finite steps in a row at step {step + 1}; parameters are those "
                                   "before them. Look at the learning rate and at bf16 against fp32.")  # fmt: skip
            saving.after(step + 1, save)
        if start == total:  # killed between its last checkpoint and the export
            conclude(stage, engine, placement, logger)
        folder = Path(config.output_dir) / "model"
        save_model(engine.model, folder, tokenizer, template, distributed.rank() == 0)
        distributed.barrier()
        logger.message(f"{stage.name}: {folder}")
    return folder


def conclude(stage: Stage, engine: TrainEngine, placement: Placement, logger: RunLogger) -> dict[str, float]:
    """Evaluation after the last step, and what the stage leaves in its model."""
    with logger.phase("evaluate"):
        metrics = evaluate(stage, engine, placement) | stage.finish(engine.evaluate, placement)
    if metrics:
        logger.message("evaluation: " + ", ".join(f"{k.removeprefix('eval/')} {v:.4f}" for k, v in metrics.items()))
    return metrics


def train_step(
    config: SupervisedConfig, stage: Stage, engine: TrainEngine, placement: Placement, logger: RunLogger, step: int
) -> tuple[dict[str, float], bool]:
    """One optimiser step over all ranks -> (metrics, whether parameters moved)."""
    index = batch_rows(config, len(stage.train), step)
    rows = [stage.train[i] for i in index]
    lens = [row.tokens for row in rows]
    micro = my_share(lens, placement.micro_tokens)
    count, tokens = stage.count(rows), sum(lens)
    stage.begin(engine.evaluate, index, False, placement)
    if config.lora_dropout:  # a resumed run drops what the whole one drops
        torch.manual_seed(random.Random(f"dropout/{config.seed}/{distributed.rank()}/{step}").getrandbits(63))
    sums: Sums = {}

    def loss(item: tuple[list[int], float]) -> Tensor:
        part, weight = item
        batch = RowBatch([rows[i] for i in part], [index[i] for i in part], False, placement)
        value, metrics = stage.loss(engine, batch)
        router = engine.router_loss()
        if router is not None:
            router = router * (batch.packed.tokens.numel() * weight / tokens)
            add(sums, {"router_aux": router})
        if weight:
            add(sums, {"loss": value.detach() / count, **{k: v / len(rows) for k, v in metrics.items()}})
            logger.progress(sum(lens[i] for i in part))
        value = value * (weight / count)
        return value if router is None else value + config.router_aux_coef * router

    result = engine.update(micro, loss, step=step)
    logger.progress(sum(lens) - sum(lens[i] for part, weight in micro if weight for i in part))  # the other ranks'
    means = reduce_sums(sums)
    metrics = {f"train/{k}": v for k, v in means.items()}
    metrics |= {"train/grad_norm": result.grad_norm, "train/lr": engine.lr(step)}
    return metrics, result.applied and math.isfinite(means["loss"])


@torch.no_grad()
def evaluate(stage: Stage, engine: TrainEngine, placement: Placement) -> dict[str, float]:
    """Loss and metrics over the held-out rows; {} when there are none."""
    if not stage.held_out:
        return {}
    stage.begin(engine.evaluate, range(len(stage.held_out)), True, placement)
    sums: Sums = {}
    count = stage.count(stage.held_out)
    for batch in held_out_batches(stage.held_out, placement):
        value, metrics = stage.loss(engine.evaluate, batch)
        if batch.index:
            add(sums, {"loss": value / count})
            add(sums, {k: v / len(stage.held_out) for k, v in metrics.items()})
    return {f"eval/{k}": v for k, v in reduce_sums(sums).items()}


def held_out_batches(rows: Sequence[Row], placement: Placement, *, held_out: bool = True) -> Iterator[RowBatch]:
    """This rank's share of `rows`, packed; batches with an empty index are dummies that keep ZeRO-3 in step."""
    lens = [row.tokens for row in rows]
    batches = micro_batches(balance(lens, distributed.world_size())[distributed.rank()], lens, placement.micro_tokens)
    if placement.lockstep:
        batches += [[]] * (max(distributed.gather_objects(len(batches))) - len(batches))
    for index in batches:
        yield RowBatch([rows[i] for i in index] or [rows[lens.index(min(lens))]], index, held_out, placement)


def add(sums: Sums, more: Sums) -> None:
    for name, value in more.items():
        sums[name] = sums[name] + value.detach() if name in sums else value.detach()


def reduce_sums(sums: Sums) -> dict[str, float]:
    """Sums over ranks; a rank whose micro-batches were all dummies has no names of its own."""
    names = sorted({n for names in distributed.gather_objects(list(sums)) for n in names})
    zero = torch.zeros(())
    total = distributed.sum_over_ranks(torch.stack([sums.get(n, zero).double().cpu() for n in names]))
    return dict(zip(names, total.tolist(), strict=True))
