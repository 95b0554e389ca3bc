"""Bytes that one rank's device holds in each phase of a run.

With P parameters of a trained model, b bytes each (2 in bf16), R ranks and ZeRO-2, a rank holds

    b·P weights + 4·P/R fp32 weights + 8·P/R moments of AdamW

and, in an update (under ZeRO-3 always), 4·P/R fp32 gradients, a bucket of gradients under way, and activations. A
frozen model is b·P whole, b·P/R partitioned. Constants of DeepSpeed are its defaults, which `deepspeed_config` leaves
alone.

With an adapter of A numbers fp32 weights, moments and gradients are A's, and a model on the policy's base holds b·A.
ZeRO-3 takes the base apart once, b·P/R, and each adapter, b·A/R.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rto_fast.backend.frozen import partitions
from rto_fast.config import RTOConfig
from rto_fast.memory.shapes import KNOWN, ModelShape, adapted, names_a_size, reads_alike, shape_of
from rto_fast.models.one_base import BaseFiles
from rto_fast.models.quantised import CODES

GIB = 1 << 30
BUCKET = 500_000_000
"""Elements of DeepSpeed's buckets for gradients and for gathering parameters."""
LIVE = 1_000_000_000
"""Parameters that ZeRO-3 keeps gathered at most, beside those that it fetches ahead."""
AHEAD = 50_000_000
"""Parameters that ZeRO-3 fetches ahead."""
HEAD_BLOCK = {"cuda": 1 << 30, "cpu": 3 << 26}
"""Bytes of the probabilities that the kernels keep at once."""


RESERVE = 1.3 * GIB
"""What CUDA, NCCL and the allocator's gaps take of a device."""
MERGING = 5
"""Copies of a matrix at most while an adapter is merged into it: the sum, the product, what checks them."""
VLLM_ASLEEP = 2 * GIB
"""What a sleeping vLLM keeps on the device: its CUDA graphs and buffers."""
VLLM_WORK = 1.5 * GIB
"""What vLLM takes of its share beside weights and cache: activations and CUDA graphs."""


@dataclass(frozen=True)
class Models:
    """The shapes of a run's models."""

    policy: ModelShape
    critic: ModelShape | None
    frozen: tuple[tuple[str, ModelShape], ...]
    """(argument, shape) of each model that is only scored with."""
    online: ModelShape | None = None
    """The DPO model where it is trained."""

    @property
    def trained(self) -> list[tuple[str, ModelShape]]:
        """In the order in which they are loaded."""
        shapes = {"policy": self.policy, "critic": self.critic, "online DPO": self.online}
        return [(name, shape) for name, shape in shapes.items() if shape]


@dataclass(frozen=True)
class Machine:
    """What a run is given. Sizes in bytes."""

    ranks: int
    device: float
    """Memory of one rank's device."""
    reserve: float
    """What CUDA, NCCL and the allocator's gaps take of it."""
    kind: str = "cuda"
    """cuda, or cpu: there memory that is asked for counts where it is written to alone."""
    node_ranks: int = 8
    """Ranks that share a host, at most."""
    host: float = math.inf
    """Memory of that host."""

    @property
    def on_node(self) -> int:
        """Ranks on the node of rank 0."""
        return min(self.ranks, self.node_ranks)


@dataclass(frozen=True)
class Phase:
    """What one rank's device holds at a phase's peak, bytes by what it is."""

    name: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def models_of(config: RTOConfig) -> Models:
    """The models that a run with these settings loads, from their configs. Raises ConfigError as `shape_of`."""
    policy, reward, shapes = config.policy, config.reward_model, _Shapes(config)
    of_policy, critic = shapes.trained(policy, "policy", shares=False), None
    if config.uses_critic:  # `auto` is taken for the reward model: whether tokenizers agree, a config does not say
        new = config.critic == "policy" or not reward
        start = (policy, "policy") if new else (reward[0], "reward_model")
        critic = shapes.trained(*start, scalar=True, new=new, shares=config.lora_critic == "shared")
    named = [("reference", config.reference or policy, False)]
    online = shapes.trained(config.dpo_model[0], "dpo_model") if config.online != "off" else None
    if config.dpo_scale:
        named += [("dpo_model", path, False) for path in config.dpo_model if not online]
        named += [("dpo_ref", config.dpo_ref, False)] * bool(config.dpo_ref)
    named += [("token_reward", path, spec.scalar) for spec, _ in config.other_token_sources for path in spec.models]
    named += [("reward_model", path, True) for path in reward]
    frozen, loaded = [], set()
    for name, path, scalar in named:
        if (path, scalar) not in loaded:  # a model that two settings name is loaded once
            frozen.append((name, shapes.frozen(path, name, scalar=scalar)))
        loaded |= {(path, scalar)} if path not in KNOWN else set()  # else the name of a size, not a model's
    return Models(of_policy, critic, tuple(frozen), online)


