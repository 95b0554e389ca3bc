"""From settings to a run: check everything, load the models, then put it together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rto_fast import distributed
from rto_fast.algo.targets import NO_DELIMITERS, KLController
from rto_fast.backend.checkpoints import Checkpoints, check_space, open_output
from rto_fast.backend.frozen import FrozenModel, frozen, lent, partitions
from rto_fast.backend.train_engine import TrainEngine
from rto_fast.backend.warm import warm
from rto_fast.backend.weight_average import WeightAverage
from rto_fast.config import RTOConfig
from rto_fast.contract import ResponseTexts
from rto_fast.data.chat_template import ChatTemplate, check_template, load_template
from rto_fast.data.columns import DataColumns
from rto_fast.data.load import PromptData, load_prompts, load_ptx
from rto_fast.data.tokenizer import (
    check_max_length,
    check_min_length,
    check_vocabulary,
    delimiter_ids,
    end_of_turn,
    load_tokenizer,
    special_tokens_used,
    stop_token_ids,
    tokenizer_difference,
)
from rto_fast.errors import ConfigError, require
from rto_fast.logs.run_logger import RunLogger
from rto_fast.memory.fit import check_device
from rto_fast.models.adapters import check_adapter, form_of
from rto_fast.models.heads import PolicyModel, ScalarModel
from rto_fast.models.load import (
    DTYPES,
    check_reward_head,
    check_weights,
    load_config,
    load_policy,
    load_scalar,
    new_scalar,
    place,
)
from rto_fast.models.one_base import OneBase
from rto_fast.models.packing import Placement
from rto_fast.models.quantised import check_code, quantise
from rto_fast.models.router import check_router, watch_router
from rto_fast.models.save import rehearse_export
from rto_fast.redact import without_credentials
from rto_fast.rollout.engine import Sampling
from rto_fast.rollout.make_engine import make_engine
from rto_fast.rollout.vllm_engines import address
from rto_fast.rollout.weights.sync import WeightSync
from rto_fast.run import Run, State
from rto_fast.scoring.reward_function import FunctionReward
from rto_fast.scoring.reward_model import ModelReward, OwnText
from rto_fast.scoring.reward_server import RemoteReward, label_column
from rto_fast.scoring.reward_source import TRIAL, TRIED, Model, RewardSource, try_sources
from rto_fast.scoring.score import Scorers
from rto_fast.scoring.token_function import try_written
from rto_fast.scoring.token_load import Written, check_token_models, check_tokens, load_token_sources, load_written
from rto_fast.scoring.token_source import Mixture
from rto_fast.supervised.stage import Rows


@dataclass(frozen=True)
class Reader:
    """How a reward model reads a response."""

    own_text: OwnText | None
    """None where the policy's tokens are its own."""
    positions: int
    """Positions of the model; 0 = unlimited."""
    said: str


@dataclass(frozen=True)
class Inputs:
    """What the checks have read: everything but weights."""

    device: torch.device
    checkpoints: Checkpoints
    found: tuple[int, dict[str, Any]] | None
    """The checkpoint to go on from."""
    rewards: list[RewardSource]
    """Those of `reward_fn` and `reward_url`."""
    written: Written
    """Sources of token rewards that a function or a server is."""
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    sampling: Sampling
    delimiters: Tensor
    prompts: PromptData
    columns: DataColumns
    """What rewards see of the prompts' rows."""
    ptx: Rows | None
    """The supervised rows of the PTX loss, where there is one."""
    special_used: frozenset[str]
    """The special tokens that the run's prompts and responses are made with."""
    readers: list[Reader]
    """How each reward model reads."""
    iterations: int


@dataclass(frozen=True)
class Loaded:
    """The models of a run, on their devices."""

    placement: Placement
    policy: TrainEngine
    critic: TrainEngine | None
    online: TrainEngine | None
    """The DPO model where it is trained."""
    origins: list[str]
    """Where the critic came from, and how each reward model reads."""
    tight: str
    """A warning of a disk that may fill up, or ""."""
    scorers: Scorers


