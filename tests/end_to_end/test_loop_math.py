"""What the loop computes, against fp64 calculations written out from the paper's formulas, loop by loop.

A real run (`build.build`) on tiny models scores a rollout with empty, one-token and truncated responses; policy
and critic are then moved, so that ratios and values are clipped, and updated on a part of that rollout. The other
side uses transformers in fp64 on each sequence alone, and Python's arithmetic: none of the kernels, none of the
packing.
"""

import dataclasses
import math
import random

import pytest
import torch
from loop_helpers import save_moved, small_run, watched_gradients
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rto_fast import build
from rto_fast.config import RTOConfig
from rto_fast.contract import Request, ResponseTexts, Rollout
from rto_fast.metrics import of_critic, of_policy, of_rollout, of_targets
from rto_fast.run import Run
from rto_fast.scoring.score import score_rollout
from rto_fast.trainer import compute_targets
from rto_fast.updates.ppo import TrainBatch

PROMPTS = [1, 4, 2, 6, 3, 5, 1, 7]
RESPONSES = [5, 1, 0, 12, 7, 0, 3, 9]
TRUNCATED = [False, False, False, True, False, True, True, False]
TRAINED = [3, 2, 1, 6, 0]
"""The part of the rollout that one update sees: an empty response and a one-token one in it."""

REWARD_FILE = """
def shouting(prompts, responses):
    return [3.0 * len(r) - 5.0 for r in responses]
"""
CASES = {
    "paper": {},
    "bootstrap": {
        "truncation": "bootstrap", "loss_aggregation": "token", "temperature": 0.7, "dpo_ref": True,
        "score_clip": 0.5, "entropy_coef": 0.01, "gamma": 0.97, "lam": 0.9, "micro_tokens": 24, "zero_stage": 3,
    },
    "all_off": {
        "truncated_reward": -1.25, "score_clip": 0.0, "dpo_clip": 0.0, "value_clip": 0.0, "temperature": 1.4,
        "beta2": 0.0, "beta3": 0.7, "micro_tokens": 1, "zero_stage": 0, "entropy_coef": 0.1, "lam": 1.0,
        "functions": True,
    },
    "ppo": {"beta1": 0.0, "loss_aggregation": "token", "clip": 0.1, "value_clip": 0.5, "kl_target": 0.05},
}  # fmt: skip


# The fp64 side


def model_at(folder, weights=None, kind=AutoModelForCausalLM):
    model = kind.from_pretrained(folder, dtype=torch.float64)
    if weights is not None:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(weights[name])
    return model.eval()


def token_logps(model, rollout, temperature):
    """[sequence][token] 0-d fp64 tensors: log-probs of response tokens, and entropies of their distributions."""
    logps, entropies = [], []
    for tokens, start in zip(rollout.sequences(), rollout.prompt_lens.tolist(), strict=True):
        rows = torch.log_softmax(model(tokens[None]).logits[0] / temperature, -1)
        logps.append([rows[t - 1, tokens[t]] for t in range(start, len(tokens))])
        entropies.append([-(rows[t - 1].exp() * rows[t - 1]).sum() for t in range(start, len(tokens))])
    return logps, entropies


def state_values(model, rollout):
    """[sequence][state] 0-d fp64 tensors: the value before each response token, and the one after the last."""
    out = []
    for tokens, start in zip(rollout.sequences(), rollout.prompt_lens.tolist(), strict=True):
        hidden = model.model(tokens[None]).last_hidden_state[0]
        numbers = (hidden @ model.score.weight[0] - model.config.mean) / model.config.std
        out.append([numbers[t - 1] for t in range(start, len(tokens) + 1)])
    return out


def clip(x, low, high):
    return min(max(x, low), high)


def aggregate(per_token, aggregation):
    """[sequence][token] -> the mean that losses and statistics are: over tokens then sequences, or over tokens."""
    filled = [row for row in per_token if row]
    if aggregation == "sequence":
        return sum(sum(row) / len(row) for row in filled) / len(filled)
    return sum(sum(row) for row in filled) / sum(len(row) for row in filled)


