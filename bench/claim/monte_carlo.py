"""Values of a rollout's states without a critic: the mean return of several continuations by the policy itself.

    V(s_t) ~ 1/K sum_k  sum_{u >= t} r_u(y_<t, y_>=t^(k)),    y^(k) ~ pi(. | x, y_<t)

Unbiased under the run's own rewards, whatever a critic would have learnt (VinePPO, arXiv 2410.01679). It costs K whole
rollouts a token, so it serves to see what a critic's errors do, not to train.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from rto_fast.contract import Request, Rollout, offsets
from rto_fast.rollout.engine import sample_seed
from rto_fast.run import Run
from rto_fast.scoring.score import score_rollout
from rto_fast.trainer import compute_targets


def values(run: Run, rollout: Rollout, samples: int) -> Tensor:
    """[R] fp32: of the state before each response token, from `samples` continuations of each. One rank, no lag."""
    found = torch.zeros(len(rollout.response_tokens))
    first = rollout.cu_responses[:-1]
    for place in range(int(rollout.response_lens.max()) if len(rollout) else 0):
        index = (rollout.response_lens > place).nonzero().flatten()
        continued = continuations(run, rollout, index.tolist(), place, samples)
        found[first[index] + place] = returns(run, continued, place).view(len(index), samples).mean(1)
    return found


def continuations(run: Run, rollout: Rollout, index: list[int], place: int, samples: int) -> Rollout:
    """`samples` responses for each one at `index`, in order, that share its first `place` tokens and go on anew."""
    prompts, responses = rollout.prompts(), rollout.responses()
    begun = rollout.sampler_logp.split(rollout.response_lens.tolist())
    requests = [
        Request((*prompts[i].tolist(), *responses[i][:place].tolist()), int(rollout.rows[i]),
                int(rollout.sample_index[i]), k, _seed(run, rollout, i, place, k))
        for i in index for k in range(samples)
    ]  # fmt: skip
    least = max(0, run.sampling.min_tokens - place)
    sampling = dataclasses.replace(run.sampling, max_tokens=run.sampling.max_tokens - place, min_tokens=least)
    drawn = run.sync.sample(requests, sampling)
    kept = [i for i in index for _ in range(samples)]
    logps = zip(kept, drawn.sampler_logp.split(drawn.response_lens.tolist()), strict=True)
    return dataclasses.replace(
        drawn, prompt_lens=rollout.prompt_lens[kept], response_lens=drawn.response_lens + place,
        sampler_logp=torch.cat([part for i, logp in logps for part in (begun[i][:place], logp)]),
    )  # fmt: skip


def _seed(run: Run, rollout: Rollout, i: int, place: int, k: int) -> int:
    """Another one than of any response that trains."""
    return sample_seed(run.config.seed, int(rollout.sample_index[i]), -1 - i, place * 1_000_000 + k)


def returns(run: Run, rollout: Rollout, place: int) -> Tensor:
    """[B] fp32: discounted sums of the run's rewards from response token `place` on, those of now."""
    texts = run.texts(rollout)
    scores, _ = score_rollout(rollout, texts, run.scorers, run.config, run.placement, lambda _: None)
    targets = compute_targets(rollout, scores, run.config, run.state.kl.beta2, run.delimiters)
    return torch.stack([one.sum() for one in _from(targets.rewards.cpu(), rollout, place, run.config.gamma)])


def _from(rewards: Tensor, rollout: Rollout, place: int, gamma: float) -> Iterator[Tensor]:
    """Each response's rewards from `place` on, discounted to it."""
    cu = offsets(rollout.response_lens).tolist()
    for start, end in itertools.pairwise(cu):
        rest = rewards[start + place : end]
        yield rest * gamma ** torch.arange(len(rest))