class _Shapes:
    """Shapes of a run's models: with an adapter each where adapters are trained."""

    def __init__(self, config: RTOConfig) -> None:
        self.policy, self.lora = config.policy, config.lora
        self.base = BaseFiles(config.policy) if self.lora and not names_a_size(config.policy) else None

    def trained(
        self, path: str, argument: str, *, scalar: bool = False, new: bool = False, shares: bool = True
    ) -> ModelShape:
        """new: with a new head; shares: on the policy's base where its weights are the same."""
        shape = shape_of(path, argument, scalar=scalar)
        if not self.lora:
            return shape
        on_base = shares and self._on_base(path, argument, scalar, new)
        return adapted(shape, path, argument, self.lora, on_base=on_base)

    def frozen(self, path: str, argument: str, *, scalar: bool) -> ModelShape:
        """An adapter on other weights is merged. The name of a size stands for an adapter of the run's kind."""
        shape = shape_of(path, argument, scalar=scalar)
        if not self.lora or not self._on_base(path, argument, scalar, new=False):
            return shape
        return adapted(shape, path, argument, self.lora if names_a_size(path) else None, on_base=True)

    def _on_base(self, path: str, argument: str, scalar: bool, new: bool) -> bool:
        """As OneBase has it (models/one_base.py)."""
        if names_a_size(path) or not self.base:
            same = path == self.policy
        elif scalar and not new:
            same = self.base.hold_reward_model(path, argument)
        else:
            same = self.base.hold(path, argument)
        return same and (not scalar or reads_alike(self.policy, argument))


def stands(config: RTOConfig, s: ModelShape, *, trained: bool = False) -> bool:
    """Whether a model has no weights of its own but an adapter and a head; frozen ones that stay whole beside a base in
    parts have."""
    return s.on_base and (trained or config.zero_stage < 3 or config.partition_frozen != "no")


def kept_of(config: RTOConfig, s: ModelShape, *, trained: bool) -> int:
    """Numbers that a model adds to those that lie there; an adapter is merged into frozen weights of its own."""
    if stands(config, s, trained=trained):
        return s.adapter + s.head
    return s.parameters + (s.adapter if trained else 0)


def frozen_bytes(config: RTOConfig, s: ModelShape) -> float:
    """What a frozen model holds whole on a device, in codes where `frozen_dtype` has it so."""
    b, numbers = width(config), kept_of(config, s, trained=False)
    if config.frozen_dtype == "off" or stands(config, s):
        return float(b * numbers)
    inner, rows, _ = s.matrices
    return b * (numbers - inner) + CODES[config.frozen_dtype].bytes(inner, rows)


def in_codes(config: RTOConfig, s: ModelShape) -> float:
    """Bytes that linear maps of a model on a base in codes take less than in the run's dtype."""
    if config.lora_base_dtype == "off":
        return 0.0
    inner, rows, _ = s.matrices
    return width(config) * inner - CODES[config.lora_base_dtype].bytes(inner, rows)


def whole_one(config: RTOConfig, models: Models) -> dict[str, float]:
    """The largest model that is held in codes, whole on the host where it is read and where it is measured against; {}
    where none is."""
    sizes = [float(width(config) * s.parameters) for s in [*_coded(config, models), *_measured(config, models)]]
    return {"a model in codes, whole": max(sizes)} if sizes else {}


