"""The forward pass by the vendor's products in blocks: it passes the tests of the pass that it stands in for."""

import pytest
import rto_kernels as rk
import torch
from kernel_checks import DEVICE
from rto_kernels import linear_blocks, tiles
from rto_kernels._dispatch import INTERPRET, count_launches
from rto_kernels._vocab_torch import Head
from test_confident_tokens import (  # noqa: F401
    test_a_token_that_became_unthinkable_spoils_no_other,
    test_fused_linear_ppo_loss,
    test_token_logprobs,
)
from test_linear_logprob import (  # noqa: F401
    test_a_share_of_the_probabilities_kept,
    test_columns_at_minus_infinity,
    test_equals_fp64_truth,
    test_nan_in_rows_that_do_not_count_goes_nowhere,
    test_probabilities_kept_in_bf16_are_close,
    test_same_bits_every_time,
    test_strided_inputs_and_expanded_gradients,
    test_targets_outside_the_vocabulary,
)

pytestmark = pytest.mark.skipif(DEVICE != "cuda" and not INTERPRET, reason="needs a GPU or Triton's interpreter")


@pytest.fixture(autouse=True)
def by_blocks(request):
    if request.node.originalname.startswith(("test_blocks", "test_by_products")):
        yield
        return
    with linear_blocks.forced(), count_launches() as launched:
        yield
    assert launched["linear_block"] or not launched  # nothing where the PyTorch path ran, or a case was left out
    assert not launched["linear_stats"]


def problem(n: int = 70, width: int = 24, vocab: int = 333):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(k, width, generator=generator).bfloat16().to(DEVICE) for k in (n, vocab))
    return hidden, weight, torch.randint(vocab, (n,), generator=generator).to(DEVICE)


def test_blocks_serve_chips_without_tiles(monkeypatch, tmp_path):
    hidden, weight, _ = problem()
    head = Head(weight, None, 1.0, 0.0)
    monkeypatch.setenv("RTO_KERNELS_TILES", str(tmp_path / "tiles.json"))
    monkeypatch.setattr(linear_blocks, "_has_tiles", lambda device: True)
    assert not linear_blocks.serves(hidden, head)
    monkeypatch.setattr(linear_blocks, "_has_tiles", lambda device: False)
    assert linear_blocks.serves(hidden, head)
    assert not linear_blocks.serves(hidden, head._replace(by_row=True))
    assert not linear_blocks.serves(hidden.float(), head._replace(weight=weight.float()))
    found = tiles.problem_of(24, 333, 2, hidden.device)
    tiles.remember(found, hidden.device, tiles.choose(found))
    tiles._chosen.cache_clear()  # as in a later process
    assert not linear_blocks.serves(hidden, head)


def test_blocks_are_taken_and_left_by_the_public_functions():
    hidden, weight, targets = problem()
    with count_launches() as tiled:
        expected = rk.token_logprobs(hidden, weight, targets, backend="triton")
    with linear_blocks.forced(), count_launches() as blocks:
        got = rk.token_logprobs(hidden, weight, targets, backend="triton")
        alone = rk.token_logprobs(hidden, weight, targets, backend="triton", deterministic="batch")
    assert tiled["linear_block"] == 0
    assert tiled["linear_stats"] > 0
    rows, columns = linear_blocks.BLOCK_ROWS, linear_blocks.BLOCK_COLUMNS
    assert blocks["linear_block"] == -(-len(hidden) // rows) * -(-len(weight) // columns)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(alone, expected)


def test_by_products_come_from_the_pass_by_tiles():
    hidden, weight, targets = problem()
    names = ("mean_logits", "is_top1", "log_sum_sq_probs")
    expected = rk.token_logprobs(hidden, weight, targets, extras=names, backend="triton")
    with linear_blocks.forced(), count_launches() as launched:
        got = rk.token_logprobs(hidden, weight, targets, extras=names, backend="triton")
    assert launched["linear_extras"] == launched["linear_stats"] == 1
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
