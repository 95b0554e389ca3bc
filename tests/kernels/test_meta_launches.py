"""Every launcher at real and at extreme sizes, on tensors without memory: see meta_launches.py."""

from collections import Counter

import pytest
import rto_kernels as rk
import torch
import triton
import triton.language as tl
from meta_launches import faults, narrow_pointers, recorded, ttir
from rto_kernels import linear_blocks, linear_logprob, logits_logprob
from rto_kernels._dispatch import INTERPRET
from rto_kernels._vocab_torch import Head
from rto_kernels.linear_forward import FORWARD_TOKENS, SAVED_ELEMENTS, linear_forward_triton
from rto_kernels.linear_logprob import kept_dtype
from triton.tools.tensor_descriptor import TensorDescriptor

pytestmark = pytest.mark.skipif(INTERPRET, reason="interpreted kernels are launched by another path")

MIB = 1 << 20
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# (tokens, hidden, vocabulary, dtype): Llama-3's head, more tokens than a launch, an odd vocabulary, odd widths past 32
# bits, fp32, one token, a weight past 32 bits.
HEADS = [
    (4096, 4096, 128256, BF16),
    (40000, 4096, 128256, BF16),
    (300, 4096, 128257, FP16),
    (70000, 77, 262144, BF16),
    (300, 1024, 32003, FP32),
    (1, 64, 7, BF16),
    (64, 16384, 262144, BF16),
]
CHIPS = ["sm80", "sm90", "sm100"]


def meta(*shape, dtype=FP32):
    return torch.empty(shape, dtype=dtype, device="meta")


def head(n, width, vocab, dtype):
    return meta(n, width, dtype=dtype), meta(vocab, width, dtype=dtype), meta(n, dtype=torch.int64)


def logprobs_and_gradients(h, w, t, *, full: bool, entropy: bool, save: bool):
    """token_logprobs, then its backward operator."""
    bias, softcap = (meta(w.shape[0], dtype=w.dtype), 30.0) if full else (None, 0.0)
    keep = kept_dtype(h) if save else None
    stats = linear_forward_triton(h, t, Head(w, bias, 1.0, softcap), -100, entropy, keep)
    row = meta(h.shape[0])
    linear_logprob._linear_logprob_backward(
        h, w, t, bias, 1.0, softcap, stats.logp, stats.lse, stats.entropy, row, row if entropy else None, stats.saved,
        stats.shift, [True, True, full], "triton",
    )  # fmt: skip


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("size", HEADS, ids=str)
def test_log_probs_of_hidden_states(size, chip):
    with recorded(chip) as record:
        for full in (False, True):
            for save in (False, True):
                logprobs_and_gradients(*head(*size), full=full, entropy=full, save=save)
        rk.token_logprobs(*head(*size), return_entropy=True, extras=("mean_logits", "is_top1"), backend="triton")
    assert not record.wrong
    assert {"linear_stats", "linear_merge", "linear_extras", "linear_dlogits_saved", "linear_product"} <= record.names()


@pytest.mark.parametrize("size", [size for size in HEADS if size[0] != 70000], ids=str)
def test_blocks_for_chips_without_tiles(size):
    """Which have A100's tiles."""
    with recorded("sm80") as record, linear_blocks.forced():
        rk.token_logprobs(*head(*size), return_entropy=True, save_probs=BF16, backend="triton")
        rk.token_logprobs(*head(*size), backend="triton")
    assert not record.wrong
    assert record.names() == {"linear_block", "linear_merge"}


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("size", [size for size in HEADS if size[3] != FP16], ids=str)
def test_the_fused_loss(size, chip):
    n = size[0]
    h, w, t = head(*size)
    h.requires_grad_(), w.requires_grad_()
    ends = meta(5, dtype=torch.int32)
    with recorded(chip) as record:
        for mask, coefficient in ((None, 0.0), (meta(n, dtype=torch.bool), 0.1)):
            loss = rk.fused_linear_ppo_loss(
                h, w, t, meta(n), meta(n), cu_seqlens=ends, mask=mask, entropy_coef=coefficient, backend="triton"
            )
            loss.policy_loss.backward()
    assert not record.wrong
    assert {"linear_stats", "ppo_loss", "scale"} <= record.names()


