"""Online token rewards: the DPO model's own updates from rollouts, against transformers in fp64."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from loop_helpers import small_run, watched_gradients
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rto_fast import build, trainer
from rto_fast.algo.losses import OnlineStats
from rto_fast.backend.train_engine import StepResult
from rto_fast.config import RTOConfig
from rto_fast.contract import Request, Rollout
from rto_fast.errors import ConfigError, Diverged
from rto_fast.metrics import of_online
from rto_fast.run import State
from rto_fast.scoring.score import score_rollout
from rto_fast.updates.online import BestWorstBatch, OutcomeBatch
from rto_fast.updates.ppo import UpdateStats

pytestmark = pytest.mark.usefixtures("one_rank")

BETA = 0.3
LENGTHS = (5, 0, 24, 3, 3, 9, 0, 1, 12, 7, 2, 4)
"""Of the responses to four prompts, three each; one that has 24 tokens is cut there."""
SCORES = (0.9, 0.2, -1.5, 0.5, 0.5, 0.5, 2.0, 0.7, 0.7, -0.1, 0.4, 0.3)
PAIRS = [[0, 2], [6, 7], [10, 9]]
"""Best and worst; the second prompt's scores are all equal."""
CASES = {
    "prime, a verifier": {"online": "prime", "online_outcome": "binary", "zero_stage": 3},
    "prime, a reward model": {"online": "prime", "temperature": 0.7},
    "pairs": {"online": "dpo"},
    "pairs, ZeRO-3": {"online": "dpo", "zero_stage": 3, "micro_tokens": 1},
}


def brief(prompts: list[str], responses: list[str]) -> list[float]:
    """A verifier: 1 for a response of few words."""
    return [float(len(r.split()) < 6) for r in responses]


def good(prompts: list[str], responses: list[str]) -> list[float]:
    """A verifier that finds nothing wrong."""
    return [1.0 for _ in responses]


def online_run(tiny, folder, **settings):
    given = {"online": "prime", "online_beta": BETA, "report": False, "max_grad_norm": 0.0, "prompt_key": "prompt",
             "max_response_length": 24, "micro_tokens": 50, "rollout_batch": 4, "responses_per_prompt": 3,
             "train_batch": 12, "dpo_ref": tiny.dpo_ref, "sync_proof": False, "warmup_ratio": 0.0}  # fmt: skip
    return RTOConfig(**small_run(tiny, folder, **given | settings))


def figures(folder, names=("online/", "policy/", "critic/", "reward/", "kl/", "bad")):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k.startswith(names)} for r in lines]


