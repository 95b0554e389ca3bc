"""The parts of one RTO run, and what the loop asks of them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rto_fast import distributed
from rto_fast.algo.targets import KLController, RunningScale
from rto_fast.backend.checkpoints import Checkpoints, checkpoint_bytes
from rto_fast.backend.train_engine import TrainEngine
from rto_fast.backend.weight_average import WeightAverage
from rto_fast.config import RTOConfig
from rto_fast.contract import Request, ResponseTexts, Rollout, Scores, Targets
from rto_fast.data.chat_template import ChatTemplate
from rto_fast.data.columns import DataColumns
from rto_fast.data.load import PromptData
from rto_fast.data.order import permutation
from rto_fast.logs.files import SAMPLES, folder_aside
from rto_fast.logs.run_logger import RunLogger
from rto_fast.models.load import DTYPES
from rto_fast.models.packing import Placement
from rto_fast.models.save import save_model, save_tokenizer
from rto_fast.report.page import report_run
from rto_fast.report.samples import append_samples, report_samples
from rto_fast.rollout.assignment import Share
from rto_fast.rollout.engine import Sampling, SyncStats, sample_seed
from rto_fast.rollout.weights.sync import WeightSync
from rto_fast.scoring.frozen_error import MEASURED, frozen_error, said_of
from rto_fast.scoring.score import Scorers
from rto_fast.supervised.stage import Row

SAMPLED_ITERATIONS = 4
"""Iterations, evenly spread, whose samples go into the report."""


@dataclass
class State:
    """What a checkpoint holds beside the engines."""

    iteration: int
    kl: KLController
    bad_steps: int = 0
    bad_in_a_row: int = 0
    wrong_in_a_row: int = 0
    """Iterations in a row whose online token reward was wrong more often than right."""
    scale: RunningScale = field(default_factory=RunningScale)
    """Of all scores so far where `score_scale` is running."""


@dataclass
class Run:
    """The parts of one RTO run."""

    config: RTOConfig
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    prompts: PromptData
    columns: DataColumns
    """What rewards see of the prompts' rows."""
    ptx: Sequence[Row] | None
    """Supervised rows whose loss joins the policy's; None where `ptx_coef` is 0."""
    iterations: int
    placement: Placement
    policy: TrainEngine
    critic: TrainEngine | None
    """None where the advantages need none."""
    online: TrainEngine | None
    """The DPO model; None where it is not trained."""
    scorers: Scorers
    sync: WeightSync
    sampling: Sampling
    delimiters: Tensor
    """[K] int64: tokens that end a sentence; empty unless credit goes by sentences."""
    average: WeightAverage
    checkpoints: Checkpoints
    logger: RunLogger
    state: State
    ahead: Rollout | None = None
    """The next iteration's rollout where it was sampled already (rollout_lag 1)."""
    frozen_error: dict[str, float] = field(default_factory=dict)
    """Metrics of `measure_frozen`."""
    told_of_cuts: bool = False
    """Whether it was said that most responses are cut short."""

    def take_ahead(self) -> Rollout | None:
        """The rollout sampled ahead, once."""
        rollout, self.ahead = self.ahead, None
        return rollout

    def requests(self, iteration: int) -> list[Request]:
        """The iteration's requests. Prompts come in a new order each epoch; seeds know neither rank nor batch."""
        config, requests = self.config, []
        for index in range(iteration * config.drawn_prompts, (iteration + 1) * config.drawn_prompts):
            epoch, place = divmod(index, len(self.prompts.prompt_ids))
            row = permutation(len(self.prompts.prompt_ids), f"prompts/{config.seed}/{epoch}")[place]
            for j in range(config.responses_per_prompt):
                seed = sample_seed(config.seed, index, epoch, j)
                requests.append(Request(tuple(self.prompts.prompt_ids[row]), row, index, j, seed))
        return requests

    def share(self, iteration: int) -> Share:
        """What this rank's engine samples of the iteration's requests."""
        keep = self.config.rollout_batch if self.config.rollout_oversample else None
        return self.sync.share(self.requests(iteration), self.sampling, keep)

    def texts(self, rollout: Rollout) -> ResponseTexts:
        """What reward sources see of a rollout."""
        rows, token_ids = rollout.rows.tolist(), [r.tolist() for r in rollout.responses()]
        return ResponseTexts(
            prompts=[self.prompts.texts[r] for r in rows],
            responses=self.tokenizer.batch_decode(token_ids, skip_special_tokens=True),
            messages=[self.prompts.messages[r] for r in rows],
            token_ids=token_ids,
            columns=self.columns.of([self.prompts.rows[r] for r in rows]),
        )

    def train_batches(self, iteration: int, epoch: int, responses: int) -> list[list[int]]:
        """The rollout's responses in a new order each PPO epoch, cut into train batches; pairs stay together."""
        return self._batches(f"train/{self.config.seed}/{iteration}/{epoch}", responses, self.config.compared_responses)

    def online_batches(self, iteration: int, responses: int) -> list[list[int]]:
        """The same for the DPO model's one pass; what it compares stays together."""
        return self._batches(f"online/{self.config.seed}/{iteration}", responses, self.config.learnt_together)

    def _batches(self, seed: str, responses: int, together: int) -> list[list[int]]:
        units, size = permutation(responses // together, seed), self.config.train_batch
        order = [unit * together + i for unit in units for i in range(together)]
        return [order[i : i + size] for i in range(0, responses, size)]

    def optimiser_step(self, iteration: int, epoch: int, number: int) -> int:
        """Index of a train batch's update in the whole run."""
        batches = self.config.responses // self.config.train_batch
        return (iteration * self.config.ppo_epochs + epoch) * batches + number

    def push_weights(self) -> SyncStats:
        """The policy's weights go to the rollout engine (and into the running average)."""
        if self.config.ema_decay:
            self.average.update(self.policy.weights())
        return self.sync.push(version=self.state.iteration + 1)

    def prove_sync(self) -> None:
        """Shows that the engine samples from the policy, before anything is built on it."""
        if self.config.sync_proof:
            self.logger.message(self.sync.prove(self.requests(self.state.iteration), self.sampling))

    def measure_frozen(self) -> None:
        """Says what quantised weights of frozen models do to token rewards and scores, on responses of the policy."""
        if {self.config.frozen_dtype, self.config.lora_base_dtype} == {"off"}:
            return
        share = self.sync.share(self.requests(self.state.iteration)[:MEASURED], self.sampling)
        rollout = self.sync.gather(share, self.sync.sample(share.requests, self.sampling))
        self.frozen_error = frozen_error(rollout, self.texts(rollout), self.scorers, self.config, self.placement)
        self.logger.message(said_of(self.config, self.frozen_error, len(rollout)))

    def keep_samples(
        self, iteration: int, rollout: Rollout, scores: Scores, targets: Targets, texts: ResponseTexts
    ) -> None:
        """Some responses of a few iterations, first and last among them, for the report."""
        last = self.iterations - 1
        kept = {round(i * last / (SAMPLED_ITERATIONS - 1)) for i in range(SAMPLED_ITERATIONS)}
        if self.config.report_samples and iteration in kept and distributed.rank() == 0:
            count = min(len(rollout), -(-self.config.report_samples // len(kept)))
            rows = report_samples(self.tokenizer, rollout, scores, targets, texts, range(count), iteration + 1)
            append_samples(Path(self.config.output_dir) / SAMPLES, rows)

    def export_if_due(self) -> None:
        """The models of this iteration, where it is due for an export."""
        every, done = self.config.export_every, self.state.iteration
        if every and done % every == 0 and done < self.iterations:
            self.export(Path(self.config.output_dir) / f"export-{done:08d}")

    def save(self) -> None:
        """Writes the checkpoint of the iterations done."""
        with self.logger.phase("checkpoint"):
            state = {"kl": dataclasses.asdict(self.state.kl), "bad_steps": self.state.bad_steps,
                     "bad_in_a_row": self.state.bad_in_a_row}  # fmt: skip
            if self.online:
                state["wrong_in_a_row"] = self.state.wrong_in_a_row
            if self.config.score_scale == "running":
                state["score_scale"] = dataclasses.asdict(self.state.scale)
            if self.critic:
                state["critic_normalisation"] = (self.critic.model.mean, self.critic.model.std)
            ahead = self.ahead and vars(self.ahead)
            tensors = {"average": self.average.weights, "rng": torch.get_rng_state(), "ahead": ahead}
            self.checkpoints.save(self.state.iteration, self.engines, state, tensors)

    @property
    def engines(self) -> dict[str, TrainEngine]:
        found = {"policy": self.policy, "critic": self.critic, "dpo": self.online}
        return {name: engine for name, engine in found.items() if engine}

    @property
    def checkpoint_bytes(self) -> int:
        models = [engine.model for engine in self.engines.values()]
        return checkpoint_bytes(self.config, models, averaged=self.config.ema_decay > 0)

    def restore(self, step: int, state: dict[str, Any]) -> None:
        """Continues from checkpoint `step`."""
        tensors = self.checkpoints.load(step, self.engines)
        self.average.load(tensors["average"])
        torch.set_rng_state(tensors["rng"].clone())
        self.ahead = Rollout(**copy.deepcopy(tensors["ahead"])) if tensors.get("ahead") else None
        self.state = State(
            step, KLController(**state["kl"]), state["bad_steps"], state["bad_in_a_row"],
            state.get("wrong_in_a_row", 0), RunningScale(**state.get("score_scale", {})),
        )  # fmt: skip
        self.sync.push(version=step)

    def export(self, folder: Path) -> None:
        """policy/, critic/, dpo/ where it was trained (and ema/) as Hugging Face folders under `folder`."""
        writes = distributed.rank() == 0
        for name, engine in self.engines.items():
            save_model(engine.model, folder / name, self.tokenizer, self.template, writes)
        if self.config.ema_decay and writes:
            with_average = {n: t.to(DTYPES[self.config.dtype]) for n, t in self.average.weights.items()}
            with folder_aside(folder / "ema") as aside:
                self.policy.model.lm.save_pretrained(aside, state_dict=with_average)
                save_tokenizer(aside, self.tokenizer, self.template)
        distributed.barrier()

    def finish(self) -> None:
        """Exports the models and writes the report."""
        folder = Path(self.config.output_dir)
        self.export(folder)
        self.logger.message(f"policy: {folder / 'policy'}")
        if self.config.report and distributed.rank() == 0:
            self.logger.message(f"report: {report_run(folder, limit=self.config.report_samples)}")
