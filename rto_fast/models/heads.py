"""Policy, critic and reward model: backbones on packed tokens, and heads.

A head reads chosen positions only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rto_kernels import token_kl, token_logprobs
from torch import Tensor, nn

from rto_fast.errors import ConfigError
from rto_fast.models.adapters import Adapter
from rto_fast.models.attention import ALONE
from rto_fast.models.packing import PackedBatch
from rto_fast.models.router import RouterLoss

_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_FACTORS = ("logit_scale", "lm_head_multiplier")
_DIVISORS = ("logits_scaling",)
"""Names by which families' configs know a soft-cap of their logits, a factor and a divisor."""


Read = Callable[..., Any]
"""What an lm_head is asked for in place of logits, on R positions: a function of

    hidden [R, H], weight [V, H], targets [R] int64, *, bias [V] or None, softcap

such as a kernel, or one with its other arguments filled in."""


class LMHead(nn.Linear):
    """The lm_head that lends its weight to a kernel: [N, V] logits never exist.

    Called as a module, so that DeepSpeed's ZeRO-3 hooks gather and release its weight.
    """

    softcap: float | None

    @classmethod
    def share(cls, linear: nn.Linear, softcap: float | None) -> LMHead:
        """A head on the same parameters (a tied embedding stays tied)."""
        head = cls(1, 1, bias=False, device="meta")
        head.in_features, head.out_features = linear.in_features, linear.out_features
        head.weight, head.bias, head.softcap = linear.weight, linear.bias, softcap
        return head

    def forward(self, hidden: Tensor, targets: Tensor, read: Read) -> Any:
        return read(hidden, self.weight, targets, bias=self.bias, softcap=self.softcap)


def logps_at(temperatures: Sequence[float]) -> Read:
    """A read of the targets' log-probs (nats) at each temperature, [len(temperatures), R] fp32."""

    def read(*args: Tensor, **head: Any) -> Tensor:
        return torch.stack([token_logprobs(*args, temperature=t, **head) for t in temperatures])

    return read


def logps_and_entropy(temperatures: Sequence[float]) -> Read:
    """A read of `logps_at` the temperatures, of which the last is 1, with the entropy at 1 (nats) as one more row."""

    def read(*args: Tensor, **head: Any) -> Tensor:
        *others, one = temperatures
        rows: list[Any] = [token_logprobs(*args, temperature=t, **head) for t in others]
        rows += token_logprobs(*args, temperature=one, return_entropy=True, **head)
        return torch.stack(rows)

    return read


def logp_and_kl(ref_hidden: Tensor, ref_head: LMHead) -> Read:
    """A read of log-probs [R] and of KL(pi_ref || pi) [R], fp32, nats; ref_hidden [R, H] and its head: `states`."""

    def read(hidden: Tensor, weight: Tensor, targets: Tensor, **head: Any) -> tuple[Tensor, Tensor]:
        logp = token_logprobs(hidden, weight, targets, **head)
        kl = token_kl(
            hidden, weight, ref_hidden, ref_head.weight,
            ref_bias=ref_head.bias, ref_softcap=ref_head.softcap, **head,
        )  # fmt: skip
        return logp, kl

    return read