def responses_of_lengths() -> Rollout:
    generator = torch.Generator().manual_seed(8)

    def draw(n: int) -> list[int]:
        return torch.randint(4, 80, (n,), generator=generator).tolist()

    prompts = [tuple(draw(n)) for n in (3, 1, 6, 2)]
    requests = [Request(prompts[i // 3], i // 3, i // 3, i % 3, i) for i in range(12)]
    logps = [[-1.0] * n for n in LENGTHS]
    return Rollout.from_lists(requests, [draw(n) for n in LENGTHS], logps, [n == 24 for n in LENGTHS], version=0)


def scored(run, rollout):
    return score_rollout(rollout, run.texts(rollout), run.scorers, run.config, run.placement, lambda tokens: None)[0]


def one_update(config):
    """(its figures, its gradients) of the DPO model's first update on the responses above."""
    run, rollout = build.build(config), responses_of_lengths()
    scores = replace(scored(run, rollout), score=torch.tensor(SCORES))
    batch = trainer.ONLINE[config.online](run, rollout, scores, range(12))
    with watched_gradients(run.online) as gradients:
        stats = batch.update(0)
    run.logger.close()
    return stats, dict(gradients)


def log_ratios(model, reference, rollout):
    """[B] fp64 sums of log(pi / pi_ref) over each response, one after the other without packing."""
    out = []
    for tokens, start in zip(rollout.sequences(), rollout.prompt_lens.tolist(), strict=True):
        at = torch.arange(start, len(tokens))

        def logps(lm, tokens=tokens, at=at):
            return torch.log_softmax(lm(tokens[None]).logits[0], -1)[at - 1, tokens[at]]

        with torch.no_grad():
            base = logps(reference)
        out.append((logps(model) - base).sum())
    return torch.stack(out)


def expected(tiny, config):
    """(loss, gradients, accuracy) by the formulas."""
    model, reference = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval() for path in (tiny.dpo, tiny.dpo_ref)
    )
    d, rows, right = log_ratios(model, reference, responses_of_lengths()), [], []
    if config.online == "prime":
        for ratio, score, length in zip(d, SCORES, LENGTHS, strict=True):
            if length:
                outcome = float(score > 0.5) if config.online_outcome == "binary" else 1 / (1 + math.exp(-score))
                p = 1 / (1 + torch.exp(-BETA * ratio))
                rows.append(-outcome * torch.log(p) - (1 - outcome) * torch.log(1 - p))
                right.append(0.5 if outcome == 0.5 else float((ratio > 0) == (outcome > 0.5)))
    else:
        for best, worst in PAIRS:
            rows.append(-torch.log(1 / (1 + torch.exp(-BETA * (d[best] - d[worst])))))
            right.append(float(d[best] > d[worst]))
    loss = torch.stack(rows).mean()
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters()}, sum(right) / len(right), d.detach()


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient(tiny, tmp_path, case):
    """At temperature 1 whatever the sampler's; with an empty and a truncated response, packed."""
    config = online_run(tiny, tmp_path / "run", **CASES[case])
    stats, gradients = one_update(config)
    loss, theirs, accuracy, d = expected(tiny, config)
    assert stats.loss == pytest.approx(loss, rel=1e-5)
    assert float(stats.stats.accuracy) == pytest.approx(accuracy)
    kept = [i for pair in PAIRS for i in pair] if config.online == "dpo" else range(12)
    assert float(stats.stats.ratio_max) == pytest.approx(float(d[list(kept)].abs().max()), rel=1e-4)
    assert gradients.keys() == theirs.keys()
    largest = max(float(g.abs().max()) for g in theirs.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient.double(), theirs[name], rtol=1e-3, atol=1e-5 * largest)
    norm = math.sqrt(sum(float(g.square().sum()) for g in theirs.values()))
    assert stats.result.grad_norm == pytest.approx(norm, rel=1e-4)
    assert of_online([stats]) == {
        "online/loss": stats.loss, "online/accuracy": pytest.approx(accuracy), "online/grad_norm": pytest.approx(norm),
        "online/lr": config.online_lr, "online/logratio_max": float(stats.stats.ratio_max),
    }  # fmt: skip


@pytest.mark.parametrize("online", ["prime", "dpo"])
def test_micro_batches_change_nothing(tiny, tmp_path, online):
    """One row each, and all in one."""
    (a, small), (b, large) = (
        one_update(online_run(tiny, tmp_path / str(tokens), online=online, micro_tokens=tokens)) for tokens in (1, 4096)
    )
    assert a.loss == pytest.approx(b.loss, rel=1e-6)
    largest = max(float(g.abs().max()) for g in large.values())
    for name, gradient in small.items():
        torch.testing.assert_close(gradient, large[name], rtol=1e-4, atol=2e-6 * largest)


# The rows


def rows_of(kind, scores, index=range(12)):
    return kind(
        SimpleNamespace(config=RTOConfig()), responses_of_lengths(), SimpleNamespace(score=torch.tensor(scores)), index
    ).rows


def test_best_against_worst_of_each_prompt():
    assert rows_of(BestWorstBatch, SCORES) == PAIRS
    assert rows_of(BestWorstBatch, SCORES, [9, 10, 11, 0, 1, 2]) == [[10, 9], [0, 2]]
    assert rows_of(BestWorstBatch, [1.0] * 12) == []
    assert LENGTHS[1] == 0  # an empty response may be the best
    assert rows_of(BestWorstBatch, [0.0, 2.0, 1.0] * 2 + [0.0] * 6) == [[1, 0], [4, 3]]


def test_a_pair_of_empty_responses_teaches_nothing(monkeypatch):
    monkeypatch.setitem(globals(), "LENGTHS", (0, 0, 0, *LENGTHS[3:]))
    assert rows_of(BestWorstBatch, SCORES) == PAIRS[1:]


def test_empty_responses_have_no_outcome():
    assert rows_of(OutcomeBatch, SCORES) == [[i] for i, n in enumerate(LENGTHS) if n]


def test_what_teaches_nothing_makes_no_step(tiny, tmp_path):
    """Scores that are all equal: the loop goes on, and the DPO model stays."""
    changes = {"online": "dpo", "reward_model": (), "reward_fn": ("test_online:good",), "iterations": 1}
    trainer.train(online_run(tiny, tmp_path / "run", online_lr=0.1, **changes))
    (row,) = figures(tmp_path / "run", ("online/", "bad"))
    assert row == {"bad_steps": 0}
    ours, start = (load_file(f"{folder}/model.safetensors") for folder in (tmp_path / "run" / "dpo", tiny.dpo))
    assert all(torch.equal(ours[name], tensor) for name, tensor in start.items())


@pytest.mark.parametrize(
    ("given", "outcome"),
    [
        ({"reward_fn": ("m:f",)}, "binary"),
        ({"reward_fn": ("m:f",), "online_outcome": "sigmoid"}, "sigmoid"),
        ({"reward_model": ("r",), "reward_fn": ("m:f",)}, "sigmoid"),
        ({"reward_url": ("http://h",)}, "sigmoid"),
        ({"reward_model": ("r",), "online_outcome": "binary"}, "binary"),
    ],
)
def test_the_outcome_goes_by_what_gives_the_score(given, outcome):
    assert RTOConfig(**given).outcome == outcome


# The loop


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_before_reads_the_reward_anew_and_after_leaves_it(tiny, tmp_path, zero_stage):
    for order in ("before", "after"):
        config = online_run(tiny, tmp_path / order, online_order=order, online_lr=1e-2, zero_stage=zero_stage)
        run, rollout = build.build(config), responses_of_lengths()
        old = scored(run, rollout)
        new, steps = trainer.learn_token_reward(run, 0, rollout, old)
        now = scored(run, rollout)
        run.logger.close()
        assert len(steps) == 1
        assert (now.dpo_logp - old.dpo_logp).abs().max() > 0.01
        assert torch.equal(new.dpo_logp, now.dpo_logp if order == "before" else old.dpo_logp)
        for name in ("old_logp", "policy_logp", "ref_logp", "dpo_ref_logp", "values", "score"):
            assert torch.equal(getattr(new, name), getattr(old, name))
            assert torch.equal(getattr(now, name), getattr(old, name))


def test_the_steps_follow_their_own_schedule(tiny, tmp_path):
    """One pass over a rollout, whatever ppo_epochs is, from the first iteration on."""
    changes = {"iterations": 2, "train_batch": 6, "ppo_epochs": 2, "critic_warmup": 1, "lr_floor": 0.0}
    trainer.train(online_run(tiny, tmp_path / "run", online_lr=1e-3, **changes))
    rates = [row["online/lr"] for row in figures(tmp_path / "run")]  # of each iteration's second step of two
    assert rates == pytest.approx([1e-3 * 0.5 * (1 + math.cos(math.pi * step / 4)) for step in (1, 3)])


@pytest.mark.parametrize("online", ["prime", "dpo"])
def test_it_learns_what_the_score_prefers(tiny, tmp_path, online):
    """From the policy's own start, as a frozen DPO model must not: its first token rewards are 0."""
    changes = {"dpo_model": tiny.policy, "dpo_ref": "", "reward_model": (), "reward_fn": ("test_online:brief",)}
    config = online_run(
        tiny, tmp_path / "run", online=online, online_lr=3e-3, online_order="after", rollout_batch=16, train_batch=12,
        iterations=8, policy_lr=1e-6, **changes,
    )  # fmt: skip
    trainer.train(config)
    rows = figures(tmp_path / "run")
    assert rows[0]["reward/dpo"] == pytest.approx(0, abs=1e-5)
    assert rows[-1]["online/accuracy"] > 0.85
    assert rows[-1]["online/loss"] < 0.6 * math.log(2)
    reference, start = (load_file(f"{f}/model.safetensors") for f in (tmp_path / "run" / "dpo", tiny.policy))
    assert any((reference[name] != tensor).any() for name, tensor in start.items())


@pytest.mark.parametrize("changes", [{"online": "prime"}, {"online": "dpo", "online_order": "after", "zero_stage": 3}])
def test_resumed_bit_for_bit(tiny, tmp_path, monkeypatch, changes):
    settings = {"iterations": 3, "save_every": 2, "policy_lr": 1e-3, "critic_lr": 1e-3, "online_lr": 1e-3} | changes
    whole_run = trainer.train(online_run(tiny, tmp_path / "whole", **settings))

    def stops(run, iteration, *more, whole=trainer.rto_iteration):
        if iteration == 2:
            raise KeyboardInterrupt
        run.state.wrong_in_a_row = 7
        return whole(run, iteration, *more)

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "rto_iteration", stops)
        patched.setattr(trainer, "check_token_reward", lambda run, steps: None)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(online_run(tiny, tmp_path / "cut", **settings))
    config = online_run(tiny, tmp_path / "cut", **settings, resume="auto")
    resumed = build.build(config)
    resumed.logger.close()
    assert resumed.state.wrong_in_a_row == 7
    trainer.train(config)
    for name in ("policy", "critic", "dpo"):
        whole, cut = (load_file(tmp_path / f / name / "model.safetensors") for f in ("whole", "cut"))
        assert all(torch.equal(cut[n], tensor) for n, tensor in whole.items()), name
    assert figures(tmp_path / "cut") == figures(tmp_path / "whole")
    assert whole_run.engines.keys() == {"policy", "critic", "dpo"}


