"""The loop of Reinforced Token Optimization (arXiv 2404.18922, Algorithm 1).

    for each batch of prompts x:
        y ~ pi(. | x)                                                           rollout
        log pi, log pi_ref, log pi_dpo, V, r(x, y)                              score
        pi_dpo on r(x, y), where it is trained online                           learn the token reward
        r_t = beta1 log(pi_dpo / pi_ref) - beta2 log(pi / pi_ref) + [t = T] beta3 r    token reward, Eq. 4.7
        A, R = GAE(r, V), whitened over the rollout                             targets
        PPO updates of pi and V                                                 train
        weights of pi -> sampler                                                sync

With `rollout_lag` 1 the next batch is sampled while this one trains: by the policy of one iteration before.

Every rank holds the whole rollout (some 40 bytes a token), so that all of them see the same targets and cut the
same train batches out of it; generation, forwards and gradients are shared out by tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from rto_fast import build
from rto_fast.algo.advantages import ESTIMATORS, pair
from rto_fast.algo.credit import CREDIT
from rto_fast.algo.losses import OnlineStats
from rto_fast.algo.targets import NO_DELIMITERS, Coefficients, targets_of
from rto_fast.backend.output_lock import alone
from rto_fast.backend.saving import Saving
from rto_fast.config import RTOConfig
from rto_fast.contract import ResponseTexts, Rollout, Scores, Targets
from rto_fast.errors import Diverged
from rto_fast.metrics import (
    not_finite,
    of_critic,
    of_iteration,
    of_online,
    of_pairs,
    of_policy,
    of_ptx,
    of_sampled_policy,
    of_sampler,
    of_scored,
)
from rto_fast.rollout.engine import SyncStats
from rto_fast.rollout.weights.sync import Gap
from rto_fast.run import Run
from rto_fast.scoring.score import dpo_logps, score_rollout
from rto_fast.updates.online import BestWorstBatch, OnlineBatch, OutcomeBatch
from rto_fast.updates.pairs import P3OBatch, RebelBatch
from rto_fast.updates.ppo import TrainBatch, UpdateStats
from rto_fast.updates.sampler_corrected import SamplerBatch

Observer = Callable[[Rollout, ResponseTexts], dict[str, float]]
Values = Callable[[Run, Rollout], Tensor]


@dataclass(frozen=True)
class PolicyUpdate:
    """One way to move the policy."""

    batch: type[TrainBatch]
    """The train batch that makes it."""
    figures: Callable[[list[UpdateStats[Any]]], dict[str, float]]
    """The metrics of its steps."""


POLICY_UPDATES = {
    "ppo": PolicyUpdate(TrainBatch, of_policy),
    "p3o": PolicyUpdate(P3OBatch, of_pairs),
    "rebel": PolicyUpdate(RebelBatch, of_pairs),
}
"""What each `policy_update` is, where the trainer's log-probs are the behaviour's."""
SAMPLER_CORRECTED = PolicyUpdate(SamplerBatch, of_sampled_policy)
"""PPO where the sampler's are."""
ONLINE: dict[str, type[OnlineBatch]] = {"prime": OutcomeBatch, "dpo": BestWorstBatch}
"""What trains the DPO model under each `online`."""


@alone
def train(config: RTOConfig, observe: Observer | None = None, value: Values | None = None) -> Run:
    """Runs RTO (PPO where beta1 = 0) and writes checkpoints, logs, the report and Hugging Face folders.

    observe: called with each global rollout and its texts; what it returns is logged (a known true reward, say).
    value: [R] fp32 values of a rollout's states in place of the critic's (better ones, to see what a critic costs).
    """
    run = build.build(config)
    with Saving(config) as saving, closing(run.logger), closing(run.sync):
        run.logger.message(saving.plan(run.checkpoint_bytes))
        for iteration in range(run.state.iteration, run.iterations):
            metrics = rto_iteration(run, iteration, observe, value)
            run.state.iteration = iteration + 1
            run.logger.log(iteration + 1, metrics | run.frozen_error)
            run.export_if_due()
            saving.after(iteration + 1, run.save)
        run.finish()
    return run


def rto_iteration(
    run: Run, iteration: int, observe: Observer | None = None, value: Values | None = None
) -> dict[str, float]:
    """One turn of the loop; returns its metrics."""
    beta2 = run.state.kl.beta2
    rollout = draw(run, iteration)
    with sampled_ahead(run, iteration + 1):
        texts, scores, seen = score(run, iteration, rollout, observe)
        scores, dpo_steps = learn_token_reward(run, iteration, rollout, scores)
        if wrong := not_finite(scores):
            return seen | bad_step(run, f"rollout {iteration + 1} gave {wrong}")
        if value:
            scores = replace(scores, values=value(run, rollout).to(scores.values))
        paid, seen_scale = scale_scores(run, scores)
        targets = compute_targets(rollout, paid, run.config, beta2, run.delimiters)
        run.state.kl.update(targets.mean_kl, len(rollout))
        run.keep_samples(iteration, rollout, scores, targets, texts)
        learnt = updates(run, iteration, rollout, scores, targets, dpo_steps)
    return of_iteration(seen | seen_scale, targets, len(rollout), beta2, learnt, push(run))


