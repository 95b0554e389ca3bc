"""What the tests of the integrations share: random inputs, gradients, and calls that are counted."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE, INTERPRET, sample

MARKS = [
    pytest.mark.skipif(INTERPRET, reason="what is patched does not depend on the backend"),
    pytest.mark.usefixtures("ordinary_memory"),
]


def random(*shape, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(DEVICE)


def graded(function, *inputs):
    """(outputs, gradients) under a random upstream gradient, the same at every call."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outs = function(*leaves)
    outs = [out for out in (outs if isinstance(outs, tuple) else (outs,)) if isinstance(out, torch.Tensor)]
    ups = [random(*out.shape, seed=30 + i) for i, out in enumerate(outs)]
    total = sum((out.float() * up).sum() for out, up in zip(outs, ups, strict=True) if out.requires_grad)
    return outs, torch.autograd.grad(total, leaves)


def rollout(seed=0):
    """[4, 9] tokens with right padding and a gap, and a 0/1 mask."""
    layout = sample("gaps", seed)
    mask = (layout.mask[:4, :9]).float()
    mask[:, 0] = 1
    return mask, [random(4, 9, scale=0.6, seed=s) for s in range(10, 16)]


def called(monkeypatch, module) -> list:
    """Into this list goes an entry for each call that an integration makes of our loss."""
    calls, ours = [], module.ppo_loss
    monkeypatch.setattr(module, "ppo_loss", lambda *a, **k: calls.append(k) or ours(*a, **k))
    return calls