@dataclasses.dataclass
class Truth:
    """[sequence][token] fp64 figures of a rollout."""

    rewards: list
    dpo_reward: list
    kl: list
    advantages: list
    returns: list
    mean: float
    rstd: float


def truth_of(c, beta2, lp, ref, dpo, dpo_ref, values, after, score):
    """Eq. 4.7, GAE and whitening, token by token; every argument is [sequence][token] or [sequence] of floats."""
    out = Truth([], [], [], [], [], 0.0, 0.0)
    for i in range(len(lp)):
        n = len(lp[i])
        dense = [c.beta1 * (dpo[i][t] - dpo_ref[i][t]) for t in range(n)]
        if c.dpo_clip:
            dense = [clip(x, -c.dpo_clip, c.dpo_clip) for x in dense]
        kl = [lp[i][t] - ref[i][t] for t in range(n)]
        reward = [dense[t] - beta2 * kl[t] for t in range(n)]
        if n:
            reward[-1] += c.beta3 * (clip(score[i], -c.score_clip, c.score_clip) if c.score_clip else score[i])
        advantage, running, following = [0.0] * n, 0.0, after[i]
        for t in reversed(range(n)):
            delta = reward[t] + c.gamma * following - values[i][t]
            running = delta + c.gamma * c.lam * running
            advantage[t], following = running, values[i][t]
        out.rewards.append(reward)
        out.dpo_reward.append(dense)
        out.kl.append(kl)
        out.advantages.append(advantage)
        out.returns.append([advantage[t] + values[i][t] for t in range(n)])
    every = [a for row in out.advantages for a in row]
    out.mean = math.fsum(every) / len(every)
    variance = math.fsum((a - out.mean) ** 2 for a in every) / len(every)
    out.rstd = 1 / math.sqrt(max(variance, 1e-8))
    return out


# The run


@pytest.fixture(scope="module")
def reference(tiny, tmp_path_factory):
    """Another KL reference than the policy: otherwise the KL of a first rollout is 0."""
    folder = tmp_path_factory.mktemp("reference")
    save_moved(tiny.policy, folder, seed=8, by=0.02)
    return str(folder)


@dataclasses.dataclass
class Case:
    """One setting: the run, the rollout and what either side makes of them."""

    run: Run
    rollout: Rollout
    scores: object
    sources: dict
    targets: object
    expected_scores: dict
    """Field of Scores -> [sequence][token] or [sequence] fp64."""
    policy: object
    """TrainBatch.update_policy's UpdateStats and gradients, and the fp64 side's figures and gradients."""
    critic: object


def make_rollout(end=()):
    """`end`: tokens behind the responses that were cut short."""
    rng = random.Random(7)
    requests = [
        Request(tuple(rng.randrange(4, 87) for _ in range(n)), row=i, sample_index=i, response_index=0, seed=i)
        for i, n in enumerate(PROMPTS)
    ]
    responses = [[rng.randrange(4, 87) for _ in range(n)] for n in RESPONSES]
    responses = [[*r, *end] if cut else r for r, cut in zip(responses, TRUNCATED, strict=True)]
    return Rollout.from_lists(requests, responses, [[-1.0] * len(r) for r in responses], TRUNCATED, version=0)


def move(engine, seed, by):
    """Noise on every weight of a trained model; its names and values afterwards."""
    generator = torch.Generator().manual_seed(seed)
    for _, tensor in engine.weights():
        tensor += by * torch.randn(tensor.shape, generator=generator)
    return {name: tensor.double().clone() for name, tensor in engine.weights()}


def by_sequence(flat):
    return [row.tolist() for row in flat.double().split(RESPONSES)]


def floats(rows):
    return [[float(x) for x in row] for row in rows]