def draw(run: Run, iteration: int) -> Rollout:
    """The iteration's rollout: the one sampled ahead, or a new one."""
    with run.logger.phase("rollout"):
        return run.take_ahead() or sample(run, iteration)


def sample(run: Run, iteration: int) -> Rollout:
    """The global rollout of an iteration, the same on every rank, in the order of its prompts."""
    share, done = run.share(iteration), 0

    def report(tokens: int, ended: int) -> None:
        nonlocal done
        done += ended
        run.logger.progress(tokens, done, len(share.requests))

    local = run.sync.sample(share.requests, run.sampling, report, share.keep)
    rollout = run.sync.gather(share, local)
    run.logger.progress(int(rollout.response_lens.sum() - local.response_lens.sum()))  # the other engines'
    return rollout


@contextmanager
def sampled_ahead(run: Run, iteration: int) -> Iterator[None]:
    """With `rollout_lag` 1 the iteration's rollout is sampled while the block runs, and kept for `take_ahead`."""
    if not run.config.rollout_lag or iteration >= run.iterations:
        yield
        return
    share = run.share(iteration)
    finish = run.sync.sample_ahead(share.requests, run.sampling)
    yield
    with run.logger.phase("rollout"):
        local, failure = finish()
    if failure:
        run.logger.warn(f"sampling ahead failed ({failure}); iteration {iteration + 1} samples anew, without lag")
    else:
        assert local is not None
        run.ahead = run.sync.gather(share, local)


def score(
    run: Run, iteration: int, rollout: Rollout, observe: Observer | None
) -> tuple[ResponseTexts, Scores, dict[str, float]]:
    """The rollout's texts, what the models say of it, and the metrics of both; SyncError as `check_sampler`."""
    warn_of_cuts(run, rollout)
    with run.logger.phase("score"):
        texts = run.texts(rollout)
        scores, sources = score_rollout(rollout, texts, run.scorers, run.config, run.placement, run.logger.progress)
    metrics = of_scored(run.config, iteration, rollout, scores, sources, lag=run.sync.version - rollout.version)
    metrics |= observe(rollout, texts) if observe else {}
    if run.config.scores_policy and not not_finite(scores):
        check_sampler(run, rollout, scores)
    return texts, scores, metrics


def warn_of_cuts(run: Run, rollout: Rollout) -> None:
    """Says once that most responses of a rollout were cut short."""
    cut = float(rollout.truncated.float().mean())
    if cut > 0.5 and not run.told_of_cuts:
        run.told_of_cuts = True
        run.logger.warn(
            f"{100 * cut:.0f} % of the responses were cut at max_response_length {run.config.max_response_length}: "
            "reward models judge them with an end of turn that the policy did not sample; see also --truncated-reward"
        )


def learn_token_reward(
    run: Run, iteration: int, rollout: Rollout, scores: Scores
) -> tuple[Scores, list[UpdateStats[OnlineStats]]]:
    """One pass of the DPO model over a rollout that is finite, where it is trained online, and its steps.

    With `online_order` before, the scores are by the model that has learnt from them; else the next rollout's are.
    Raises Diverged after `online_patience` iterations in a row in which it was wrong more often than right.
    """
    config, dpo = run.config, run.online
    if dpo is None or not_finite(scores):
        return scores, []
    batches = run.online_batches(iteration, len(rollout))
    with run.logger.phase("online"):
        steps = [
            ONLINE[config.online](run, rollout, scores, index).update(iteration * len(batches) + number)
            for number, index in enumerate(batches)
        ]
        done = [step for step in steps if step]
        check_token_reward(run, done)
        run.logger.progress(int(rollout.seq_lens.sum()))
        if config.online_order == "before" and done:
            scores = replace(scores, dpo_logp=dpo_logps(rollout, dpo.evaluate, run.placement))
    return scores, done


def check_token_reward(run: Run, steps: list[UpdateStats[OnlineStats]]) -> None:
    """Counts the iterations in which an online token reward is wrong; raises Diverged after `online_patience`."""
    config, state, accuracy = run.config, run.state, of_online(steps).get("online/accuracy")
    if accuracy is None:
        return
    state.wrong_in_a_row = state.wrong_in_a_row + 1 if accuracy < 0.5 else 0
    if config.online_patience and state.wrong_in_a_row >= config.online_patience:
        raise Diverged(
            f"online: the token reward was wrong more often than right in {state.wrong_in_a_row} iterations in a row "
            f"(accuracy {accuracy:.2f} in the last). The last checkpoint is whole. Look at --online-lr, --online-beta, "
            "the outcomes and where the DPO model started; --online-patience 0 goes on all the same"
        )