def test_off_nothing_is_trained_or_kept(tiny, tmp_path):
    changes = {"online": "off", "online_beta": 0.05, "iterations": 1, "save_every": 1}
    run = trainer.train(online_run(tiny, tmp_path / "run", **changes))
    assert run.online is None
    assert run.engines.keys() == {"policy", "critic"}
    assert not (tmp_path / "run" / "dpo").exists()
    assert not any(name.startswith("online/") for name in figures(tmp_path / "run")[0])


# What goes wrong


def test_an_infinite_loss_is_a_bad_step(tiny, tmp_path):
    """Though policy and critic have made theirs; the DPO model does not move."""
    trainer.train(online_run(tiny, tmp_path / "run", online_beta=1e300, iterations=1))
    assert figures(tmp_path / "run")[0]["bad_steps"] == 1
    ours, start = (load_file(f"{folder}/model.safetensors") for folder in (tmp_path / "run" / "dpo", tiny.dpo))
    assert all(torch.equal(ours[name], tensor) for name, tensor in start.items())
    with pytest.raises(Diverged, match=r"2 bad steps in a row, the last: 1 updates of iteration 2 had non-finite"):
        trainer.train(online_run(tiny, tmp_path / "again", online_beta=1e300, iterations=4, max_bad_steps=2))