class PolicyModel(nn.Module):
    """A causal language model that answers with what a kernel reads at the positions before given tokens."""

    router: RouterLoss | None = None
    """Where its experts are to be balanced, see `watch_router`."""
    adapter: Adapter | None = None
    """The adapter that is trained in place of the weights."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        head = lm.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise ConfigError(f"model: {type(lm).__name__} has no linear lm_head; it is not supported")
        text = lm.config.get_text_config(decoder=True)
        softcap = next((cap for name in _SOFTCAPS if (cap := getattr(text, name, None))), None)
        self.scale = math.prod(getattr(text, name, None) or 1.0 for name in _FACTORS)
        self.scale /= math.prod(getattr(text, name, None) or 1.0 for name in _DIVISORS)
        lm.set_output_embeddings(LMHead.share(head, softcap))
        self.lm = lm

    @property
    def inner(self) -> Any:
        """transformers' own model."""
        return self.lm

    def forward(self, batch: PackedBatch, read: Read | None = None) -> Any:
        """What `read` finds at the R response tokens; by default their log-probs (nats), [R] fp32."""
        hidden = self._read_states(batch)
        return self.lm.get_output_embeddings()(hidden, batch.response_tokens, read or token_logprobs)

    def states(self, batch: PackedBatch) -> tuple[Tensor, LMHead, Tensor]:
        """Hidden states [R, H] before the response tokens, the head that reads them, and the log-probs [R] fp32.

        For a model whose weights are whole on this rank.
        """
        hidden, head = self._read_states(batch), self.lm.get_output_embeddings()
        return hidden, head, head(hidden, batch.response_tokens, token_logprobs)

    def _read_states(self, batch: PackedBatch) -> Tensor:
        """[R, H] before the response tokens, by the factor of the family's logits: (s h) W = s (h W)."""
        hidden = hidden_states(backbone(self.lm), batch, self.training and self.router)[batch.state_positions]
        return hidden if self.scale == 1 else hidden * self.scale


class ScalarHead(nn.Linear):
    """A linear map to one number, in fp32 whatever the backbone's dtype."""

    def forward(self, hidden: Tensor) -> Tensor:
        """[R, H] -> [R] fp32."""
        bias = None if self.bias is None else self.bias.float()
        return F.linear(hidden.float(), self.weight.float(), bias).squeeze(-1)


class ScalarModel(nn.Module):
    """A backbone with one number a position: reward model and critic.

    The number is normalised, (v - mean) / std, by the statistics that the reward model's recipe stored, so that
    critic and reward speak the same units.
    """

    router: RouterLoss | None = None
    """Where its experts are to be balanced, see `watch_router`."""
    adapter: Adapter | None = None
    """The adapter that is trained in place of the weights."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        stored: Any = classifier.score
        head = ScalarHead(stored.weight.shape[1], 1, bias=False, device="meta")
        head.weight, head.bias = stored.weight, stored.bias
        classifier.score = head
        self.classifier = classifier
        self.mean = float(getattr(classifier.config, "mean", 0.0))
        self.std = float(getattr(classifier.config, "std", 1.0))

    @property
    def inner(self) -> Any:
        """transformers' own model."""
        return self.classifier

    def forward(self, batch: PackedBatch, positions: Tensor) -> Tensor:
        """The numbers at `positions` [P] int64 of the packed row -> [P] fp32."""
        hidden = hidden_states(backbone(self.classifier), batch, self.training and self.router)[positions]
        return (self.classifier.score(hidden) - self.mean) / self.std


def backbone(model: Any) -> nn.Module:
    """The model without its head; ConfigError where there is none."""
    base = model.base_model
    if base is model:  # some families name another prefix than they use
        base = getattr(model, "model", None)
    if base is None:
        raise ConfigError(f"{type(model).__name__} has no backbone apart from its head; it is not supported")
    return base


def hidden_states(base: nn.Module, batch: PackedBatch, router: RouterLoss | Literal[False] | None = None) -> Tensor:
    """Final hidden states of all N tokens, [N, H]: of one packed row, or of each sequence alone.

    router: where the auxiliary loss of these tokens goes; none = it is not computed.
    """
    asked: dict[str, object] = {"use_cache": False, **({"output_router_logits": True} if router else {})}
    if batch.layout.kernel == ALONE:
        outs = [base(input_ids=tokens[None], **asked) for tokens in batch.tokens.split(batch.layout.lens)]
    else:
        outs = [base(input_ids=batch.tokens[None], **asked, **batch.layout.model_kwargs())]
    if router:
        router.record([out.router_logits for out in outs])
    states = [out.last_hidden_state[0] for out in outs]
    return states[0] if len(states) == 1 else torch.cat(states)
