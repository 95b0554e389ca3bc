"""What is compiled before the first step is what a run launches, and nothing is left to compile later."""

from functools import partial
from types import SimpleNamespace

import pytest
import rto_kernels
import torch
from rto_kernels import aot
from rto_kernels._dispatch import INTERPRET

from rto_fast.algo import losses
from rto_fast.algo.advantages import gae
from rto_fast.backend.warm import warm
from rto_fast.config import RTOConfig
from rto_fast.errors import ConfigError
from rto_fast.models.heads import LMHead, logps_at

pytestmark = pytest.mark.skipif(INTERPRET, reason="interpreted kernels are not compiled")

WIDTH, VOCAB = 64, 1024


def terms(tokens: int) -> losses.PolicyTerms:
    row, one = torch.zeros(tokens), torch.ones((), dtype=torch.float64)
    cu = torch.tensor(sorted({*range(0, min(tokens, 17)), tokens}))  # up to 17 sequences
    return losses.PolicyTerms(row, row, (one, one), cu, one.float())


def a_run(
    tokens: int,
    *,
    sampler: bool,
    pairs: bool,
    values: bool,
    softcap: float | None,
    entropy_coef: float,
    aggregation: str,
):
    """What scoring, targets and updates launch on `tokens` response tokens."""
    hidden, weight = (torch.zeros(n, WIDTH, dtype=torch.bfloat16, requires_grad=True) for n in (tokens, VOCAB))
    targets, row, given = torch.zeros(tokens, dtype=torch.int64), torch.zeros(tokens), terms(tokens)
    head = {"bias": None, "softcap": softcap}
    with torch.no_grad():
        logps_at((0.7, 1.0))(hidden, weight, targets, **head)
    scores = torch.zeros(len(given.cu_seqlens) - 1)
    rto_kernels.token_rewards(
        row, row, row, scores, beta1=0.05, beta2=0.01, beta3=1.0, dpo_clip=3.0, score_clip=5.0, dpo_ref_logp=row,
        cu_seqlens=given.cu_seqlens,
    )  # fmt: skip
    if values:
        seen = SimpleNamespace(values=row, bootstrap=scores)
        gae(row, seen, given.cu_seqlens, gamma=0.99, lam=0.95, group=1)
        leaf = row.clone().requires_grad_()
        losses.value_loss(
            leaf, row, row, given.cu_seqlens, given.denominator, value_clip=0.2, aggregation=aggregation
        ).value_loss.backward()
    else:
        out = rto_kernels.gae(row, row, gamma=1.0, lam=1.0, cu_seqlens=given.cu_seqlens)
        rto_kernels.whiten_moments(out.moments)
    kw = {"terms": given, "clip": 0.2, "entropy_coef": entropy_coef, "aggregation": aggregation}
    if pairs:
        rto_kernels.token_logprobs(hidden, weight, targets, temperature=0.7, **head).square().sum().backward()
        return
    if sampler:
        read = partial(rto_kernels.token_logprobs, temperature=0.7, return_entropy=True)
        logp, entropy = read(hidden, weight, targets, **head)
        loss = losses.sampled_policy_loss(logp, entropy, row, is_cap=2.0, **kw)
    else:
        loss = losses.policy_loss(hidden, weight, targets, temperature=0.7, **kw, **head)
    loss.policy_loss.backward()


def difference(a: set, b: set) -> set[str]:
    return {f"{launch.name} {launch.variant}" for launch in a ^ b}


@pytest.mark.parametrize("chip", ["sm80", "sm90"])
@pytest.mark.parametrize("update", ["ppo", "sampler", "pairs"])
@pytest.mark.parametrize(
    ("values", "softcap", "entropy_coef", "aggregation"),
    [(True, None, 0.0, "sequence"), (False, 30.0, 0.01, "token")],
)
def test_warm_compiles_what_a_run_launches(chip, update, values, softcap, entropy_coef, aggregation):
    values = values and update != "pairs"  # which know no critic
    settings = {
        "sampler": update == "sampler", "pairs": update == "pairs", "values": values, "softcap": softcap,
        "entropy_coef": entropy_coef, "aggregation": aggregation,
    }  # fmt: skip
    most = 9000
    with aot.recording(chip) as warmed:
        rto_kernels.warm(WIDTH, VOCAB, dtype=torch.bfloat16, device="cpu", tokens=most, backend="triton", **settings)
    with aot.recording(chip) as launched:
        for tokens in (1, 17, 4096, most):
            a_run(tokens, **settings)
    assert len(launched) >= 8
    assert not difference(set(warmed), set(launched))


def asked(monkeypatch, device: str, **settings) -> list[tuple[tuple, dict]]:
    """The calls of the kernels' `warm` that a run on the device makes, and what it says."""
    calls = []
    monkeypatch.setattr(rto_kernels, "warm", lambda *args, **kw: calls.append((args, kw)) or 1.25)
    config = RTOConfig(**settings)
    head = LMHead.share(torch.nn.Linear(WIDTH, VOCAB, bias=False), 30.0)
    policy = SimpleNamespace(lm=SimpleNamespace(get_output_embeddings=lambda: head))
    said = warm(config, policy, torch.device(device))
    assert said == ("kernels ready after 1.2 s" if calls else "")
    return calls


def test_a_run_on_a_gpu_warms_its_own_head(monkeypatch):
    [(sizes, kw)] = asked(monkeypatch, "cuda", entropy_coef=0.01, micro_tokens=4321)
    assert sizes == (WIDTH, VOCAB)
    assert (kw["tokens"], kw["bias"], kw["softcap"], kw["entropy_coef"]) == (4321, False, 30.0, 0.01)
    assert (kw["sampler"], kw["pairs"], kw["values"]) == (False, False, True)
    [(_, kw)] = asked(monkeypatch, "cuda", behaviour_logp="sampler")
    assert kw["sampler"]


@pytest.mark.parametrize("update", ["p3o", "rebel"])
def test_pairs_are_warmed_without_a_critic(monkeypatch, update):
    [(_, kw)] = asked(monkeypatch, "cuda", policy_update=update)
    assert (kw["sampler"], kw["pairs"], kw["values"]) == (False, True, False)


def test_nothing_is_warmed_without_a_gpu(monkeypatch):
    assert not asked(monkeypatch, "cpu")


def test_a_file_of_tiles_that_cannot_be_read_is_one_error(monkeypatch):
    def warmed(*args, **kw):
        raise ValueError("tiles.json cannot be read")

    monkeypatch.setattr(rto_kernels, "warm", warmed)
    head = LMHead.share(torch.nn.Linear(WIDTH, VOCAB, bias=False), None)
    policy = SimpleNamespace(lm=SimpleNamespace(get_output_embeddings=lambda: head))
    with pytest.raises(ConfigError, match="cannot be read"):
        warm(RTOConfig(), policy, torch.device("cuda"))
