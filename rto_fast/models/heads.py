"""Policy, critic and reward model: backbones on packed tokens, and heads.

A head reads chosen positions only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rto_kernels import token_kl, token_logprobs
from torch import Tensor, nn

from rto_fast.errors import ConfigError
from rto_fast.models.packing import PackedBatch

# Families that rescale their logits in a way the log-prob head does not know.
_LOGIT_SCALES = ("logits_scaling", "logit_scale")


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

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        head = lm.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise ConfigError(f"model: {type(lm).__name__} has no linear lm_head; it is not supported")
        for name in _LOGIT_SCALES:
            if getattr(lm.config, name, None) not in (None, 1, 1.0):
                raise ConfigError(f"model: {type(lm).__name__} scales its logits ({name}); it is not supported")
        lm.set_output_embeddings(LMHead.share(head, getattr(lm.config, "final_logit_softcapping", None)))
        self.lm = lm

    def forward(self, batch: PackedBatch, read: Read | None = None) -> Any:
        """What `read` finds at the R response tokens; by default their log-probs (nats), [R] fp32."""
        hidden = _hidden(self.lm.base_model, batch)[batch.state_positions]
        return self.lm.get_output_embeddings()(hidden, batch.response_tokens, read or token_logprobs)

    def states(self, batch: PackedBatch) -> tuple[Tensor, LMHead, Tensor]:
        """Hidden states [R, H] before the response tokens, the head that reads them, and the log-probs [R] fp32.

        For a model whose weights are whole on this rank.
        """
        hidden, head = _hidden(self.lm.base_model, batch)[batch.state_positions], self.lm.get_output_embeddings()
        return hidden, head, head(hidden, batch.response_tokens, token_logprobs)


class ScalarHead(nn.Linear):
    """A bias-free linear map to one number, in fp32 whatever the backbone's dtype."""

    def forward(self, hidden: Tensor) -> Tensor:
        """[R, H] -> [R] fp32."""
        return F.linear(hidden.float(), self.weight.float()).squeeze(-1)


class ScalarModel(nn.Module):
    """A backbone with one number a position: reward model and critic.

    The number is normalised, (v - mean) / std, by the statistics that the reward model's recipe stored, so that
    critic and reward speak the same units.
    """

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        weight = classifier.score.weight
        head = ScalarHead(weight.shape[1], 1, bias=False, device="meta")
        head.weight = weight
        classifier.score = head
        self.classifier = classifier
        self.mean = float(getattr(classifier.config, "mean", 0.0))
        self.std = float(getattr(classifier.config, "std", 1.0))

    def forward(self, batch: PackedBatch, positions: Tensor) -> Tensor:
        """The numbers at `positions` [P] int64 of the packed row -> [P] fp32."""
        hidden = _hidden(self.classifier.base_model, batch)[positions]
        return (self.classifier.score(hidden) - self.mean) / self.std


def _hidden(backbone: nn.Module, batch: PackedBatch) -> Tensor:
    """Final hidden states of all N packed tokens, [N, H]."""
    out = backbone(input_ids=batch.tokens[None], use_cache=False, **batch.layout.model_kwargs())
    return out.last_hidden_state[0]
