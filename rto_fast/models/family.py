"""Whether a model computes in packed rows what it computes from each sequence.

Families differ in what a token takes from its neighbours in a row: recurrent states, convolutions, positions, biases of
attention. No list of names tells which; one short row of random tokens does, read packed and read one by one by
transformers' own forward with eager attention, in the run's dtype on the run's device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig

from rto_fast import distributed
from rto_fast.errors import ConfigError
from rto_fast.models.attention import ALONE, PACKED
from rto_fast.models.heads import PolicyModel, ScalarModel, backbone, hidden_states
from rto_fast.models.packing import PackedBatch, Placement

LENGTHS = (5, 2, 9, 3)
"""Tokens of the sequences compared. Short ones: what leaks from a neighbour reaches most of their tokens."""
LONGEST_WINDOW = 1024
"""Attention windows up to this many tokens are overrun by most tokens of one more sequence, if by the run's."""
LIMIT = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}
"""By dtype: the relative difference that rounding may cause in `SHALLOW` layers; it grows as the root of their number.

Measured in bf16 on tiny random models of 90 families: .021 at most where packing is exact, .084 at least where not."""
SHALLOW = 16
STRETCHED = ("dynamic", "longrope")
"""Rotary embeddings whose angles depend on the longest sequence of a row."""


@dataclass(frozen=True)
class Difference:
    """Ours against each sequence alone."""

    relative: float
    """|ours - alone| / |alone| of a token's logits less their mean (a scalar model: of its states); the median over the
    tokens of a sequence, since rounding may send a token of a mixture to another expert; the worst sequence's."""
    nats: float
    """Largest difference of a log-prob (a scalar model: 0)."""

    @staticmethod
    def of(ours: list[Tensor], alone: list[Tensor], *, logits: bool) -> Difference:
        """ours, alone: [length, K] of each sequence; left out where its own are not finite, which the run will meet."""
        relative, nats = 0.0, 0.0
        for x, y in zip(ours, alone, strict=True):
            if not y.isfinite().all():
                continue
            if logits:
                nats = max(nats, float((x.log_softmax(-1) - y.log_softmax(-1)).abs().max()))
                x, y = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
            of_token = (x - y).norm(dim=-1) / y.norm(dim=-1).clamp_min(1e-30)
            relative = max(relative, float(of_token.nan_to_num(torch.inf).median()))
        return Difference(relative, nats)

    def __str__(self) -> str:
        size = f"log-probs differ by {self.nats:.2g} nat" if self.nats else "states differ"
        return f"{size} ({self.relative:.1g} relative)"


def own_outputs(model: Any, placement: Placement, name: str) -> list[Tensor]:
    """What transformers' own forward with eager attention makes of each sequence alone; before heads are exchanged.

    [length - 1, V] fp64 logits of each before its last token; of a model without an lm_head [length, H] states. Raises
    ConfigError where the model does not run.
    """
    lm = model.get_output_embeddings() is not None
    try:
        with _at_rest(model, placement.device) as device, _attention(model, "eager"):
            outs = []
            for tokens in sequences(model.config, placement.longest):
                out = (model if lm else backbone(model))(input_ids=tokens[None].to(device), use_cache=False)
                outs.append((out.logits[0, :-1] if lm else out.last_hidden_state[0]).double().cpu())
            return outs
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the families' own, of any type
        raise ConfigError(f"{name} does not run on one sequence of text: {_reason(error)}") from error


def check_family(
    model: PolicyModel | ScalarModel, alone: list[Tensor], placement: Placement, name: str, *, together: bool = True
) -> None:
    """Compares the model as the run calls it with `own_outputs`; collective, every rank comes to the same end.

    together: False on a rank that checks for all of them.

    Without packing a model whose default attention differs from its eager one gets the latter. Raises ConfigError
    where the model differs beyond rounding.
    """
    inner = model.inner
    failure = check_config(inner.config, placement)
    if not failure:
        failure = _failure(model, alone, placement)
        if failure and placement.kernel == ALONE:
            _set_attention(inner, "eager")
            failure = _failure(model, alone, placement)
    failures = [f for f in (distributed.gather_objects(failure) if together else [failure]) if f]
    if failures and placement.kernel == ALONE:
        raise ConfigError(f"{name} is not supported: {failures[0]}")
    if failures:
        raise ConfigError(f"{name} cannot be packed: {failures[0]}. Use --packing off")


def check_config(config: PretrainedConfig, placement: Placement) -> str:
    """Why the run's sequences cannot be packed, where a short row would not show it; else ""."""
    text, longest = config.get_text_config(decoder=True), placement.longest
    if placement.kernel == ALONE:
        return ""
    for rope in _ropes(getattr(text, "rope_parameters", None)):
        original = (
            rope.get("original_max_position_embeddings") or getattr(text, "max_position_embeddings", None) or longest
        )
        if rope.get("rope_type") in STRETCHED and longest > original:
            return (f"its positions ({rope['rope_type']}) depend on the longest sequence of a row above {original} "
                    f"tokens, and the run's have up to {longest}")  # fmt: skip
    chunk = getattr(text, "attention_chunk_size", None)
    if isinstance(chunk, int) and chunk < longest:
        return f"its attention ends at chunks of {chunk} tokens, and the run's sequences have up to {longest}"
    return ""


