"""The bench of a frozen lm_head: the product of its gradient is missing, loss and step of the adapter are the same."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("peft")
from bench.iteration.frozen_head import Update, head_products, measure, policy_of

VOCAB = 211


def test_the_gradients_product_is_left_out():
    found = {}
    for frozen in (True, False):
        update = Update(policy_of(64, 2, VOCAB, frozen=frozen))
        loss = update()
        after = {name: p.detach().clone() for name, p in update.policy.named_parameters()}
        found[frozen] = head_products(update, VOCAB), loss, after
    (without, loss, ours), (whole, other, theirs) = found[True], found[False]
    assert (without, whole) == (2, 3)
    assert torch.equal(loss, other)
    moved = [n for n in ours if "lora_" in n]
    assert all(torch.equal(ours[n], theirs[n]) for n in moved)
    assert not torch.equal(ours["lm.lm_head.weight"], theirs["lm.lm_head.weight"])


def test_both_are_timed():
    found = measure(64, 1, VOCAB, turns=2)
    assert found.keys() == {"frozen_ms", "trained_ms", "ratio", "frozen_head_products", "trained_head_products"}
    assert all(value > 0 for value in found.values())
    assert (found["frozen_head_products"], found["trained_head_products"]) == (2, 3)