def lent_one(config: RTOConfig, models: Models) -> dict[str, float]:
    """What the device holds of a whole model that is measured against: a matrix at a time, and what is none."""
    b, lent = width(config), [(s.parameters, *s.matrices) for s in _measured(config, models)]
    sizes = [float(b * (numbers - inner + largest)) for numbers, inner, _, largest in lent]
    return {"a whole model, a matrix at a time": max(sizes)} if sizes else {}


def _coded(config: RTOConfig, models: Models) -> list[ModelShape]:
    """Trained models whose base is in codes."""
    return [s for _, s in models.trained if config.lora_base_dtype != "off"]


def _measured(config: RTOConfig, models: Models) -> list[ModelShape]:
    """Frozen models in codes, whose error is measured."""
    of_base, of_own = config.lora_base_dtype != "off", config.frozen_dtype != "off"
    return [s for _, s in models.frozen if (of_base if stands(config, s) else of_own)]


def phases(config: RTOConfig, models: Models, machine: Machine) -> list[Phase]:
    """The phases in the order of the loop, each at its peak; every one holds what the run keeps between them."""
    base = {"CUDA and NCCL": machine.reserve} if machine.reserve else {}
    weights, states = weights_of(config, models, machine.ranks), states_of(config, models, machine.ranks)
    held = base | weights | states
    waiting, awake = (_frozen(config, models, machine, scoring=scoring) for scoring in (False, True))
    if sampler := sampler_of(config, models, machine):
        held["sampler"] = sampler
    masters = {k: v for k, v in held.items() if not k.endswith("moments")}
    out = [Phase("load", masters | waiting)]
    asleep: dict[str, float] = {}
    if uses_vllm(config, machine):
        vllm = {f"vLLM, {config.vllm_memory_share:g} of the device": config.vllm_memory_share * machine.device}
        out.append(Phase("vLLM start", masters | waiting | vllm))
        out.append(Phase("rollout", held | waiting | vllm))
        asleep = {"vLLM asleep": float(VLLM_ASLEEP)}
    elif config.rollout_engine != "vllm-serve":
        out.append(Phase("rollout", held | waiting | _decoding(config, models, machine.ranks)))
    held |= asleep
    if models.policy.adapter:
        sending: dict[str, float] = {}
        if merges(config, machine):
            sending["a merged matrix"] = float(MERGING * width(config) * models.policy.adapted)
        if asleep:  # its cache sleeps on
            sending["vLLM's weights"] = width(config) * models.policy.parameters / config.vllm_tensor_parallel
        out.append(Phase("weights to the sampler", held | waiting | sending))
    scoring = held | awake | _scoring(config, models, machine)
    if lent := lent_one(config, models):
        start = {k: v for k, v in scoring.items() if not k.endswith("moments")}
        out.append(Phase("error of frozen weights", start | lent))
    out.append(Phase("scoring", scoring))
    for name, shape in models.trained:
        update = _update(config, shape, machine)
        out.append(Phase(f"{name} update", held | waiting | update))
    gathered = max(s.largest_trained for _, s in models.trained) * 4.0 if config.zero_stage == 3 else 0.0
    out.append(Phase("checkpoint", held | waiting | ({"a gathered parameter": gathered} if gathered else {})))
    return out


def uses_vllm(config: RTOConfig, machine: Machine) -> bool:
    """Whether vLLM shares the device. `auto` is taken to find it."""
    return config.rollout_engine in ("vllm", "auto") and machine.kind == "cuda"


def merges(config: RTOConfig, machine: Machine) -> bool:
    """Whether the sampler is pushed whole weights with the adapter merged, and not the adapter alone."""
    vllm = uses_vllm(config, machine) or config.rollout_engine == "vllm-serve"
    return not vllm or config.lora_push == "merged" or config.lora_dora or config.lora_base_dtype != "off"


def sleeps_with_base(config: RTOConfig, machine: Machine) -> bool:
    """Whether a vLLM in the training process keeps the base in the host's memory while it sleeps."""
    return uses_vllm(config, machine) and not merges(config, machine)


