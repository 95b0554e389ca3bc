"""A run meets thousands of micro-batch sizes; none of them may make a rank compile while the others wait."""

import pytest
import rto_kernels as rk
import torch
from rto_kernels import aot
from rto_kernels._dispatch import INTERPRET

pytestmark = pytest.mark.skipif(INTERPRET, reason="interpreted kernels are not compiled")


def launches(tokens: int, chip: str) -> set:
    hidden, weight = torch.zeros(tokens, 64, dtype=torch.bfloat16), torch.zeros(1024, 64, dtype=torch.bfloat16)
    hidden.requires_grad_(), weight.requires_grad_()
    targets, row = torch.zeros(tokens, dtype=torch.int64), torch.zeros(tokens)
    ends = torch.tensor([0, tokens], dtype=torch.int32)
    with aot.recording(chip) as found:
        rk.token_logprobs(hidden, weight, targets, backend="triton").sum().backward()
        rk.token_logprobs(hidden, weight, targets, backend="triton", save_probs=True, return_entropy=True)
        by_products = ("mean_logits", "is_top1", "log_sum_sq_probs")
        rk.token_logprobs(hidden, weight, targets, backend="triton", extras=by_products)
        kw = {"cu_seqlens": ends, "backend": "triton"}
        rk.fused_linear_ppo_loss(hidden, weight, targets, row, row, **kw).policy_loss.backward()
        rk.fused_linear_ppo_loss(hidden, weight, targets, row, row, **kw, entropy_coef=0.1).policy_loss.backward()
        estimate = rk.gae(row, row, **kw)
        leaf = row.clone().requires_grad_()
        rk.ppo_loss(leaf, row, estimate.advantages, **kw).policy_loss.backward()
        rk.token_rewards(row, row, row, torch.zeros(1), beta1=0.05, beta2=0.01, **kw)
    return set(found)


@pytest.mark.parametrize("chip", ["sm80", "sm90"])
def test_the_number_of_tokens_is_compiled_for_once(chip):
    # Beyond one chunk d(weight) adds up in fp32, by a variant of its own.
    first = launches(4096, chip) | launches(9000, chip)
    assert len(first) >= 10
    for tokens in (4095, 17, 1, 8200, 20001):
        new = {launch.name for launch in launches(tokens, chip) - first}
        assert not new, f"{tokens} tokens compile {sorted(new)} again"