def build(config: RTOConfig) -> Run:
    """Checks everything that can be wrong, cheapest first, then makes the run; resumes where asked to.

    Raises ConfigError, with nothing written, on settings, files or models that cannot work.
    """
    inputs = check(config)
    loaded = load(config, inputs)
    compiled = warm(config, loaded.policy.model, inputs.device)
    pad = inputs.tokenizer.pad_token_id if inputs.tokenizer.pad_token_id is not None else 0
    dtype = DTYPES[config.dtype]
    model = loaded.policy.model
    form = form_of(model) if model.adapter and config.lora_push == "adapter" else None
    sync = WeightSync(
        config, lambda: make_engine(config, config.policy, inputs.device, dtype, pad, form), loaded.policy,
        loaded.placement,
    )  # fmt: skip
    logger = RunLogger(  # writes the first files, now that nothing can be wrong any more
        config.output_dir, stage="RTO" if config.pays_tokens else "PPO", total_steps=inputs.iterations,
        rank=distributed.rank(), wandb_project=config.wandb_project, config=dataclasses.asdict(config),
        start_step=inputs.found[0] if inputs.found else 0,
    )  # fmt: skip
    for said in [*loaded.origins, *filter(None, [compiled])]:
        logger.message(said)
    for warning in [*inputs.checkpoints.torn, *filter(None, [loaded.tight])]:
        logger.warn(warning)
    run = Run(
        config=config, tokenizer=inputs.tokenizer, template=inputs.template, prompts=inputs.prompts,
        columns=inputs.columns, ptx=inputs.ptx, iterations=inputs.iterations, placement=loaded.placement,
        policy=loaded.policy, critic=loaded.critic, online=loaded.online,
        scorers=loaded.scorers, sync=sync, sampling=inputs.sampling, delimiters=inputs.delimiters,
        average=WeightAverage(config.ema_decay, holds=distributed.rank() == 0),
        checkpoints=inputs.checkpoints, logger=logger,
        state=State(0, KLController(config.beta2, config.kl_target, config.kl_horizon)),
    )  # fmt: skip
    logger.message(f"rollouts: {sync.said}")
    if config.rollout_oversample:
        logger.warn(
            f"rollout_oversample: {config.drawn_prompts} prompts are drawn for every {config.rollout_batch}, and those "
            "whose responses end last are dropped. What is trained on is biased towards short responses"
        )
    if inputs.found:
        run.restore(*inputs.found)
    else:
        sync.push(version=0)  # an engine that was there before may hold other weights
    run.prove_sync()
    run.measure_frozen()
    return run