# (tokens, vocabulary), the last two past 32 bits: the second by its padding alone.
LOGITS = [(4096, 128256), (1, 7), (0, 128256), (40000, 128256)]


@pytest.mark.parametrize("size", LOGITS, ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_log_probs_of_logits(size, dtype):
    (n, vocab), row = size, meta(size[0])
    targets = meta(n, dtype=torch.int64)
    with recorded("sm90") as record:
        for logits in (meta(n, vocab, dtype=dtype), meta(2 * n, vocab + 60000, dtype=dtype)[::2, :vocab]):
            for entropy in (False, True):
                rk.logprobs_from_logits(logits, targets, return_entropy=entropy, backend="triton")
                logits_logprob._logits_logprob_backward(
                    logits, targets, 1.0, -100, row, row, row, row, row if entropy else None, "triton"
                )
        rk.logits_token_rewards(
            logits, logits, logits, targets, meta(3), beta1=1.0, beta2=1.0, cu_seqlens=meta(4, dtype=torch.int64),
            mask=meta(n, dtype=torch.bool), backend="triton",
        )  # fmt: skip
    if n:
        assert not record.wrong
        assert record.names() == {"logits_logprob", "logits_gradient", "logits_token_rewards"}
    else:
        assert not record.compiled


# Padded [B, T], and packed tokens in B sequences: one rollout, very many sequences, more tokens than 32 bits count.
TOKENS = [(128, 1024), (100_000, 3), (70_000, 40_000), (1, 1), (0, 5), (3, 0)]


@pytest.mark.parametrize("shape", TOKENS, ids=str)
@pytest.mark.parametrize("packed", [True, False])
def test_token_sized_kernels(shape, packed):
    batch, width = shape
    tokens = meta(batch * width) if packed else meta(batch, width)
    layout = {"mask": torch.empty_like(tokens, dtype=torch.bool), "backend": "triton"}
    if packed:
        layout["cu_seqlens"] = meta(batch + 1, dtype=torch.int64)
    betas, scores = {"beta1": 1.0, "beta2": 1.0}, meta(batch)
    with recorded("sm90") as record:
        rk.token_rewards(tokens, tokens, tokens, scores, **betas, **layout)
        for gaps in ("zero", "carry"):
            estimate = rk.gae(tokens, tokens, bootstrap=scores, gaps=gaps, **layout)
        rk.rewards_gae(tokens, tokens, tokens, scores, tokens, **betas, **layout)
        leaf, value = (torch.empty_like(tokens).requires_grad_() for _ in range(2))
        loss = rk.ppo_loss(
            leaf, tokens, estimate.advantages, value, tokens, tokens, entropy=tokens, entropy_coef=0.1,
            sampler_logp=tokens, is_cap=2.0, **layout,
        )  # fmt: skip
        (loss.policy_loss + loss.value_loss).backward()
        out, _ = rk.gae_ppo_loss(leaf, tokens, tokens, tokens, value, **layout)
        (out.policy_loss + out.value_loss).backward()
    if batch:
        assert not record.wrong
        wanted = {"token_rewards", "gae", "ppo_loss"} | ({"scale"} if tokens.numel() else set())
        assert record.names() == wanted
    else:
        assert not record.compiled


def test_a_head_is_compiled_once_for_all_numbers_of_tokens():
    """At the real width, where the offsets of a launch's slices are real too."""

    def compiled(n: int) -> set:
        h, w, t = head(n, 4096, 128256, BF16)
        h.requires_grad_(), w.requires_grad_()
        with recorded("sm90") as record:
            logprobs_and_gradients(h.detach(), w.detach(), t, full=False, entropy=False, save=True)
            logprobs_and_gradients(h.detach(), w.detach(), t, full=True, entropy=True, save=False)
            loss = rk.fused_linear_ppo_loss(
                h, w, t, meta(n), meta(n), cu_seqlens=meta(3, dtype=torch.int32), backend="triton"
            )
            loss.policy_loss.backward()
        return record.compiled

    first = compiled(4096) | compiled(9000)
    assert len(first) >= 10
    for n in (1, 17, 4095, 8200, 20001, FORWARD_TOKENS + 1):
        new = {launch.name for launch in compiled(n) - first}
        assert not new, f"{n} tokens compile {sorted(new)} again"


# What a call holds at most beside its inputs, in bytes, as the docstrings say; at N tokens, width H, vocabulary V.
N, H, V = 4096, 4096, 128256
SMALL = 64 * MIB  # rows' statistics, partial results of the splits, one row of anything


def peak(call, *args, **kw) -> int:
    """Bytes that the call holds at most beside its arguments, its results included."""
    with recorded("sm90") as record:
        call(*args, **kw)
    return record.memory.peak


def test_a_forward_pass_holds_no_logits():
    assert peak(rk.token_logprobs, *head(N, H, V, BF16), backend="triton") <= SMALL
    # Ten times the tokens cost ten times the rows and no more partial results.
    assert peak(rk.token_logprobs, *head(10 * N, H, V, BF16), backend="triton") <= SMALL


def test_kept_probabilities_are_two_bytes_a_logit():
    held = peak(rk.token_logprobs, *head(N, H, V, BF16), save_probs=True, backend="triton")
    assert 2 * N * V <= held <= 2 * N * V + SMALL


@pytest.mark.parametrize("tokens", [N, 5 * N])
def test_the_backward_pass_holds_a_block_of_dz(tokens):
    """Its gradients, a quarter gigabyte of dz, the gathered hidden states, and sums in fp32."""
    h, w, t = head(tokens, H, V, BF16)
    with recorded("sm90"):
        stats = linear_forward_triton(h, t, Head(w, None, 1.0, 0.0), -100)
    row = meta(tokens)
    args = (
        h,
        w,
        t,
        None,
        1.0,
        0.0,
        stats.logp,
        stats.lse,
        stats.entropy,
        row,
        None,
        *stats[3:5],
        [True, True, False],
        "triton",
    )

    def call():
        linear_logprob._linear_logprob_backward(*args)

    held = peak(call)
    sums = 4 * V * H if tokens > 8192 else 0
    assert held <= 2 * V * H + sums + 256 * MIB + tokens * H * (2 + 2 + 2 + 4 + 4) + SMALL


def test_a_frozen_heads_gradient_is_not_computed():
    """Of the backward pass's two products one is left, and no gradient of the head's size is made."""
    h, w, t = head(N, H, V, BF16)
    made = {}
    for trained in (True, False):
        with recorded("sm90") as record:
            launches, plain = Counter(), record.add
            record.add = lambda one, plain=plain, seen=launches: (seen.update([one.name]), plain(one))
            stats = linear_forward_triton(h, t, Head(w, None, 1.0, 0.0), -100)
            launches.clear()
            linear_logprob._linear_logprob_backward(
                h, w, t, None, 1.0, 0.0, stats.logp, stats.lse, stats.entropy, meta(N), None, *stats[3:5],
                [True, trained, False], "triton",
            )  # fmt: skip
        made[trained] = launches, record.memory.peak
    (with_it, held), (without, less) = made[True], made[False]
    assert without["linear_product"] == with_it["linear_product"] / 2 > 0
    assert without - with_it == Counter()
    assert held - less >= 2 * V * H


@pytest.mark.parametrize("tokens", [N, 5 * N])
def test_the_fused_loss_holds_one_chunk(tokens):
    """d(weight), an fp32 one beside it where the tokens take several chunks, and a chunk's probabilities."""
    h, w, t = head(tokens, H, V, BF16)
    h.requires_grad_(), w.requires_grad_()
    ends = meta(3, dtype=torch.int32)
    held = peak(
        lambda: rk.fused_linear_ppo_loss(h, w, t, meta(tokens), meta(tokens), cu_seqlens=ends, backend="triton")
    )
    chunk = min(tokens, SAVED_ELEMENTS // V)
    sums = 4 * V * H if tokens > chunk else 0
    assert 2 * V * H <= held <= 2 * V * H + sums + 2 * chunk * V + tokens * H * 2 + chunk * H * 12 + SMALL


def test_blocks_hold_one_block_of_logits():
    with linear_blocks.forced():
        held = peak(rk.token_logprobs, *head(N, H, V, BF16), backend="triton")
    assert held <= 4 * linear_blocks.BLOCK_ROWS * linear_blocks.BLOCK_COLUMNS + SMALL


def test_the_gradient_of_logits_can_take_their_place():
    logits, targets, row = meta(N, V, dtype=BF16), meta(N, dtype=torch.int64), meta(N)
    stats = (row, row, row, row, None)
    fresh = peak(lambda: logits_logprob._logits_logprob_backward(logits, targets, 1.0, -100, *stats, "triton"))
    assert 2 * N * V <= fresh <= 2 * N * V + SMALL
    assert peak(lambda: logits_logprob._gradient(logits, targets, 1.0, -100, *stats, logits, "triton")) <= SMALL


def test_token_sized_kernels_hold_their_results():
    tokens = meta(128, 1024)
    numbers = tokens.numel() * 4
    assert peak(lambda: rk.gae(tokens, tokens, backend="triton")) <= 2 * numbers + MIB
    assert (
        peak(lambda: rk.token_rewards(tokens, tokens, tokens, meta(128), beta1=1.0, beta2=1.0, backend="triton"))
        <= 6 * numbers + MIB
    )


# That the checks can fail.


@triton.jit
def narrow_row(x_ptr, out_ptr, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + row.to(tl.int64), tl.sum(tl.load(x_ptr + row * stride + offs), 0))


@triton.jit
def widened_late(x_ptr, out_ptr, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + row.to(tl.int64), tl.sum(tl.load(x_ptr + (row * stride).to(tl.int64) + offs), 0))


@triton.jit
def wide_in_a_loop(x_ptr, out_ptr, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = x_ptr + row * stride + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(0, stride, BLOCK):
        total += tl.load(at)
        at += BLOCK
    tl.store(out_ptr + row, tl.sum(total, 0))


def launch(kernel, x, out, grid=(70_000,)):
    """The launch, for `faults` to judge."""
    made = []
    with recorded("sm90") as record:
        record.add = made.append
        kernel[grid](x, out, x.stride(0), BLOCK=256)
    return made[0]


def test_narrow_offsets_are_seen():
    large, small, out = meta(70_000, 40_000), meta(70, 400), meta(70_000)
    assert faults(launch(narrow_row, large, out)) == ["narrow_row: 32-bit offsets into x_ptr"]
    assert faults(launch(widened_late, large, out)) == ["widened_late: 32-bit offsets into x_ptr"]
    assert faults(launch(wide_in_a_loop, large, out)) == []
    assert faults(launch(narrow_row, small, out)) == []
    assert narrow_pointers(ttir(launch(narrow_row, small, out).compiled)) == {"x_ptr"}


def test_other_faults_of_a_launch_are_seen():
    x, out = meta(70, 400), meta(70)
    assert faults(launch(wide_in_a_loop, x, out, (70, 65536))) == ["wide_in_a_loop: 65536 blocks along y"]
    assert faults(launch(wide_in_a_loop, x, out, (70, 1, 65536))) == ["wide_in_a_loop: 65536 blocks along z"]
    assert faults(launch(wide_in_a_loop, x, out, (0,))) == ["wide_in_a_loop: 0 blocks along x"]
    assert faults(launch(wide_in_a_loop, x, torch.empty(70))) == ["wide_in_a_loop: out_ptr is on cpu"]


def test_descriptors_that_the_copy_engine_refuses_are_seen():
    made = launch(wide_in_a_loop, meta(70, 400), meta(70))
    whole = TensorDescriptor(meta(64, 64, dtype=BF16), [64, 64], [64, 1], [16, 64])
    wide = TensorDescriptor(meta(64, 1024, dtype=BF16), [64, 1024], [1024, 1], [16, 512])
    late = TensorDescriptor(meta(65, 64, dtype=BF16), [64, 64], [64, 1], [16, 64])
    late.base = meta(64 * 64 + 4, dtype=BF16)[4:]
    assert faults(made._replace(given={"h": whole})) == []
    assert faults(made._replace(given={"h": wide})) == ["wide_in_a_loop: h has blocks of [16, 512]"]
    assert faults(made._replace(given={"h": late})) == ["wide_in_a_loop: h does not start at 16 bytes"]


def test_memory_counts_what_lives_at_once():
    def one_after_the_other():
        for _ in range(3):
            meta(MIB).add_(1)

    def together():
        return [meta(MIB)[:5].view(5) for _ in range(3)]

    assert peak(one_after_the_other) == 4 * MIB
    assert peak(together) == 12 * MIB
