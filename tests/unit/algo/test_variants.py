"""RTO's variants: where credit is paid, advantage estimators, pairwise updates; each also by the recipe's flags."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
from pathlib import Path

import pytest
import torch
from loop_helpers import small_run, watched_gradients
from recipe_helpers import flags_of, run_recipe

from rto_fast.algo import advantages, credit, losses
from rto_fast.config import RTOConfig
from rto_fast.contract import Scores, offsets
from rto_fast.data.tokenizer import delimiter_ids
from rto_fast.demo.tiny_task import make_task
from rto_fast.errors import ConfigError
from rto_fast.trainer import compute_targets

LENS = torch.tensor([5, 0, 1, 7, 3, 2])
CU = offsets(LENS)
DELIMITER = torch.tensor([0, 1, 0, 0, 1, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0], dtype=torch.bool)


def numbers(seed=0, dtype=torch.float32):
    return torch.randn(int(LENS.sum()), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rows(flat):
    return [t.tolist() for t in flat.double().split(LENS.tolist())]


# Credit


def moved(kind, dense, delimiter):
    """The definition, sequence by sequence."""
    out = [0.0] * len(dense)
    if kind == "token":
        return dense
    if kind == "shaped":
        return [*dense[:-1], dense[-1] - math.fsum(dense)] if dense else []
    if kind == "segment":
        starts = [0, *(t + 1 for t in range(len(dense) - 1) if delimiter[t]), len(dense)]
        parts = [dense[a:b] for a, b in itertools.pairwise(starts)] if dense else []
        return [math.fsum(part) / len(part) for part in parts for _ in part]
    held = 0.0
    for t, value in enumerate(dense):
        held += value
        if t == len(dense) - 1 or (kind == "sentence" and delimiter[t]):
            out[t], held = held, 0.0
    return out


@pytest.mark.parametrize("kind", credit.CREDIT)
def test_credit_is_paid_where_the_definition_says(kind):
    dense = numbers()
    got = credit.CREDIT[kind](dense, CU, DELIMITER)
    for ours, row, ends in zip(rows(got), rows(dense), rows(DELIMITER), strict=True):
        assert ours == pytest.approx(moved(kind, row, ends), abs=1e-6)
    totals = [math.fsum(r) for r in rows(got)]
    assert totals == pytest.approx([0.0 if kind == "shaped" else math.fsum(r) for r in rows(dense)], abs=1e-6)


@pytest.mark.parametrize("kind", credit.CREDIT)
def test_credit_of_a_rollout_without_a_token(kind):
    none = torch.zeros(0, dtype=torch.bool)
    assert credit.CREDIT[kind](torch.zeros(0), torch.tensor([0, 0, 0]), none).numel() == 0


def test_sentences_end_at_delimiters():
    tokenizer = make_task(0).tokenizer
    ids = delimiter_ids(tokenizer, (".",)).tolist()
    assert [tokenizer.convert_ids_to_tokens(i) for i in ids] == ["."]
    assert delimiter_ids(tokenizer, ("fox", "?")).tolist() == [tokenizer.convert_tokens_to_ids("fox")]
    assert delimiter_ids(tokenizer, ("@",)).numel() == 0


# Targets: clip first, then move


def scores_of(seed=0):
    token = [numbers(seed + i) * 0.3 - 1 for i in range(5)]
    score = torch.randn(len(LENS), generator=torch.Generator().manual_seed(seed + 9))
    return Scores(
        old_logp=token[0], policy_logp=token[0], ref_logp=token[1], dpo_logp=token[2], dpo_ref_logp=token[3],
        values=token[4], bootstrap=torch.zeros(len(LENS)), score=score,
    )  # fmt: skip


def rollout_of():
    from rto_fast.contract import Request, Rollout

    rng = random.Random(0)
    requests = [Request((1, 2), i // 2, i // 2, i % 2, i) for i in range(len(LENS))]
    tokens = [7 if d else rng.randrange(8, 40) for d in DELIMITER.tolist()]
    answers = [t.tolist() for t in torch.tensor(tokens).split(LENS.tolist())]
    return Rollout.from_lists(requests, answers, [[0.0] * len(a) for a in answers], [False] * len(LENS), 0)


def config_of(**settings):
    base = {"policy": "p", "dpo_model": "d", "reward_model": ("r",), "data": "x", "responses_per_prompt": 2}
    return RTOConfig(**(base | {"beta1": 0.1, "dpo_clip": 0.02, "rollout_batch": 3, "train_batch": 2} | settings))


@pytest.mark.parametrize("kind", credit.CREDIT)
def test_targets_clip_each_token_before_credit_is_moved(kind):
    config, scores, delimiters = config_of(credit=kind), scores_of(), torch.tensor([7])
    targets = compute_targets(rollout_of(), scores, config, 0.03, delimiters)
    dense = (0.1 * (scores.dpo_logp - scores.dpo_ref_logp)).clamp(-0.02, 0.02)
    assert (dense.abs() == 0.02).any()
    assert (dense.abs() < 0.02).any()
    kl, score = scores.policy_logp - scores.ref_logp, scores.score.tolist()
    torch.testing.assert_close(targets.dpo_reward, dense)
    every = zip(rows(targets.rewards), rows(dense), rows(kl), rows(DELIMITER), score, strict=True)
    for got, d, k, ends, s in every:
        expected = [x - 0.03 * y for x, y in zip(moved(kind, d, ends), k, strict=True)]
        if expected:
            expected[-1] += s
        assert got == pytest.approx(expected, abs=1e-6)


def test_totals_of_rs_ppo_are_those_of_ppo():
    scores, rollout = scores_of(), rollout_of()
    shaped = compute_targets(rollout, scores, config_of(credit="shaped"), 0.03)
    ppo = compute_targets(rollout, scores, config_of(beta1=0.0), 0.03)
    for ours, theirs in zip(rows(shaped.rewards), rows(ppo.rewards), strict=True):
        assert math.fsum(ours) == pytest.approx(math.fsum(theirs), abs=1e-6)


# Advantages


def to_go(row, gamma):
    out, running = [0.0] * len(row), 0.0
    for t in reversed(range(len(row))):
        running = row[t] + gamma * running
        out[t] = running
    return out


@pytest.mark.parametrize("name", ["reinforce_pp", "rloo", "grpo"])
def test_estimators_without_a_critic(name):
    config, rewards = config_of(advantage=name, gamma=0.97), numbers(3)
    found = advantages.ESTIMATORS[name](rewards, scores_of(), CU, gamma=0.97, lam=config.lam, group=2)
    expected = [to_go(r, 0.97) for r in rows(rewards)]
    for got, row in zip(rows(found.returns), expected, strict=True):
        assert got == pytest.approx(row, abs=1e-5)
    totals = [r[0] if r else 0.0 for r in expected]
    every = [a for r in expected for a in r]
    mean, rstd = (float(x) for x in found.whiten)
    if name == "reinforce_pp":
        centre = math.fsum(every) / len(every)
        variance = math.fsum((a - centre) ** 2 for a in every) / len(every)
        assert (mean, rstd) == pytest.approx((centre, variance**-0.5), rel=1e-5)
    else:
        assert (mean, rstd) == (0.0, 1.0)
        for i in range(len(expected)):
            group = totals[i - i % 2 : i - i % 2 + 2]
            if name == "rloo":
                base, scale = group[1 - i % 2], 1.0
            else:
                base = sum(group) / 2
                scale = 1 / (math.sqrt(sum((g - base) ** 2 for g in group)) + 1e-4)  # n - 1 = 1
            expected[i] = [(a - base) * scale for a in expected[i]]
    for got, row in zip(rows(found.advantages), expected, strict=True):
        assert got == pytest.approx(row, rel=1e-4, abs=1e-5)


def test_group_estimators_are_the_papers_where_only_the_last_token_is_rewarded():
    terminal = torch.zeros(int(LENS.sum()))
    terminal[CU[1:][LENS > 0] - 1] = torch.tensor([1.0, 2.0, -1.0, 0.5, 3.0])
    reward = torch.tensor([[1.0, 0.0], [2.0, -1.0], [0.5, 3.0]])
    got = advantages.rloo(terminal, scores_of(), CU, gamma=1.0, lam=0.95, group=2).advantages
    each = (reward - reward.flip(1)).reshape(-1)
    torch.testing.assert_close(got, torch.repeat_interleave(each, LENS))
    got = advantages.grpo(terminal, scores_of(), CU, gamma=1.0, lam=0.95, group=2).advantages
    each = ((reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)).reshape(-1)
    torch.testing.assert_close(got, torch.repeat_interleave(each, LENS))


# Losses on pairs


def test_p3o_loss_and_gradient_in_fp64():
    logs = torch.tensor([[0.05, -0.02], [0.5, 0.1], [-0.6, 0.0], [0.3, -0.3]], dtype=torch.float64, requires_grad=True)
    gap = torch.tensor([1.5, 2.0, 0.7, -1.0], dtype=torch.float64)
    loss, stats = losses.p3o_loss(logs, gap, torch.tensor(4.0), clip=0.2)
    loss.backward()
    expected, slopes = 0.0, []
    for (a, b), g in zip(logs.tolist(), gap.tolist(), strict=True):
        change, importance = a - b, math.exp(a + b)
        bounded = min(max(change, math.log(0.8)), math.log(1.2))
        expected -= importance * min(g / 2 * change, g / 2 * bounded) / 4
        slopes.append(-g / 2 * importance / 4 if g / 2 * change <= g / 2 * bounded else 0.0)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(logs.grad[:, 0], torch.tensor(slopes, dtype=torch.float64))
    torch.testing.assert_close(logs.grad[:, 1], -torch.tensor(slopes, dtype=torch.float64))
    assert slopes[1] == 0  # pushed beyond the clip already
    assert slopes[2] != 0  # moved the wrong way: the clip must not hold it there
    assert float(stats.clip_fraction) == 0.25


def test_p3os_separate_clip_and_its_gradient_in_fp64():
    """PPO's clip on each response's own ratio, for advantages of +-(r1 - r2) / 2."""
    logs = torch.tensor([[0.05, -0.02], [0.5, 0.1], [-0.6, 0.3], [0.3, -0.3]], dtype=torch.float64, requires_grad=True)
    gap = torch.tensor([1.5, 2.0, 0.7, -1.0], dtype=torch.float64)
    loss, stats = losses.p3o_separate_loss(logs, gap, torch.tensor(4.0), clip=0.2)
    loss.backward()
    expected, slopes, cut = 0.0, [], 0
    for row, g in zip(logs.tolist(), gap.tolist(), strict=True):
        for log, advantage in zip(row, (g / 2, -g / 2), strict=True):
            ratio = math.exp(log)
            plain, bounded = advantage * ratio, advantage * min(max(ratio, 0.8), 1.2)
            expected -= min(plain, bounded) / 4
            slopes.append(-plain / 4 if plain <= bounded else 0.0)
            cut += plain > bounded
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(logs.grad.reshape(-1), torch.tensor(slopes, dtype=torch.float64))
    assert slopes[2] == 0  # y1 is beyond the clip in the reward's direction, y2 is not
    assert slopes[3] != 0
    assert float(stats.clip_fraction) == cut / 8


@pytest.mark.parametrize("form", [losses.p3o_loss, losses.p3o_separate_loss])
@pytest.mark.parametrize("distance", [0.0, 0.1, 0.3, 1.0, 2.0])
def test_p3o_gradient_is_that_of_the_expected_reward_off_policy(distance, form):
    """Over every pair of the 27 responses of three tokens, against the gradient of E_pi[r] by autograd."""
    draw = torch.Generator().manual_seed(0)
    responses = torch.cartesian_prod(*[torch.arange(3)] * 3)
    old = torch.randn(3, 3, generator=draw, dtype=torch.float64)  # logits of each place
    logits = (old + distance * torch.randn(3, 3, generator=draw, dtype=torch.float64)).requires_grad_()
    reward = torch.randn(27, generator=draw, dtype=torch.float64)

    def logp(of):
        return of.log_softmax(1)[torch.arange(3), responses].sum(1)

    (truth,) = torch.autograd.grad(-(logp(logits).exp() @ reward), logits)
    change = logp(logits) - logp(old)
    pairs = torch.cartesian_prod(torch.arange(27), torch.arange(27))
    total = torch.zeros((), dtype=torch.float64)
    for (i, j), chance in zip(pairs.tolist(), logp(old)[pairs].sum(1).exp(), strict=True):
        gap = (reward[i] - reward[j])[None]
        total = total + form(torch.stack([change[i], change[j]])[None], gap, 1 / chance, clip=math.inf)[0]
    (found,) = torch.autograd.grad(total, logits)
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-12)
    kl = float(logp(old).exp() @ -change.detach())
    assert (kl > 0.3) == (distance >= 1)
    assert (kl > 0) == (distance > 0)


def test_rebel_loss_and_gradient_in_fp64():
    logs = torch.tensor([[0.05, -0.02], [0.5, 0.1]], dtype=torch.float64, requires_grad=True)
    gap = torch.tensor([1.5, -2.0], dtype=torch.float64)
    loss, _ = losses.rebel_loss(logs, gap, torch.tensor(2.0), eta=0.5)
    loss.backward()
    residual = [(a - b) / 0.5 - g for (a, b), g in zip(logs.tolist(), gap.tolist(), strict=True)]
    assert loss.item() == pytest.approx(sum(r * r for r in residual) / 2, rel=1e-12)
    assert logs.grad[:, 0].tolist() == pytest.approx([2 * r / 0.5 / 2 for r in residual], rel=1e-12)


# Settings that contradict each other


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"credit": "sentence", "beta1": 0.0}, "credit: beta1 = 0"),
        ({"credit": "sentence", "delimiters": ()}, "delimiters"),
        ({"credit": "sentence", "delimiters": ("",)}, "delimiters"),
        ({"advantage": "rloo", "responses_per_prompt": 1}, "responses_per_prompt: rloo"),
        ({"advantage": "grpo", "critic": "reward"}, "critic: 'reward' needs a critic, and grpo has none"),
        ({"advantage": "reinforce_pp", "critic_warmup": 2}, "critic_warmup"),
        ({"advantage": "reinforce_pp", "truncation": "bootstrap"}, "truncation"),
        ({"policy_update": "rebel", "responses_per_prompt": 4}, "responses_per_prompt: rebel needs exactly 2"),
        ({"policy_update": "p3o", "advantage": "rloo"}, "advantage: p3o"),
        ({"policy_update": "p3o", "train_batch": 3, "rollout_batch": 3}, "train_batch: must be even"),
        ({"policy_update": "p3o", "entropy_coef": 0.1}, "entropy_coef"),
        ({"p3o_clip": "separate"}, "p3o_clip: is for --policy-update p3o, not ppo"),
        ({"policy_update": "rebel", "rebel_eta": 0.0}, "rebel_eta"),
        ({"policy_update": "rebel", "critic": "policy"}, "critic: 'policy' needs a critic, and rebel has none"),
    ],
)
def test_contradictory_settings_are_refused(settings, names):
    config_of().validate()
    with pytest.raises(ConfigError, match=names):
        config_of(**settings).validate()


# The loop, by the recipe's flags

VARIANTS = {
    "semi_rto": {"credit": "sentence"},
    "segments": {"credit": "segment", "segment_entropy": 2.5},
    "ddpo": {"credit": "response"},
    "rs_ppo": {"credit": "shaped"},
    "reinforce_pp": {"advantage": "reinforce_pp"},
    "rloo": {"advantage": "rloo", "responses_per_prompt": 2},
    "q": {"advantage": "q", "responses_per_prompt": 2},
    "grpo": {"advantage": "grpo", "responses_per_prompt": 4, "credit": "sentence"},
    "p3o": {"policy_update": "p3o", "responses_per_prompt": 2},
    "p3o_separate": {"policy_update": "p3o", "p3o_clip": "separate", "responses_per_prompt": 2},
    "rebel": {"policy_update": "rebel", "responses_per_prompt": 2, "rebel_eta": 0.5},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_variant_runs_by_the_recipes_flags(name, tiny, tmp_path, monkeypatch, one_rank):
    settings = VARIANTS[name]
    base = small_run(tiny, tmp_path / "run", prompt_key="prompt", save_every=1, policy_lr=1e-3)
    flags = flags_of(base | settings)
    assert run_recipe("rto_llama3.py", flags, monkeypatch) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert all(math.isfinite(row["policy/loss"]) and row["policy/grad_norm"] > 0 for row in lines)
    has_critic = name in ("semi_rto", "segments", "ddpo", "rs_ppo")
    assert (tmp_path / "run" / "critic").exists() == has_critic
    assert all(("critic/loss" in row) == has_critic for row in lines)
    assert (tmp_path / "run" / "policy" / "model.safetensors").exists()
    assert (tmp_path / "run" / "report.html").exists()
    if name == "reinforce_pp":  # a checkpoint without a critic is whole: the run goes on from it
        longer = flags_of(base | settings | {"epochs": 2.0, "resume": "auto"})
        assert run_recipe("rto_llama3.py", longer, monkeypatch) == 2  # other settings
        assert run_recipe("rto_llama3.py", [*flags, "--resume", "auto"], monkeypatch) == 0


@pytest.mark.parametrize("update", ["p3o", "rebel"])
def test_pairs_do_not_depend_on_micro_batches(update, tiny, tmp_path, one_rank):
    """The same gradient whether a micro-batch holds one pair or all of them."""
    from rto_fast import build, trainer
    from rto_fast.scoring.score import score_rollout

    found = []
    for budget in (30, 4096):
        settings = small_run(
            tiny, tmp_path / f"{budget}", prompt_key="prompt", policy_update=update, responses_per_prompt=2,
            micro_tokens=budget, beta2=0.1, max_grad_norm=0.0,
        )  # fmt: skip
        run = build.build(RTOConfig(**settings))
        with run.logger.phase("rollout"):
            rollout = trainer.sample(run, 0)
        scores, _ = score_rollout(rollout, run.texts(rollout), run.scorers, run.config, run.placement, lambda n: None)
        # As if the policy had moved since: ratios other than 1.
        noise = 0.02 * torch.randn(scores.old_logp.shape, generator=torch.Generator().manual_seed(0))
        scores = dataclasses.replace(scores, old_logp=scores.old_logp + noise)
        targets = compute_targets(rollout, scores, run.config, 0.1, run.delimiters)
        index = run.train_batches(0, 0, len(rollout))[0]
        assert all(a + 1 == b and a % 2 == 0 for a, b in zip(index[::2], index[1::2], strict=True))
        batch = trainer.POLICY_UPDATES[update].batch(run, rollout, scores, targets, index)
        assert (len(batch.micro) > 1) == (budget == 30)
        with watched_gradients(run.policy) as gradients:
            step = batch.update_policy(0)
        found.append((step, dict(gradients)))
        run.logger.close()
    (first, ours), (second, theirs) = found
    assert first.loss == pytest.approx(second.loss, rel=1e-5)
    assert [float(x) for x in first.stats] == pytest.approx([float(x) for x in second.stats], rel=1e-5)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-5 * float(theirs[name].abs().max()))


def test_sentences_of_the_run_end_at_its_tokenizers_delimiters(tiny, tmp_path, one_rank):
    from rto_fast import build

    settings = small_run(tiny, tmp_path / "run", prompt_key="prompt", credit="sentence")
    run = build.build(RTOConfig(**settings))
    assert run.tokenizer.convert_ids_to_tokens(run.delimiters.tolist()) == ["."]
    run.logger.close()
    with pytest.raises(ConfigError, match="delimiters: no token"):
        build.build(RTOConfig(**(settings | {"delimiters": ("@",), "output_dir": str(tmp_path / "other")})))
    assert not Path(tmp_path / "other").exists()