def check(config: RTOConfig) -> Inputs:
    """Settings, files, models' configs, data, reward functions and servers, in this order."""
    config.validate()
    device = distributed.init()
    require(
        distributed.world_size() % config.vllm_tensor_parallel == 0,
        f"vllm_tensor_parallel: {config.vllm_tensor_parallel} does not divide the {distributed.world_size()} ranks of "
        "this launch",
    )
    _check_reach(config)
    check_code(config.frozen_dtype)
    check_code(config.lora_base_dtype, "lora_base_dtype")
    checkpoints = open_output(config)
    found = checkpoints.read()
    columns = DataColumns.of_prompts(config)
    rewards = load_reward_sources(config, columns)
    tokenizer = load_tokenizer(config.policy, "policy")
    template = load_template(config.chat_template, tokenizer, config.template_date)
    written = load_written(config, tokenizer, columns)
    _check_models(config, tokenizer, template)
    check_device(config, device, distributed.world_size())
    stop_ids = stop_token_ids(config.policy, tokenizer, template)
    check_min_length(config.min_response_length, stop_ids, load_config(config.policy, "policy"))
    sampling = Sampling(config.max_response_length, config.temperature, stop_ids, config.min_response_length)
    delimiters = _delimiters(config, tokenizer)
    prompts = load_prompts(config, tokenizer, template)
    ptx = load_ptx(config, tokenizer, template) if config.ptx_coef else None
    trial = made_up(prompts, columns, tokenizer)
    try_sources(rewards, trial)
    try_written(list(written.values()), trial)
    checkpoints.check_inputs(config)
    wanted = max(1, round(config.epochs * len(prompts.prompt_ids)))
    iterations = config.iterations or -(-wanted // config.drawn_prompts)
    special = special_tokens_used(tokenizer, template, stop_ids, prompts.prompt_ids)
    readers = [_reader(config, path, tokenizer, special, prompts) for path in config.reward_model]
    return Inputs(
        device, checkpoints, found, rewards, written, tokenizer, template, sampling, delimiters, prompts, columns,
        Rows(ptx.prompt_ids, ptx.response_ids) if ptx else None, special, readers, iterations,
    )  # fmt: skip


def _check_reach(config: RTOConfig) -> None:
    """ConfigError where a rank could not reach a server that is for the machine of rank 0 alone."""
    if config.rollout_engine != "vllm-serve":
        return
    near = [url for url in config.vllm_url if address.is_near(url)]
    if config.vllm_url and not near:
        return
    first, *others = distributed.hosts()
    what = f"{without_credentials(near[0])} is" if near else "the recipe's own servers are"
    require(
        not (elsewhere := sorted({host for host in others if host != first})),
        f"vllm_url: {what} reached from {first} alone, and ranks run on {', '.join(elsewhere)} too; start servers in a "
        "private network (docs/rollouts.md) and give their URLs",
    )


def load(config: RTOConfig, inputs: Inputs) -> Loaded:
    """Policy, critic and an online DPO model in their training engines, beside them the frozen and reward models."""
    longest = config.max_prompt_length + config.max_response_length
    partitioned = partitions(config, distributed.world_size(), inputs.device.type)
    placement, loading = place(config, inputs.device, config.score_tokens, longest, lockstep=partitioned)
    iterations, updates = inputs.iterations, config.ppo_epochs * (config.responses // config.train_batch)
    policy_model = load_policy(config.policy, argument="policy", lora=config.lora, **loading)
    one_base = OneBase(policy_model, config.policy) if config.lora else None
    watch_router(policy_model, config.router_aux_coef)
    rates = {name: getattr(config, f"lora_{name}" if config.lora else name) for name in RATES}
    steps = max(1, (iterations - config.critic_warmup) * updates)
    policy = TrainEngine(policy_model, config, peak_lr=rates["policy_lr"], total_steps=steps)
    critic, origin = None, "none, the advantages need none"
    if config.uses_critic:
        critic_model, origin = _critic(config, inputs, loading, one_base if config.lora_critic == "shared" else None)
        critic = TrainEngine(critic_model, config, peak_lr=rates["critic_lr"], total_steps=iterations * updates)

    online = None
    if config.online != "off":
        online = _online(config, iterations, loading, one_base, rates["online_lr"])
    trained = [engine for engine in (policy, critic, online) if engine]
    models = [engine.model for engine in trained]
    rehearse_export(models, inputs.tokenizer, inputs.template)
    exports = 1 + ((iterations - 1) // config.export_every if config.export_every else 0)
    tight = check_space(config, models, exports, averaged=config.ema_decay > 0)

    whole = "host" if config.park_frozen else "device"
    loading["home"] = "rank 0" if partitioned else whole
    kept: list[FrozenModel] = []

    def keep(loader: Callable[..., torch.nn.Module], path: str, argument: str) -> FrozenModel:
        if config.frozen_dtype == "off":
            model = loader(path, argument=argument, **loading)
            kept.append(frozen(model, config, parks=config.park_frozen, partitioned=partitioned))
            return kept[-1]
        model = loader(path, argument=argument, **loading | {"home": "host"})
        quantise(model, config.frozen_dtype, argument, device=inputs.device)
        kept.append(frozen(model, config, parks=config.park_frozen, partitioned=False))
        kept[-1].whole = whole_one(loader, path, argument)
        return kept[-1]

    def whole_one(loader: Callable[..., torch.nn.Module], path: str, argument: str) -> Callable[[], FrozenModel]:
        """What loads again, not in codes, a model that is in them."""
        again = loading | {"home": "host", "placement": None}  # without the checks, in which all ranks take part
        return lambda: lent(loader(path, argument=argument, **again), inputs.device)

    def once(
        loader: Callable[..., torch.nn.Module], on_base: Callable[[str, str], torch.nn.Module | None]
    ) -> Callable[[str, str], FrozenModel]:
        """Of a path and the setting that names it: the model, the same one for the same path."""
        seen: dict[str, FrozenModel] = {}

        def load_once(path: str, argument: str) -> FrozenModel:
            if path not in seen:
                shared = on_base(path, argument)
                if shared:  # trained models stand on its weights, which lie where theirs do
                    kept.append(frozen(shared, config, partitioned=config.zero_stage == 3))
                    if config.lora_base_dtype != "off":
                        kept[-1].whole = whole_one(loader, path, argument)
                    seen[path] = kept[-1]
                else:
                    seen[path] = keep(loader, path, argument)
            return seen[path]

        return load_once

    apart = one_base.apart if one_base else _nothing
    on_base = one_base if config.zero_stage < 3 or partitioned else None
    language = once(load_policy, on_base.language if on_base else apart)
    scalar = once(load_scalar, on_base.scalar if on_base else apart)
    reference = language(config.reference or config.policy, "reference")
    dpo: Model | Mixture | None = None
    dpo_ref = reference
    if online:
        dpo = online.evaluate
    elif config.dpo_scale:
        models = [language(path, "dpo_model") for path in config.dpo_model]
        single = config.dpo_weights == (1.0,)
        dpo = models[0] if single else Mixture(models, config.dpo_weights, config.dpo_pessimism)
    if config.dpo_scale and config.dpo_ref and config.dpo_ref != (config.reference or config.policy):
        dpo_ref = language(config.dpo_ref, "dpo_ref")
    tokens = load_token_sources(config, inputs.written, placement, language, scalar)
    names = ["model"] if len(config.reward_model) == 1 else [f"model{i}" for i in range(len(config.reward_model))]
    sources, readings = [], []
    for path, name, reader in zip(config.reward_model, names, inputs.readers, strict=True):
        model = scalar(path, "reward_model")
        end = end_of_turn(inputs.tokenizer, inputs.template)
        sources.append(ModelReward(name, model, placement, end, reader.positions, reader.own_text))
        readings.append(f"reward model: {reader.said}")
    scorers = Scorers(
        policy=policy.evaluate, critic=critic and critic.evaluate, reference=reference, dpo=dpo, dpo_ref=dpo_ref,
        rewards=[*sources, *inputs.rewards], reward_weights=config.reward_weights, tokens=tokens,
        frozen=kept,
    )  # fmt: skip
    origins = [f"critic: {origin}", *readings, *_adapters_said(config, policy_model, one_base)]
    return Loaded(placement, policy, critic, online, origins, tight, scorers)


RATES = ("policy_lr", "critic_lr", "online_lr")
"""Settings of learning rates of whole weights; those of adapters are named with `lora_` before."""


def _nothing(path: str, argument: str) -> None:
    """No model on a shared base, where there is none."""


def _adapters_said(config: RTOConfig, policy: PolicyModel, one_base: OneBase | None) -> list[str]:
    """What is trained and what is shared, where adapters are."""
    if not policy.adapter:
        return []
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in policy.parameters() if p.requires_grad)
    of = "a new adapter" if policy.adapter.fresh else f"the adapter {config.policy}"
    held = f" in {config.lora_base_dtype}" if config.lora_base_dtype != "off" else ""
    found = [f"policy: {of} of rank {config.lora_rank} on {policy.adapter.base}{held}, {trained:,} numbers"]
    return found + ([one_base.said()] if one_base else [])


def _online(
    config: RTOConfig, iterations: int, loading: dict[str, Any], one_base: OneBase | None, rate: float
) -> TrainEngine:
    """The DPO model in a training engine: one pass over each rollout."""
    (path,) = config.dpo_model
    model = one_base.language(path, "dpo_model", config.lora) if one_base else None
    model = model or load_policy(path, argument="dpo_model", lora=config.lora, **loading)
    watch_router(model, config.router_aux_coef)
    steps = iterations * (config.responses // config.train_batch)
    return TrainEngine(model, config, peak_lr=rate, total_steps=steps)


def _delimiters(config: RTOConfig, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    if config.credit != "sentence":
        return NO_DELIMITERS
    ids = delimiter_ids(tokenizer, config.delimiters)
    require(ids.numel() > 0, f"delimiters: no token of the policy's vocabulary ends with any of {config.delimiters}")
    return ids


def _check_models(config: RTOConfig, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> None:
    """Vocabularies, positions and templates of all models, from their configs alone."""
    policy = load_config(config.policy, "policy")
    check_weights(config.policy, "policy")
    check_adapter(config.policy, config.lora, "policy")
    if config.online != "off":
        check_adapter(config.dpo_model[0], config.lora, "dpo_model")
    check_vocabulary(tokenizer, policy, "policy")
    check_router(policy, config.router_aux_coef, "policy")
    check_template(config.policy, template, "policy")
    length = config.max_prompt_length + config.max_response_length
    check_max_length(length, policy, "max_prompt_length + max_response_length")
    others = [("reference", config.reference)]
    if config.dpo_scale:
        others += [*(("dpo_model", path) for path in config.dpo_model), ("dpo_ref", config.dpo_ref)]
    special = special_tokens_used(tokenizer, template)
    for argument, path in others:
        if path:
            check_tokens(path, argument, tokenizer, config.policy, special, exact=True)
            check_weights(path, argument)
            check_template(path, template, argument)
            other = load_config(path, argument)
            check_max_length(length, other, f"max_prompt_length + max_response_length ({argument})")
            if argument == "dpo_model" and config.online != "off":
                check_router(other, config.router_aux_coef, argument)
    check_token_models(config, tokenizer, special)
    for path in config.reward_model:
        reward, own = load_config(path, "reward_model"), load_tokenizer(path, "reward_model")
        check_reward_head(path, "reward_model")
        check_vocabulary(own, reward, "reward_model")
        if not _difference(tokenizer, special, path):
            check_max_length(length, reward, "max_prompt_length + max_response_length (reward_model)")
            check_template(path, template, "reward_model")


def _difference(tokenizer: PreTrainedTokenizerBase, special_used: frozenset[str], path: str) -> str:
    """Why the reward model at `path` cannot read the policy's tokens, or ""."""
    top, size = max(tokenizer.get_vocab().values()), load_config(path, "reward_model").get_text_config().vocab_size
    if top >= size:
        return f"the policy's tokens have ids up to {top}, it has {size} of them"
    return tokenizer_difference(tokenizer, load_tokenizer(path, "reward_model"), special_used)


def _critic(
    config: RTOConfig, inputs: Inputs, loading: dict[str, Any], one_base: OneBase | None
) -> tuple[ScalarModel, str]:
    """The critic and where it came from; one_base: what it may stand on."""
    why, lora = "", config.lora
    if config.reward_model and config.critic != "policy":
        path = config.reward_model[0]
        difference = _difference(inputs.tokenizer, inputs.special_used, path)
        if not difference:
            shared = one_base.scalar(path, "critic", lora) if one_base else None
            scalar = shared or load_scalar(path, argument="reward_model", lora=lora, **loading)
            return scalar, f"starts from the reward model {path}"
        require(
            config.critic == "auto",
            f"critic: the reward model {path!r} has another tokenizer than the policy ({difference}), so its weights "
            "cannot read the policy's tokens; use --critic policy",
        )
        why = f", since the reward model {path} has another tokenizer ({difference})"
    shared = one_base.scalar(config.policy, "critic", lora, new=True) if one_base else None
    scalar = shared or new_scalar(config.policy, argument="policy", lora=lora, **loading)
    return scalar, f"starts from the policy's backbone {config.policy} with a zero head{why}"


def _reader(
    config: RTOConfig, path: str, tokenizer: PreTrainedTokenizerBase, special_used: frozenset[str], prompts: PromptData
) -> Reader:
    """How the reward model at `path` reads; DataError for a prompt that it cannot read. Collective."""
    difference = _difference(tokenizer, special_used, path)
    positions = getattr(load_config(path, "reward_model").get_text_config(), "max_position_embeddings", 0)
    if not difference:
        return Reader(None, positions, f"{path} reads the policy's tokens")
    own = load_tokenizer(path, "reward_model")
    text = OwnText(path, own, load_template("auto", own, config.template_date), positions, prompts)
    tight = text.check(config.max_response_length)
    said = f"{path} tokenises the texts anew, since {difference}" + (f"; {tight}" if tight else "")
    return Reader(text, positions, said)


def made_up(prompts: PromptData, columns: DataColumns, tokenizer: PreTrainedTokenizerBase) -> ResponseTexts:
    """Made-up responses to the first prompts, to try reward sources on."""
    ids, count = tokenizer.encode(TRIAL, add_special_tokens=False), len(prompts.texts[:TRIED])
    return ResponseTexts(
        prompts.texts[:TRIED], [TRIAL] * count, prompts.messages[:TRIED], [ids] * count,
        columns.of(prompts.rows[:TRIED]),
    )  # fmt: skip


def load_reward_sources(config: RTOConfig, columns: DataColumns) -> list[RewardSource]:
    """The sources of `reward_fn` and `reward_url`, in that order; calls and requests nothing.

    Raises ConfigError for a function that cannot be imported or wants what there is not, a malformed URL, and a
    source given twice.
    """
    sources: list[RewardSource] = [FunctionReward.load(spec, columns) for spec in config.reward_fn]
    for url in config.reward_url:
        labels = label_column(columns)
        timeout, attempts = config.reward_timeout_s, config.reward_retries + 1
        sources.append(RemoteReward(url, timeout_s=timeout, attempts=attempts, labels=labels))
    names = [s.name for s in sources]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"reward source {name} is given twice; give it once with a larger --reward-weight")
    return sources
