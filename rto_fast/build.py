"""From settings to the parts of a run: checks first, then data, then models, engines and state."""

from __future__ import annotations

import copy
import dataclasses
import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rto_fast import algo, data, distributed, models, report, runfiles
from rto_fast.algo import KLController
from rto_fast.assembly import FrozenModel, choose_attention, frozen, open_output, save_model, save_tokenizer
from rto_fast.batch import Request, Rollout, Scores, Targets
from rto_fast.config import RTOConfig, require
from rto_fast.credit import delimiter_ids
from rto_fast.data import PromptData
from rto_fast.ema import WeightAverage
from rto_fast.engine import DTYPES, Checkpoints, TrainEngine
from rto_fast.metrics import RunLogger
from rto_fast.models import ScalarModel
from rto_fast.packing import Placement
from rto_fast.report_samples import report_samples
from rto_fast.rewards import ResponseTexts, load_reward_sources, try_functions
from rto_fast.rollout import Sampling, SyncStats, make_engine, sample_seed
from rto_fast.scoring import ModelReward, OwnText, Scorers, same_tokenizer
from rto_fast.shares import Share
from rto_fast.sync import WeightSync
from rto_fast.template import (
    ChatTemplate,
    check_max_length,
    check_template,
    check_vocabulary,
    load_template,
    load_tokenizer,
    stop_token_ids,
)

SAMPLED_ITERATIONS = 4
"""Iterations, evenly spread, whose samples go into the report."""


@dataclass
class State:
    """What a checkpoint holds beside the engines."""

    iteration: int
    kl: KLController
    bad_steps: int = 0
    bad_in_a_row: int = 0