def sequences(config: PretrainedConfig, longest: int) -> list[Tensor]:
    """Random tokens [length] int64, none of them special; the same on every rank, from a generator of their own."""
    text = config.get_text_config(decoder=True)
    windows = [getattr(text, name, None) for name in ("sliding_window", "index_topk")]
    overrun = [2 * w + 3 for w in windows if isinstance(w, int) and 0 < w < min(longest, LONGEST_WINDOW + 1)]
    special = {value for c in (config, text) for key, value in c.to_dict().items()
               if key.endswith(("token_id", "token_index")) and isinstance(value, int)}  # fmt: skip
    plain = torch.tensor([i for i in range(text.vocab_size) if i not in special])
    generator = torch.Generator().manual_seed(0)
    return [plain[torch.randint(len(plain), (n,), generator=generator)] for n in (*LENGTHS, *overrun)]


def _failure(model: PolicyModel | ScalarModel, alone: list[Tensor], placement: Placement) -> str:
    """How the model differs, or why it does not run; "" where it does neither."""
    limit = limit_of(model)
    where = "with one sequence a row" if placement.kernel == ALONE else "in a packed row"
    try:
        found = difference(model, alone, placement)
        if found.relative > limit:
            theirs = "transformers' own forward of each sequence alone"
            return f"{where} its {found} from {theirs}; {limit:.1g} is rounding"
        found = difference(model, alone, placement, training=True)
    except torch.OutOfMemoryError:
        raise
    except ConfigError as error:
        return str(error)
    except Exception as error:  # the families' own, of any type
        return f"it does not run ({_reason(error)})"
    return f"in training its {found} from those in evaluation" if found.relative > limit else ""


def limit_of(model: PolicyModel | ScalarModel) -> float:
    """Relative difference that rounding may cause."""
    layers = getattr(model.inner.config.get_text_config(decoder=True), "num_hidden_layers", None) or SHALLOW
    return LIMIT[next(model.parameters()).dtype] * max(1.0, layers / SHALLOW) ** 0.5


def difference(
    model: PolicyModel | ScalarModel, alone: list[Tensor], placement: Placement, *, training: bool = False
) -> Difference:
    """The model as the run calls it, in training or in evaluation, against `own_outputs`."""
    inner = model.inner
    with _at_rest(inner, placement.device) as device, _mode(inner, training):
        elsewhere = device != placement.device and placement.kernel != ALONE
        kernel = "sdpa" if elsewhere else placement.kernel
        rows = sequences(inner.config, placement.longest)
        batch = PackedBatch.make(rows, [1] * len(rows), device, kernel)
        with _attention(inner, PACKED if elsewhere else None):
            if isinstance(model, PolicyModel):
                ours, lens = model(batch, _logits), [len(r) - 1 for r in rows]
            else:
                ours, lens = hidden_states(backbone(inner), batch), [len(r) for r in rows]
    return Difference.of(list(ours.double().cpu().split(lens)), alone, logits=isinstance(model, PolicyModel))


def _logits(hidden: Tensor, weight: Tensor, _: Tensor, *, bias: Tensor | None, softcap: float | None) -> Tensor:
    """A read of the logits themselves, [R, V]."""
    logits = F.linear(hidden, weight, bias)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


@contextmanager
def _at_rest(model: nn.Module, device: torch.device) -> Iterator[torch.device]:
    """The model on the device without gradients, then back where it was; random states stay as they were.

    Gives the device: the CPU where the model does not fit (ZeRO-3 will take it apart).
    """
    home = next(model.parameters()).device
    if device.type == "cuda":
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        if 1.2 * size > torch.cuda.mem_get_info(device)[0]:
            device = home
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        waiting = [(p, p.data) for p in model.parameters()] if device != home else []
        if device != home:
            model.to(device)
        try:
            yield device
        finally:
            for parameter, data in waiting:  # nothing is copied back, and weights mapped from files stay so
                parameter.data = data
            if device != home:
                model.to(home)


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The model in training or in evaluation, then in the mode that it had."""
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)


@contextmanager
def _attention(model: nn.Module, name: str | None) -> Iterator[None]:
    """The model with another attention (None: with its own), then with the old one."""
    before = [(config, config._attn_implementation) for config in _configs(model)]
    if name:
        _set_attention(model, name)
    try:
        yield
    finally:
        for config, old in before:
            config._attn_implementation_internal = old


def _set_attention(model: nn.Module, name: str) -> None:
    """In every part of the model: some families' classes do not let transformers do it."""
    for config in _configs(model):
        config._attn_implementation_internal = name


def _configs(model: nn.Module) -> list[PretrainedConfig]:
    """The configs of all parts; decoders of old families have copies of their own."""
    found: dict[int, PretrainedConfig] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig):
            parts = [config, *(getattr(config, key, None) for key in config.sub_configs)]
            found |= {id(c): c for c in parts if isinstance(c, PretrainedConfig)}
    return list(found.values())


def _ropes(parameters: Any) -> Iterator[dict[str, Any]]:
    """The settings of rotary embeddings: one for the model, or one for each kind of layer."""
    if isinstance(parameters, dict):
        if "rope_type" in parameters:
            yield parameters
        else:
            for inner in parameters.values():
                yield from _ropes(inner)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
