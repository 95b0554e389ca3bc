"""What others do for the same job: the plain formulas, and peers; a peer that is not installed is None."""

import importlib
import importlib.util
import os
import shutil
import sys
import types

import rto_kernels as rk
import torch
from torch import Tensor


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def eager_logp(logits: Tensor, targets: Tensor) -> Tensor:
    """The formula most trainers use: target logit minus logsumexp, in fp32."""
    logits = _wide(logits)
    return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def log_softmax_logp(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(_wide(logits), -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def openrlhf_logp(logits: Tensor, targets: Tensor) -> Tensor:
    """As OpenRLHF computes it without flash-attn: the logsumexp in blocks of 1024 rows, into a buffer."""
    logits = logits.float()
    flat = logits.reshape(-1, logits.shape[-1])
    lse = torch.zeros(flat.shape[0], device=logits.device)
    for start in range(0, flat.shape[0], 1024):
        lse[start : start + 1024] = flat[start : start + 1024].logsumexp(-1)
    return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - lse.view(targets.shape)


def compiled(function):
    """torch.compile, where a C++ compiler is there for the CPU; never at toy sizes, which it would only slow down."""
    if os.environ.get("RTO_BENCH") == "toy":
        return None
    return torch.compile(function) if torch.cuda.is_available() or shutil.which("g++") else None


def trl_chunked():
    """TRL 1.16's fused LM head: (hidden, weight, targets) → log-probs."""
    try:
        function = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    except (ImportError, RuntimeError, AttributeError):
        return None
    return lambda h, w, t: function.apply(h, w, None, t, 1.0, 8192, None, 1.0, ("log_probs",))[0]


def trl_selective():
    try:
        return importlib.import_module("trl.trainer.utils").selective_log_softmax
    except (ImportError, RuntimeError, AttributeError):
        return None


def liger_logp():
    """Liger's linear cross-entropy: (hidden, weight, targets) → −loss. Triton, so a GPU's alone."""
    if not torch.cuda.is_available():
        return None
    try:
        ops = importlib.import_module("liger_kernel.transformers.functional")
    except ImportError:
        return None
    return lambda h, w, t: -ops.liger_fused_linear_cross_entropy(h, w, t, reduction="none")


def liger_ppo():
    """Liger's chunked policy loss: (hidden [B, T, H], weight, targets, old, advantages [B], clip) → loss."""
    try:
        loss = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss
    except (ImportError, AttributeError):
        return None

    def run(h, w, t, old, advantages, clip):
        layer = loss(
            beta=0.0,
            use_ref_model=False,
            epsilon_low=clip,
            epsilon_high=clip,
            loss_type="bnpo",
            compiled=False,
        )
        mask = torch.ones_like(t, dtype=h.dtype)
        return layer(h, w, t, mask, advantages, old_per_token_logps=old)[0]

    return run


def quack_cross_entropy():
    """quack's chunked linear cross-entropy: (hidden, weight, targets) → mean loss; it has no loss a token."""
    if not torch.cuda.is_available():
        return None
    try:
        return importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    except (ImportError, AttributeError):
        return None


def verl_logp():
    """verl's Triton linear cross-entropy: (hidden, weight, targets) → log-probs.

    verl's own `__init__` wants ray and more; only the folder with the kernels is imported.
    """
    if not torch.cuda.is_available():
        return None
    spec = None if "verl" in sys.modules else importlib.util.find_spec("verl")
    for name in ("verl", "verl.utils") if spec else ():
        package = types.ModuleType(name)
        package.__path__ = [f"{folder}{name[4:].replace('.', '/')}" for folder in spec.submodule_search_locations]
        sys.modules[name] = package
    try:
        linear = importlib.import_module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy
    except (ImportError, AttributeError):
        return None
    return lambda h, w, t: linear(h, w, t, 1.0, "none")[0]


class _ChunkedProducts(torch.autograd.Function):
    """Log-probs from vendor matrix products of `rows` tokens at a time, with the rest in one fused pass each.

    Forward: logits of a chunk, read once. Backward: the logits again, their gradient written over them in one
    pass, then d(hidden), and d(weight) into an fp32 sum. The buffer is one chunk's logits.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, rows):
        ctx.save_for_backward(hidden, weight, targets)
        ctx.rows = rows
        chunks = zip(hidden.split(rows), targets.split(rows), strict=True)
        return torch.cat([rk.logprobs_from_logits(h @ weight.T, t) for h, t in chunks])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden, weight, targets = ctx.saved_tensors
        d_hidden, d_weight = torch.empty_like(hidden), None
        for start in range(0, len(targets), ctx.rows):
            part = slice(start, start + ctx.rows)
            logits = (hidden[part] @ weight.T).requires_grad_()
            with torch.enable_grad():
                logp = rk.logprobs_from_logits(logits, targets[part], inplace_backward=True)
            (d_logits,) = torch.autograd.grad(logp, logits, grad[part].float())
            torch.mm(d_logits, weight, out=d_hidden[part])
            d_weight = _add_product(d_weight, d_logits.T, hidden[part], last=part.stop >= len(targets))
        return d_hidden, d_weight.to(weight.dtype), None, None


def _add_product(total: Tensor | None, a: Tensor, b: Tensor, last: bool) -> Tensor:
    """total + a·b, summed in fp32; a product alone stays in its own dtype."""
    if total is None and last:
        return a @ b
    if a.is_cuda and a.dtype != torch.float32:
        wide = torch.float32
        return torch.mm(a, b, out_dtype=wide) if total is None else torch.addmm(total, a, b, out_dtype=wide, out=total)
    return (a @ b).float() if total is None else total.add_(a @ b)


def chunked_products(rows: int):
    """The strong baseline on a GPU, cuBLAS with fused epilogues: (hidden, weight, targets) → log-probs."""
    return lambda h, w, t: _ChunkedProducts.apply(h, w, t, rows)


def cut_cross_entropy_logp():
    if not torch.cuda.is_available():
        return None
    try:
        linear = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    except ImportError:
        return None
    return lambda h, w, t: -linear(h, w, t, reduction="none")


def loop_gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """The Python loop over time of the RTO authors' code and of OpenRLHF, then the masked moments."""
    values, rewards = values * mask, rewards * mask
    last, out = torch.zeros(rewards.shape[0], device=rewards.device), []
    for t in reversed(range(rewards.shape[1])):
        following = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        last = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * last
        out.append(last)
    advantages = torch.stack(out[::-1], 1)
    return advantages * mask, (advantages + values) * mask


def eager_ppo(logp, old_logp, advantages, values, old_values, returns, mask, clip=0.2, value_clip=0.2):
    """Both losses in plain PyTorch: token means within a sequence, then the mean over sequences."""

    def average(x):
        return ((x * mask).sum(-1) / mask.sum(-1)).mean()

    ratio = (logp - old_logp).exp()
    policy = -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    bounded = old_values + (values - old_values).clamp(-value_clip, value_clip)
    value = 0.5 * torch.max((values - returns) ** 2, (bounded - returns) ** 2)
    return average(policy), average(value)
