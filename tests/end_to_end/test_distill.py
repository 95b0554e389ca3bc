"""On-policy distillation: its gradient is that of KL(pi || pi*), and the preset is RTO with a teacher."""

from __future__ import annotations

import itertools
import json

import pytest
import rto_kernels
import torch
from loop_helpers import small_run
from transformers import LlamaConfig, LlamaForCausalLM

from rto_fast.commands import DISTILL
from rto_fast.config import DistillConfig
from rto_fast.contract import Request, Rollout, Scores, offsets
from rto_fast.errors import ConfigError
from rto_fast.trainer import compute_targets, train

WORDS, END, LONGEST = 4, 0, 3
"""Tokens, the one that ends a response, and the most tokens of one: 3 * 3 * 4 + 3 + 1 = 40 responses."""


def language_model(seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(0, 0.6)
    return model


def every_response():
    words = [w for w in range(WORDS) if w != END]
    ended = [[*head, END] for n in range(LONGEST) for head in itertools.product(words, repeat=n)]
    return ended + [list(r) for r in itertools.product(words, repeat=LONGEST)]


def token_logps(model, responses):
    """For each response [length] fp64, behind the prompt (1, 2)."""
    out = []
    for r in responses:
        logits = model(torch.tensor([[1, 2, *r]])).logits[0, 1:-1].log_softmax(-1)
        out.append(logits.gather(1, torch.tensor(r)[:, None])[:, 0])
    return out


@pytest.mark.parametrize("scale", [1.0, 1.7])
def test_the_expected_update_is_the_gradient_of_the_objective(scale):
    """Over all responses, through the loop's targets and the kernel's PPO loss at its first step; gamma 1."""
    policy, teacher, base = map(language_model, (1, 2, 3))
    responses = every_response()
    logps = token_logps(policy, responses)
    with torch.no_grad():
        targets, bases = token_logps(teacher, responses), token_logps(base, responses)
    chance = torch.stack([lp.sum() for lp in logps]).exp()
    assert chance.sum().item() == pytest.approx(1.0)  # they are all there are

    gains = torch.stack(
        [(scale * (t - b)).sum() - (p - b).sum() for p, t, b in zip(logps, targets, bases, strict=True)]
    )
    exact = torch.autograd.grad((chance * gains).sum(), list(policy.parameters()), retain_graph=True)
    if scale == 1.0:
        kl = torch.stack([(p - t).sum() for p, t in zip(logps, targets, strict=True)])
        again = torch.autograd.grad((chance * kl).sum(), list(policy.parameters()), retain_graph=True)
        torch.testing.assert_close(exact, tuple(-g for g in again), rtol=1e-9, atol=1e-12)

    config = DistillConfig(policy="p", teacher="t", data="d", scale=scale, gamma=1.0)
    rollout = Rollout.from_lists(
        [Request((1, 2), 0, 0, 0, i) for i in range(len(responses))], responses, [[0.0] * len(r) for r in responses],
        [r[-1] != END for r in responses], version=0,
    )  # fmt: skip
    old, ref, ratio = (
        torch.cat(x).detach() for x in (logps, bases, [t - b for t, b in zip(targets, bases, strict=True)])
    )
    nothing = torch.zeros(len(responses), dtype=torch.float64)
    scores = Scores(old, old, ref, ref, ref, torch.zeros_like(old), nothing, nothing, ratio[:, None])
    found = compute_targets(rollout, scores, config, config.beta2)
    loss, cu = 0.0, offsets(torch.tensor([len(r) for r in responses]))
    for i, (lp, p) in enumerate(zip(logps, chance.tolist(), strict=True)):
        part = slice(int(cu[i]), int(cu[i + 1]))
        one = rto_kernels.ppo_loss(
            lp, old[part], found.advantages[part], clip=config.clip, cu_seqlens=offsets(torch.tensor([len(lp)]))
        )
        loss = loss + p * len(lp) * one.policy_loss
    got = torch.autograd.grad(loss, list(policy.parameters()))
    size = max(float(g.abs().max()) for g in exact)
    assert size > 1e-2
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(-a, b, rtol=1e-6, atol=1e-6 * size)


def test_the_preset_is_rto_with_a_teacher(one_rank, tiny, tmp_path):
    settings = small_run(tiny, tmp_path / "run", iterations=8, policy_lr=1e-3, rollout_batch=64, train_batch=16)
    settings = {k: v for k, v in settings.items() if k not in ("dpo_model", "reward_model")}
    run = train(DistillConfig(**settings, teacher=tiny.dpo))
    assert run.critic is None
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["kl/response"] == pytest.approx(0.0, abs=1e-5)  # the base is the policy's start
    assert rows[0]["kl/logratio"] == pytest.approx(-rows[0]["token/logratio"], abs=1e-4)
    gaps = [row["kl/logratio"] for row in rows]
    assert sum(gaps[-3:]) < 0.85 * sum(gaps[:3])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "teacher: no model given"),
        ({"teacher": "t", "scale": 0.0}, "scale: must be positive"),
        ({"teacher": "t", "scale": -1.0}, "scale: must be positive"),
        ({"teacher": "t", "beta2": 0.0}, "beta2: scales the whole objective"),
        ({"teacher": "a:b"}, "teacher: 'a:b' must not have a colon"),
    ],
)
def test_what_distillation_refuses(settings, message):
    with pytest.raises(ConfigError, match=message):
        DistillConfig(policy="p", data="d", **settings).validate()


def test_the_recipes_settings_hold():
    DISTILL.validate()
    assert (DISTILL.beta1, DISTILL.token_reward) == (1.0, (f"logratio:{DISTILL.teacher}",))