def sampler_of(config: RTOConfig, models: Models, machine: Machine) -> float:
    """Bytes of the transformers engine's own weights; 0 where vLLM samples."""
    own = not uses_vllm(config, machine) and config.rollout_engine != "vllm-serve"
    return float(width(config) * models.policy.parameters) if own else 0.0


def least_share(config: RTOConfig, models: Models, machine: Machine) -> float:
    """Share of the device below which vLLM cannot hold its weights and the cache of one sequence."""
    s, split = models.policy, config.vllm_tensor_parallel
    sequence = _longest(config) * cache_of_token(config, s) / split
    return (width(config) * s.parameters / split + VLLM_WORK + sequence) / machine.device


def cache_of_token(config: RTOConfig, s: ModelShape) -> float:
    """Bytes of a token's keys and values."""
    return 2.0 * width(config) * s.layers * s.keys


def _longest(config: RTOConfig) -> int:
    """Tokens of the longest sequence, which is never split."""
    return config.max_prompt_length + config.max_response_length


def width(config: RTOConfig) -> int:
    """Bytes of a weight."""
    return 2 if config.dtype == "bf16" else 4


def weights_of(config: RTOConfig, models: Models, ranks: int) -> dict[str, float]:
    """Weights of the trained models in the dtype of the run, under adapters in codes where those are asked for."""
    share, found = ranks if config.zero_stage == 3 else 1, {}
    for name, s in models.trained:
        less = 0.0 if stands(config, s, trained=True) else in_codes(config, s)
        found[f"{name} weights"] = (width(config) * kept_of(config, s, trained=True) - less) / share
    return found


def states_of(config: RTOConfig, models: Models, ranks: int) -> dict[str, float]:
    """fp32 weights, moments of AdamW, and gradients where they are always there.

    Stage 0 has no second copy of its weights; stage 3 has its gradients from the start on.
    """
    share = ranks if config.zero_stage else 1
    out = {}
    for name, s in models.trained if not config.offload else []:
        if config.zero_stage:
            out[f"{name} fp32 weights"] = 4 * s.trained / share
        if config.zero_stage == 3:
            out[f"{name} gradients"] = 4 * s.trained / share
        out[f"{name} moments"] = 8 * s.trained / share
    return out


def _frozen(config: RTOConfig, models: Models, machine: Machine, *, scoring: bool) -> dict[str, float]:
    partitioned = partitions(config, machine.ranks, machine.kind)
    parks = config.park_frozen and machine.kind == "cuda" and not partitioned
    out: dict[str, float] = {}
    parked: dict[str, float] = {}
    for i, (name, s) in enumerate(models.frozen):
        own = not stands(config, s)  # a model on the policy's base neither parks nor is spread, but by ZeRO-3
        size = frozen_bytes(config, s) / (machine.ranks if partitioned and (own or config.zero_stage == 3) else 1)
        (parked if parks and own else out)[f"{name}{i if name in out | parked else ''}"] = size
    if scoring and parked:  # one at a time
        largest = max(parked, key=lambda name: parked[name])
        out[largest] = parked[largest]
    return out


def _scoring(config: RTOConfig, models: Models, machine: Machine) -> dict[str, float]:
    """One forward's activations, and what ZeRO-3 has gathered for it."""
    shapes = [models.policy, *(s for _, s in models.frozen), *([models.online] if models.online else [])]
    tokens = max(config.score_tokens, _longest(config))
    out = {"activations": max(tokens * _forward(config, s) for s in shapes)}
    own = [s for _, s in models.frozen if not stands(config, s)]
    decoded = [_decoded(config, s, config.frozen_dtype) for s in own]
    decoded += [_decoded(config, s, config.lora_base_dtype) for _, s in models.trained]
    if any(decoded):
        out["a decoded matrix"] = max(decoded)
    whole: list[float] = []
    if partitions(config, machine.ranks, machine.kind):
        spread = [s for _, s in models.frozen] if config.zero_stage == 3 else own
        whole += [kept_of(config, s, trained=False) for s in spread]
    if config.zero_stage == 3:
        whole += [kept_of(config, s, trained=True) for _, s in models.trained]
    if whole:
        # Each model keeps what it has gathered until the next forward of its own; the base is gathered once.
        out["gathered weights"] = width(config) * sum(min(numbers, LIVE + AHEAD) for numbers in whole)
    return out


