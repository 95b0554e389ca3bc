"""What sources of token rewards say of a rollout, in fp64: one sequence at a time, without a kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rto_fast.contract import Rollout


def of_each_token(rollout: Rollout, read: Callable[[Tensor, Tensor, bool], Tensor]) -> Tensor:
    """[R] fp64: read(tokens of a sequence, places of its response's tokens, truncated), one by one."""
    found = [torch.zeros(0, dtype=torch.float64)]
    with torch.no_grad():
        parts = zip(rollout.sequences(), rollout.prompt_lens.tolist(), rollout.truncated.tolist(), strict=True)
        found += [read(tokens, torch.arange(start, len(tokens)), cut) for tokens, start, cut in parts]
    return torch.cat(found)


def logps(rollout: Rollout, path: str) -> Tensor:
    """[R] log-probs of the tokens."""
    model = AutoModelForCausalLM.from_pretrained(path).double()
    return of_each_token(rollout, lambda s, t, _: model(s[None]).logits[0].log_softmax(-1)[t - 1, s[t]])


def numbers(rollout: Rollout, path: str, bias: float = 0.0) -> tuple[Tensor, Tensor]:
    """[R] each: a scalar head's numbers before the token, and at it."""
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1).double()

    def at(s: Tensor, t: Tensor) -> Tensor:
        raw = model.score(model.model(s[None]).last_hidden_state[0, t])[:, 0] + bias
        return (raw - getattr(model.config, "mean", 0.0)) / getattr(model.config, "std", 1.0)

    before, now = (of_each_token(rollout, lambda s, t, _, back=back: at(s, t - back)) for back in (1, 0))
    return before, now


def endogenous(rollout: Rollout, path: str, alpha: float) -> Tensor:
    """[R] alpha log pi + V - V', V = alpha logsumexp(z / alpha); V' is 0 behind an end of turn."""
    model = AutoModelForCausalLM.from_pretrained(path).double()

    def reward(s: Tensor, t: Tensor, cut: bool) -> Tensor:
        z = model(s[None]).logits[0]
        after = alpha * torch.logsumexp(z / alpha, -1)
        after[-1] *= cut
        return z[t - 1, s[t]] - after[t]  # alpha log pi is z - V

    return of_each_token(rollout, reward)