@pytest.fixture(scope="module", params=CASES)
def case(request, one_rank, tiny, reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    settings = dict(CASES[request.param])
    if settings.pop("functions", False):
        (folder / "shouts.py").write_text(REWARD_FILE)
        settings |= {"reward_fn": (f"{folder / 'shouts.py'}:shouting",), "reward_weight": (0.75, 0.5)}
    if settings.pop("dpo_ref", False):
        settings["dpo_ref"] = tiny.dpo_ref
    config = RTOConfig(**small_run(tiny, folder / "out", reference=reference, score_tokens=40, **settings))
    run = build.build(config)
    rollout = make_rollout()
    texts = ResponseTexts(["p"] * 8, ["x" * n for n in RESPONSES], [[]] * 8)
    scores, sources = score_rollout(rollout, texts, run.scorers, config, run.placement, lambda tokens: None)
    targets = compute_targets(rollout, scores, config, run.state.kl.beta2)

    with torch.no_grad():
        expected = expected_scores(config, tiny, reference, rollout)
    policy_weights, critic_weights = move(run.policy, 11, 0.02), move(run.critic, 12, 0.02)
    batch = TrainBatch(run, rollout, scores, targets, TRAINED)
    with watched_gradients(run.policy) as policy_grads:
        policy = batch.update_policy(0)
    with watched_gradients(run.critic) as critic_grads:
        critic = batch.update_critic(0)
    truth = truth_from(config, scores)
    part = rollout.select(TRAINED)
    yield Case(
        run, rollout, scores, sources, targets, expected,
        (policy, policy_grads, policy_side(config, tiny, policy_weights, part, scores, truth)),
        (critic, critic_grads, critic_side(config, tiny, critic_weights, part, scores, truth)),
    )  # fmt: skip
    run.logger.close()


def expected_scores(c, tiny, reference, rollout):
    """fp64 counterparts of the fields of Scores, and of each reward source."""
    start, base = model_at(tiny.policy), model_at(reference)
    reward = model_at(tiny.reward, kind=AutoModelForSequenceClassification)
    out = {
        "old_logp": token_logps(start, rollout, c.temperature)[0],
        "policy_logp": token_logps(start, rollout, 1.0)[0],
        "ref_logp": token_logps(base, rollout, 1.0)[0],
    }
    out["dpo_ref_logp"] = token_logps(model_at(c.dpo_ref), rollout, 1.0)[0] if c.dpo_ref else out["ref_logp"]
    out["dpo_logp"] = token_logps(model_at(tiny.dpo), rollout, 1.0)[0] if c.beta1 else out["dpo_ref_logp"]
    # The critic starts as the reward model, whose score is its value after the last token.
    values = floats(state_values(reward, rollout))
    out["values"] = [row[:-1] for row in values]
    last = [row[-1] for row in values]
    bootstraps = c.truncation == "bootstrap"
    out["bootstrap"] = [last[i] if bootstraps and TRUNCATED[i] else 0.0 for i in range(8)]
    # The reward model judges at the end of turn, which it is given behind a response that was cut short.
    eos = AutoTokenizer.from_pretrained(tiny.policy).eos_token_id
    out["model"] = [row[-1] for row in floats(state_values(reward, make_rollout(end=[eos])))]
    score = [c.reward_weights[0] * x for x in out["model"]]
    if c.reward_fn:
        score = [x + c.reward_weights[1] * (3.0 * n - 5.0) for x, n in zip(score, RESPONSES, strict=True)]
    if c.truncated_reward is not None:
        score = [c.truncated_reward if cut else x for cut, x in zip(TRUNCATED, score, strict=True)]
    out["score"] = score
    return {n: floats(rows) if isinstance(rows[0], list) else rows for n, rows in out.items()}


def truth_from(c, scores):
    """The formulas on the loop's own fp32 scores, so that nothing but the formulas is judged."""
    names = ("policy_logp", "ref_logp", "dpo_logp", "dpo_ref_logp", "values")
    rows = [by_sequence(getattr(scores, n)) for n in names]
    return truth_of(c, c.beta2, *rows, scores.bootstrap.tolist(), scores.score.tolist())


def policy_side(c, tiny, weights, part, scores, truth):
    """The clipped policy loss with its entropy bonus: (figures, gradients)."""
    model = model_at(tiny.policy, weights)
    logps, entropies = token_logps(model, part, c.temperature)
    old = by_sequence(scores.old_logp)
    losses, ratios, cut, k3 = [], [], [], []
    for row, i in enumerate(TRAINED):
        advantages = [(a - truth.mean) * truth.rstd for a in truth.advantages[i]]
        ratio = [(logps[row][t] - old[i][t]).exp() for t in range(RESPONSES[i])]
        bounded = [clip(r, torch.tensor(1 - c.clip), torch.tensor(1 + c.clip)) for r in ratio]
        losses.append([-min(r * a, b * a) for r, b, a in zip(ratio, bounded, advantages, strict=True)])
        ratios.append([r.item() for r in ratio])
        cut.append([float(b * a < r * a) for r, b, a in zip(ratio, bounded, advantages, strict=True)])
        k3.append([r - 1 - math.log(r) for r in ratios[-1]])
    entropy = aggregate(entropies, c.loss_aggregation)
    loss = aggregate(losses, c.loss_aggregation) - c.entropy_coef * entropy
    loss.backward()
    figures = {
        "loss": loss.item(),
        "policy/entropy": entropy.item(),
        "policy/clip_fraction": aggregate(cut, c.loss_aggregation),
        "policy/ratio_mean": aggregate(ratios, c.loss_aggregation),
        "policy/ratio_max": max(r for row in ratios for r in row),
        "policy/kl_k3": aggregate(k3, c.loss_aggregation),
    }
    return figures, {n: p.grad for n, p in model.named_parameters()}


def critic_side(c, tiny, weights, part, scores, truth):
    """0.5 * max(unclipped, clipped) squared errors: (figures, gradients)."""
    model = model_at(tiny.reward, weights, AutoModelForSequenceClassification)
    now = [row[:-1] for row in state_values(model, part)]
    old = by_sequence(scores.values)
    losses, cut, targets, errors = [], [], [], []
    for row, i in enumerate(TRAINED):
        losses.append([])
        cut.append([])
        for v, v_old, target in zip(now[row], old[i], truth.returns[i], strict=True):
            plain = (v - target) ** 2
            if c.value_clip:
                held = v_old + clip(v - v_old, torch.tensor(-c.value_clip), torch.tensor(c.value_clip))
                kept = (held - target) ** 2
            else:
                kept = plain
            losses[-1].append(0.5 * max(plain, kept))
            cut[-1].append(float(kept > plain))
        targets.append(truth.returns[i])
        errors.append([target - v.item() for v, target in zip(now[row], truth.returns[i], strict=True)])

    def spread(rows):
        mean = aggregate(rows, c.loss_aggregation)
        return aggregate([[x * x for x in row] for row in rows], c.loss_aggregation) - mean**2

    loss = aggregate(losses, c.loss_aggregation)
    loss.backward()
    figures = {
        "loss": loss.item(),
        "critic/clip_fraction": aggregate(cut, c.loss_aggregation),
        "critic/explained_variance": 1 - spread(errors) / spread(targets),
    }
    return figures, {n: p.grad for n, p in model.named_parameters()}


# Scores and targets


def test_scores(case):
    """Every log-prob, value and score: temperatures, the DPO model's own reference, bootstrap, sources and weights."""
    for name in ("old_logp", "policy_logp", "ref_logp", "dpo_logp", "dpo_ref_logp", "values"):
        actual, expected = getattr(case.scores, name), case.expected_scores[name]
        flat = torch.tensor([x for row in expected for x in row], dtype=torch.float64)
        torch.testing.assert_close(actual.double(), flat, atol=2e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for name in ("bootstrap", "score"):
        expected = torch.tensor(case.expected_scores[name], dtype=torch.float64)
        torch.testing.assert_close(getattr(case.scores, name).double(), expected, atol=2e-5, rtol=1e-5)
    expected = torch.tensor(case.expected_scores["model"], dtype=torch.float64)
    torch.testing.assert_close(case.sources["model"].double(), expected, atol=2e-5, rtol=1e-5)
    assert case.scores.old_logp.dtype == torch.float32


def test_models_that_are_one_are_not_run_twice(case):
    c, s = case.run.config, case.run.scorers
    assert (s.dpo is None) == (c.beta1 == 0)
    assert (s.dpo_ref is s.reference) == (not c.dpo_ref)
    if c.temperature == 1:
        assert torch.equal(case.scores.old_logp, case.scores.policy_logp)
    else:
        assert (case.scores.old_logp - case.scores.policy_logp).abs().max() > 0.1


def test_targets(case):
    """Token rewards, KL, advantages, returns and the whitening, over the whole rollout."""
    c, truth = case.run.config, truth_from(case.run.config, case.scores)
    for name in ("rewards", "dpo_reward", "kl", "advantages", "returns"):
        expected = torch.tensor([x for row in getattr(truth, name) for x in row], dtype=torch.float64)
        torch.testing.assert_close(getattr(case.targets, name).double(), expected, atol=1e-5, rtol=1e-5)
    mean, rstd = case.targets.whiten
    assert float(mean) == pytest.approx(truth.mean, abs=1e-6)
    assert float(rstd) == pytest.approx(truth.rstd, rel=1e-6)
    if c.beta1 and c.dpo_clip:
        at_bound = [abs(x) == c.dpo_clip for row in truth.dpo_reward for x in row]
        assert 0.05 < sum(at_bound) / len(at_bound) < 0.95, "some are clipped, and some are not"
    if c.score_clip == 0.5:
        assert any(abs(x) > 0.5 for x in case.scores.score.tolist())


def test_metrics_of_rewards_and_kl(case):
    c, truth = case.run.config, truth_from(case.run.config, case.scores)
    logged = of_targets(case.targets, 8, c.beta2)
    logged |= of_rollout(case.rollout, case.scores, case.sources)
    kl = [x for row in truth.kl for x in row]
    expected = {
        "reward/total": sum(map(sum, truth.rewards)) / 8,
        "reward/dpo": sum(map(sum, truth.dpo_reward)) / 8,
        "kl/response": sum(kl) / 8,
        "kl/token": sum(kl) / len(kl),
        "kl/k3": sum(math.exp(-x) - 1 + x for x in kl) / len(kl),
        "kl/beta2": c.beta2,
        "advantage/mean": truth.mean,
        "advantage/std": 1 / truth.rstd,
        "reward/score": sum(case.scores.score.tolist()) / 8,
        "reward/model": sum(case.expected_scores["model"]) / 8,
        "response/length": sum(RESPONSES) / 8,
        "response/truncated": 3 / 8,
        "response/empty": 2 / 8,
    }
    for name, value in expected.items():
        assert logged[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


# Updates


def assert_update(update, gradients, truth, logged):
    figures, expected = truth
    assert update.loss == pytest.approx(figures["loss"], rel=1e-4, abs=1e-6)
    for name, value in figures.items():
        if name != "loss":
            assert logged[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert gradients.keys() == expected.keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, grad in gradients.items():
        torch.testing.assert_close(
            grad.double(), expected[name], atol=2e-5 * largest, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )
    norm = math.sqrt(sum(float(g.square().sum()) for g in expected.values()))
    assert update.result.grad_norm == pytest.approx(norm, rel=1e-4)
    assert update.result.applied


def test_policy_update(case):
    """Loss, statistics and the gradient of every weight, from a batch where some ratios are clipped."""
    update, gradients, truth = case.policy
    assert 0.05 < truth[0]["policy/clip_fraction"] < 0.95
    assert_update(update, gradients, truth, of_policy([update]))


def test_critic_update(case):
    update, gradients, truth = case.critic
    if case.run.config.value_clip:
        assert 0.02 < truth[0]["critic/clip_fraction"] < 0.98
    assert_update(update, gradients, truth, of_critic([update]))


def test_a_batch_of_empty_responses_moves_nothing(case):
    """No token, no loss, no gradient; and the step is no failure."""
    batch = TrainBatch(case.run, case.rollout, case.scores, case.targets, [2, 5])
    for update, engine in ((batch.update_policy, case.run.policy), (batch.update_critic, case.run.critic)):
        with watched_gradients(engine) as gradients:
            result = update(1)
        assert result.loss == 0
        assert result.result.applied
        assert all(not g.any() for g in gradients.values())