def scale_scores(run: Run, scores: Scores) -> tuple[Scores, dict[str, float]]:
    """The scores over the deviation of all so far, these included, and its metric; as they are where that is off."""
    if run.config.score_scale == "off":
        return scores, {}
    run.state.scale.update(scores.score)
    deviation = run.state.scale.deviation
    return replace(scores, score=scores.score / deviation), {"reward/score_deviation": deviation}


def compute_targets(
    rollout: Rollout, scores: Scores, config: RTOConfig, beta2: float, delimiters: Tensor = NO_DELIMITERS
) -> Targets:
    """`targets_of` with the run's settings; beta2 stands beside them because the adaptive controller moves it."""
    estimator = ESTIMATORS[config.advantage] if config.policy_update == "ppo" else pair
    return targets_of(
        rollout, scores, Coefficients(config.dpo_scale, beta2, config.beta3, config.dpo_clip, config.score_clip),
        scales=[config.beta1 * weight for _, weight in config.other_token_sources],
        credit=CREDIT[config.credit], delimiters=delimiters, segment_entropy=config.segment_entropy,
        estimate=partial(estimator, gamma=config.gamma, lam=config.lam, group=config.responses_per_prompt),
    )  # fmt: skip


def updates(
    run: Run, iteration: int, rollout: Rollout, scores: Scores, targets: Targets,
    dpo_steps: list[UpdateStats[OnlineStats]],
) -> dict[str, float]:  # fmt: skip
    """PPO epochs over the rollout: each train batch moves the policy, then the critic where there is one.

    dpo_steps: those of an online token reward, which count among the iteration's.
    """
    config = run.config
    update = SAMPLER_CORRECTED if config.behaviour == "sampler" else POLICY_UPDATES[config.policy_update]
    trains_policy = iteration >= config.critic_warmup
    policy_steps, critic_steps, found = [], [], {}
    with run.logger.phase("train"):
        for epoch in range(config.ppo_epochs):
            for number, index in enumerate(run.train_batches(iteration, epoch, len(rollout))):
                step = run.optimiser_step(iteration, epoch, number)
                batch = update.batch(run, rollout, scores, targets, index)
                if trains_policy:
                    policy_steps.append(batch.update_policy(step - run.optimiser_step(config.critic_warmup, 0, 0)))
                    if not config.scores_policy and len(policy_steps) == 1:  # its forward came before any step
                        found = check_sampler(run, rollout, scores)
                if run.critic:
                    critic_steps.append(batch.update_critic(step))
                run.logger.progress(int(rollout.seq_lens[index].sum()))
    skipped = [s for s in (*dpo_steps, *policy_steps, *critic_steps) if not s.result.applied]
    metrics = update.figures(policy_steps) | of_ptx(policy_steps) | of_critic(critic_steps) | found
    metrics |= of_online(dpo_steps)
    if skipped:
        return metrics | bad_step(run, f"{len(skipped)} updates of iteration {iteration + 1} had non-finite gradients")
    run.state.bad_in_a_row = 0
    return metrics | {"bad_steps": float(run.state.bad_steps)}


def push(run: Run) -> SyncStats:
    """The policy's weights go to the sampler."""
    with run.logger.phase("sync"):
        return run.push_weights()


def check_sampler(run: Run, rollout: Rollout, scores: Scores) -> dict[str, float]:
    """The figures of sampler against trainer; SyncError past the limits, where both are of one version."""
    figures = of_sampler(rollout, scores, run.config.min_response_length)
    if figures and rollout.version == run.sync.version:
        run.sync.check(Gap(figures["sampler/logp_diff_mean"], figures["sampler/logp_diff_max"]))
    return figures


def bad_step(run: Run, what: str) -> dict[str, float]:
    """Counts a skipped step; raises Diverged after `max_bad_steps` in a row."""
    state = run.state
    state.bad_steps += 1
    state.bad_in_a_row += 1
    run.logger.warn(f"skipped: {what}")
    if run.config.max_bad_steps and state.bad_in_a_row >= run.config.max_bad_steps:
        raise Diverged(
            f"{state.bad_in_a_row} bad steps in a row, the last: {what}. Parameters are those before them; the last "
            f"checkpoint is whole. Look at the learning rates, the reward sources and bf16 against fp32."
        )
    return {"bad_steps": float(state.bad_steps)}
