"""Values of a rollout's states without a critic: the mean return of several continuations by the policy itself.

    V(s_t) ~ 1/K sum_k  sum_{u >= t} r_u(y_<t, y_>=t^(k)),    y^(k) ~ pi(. | x, y_<t)

Unbiased under the run's own rewards, whatever a critic would have learnt (VinePPO, arXiv 2410.01679). It costs K whole
responses a token, so it serves to see what a critic's errors do, not to train.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rto_fast.contract import Request, Rollout
from rto_fast.errors import require
from rto_fast.rollout.engine import sample_seed
from rto_fast.run import Run
from rto_fast.scoring.score import score_rollout
from rto_fast.trainer import compute_targets

State = tuple[int, int]
"""(response of the rollout, number of its tokens that are there)."""


def values(run: Run, rollout: Rollout, samples: int) -> Tensor:
    """[R] fp32: of the state before each response token, from `samples` continuations of each. One rank, no lag.

    Raises ConfigError where responses have a least length: continuations would need one each.
    """
    require(not run.sampling.min_tokens, "min_response_length: values from continuations need 0")
    found = torch.zeros(len(rollout.response_tokens))
    first = rollout.cu_responses.tolist()
    for states in batches(run, rollout):
        returned = returns(run, continuations(run, rollout, states, samples), [t for _, t in states], samples)
        found[[first[i] + t for i, t in states]] = returned.view(len(states), samples).mean(1)
    return found


def batches(run: Run, rollout: Rollout) -> Iterator[list[State]]:
    """All states, in batches whose continuations of one length have room in the model's positions."""
    lens, longest = rollout.response_lens.tolist(), int(rollout.prompt_lens.max())
    positions = run.policy.model.inner.config.max_position_embeddings
    places = max(1, positions - longest - run.sampling.max_tokens + 1)
    for start in range(0, max(lens), places):
        yield [(i, t) for i, n in enumerate(lens) for t in range(start, min(n, start + places))]


def continuations(run: Run, rollout: Rollout, states: Sequence[State], samples: int) -> Rollout:
    """`samples` responses for each state, in order, that begin with its tokens and go on anew."""
    prompts, responses = rollout.prompts(), rollout.responses()
    logps = rollout.sampler_logp.split(rollout.response_lens.tolist())
    longest = run.sampling.max_tokens - min(t for _, t in states)
    kept = [state for state in states for _ in range(samples)]
    asked = [_request(run, rollout, i, (*prompts[i].tolist(), *responses[i][:t].tolist()), t * samples + n % samples)
             for n, (i, t) in enumerate(kept)]  # fmt: skip
    drawn = run.sync.sample(asked, dataclasses.replace(run.sampling, max_tokens=longest))
    whole, begun, truncated = [], [], []
    of_drawn = zip(kept, drawn.responses(), drawn.sampler_logp.split(drawn.response_lens.tolist()),
                   drawn.truncated.tolist(), strict=True)  # fmt: skip
    for (i, t), tokens, logp, cut in of_drawn:
        room = run.sampling.max_tokens - t
        whole.append(torch.cat([responses[i][:t], tokens[:room]]).tolist())
        begun.append(torch.cat([logps[i][:t], logp[:room]]).tolist())
        truncated.append(cut or len(tokens) > room)
    plain = [dataclasses.replace(q, prompt=tuple(prompts[i].tolist())) for q, (i, _) in zip(asked, kept, strict=True)]
    return Rollout.from_lists(plain, whole, begun, truncated, drawn.version)


def _request(run: Run, rollout: Rollout, i: int, prompt: tuple[int, ...], number: int) -> Request:
    """One continuation of a response; `number` among the response's. Its seed is none of a response that trains."""
    row, sample = int(rollout.rows[i]), int(rollout.sample_index[i])
    return Request(prompt, row, sample, number, sample_seed(run.config.seed, sample, -1 - i, number))


def returns(run: Run, rollout: Rollout, places: Sequence[int], samples: int) -> Tensor:
    """[B] fp32: sums of the run's rewards of now from each response's place on, discounted to it.

    places: of every `samples` responses.
    """
    scores, _ = score_rollout(rollout, run.texts(rollout), run.scorers, run.config, run.placement, lambda _: None)
    rewards = compute_targets(rollout, scores, run.config, run.state.kl.beta2, run.delimiters).rewards.cpu()
    place = itertools.chain.from_iterable([t] * samples for t in places)
    rest = [one[t:] for one, t in zip(rewards.split(rollout.response_lens.tolist()), place, strict=True)]
    return torch.stack([(r * run.config.gamma ** torch.arange(len(r))).sum() for r in rest])