def _decoded(config: RTOConfig, s: ModelShape, kind: str) -> float:
    """A model's largest matrix as it is decoded; int8 comes by way of fp32."""
    return 0.0 if kind == "off" else float((width(config) + (8 if kind == "int8" else 0)) * s.matrices[2])


def _forward(config: RTOConfig, s: ModelShape) -> float:
    """Bytes a token at the peak of a forward that keeps nothing: the residual stream and one feed-forward block."""
    b = width(config)
    return b * (3 * s.hidden + max(3 * s.intermediate, 2 * s.query + 4 * s.keys)) + (8 * s.hidden if b == 2 else 0)


def _kept(config: RTOConfig, s: ModelShape) -> float:
    """Bytes a token that one layer keeps for its backward: inputs of the products, attention's and the gate's."""
    b = width(config)
    norms = 8 * s.hidden if b == 2 else 0  # two norms read their input in fp32
    return b * (6 * s.hidden + 2 * s.query + 4 * s.keys + 4 * s.intermediate) + norms


def _update(config: RTOConfig, s: ModelShape, machine: Machine) -> dict[str, float]:
    """The larger of the last backward and the optimiser's step."""
    b, tokens = width(config), max(config.micro_tokens, _longest(config))
    ranks, lazy = machine.ranks, machine.kind == "cpu"
    share = ranks if config.zero_stage >= 2 else 1
    gradients = {"gradients": 4 * s.trained / share}
    if config.offload or config.zero_stage == 3:  # they go to the host as they come, or are counted in every phase
        gradients = {}
    elif config.zero_stage < 2:
        gradients = {"gradients": b * s.trained + (4 * s.trained / ranks if config.zero_stage else 0)}
    layers = tokens * (_kept(config, s) + b * (3 * s.intermediate + 2 * s.hidden))
    again = config.recomputes(s.parameters + s.adapter)
    layers += tokens * (s.layers * b * s.hidden if again else (s.layers - 1) * _kept(config, s))
    bucket = min(BUCKET, s.trained) if lazy else BUCKET
    backward = gradients | {"activations": layers}
    if config.zero_stage:
        backward["bucket"] = b * max(bucket, s.largest_trained)
    if config.zero_stage == 3:
        backward["gathered weights"] = b * min(s.parameters, LIVE + AHEAD)
    if decoded := _decoded(config, s, config.lora_base_dtype):
        backward["a decoded matrix"] = decoded
    if s.vocab:
        backward["lm_head"] = _head(config, s, tokens, machine.kind)
    step = dict(gradients)
    if not config.offload and lazy:  # on CUDA AdamW is fused and has none
        step["AdamW's temporaries"] = 8 * s.trained / (ranks if config.zero_stage else 1)
    return max((backward, step), key=lambda parts: sum(parts.values()))


def _head(config: RTOConfig, s: ModelShape, tokens: int, kind: str) -> float:
    """d(weight) in fp32 and in its own dtype, hidden states and their gradient, one block of probabilities.

    A frozen head has no d(weight).
    """
    b = width(config)
    block = min(HEAD_BLOCK[kind], tokens * s.vocab * b)
    gradient = 0 if s.adapter else s.vocab * s.hidden * (4 + b)
    return gradient + tokens * s.hidden * 2 * b + block


def _decoding(config: RTOConfig, models: Models, ranks: int) -> dict[str, float]:
    """Keys and values of the transformers engine, and its logits of one step."""
    s, longest = models.policy, _longest(config)
    tokens = max(config.rollout_tokens, longest)
    rows = min(max(1, tokens // longest), -(-config.responses // ranks))
    out = {"keys and values": rows * longest * cache_of_token(config, s)}
    return out | {"activations": rows * s.vocab * 12.0 + rows * config.max_prompt_length * _forward(config, s)}