def test_a_reward_that_stays_wrong_ends_the_run(tiny, tmp_path):
    """On the policy's samples a model with noise in its weights has the smaller log-probs, and all are good."""
    changes = {"reward_model": (), "reward_fn": ("test_online:good",), "iterations": 4, "policy_lr": 1e-7}
    with pytest.raises(Diverged, match=r"online: the token reward was wrong more often than right in 3 iterations in"):
        trainer.train(online_run(tiny, tmp_path / "run", online_lr=1e-9, online_patience=3, **changes))
    assert len(figures(tmp_path / "run")) == 2


@pytest.mark.parametrize(
    ("patience", "accuracies", "stops"),
    [(2, [0.4, 0.3], True), (2, [0.4, 0.5, 0.4], False), (2, [0.4, None, 0.4], True), (0, [0.1] * 50, False)],
)
def test_patience(patience, accuracies, stops):
    """A half is not below a half; an iteration without a row counts neither way."""
    run = SimpleNamespace(config=RTOConfig(online="prime", online_patience=patience), state=State(0, None))

    def go():
        for accuracy in accuracies:
            stats = accuracy and OnlineStats(torch.tensor(accuracy), torch.tensor(1.0))
            trainer.check_token_reward(run, [UpdateStats(StepResult(1.0, True), 0.7, stats, 1e-6)] if stats else [])

    if stops:
        with pytest.raises(Diverged, match=r"in 2 iterations in a row"):
            go()
    else:
        go()


REFUSED = {
    "no token reward": ({"beta1": 0.0, "dpo_model": ()}, r"online: prime trains the DPO model, and no token reward"),
    "another source": ({"token_reward": ("endogenous",)}, r"online: prime trains the DPO model, and no token reward"),
    "two models": (
        {"dpo_model": ("d", "e")},
        r"online: prime trains one DPO model of weight 1, got 2 of weights 0.5, 0",
    ),
    "a weight": ({"dpo_weight": (2.0,)}, r"online: prime trains one DPO model of weight 1, got 1 of weights 2"),
    "no score": ({"reward_model": (), "beta3": 0.0}, r"online: prime learns from scores; pass --reward-model"),
    "one response": ({"online": "dpo"}, r"responses_per_prompt: online dpo needs at least 2"),
    "prompts that are cut": (
        {"online": "dpo", "responses_per_prompt": 3, "train_batch": 64, "rollout_batch": 64},
        r"train_batch: 64 is no multiple of responses_per_prompt 3",
    ),
    "no learning rate": ({"online_lr": 0.0}, r"online_lr: must be positive, got 0"),
    "no beta": ({"online_beta": -1.0}, r"online_beta: must be positive, got -1"),
    "negative patience": ({"online_patience": -1}, r"online_patience: must not be negative, got -1"),
    "off, with a rate": ({"online": "off", "online_lr": 1e-3}, r"online_lr: 0.001 is not read with --online off"),
    "an outcome of pairs": (
        {"online": "dpo", "responses_per_prompt": 2, "online_outcome": "binary"},
        r"online_outcome: 'binary' is not read with --online dpo",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    settings, message = REFUSED[case]
    given = {"policy": "p", "dpo_model": "d", "reward_model": ("r",), "data": "x", "online": "prime"}
    with pytest.raises(ConfigError, match=message):
        RTOConfig(**given | settings).validate()
    RTOConfig(**given).validate()