@dataclass
class Run:
    """The parts of one RTO run."""

    config: RTOConfig
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    prompts: PromptData
    iterations: int
    placement: Placement
    policy: TrainEngine
    critic: TrainEngine | None
    """None where the advantages need none."""
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

    def take_ahead(self) -> Rollout | None:
        """The rollout sampled ahead, once."""
        rollout, self.ahead = self.ahead, None
        return rollout

    def requests(self, iteration: int) -> list[Request]:
        """The iteration's requests. Prompts come in a new order each epoch; seeds know neither rank nor batch."""
        config, requests = self.config, []
        for index in range(iteration * config.drawn_prompts, (iteration + 1) * config.drawn_prompts):
            epoch, place = divmod(index, len(self.prompts.prompt_ids))
            row = _permutation(len(self.prompts.prompt_ids), f"prompts/{config.seed}/{epoch}")[place]
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
        rows = rollout.rows.tolist()
        return ResponseTexts(
            prompts=[self.prompts.texts[r] for r in rows],
            responses=self.tokenizer.batch_decode([r.tolist() for r in rollout.responses()], skip_special_tokens=True),
            messages=[self.prompts.messages[r] for r in rows],
        )

    def train_batches(self, iteration: int, epoch: int, responses: int) -> list[list[int]]:
        """The rollout's responses in a new order each PPO epoch, cut into train batches; pairs stay together."""
        together, size = self.config.compared_responses, self.config.train_batch
        units = _permutation(responses // together, f"train/{self.config.seed}/{iteration}/{epoch}")
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

    def keep_samples(
        self, iteration: int, rollout: Rollout, scores: Scores, targets: Targets, texts: ResponseTexts
    ) -> None:
        """Some responses of a few iterations, first and last among them, for the report."""
        last = self.iterations - 1
        kept = {round(i * last / (SAMPLED_ITERATIONS - 1)) for i in range(SAMPLED_ITERATIONS)}
        if self.config.report_samples and iteration in kept and distributed.rank() == 0:
            count = min(len(rollout), -(-self.config.report_samples // len(kept)))
            rows = report_samples(self.tokenizer, rollout, scores, targets, texts, range(count), iteration + 1)
            runfiles.append_samples(Path(self.config.output_dir) / runfiles.SAMPLES, rows)

    def save_if_due(self) -> None:
        """Checkpoint and export where this iteration is due for them."""
        config, done = self.config, self.state.iteration
        if config.export_every and done % config.export_every == 0 and done < self.iterations:
            self.export(Path(config.output_dir) / f"export-{done:08d}")
        if config.save_every and done % config.save_every == 0:
            with self.logger.phase("checkpoint"):
                state = {"kl": dataclasses.asdict(self.state.kl), "bad_steps": self.state.bad_steps,
                         "bad_in_a_row": self.state.bad_in_a_row}  # fmt: skip
                if self.critic:
                    state["critic_normalisation"] = (self.critic.model.mean, self.critic.model.std)
                ahead = self.ahead and vars(self.ahead)
                tensors = {"average": self.average.weights, "rng": torch.get_rng_state(), "ahead": ahead}
                self.checkpoints.save(done, self.engines, state, tensors)

    @property
    def engines(self) -> dict[str, TrainEngine]:
        return {"policy": self.policy} | ({"critic": self.critic} if self.critic else {})

    def restore(self, step: int, state: dict[str, Any]) -> None:
        """Continues from checkpoint `step`."""
        tensors = self.checkpoints.load(step, self.engines)
        self.average.load(tensors["average"])
        torch.set_rng_state(tensors["rng"].clone())
        self.ahead = Rollout(**copy.deepcopy(tensors["ahead"])) if tensors.get("ahead") else None
        self.state = State(step, KLController(**state["kl"]), state["bad_steps"], state["bad_in_a_row"])
        self.sync.push(version=step)

    def export(self, folder: Path) -> None:
        """policy/, critic/ (and ema/) as Hugging Face folders under `folder`."""
        writes = distributed.rank() == 0
        for name, engine in self.engines.items():
            save_model(engine.model, folder / name, self.tokenizer, self.template, writes)
        if self.config.ema_decay and writes:
            with_average = {n: t.to(DTYPES[self.config.dtype]) for n, t in self.average.weights.items()}
            self.policy.model.lm.save_pretrained(folder / "ema", state_dict=with_average)
            save_tokenizer(folder / "ema", self.tokenizer, self.template)
        distributed.barrier()

    def finish(self) -> None:
        """Exports the models and writes the report."""
        folder = Path(self.config.output_dir)
        self.export(folder)
        self.logger.message(f"policy: {folder / 'policy'}")
        if self.config.report and distributed.rank() == 0:
            self.logger.message(f"report: {report.report_run(folder, limit=self.config.report_samples)}")


def build(config: RTOConfig) -> Run:
    """Checks everything that can be wrong, cheapest first, then makes the run; resumes where asked to.

    Raises ConfigError, with nothing written, on settings, files or models that cannot work.
    """
    config.validate()
    device = distributed.init()
    require(
        distributed.world_size() % config.vllm_tensor_parallel == 0,
        f"vllm_tensor_parallel: {config.vllm_tensor_parallel} does not divide the {distributed.world_size()} ranks of "
        "this launch",
    )
    checkpoints = open_output(config)
    found = checkpoints.read()
    remote_and_functions = load_reward_sources(config)
    tokenizer = load_tokenizer(config.policy, "policy")
    template = load_template(config.chat_template, tokenizer)
    _check_models(config, tokenizer, template)
    stop_ids = stop_token_ids(config.policy, tokenizer, template)
    sampling = Sampling(config.max_response_length, config.temperature, stop_ids)
    delimiters = _delimiters(config, tokenizer)
    prompts = data.load_prompts(config, tokenizer, template)
    try_functions(remote_and_functions, prompts.texts)
    wanted = max(1, round(config.epochs * len(prompts.prompt_ids)))
    iterations = config.iterations or -(-wanted // config.drawn_prompts)

    dtype = DTYPES[config.dtype]
    attention, kernel = choose_attention(config, device)
    placement = Placement(device, kernel, lockstep=config.zero_stage == 3, micro_tokens=config.score_tokens)
    loading = {"dtype": dtype, "attention": attention}

    updates = config.ppo_epochs * (config.responses // config.train_batch)
    policy = TrainEngine(
        models.load_policy(config.policy, argument="policy", **loading), config,
        peak_lr=config.policy_lr, total_steps=max(1, (iterations - config.critic_warmup) * updates),
    )  # fmt: skip
    critic, origin = None, "none, the advantages need none"
    if config.uses_critic:
        critic_model, origin = _critic(config, tokenizer, loading)
        critic = TrainEngine(critic_model, config, peak_lr=config.critic_lr, total_steps=iterations * updates)

    kept: list[FrozenModel] = []

    def keep(model: torch.nn.Module) -> FrozenModel:
        kept.append(frozen(model, config, parks=config.park_frozen))
        return kept[-1]

    reference = keep(models.load_policy(config.reference or config.policy, argument="reference", **loading))
    dpo, dpo_ref = None, reference
    if config.beta1:
        dpo = keep(models.load_policy(config.dpo_model, argument="dpo_model", **loading))
        if config.dpo_ref and config.dpo_ref != (config.reference or config.policy):
            dpo_ref = keep(models.load_policy(config.dpo_ref, argument="dpo_ref", **loading))
    names = ["model"] if len(config.reward_model) == 1 else [f"model{i}" for i in range(len(config.reward_model))]
    sources = [
        _model_reward(path, name, keep, tokenizer, prompts, placement, loading)
        for path, name in zip(config.reward_model, names, strict=True)
    ]
    scorers = Scorers(
        policy=policy.evaluate, critic=critic and critic.evaluate, reference=reference, dpo=dpo, dpo_ref=dpo_ref,
        rewards=[*sources, *remote_and_functions], reward_weights=config.reward_weights,
        frozen=kept,
    )  # fmt: skip
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    sync = WeightSync(config, lambda: make_engine(config, config.policy, device, dtype, pad), policy, placement)
    logger = RunLogger(  # writes the first files, now that nothing can be wrong any more
        config.output_dir, stage="RTO" if config.beta1 else "PPO", total_steps=iterations,
        rank=distributed.rank(), wandb_project=config.wandb_project, config=dataclasses.asdict(config),
        start_step=found[0] if found else 0,
    )  # fmt: skip
    logger.message(f"critic: {origin}")
    run = Run(
        config=config, tokenizer=tokenizer, template=template, prompts=prompts, iterations=iterations,
        placement=placement, policy=policy, critic=critic, scorers=scorers,
        sync=sync, sampling=sampling, delimiters=delimiters,
        average=WeightAverage(config.ema_decay, holds=distributed.rank() == 0),
        checkpoints=checkpoints, logger=logger,
        state=State(0, KLController(config.beta2, config.kl_target, config.kl_horizon)),
    )  # fmt: skip
    logger.message(f"rollouts: {type(sync.engine).__name__}")
    if config.rollout_oversample:
        logger.warn(
            f"rollout_oversample: {config.drawn_prompts} prompts are drawn for every {config.rollout_batch}, and those "
            "whose responses end last are dropped. What is trained on is biased towards short responses"
        )
    if found:
        run.restore(*found)
    else:
        sync.push(version=0)  # an engine that was there before may hold other weights
    run.prove_sync()
    return run


def _delimiters(config: RTOConfig, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    if config.credit != "sentence":
        return algo.NO_DELIMITERS
    ids = delimiter_ids(tokenizer, config.delimiters)
    require(ids.numel() > 0, f"delimiters: no token of the policy's vocabulary ends with any of {config.delimiters}")
    return ids


def _check_models(config: RTOConfig, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> None:
    """Vocabularies, positions and templates of all models, from their configs alone."""
    policy = models.load_config(config.policy, "policy")
    models.check_weights(config.policy, "policy")
    check_vocabulary(tokenizer, policy, "policy")
    check_template(config.policy, template, "policy")
    length = config.max_prompt_length + config.max_response_length
    check_max_length(length, policy, "max_prompt_length + max_response_length")
    others = {"reference": config.reference}
    if config.beta1:
        others |= {"dpo_model": config.dpo_model, "dpo_ref": config.dpo_ref}
    for argument, path in others.items():
        if path:
            other = models.load_config(path, argument)
            require(
                other.vocab_size == policy.vocab_size,
                f"{argument}: {path!r} has a vocabulary of {other.vocab_size} tokens, the policy's has "
                f"{policy.vocab_size}; token rewards compare the two token by token",
            )
            models.check_weights(path, argument)
            check_template(path, template, argument)
            check_max_length(length, other, f"max_prompt_length + max_response_length ({argument})")
    for path in config.reward_model:
        reward, own = models.load_config(path, "reward_model"), load_tokenizer(path, "reward_model")
        models.check_reward_head(path, "reward_model")
        check_vocabulary(own, reward, "reward_model")
        if same_tokenizer(tokenizer, own):
            check_max_length(length, reward, "max_prompt_length + max_response_length (reward_model)")
            check_template(path, template, "reward_model")


def _critic(config: RTOConfig, tokenizer: PreTrainedTokenizerBase, loading: dict[str, Any]) -> tuple[ScalarModel, str]:
    """The critic and where it came from."""
    if config.reward_model and config.critic != "policy":
        path = config.reward_model[0]
        if same_tokenizer(tokenizer, load_tokenizer(path, "reward_model")):
            scalar = models.load_scalar(path, argument="reward_model", **loading)
            return scalar, f"starts from the reward model {path}"
        require(
            config.critic == "auto",
            f"critic: the reward model {path!r} has another tokenizer than the policy, so its weights cannot read "
            "the policy's tokens; use --critic policy",
        )
    scalar = models.new_scalar(config.policy, argument="policy", **loading)
    return scalar, f"starts from the policy's backbone {config.policy} with a zero head"


def _model_reward(
    path: str, name: str, keep: Callable[[torch.nn.Module], FrozenModel], tokenizer: PreTrainedTokenizerBase,
    prompts: PromptData, placement: Placement, loading: dict[str, Any],
) -> ModelReward:  # fmt: skip
    model = keep(models.load_scalar(path, argument="reward_model", **loading))
    own = load_tokenizer(path, "reward_model")
    if same_tokenizer(tokenizer, own):
        return ModelReward(name, model, placement)
    limit = getattr(models.load_config(path, "reward_model"), "max_position_embeddings", 0)
    return ModelReward(name, model, placement, OwnText(own, load_template("auto", own), limit, prompts.prompts))


@functools.lru_cache(maxsize=2)
def _permutation(count: int, key: str) -> Sequence[int]:
    """A shuffle of range(count), the same for the same arguments in every process."""
    order = list(range(count))
    random.Random(key).shuffle(order)
    return tuple(order)
