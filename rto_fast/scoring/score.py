"""What the models say of a rollout: log-probs, values and scores.

Without gradient, packed, shared out over ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from rto_fast import distributed
from rto_fast.backend.frozen import FrozenModel
from rto_fast.config import RTOConfig
from rto_fast.contract import ResponseTexts, Rollout, Scores
from rto_fast.errors import RewardError
from rto_fast.models.heads import logps_and_entropy, logps_at
from rto_fast.models.packing import PackedBatch, Placement, balance
from rto_fast.scoring.reward_source import MetricSource, Model, RewardSource
from rto_fast.scoring.token_source import Mixture, TokenSource, over_rollout


@dataclass(frozen=True)
class Scorers:
    """The models of one run, each callable on packed batches. `reference is dpo_ref` where they are one model."""

    policy: Model
    critic: Model | None
    """None where the advantages need none: values are 0."""
    reference: Model
    dpo: Model | Mixture | None
    """None where no token reward comes from it."""
    dpo_ref: Model
    rewards: Sequence[RewardSource]
    reward_weights: Sequence[float]
    tokens: Sequence[TokenSource]
    """Sources of token rewards beside the DPO models."""
    frozen: Sequence[FrozenModel]
    """Those of the models that may wait in host memory between rollouts."""

    @contextmanager
    def on_device(self, model: object) -> Iterator[None]:
        """Inside, the model is on the device, and of those that park it alone."""
        parked = [m for m in self.frozen if m is model]
        for m in parked:
            m.fetch()
        try:
            yield
        finally:
            for m in parked:
                m.park()


@torch.no_grad()
def score_rollout(
    rollout: Rollout,
    texts: ResponseTexts,
    scorers: Scorers,
    config: RTOConfig,
    placement: Placement,
    progress: Callable[[int], None],
) -> tuple[Scores, dict[str, Tensor]]:
    """Scores of the global rollout, the same on every rank; each reward source's own scores [B], and its metrics as
    SOURCE/METRIC, each [responses that have it] fp64.

    Each rank computes a share that is balanced by tokens; `progress` is told of tokens done, at last of the other
    ranks'. fp32, on the device.
    """
    owners = balance(rollout.seq_lens.tolist(), distributed.world_size())
    mine = owners[distributed.rank()]
    local, local_texts = rollout.select(mine), texts.select(mine)

    named, more = _source_scores(local, local_texts, scorers)
    pieces = _token_scores(local, scorers, config, placement, progress)
    said = _said_of_tokens(local, local_texts, pieces, scorers.tokens)
    unasked = () if config.credit == "segment" else ("entropy",)
    names = [f.name for f in fields(Scores) if f.name not in ("score", "tokens", *unasked)]
    # Column by column, so that a rank without any sequence takes part too.
    columns = [distributed.gather_ragged([p[k] for p in pieces], owners) for k in range(len(names))]
    progress(int(rollout.seq_lens.sum() - local.seq_lens.sum()))
    tensors = {n: torch.cat(c).to(placement.device) for n, c in zip(names, columns, strict=True)}
    if config.behaviour == "sampler" and config.samples_policy:
        tensors["policy_logp"] = rollout.sampler_logp.to(placement.device)

    if scorers.tokens:
        lens = local.response_lens.tolist()
        every = [torch.cat(distributed.gather_ragged(list(one.split(lens)), owners)) for one in said]
        tensors["tokens"] = torch.stack(every, dim=1).to(placement.device)
    sources = {
        n: torch.cat(distributed.gather_ragged(list(t.float().cpu()[:, None]), owners)) for n, t in named.items()
    }
    total = weighted_sum(sources, scorers.reward_weights) if sources else torch.zeros(len(rollout))
    if config.truncated_reward is not None:
        total = torch.where(rollout.truncated, torch.tensor(config.truncated_reward), total)
    return Scores(**tensors, score=total.to(placement.device)), sources | _metrics(more, owners)


@torch.no_grad()
def dpo_logps(rollout: Rollout, dpo: Model, placement: Placement) -> Tensor:
    """[R] fp32 on the device: `Scores.dpo_logp` of one DPO model as it is now; the same on every rank."""
    owners = balance(rollout.seq_lens.tolist(), distributed.world_size())
    local = rollout.select(owners[distributed.rank()])
    said = over_rollout(placement, local, dpo, dpo).split(local.response_lens.tolist())
    return torch.cat(distributed.gather_ragged(said, owners)).to(placement.device)


def _source_scores(
    local: Rollout, texts: ResponseTexts, scorers: Scorers
) -> tuple[dict[str, Tensor], dict[str, list[dict[str, float]]]]:
    """Each source's scores and metrics of this rank's share. One that fails on one rank raises RewardError on all."""
    named: dict[str, Tensor] = {}
    more: dict[str, list[dict[str, float]]] = {}
    failure = ""
    for source in scorers.rewards:
        try:
            with scorers.on_device(getattr(source, "model", None)):
                if isinstance(source, MetricSource):
                    named[source.name], more[source.name] = source.judge(texts)
                else:
                    named[source.name] = source.score(local, texts)
        except RewardError as error:
            failure = str(error)
            break
    if failed := [f for f in distributed.gather_objects(failure) if f]:
        raise RewardError(failed[0])
    return named, more


def _metrics(local: dict[str, list[dict[str, float]]], owners: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """SOURCE/METRIC -> [responses that have it] fp64, in the rollout's order whatever the ranks.

    local: of each source, the metrics of this rank's responses.
    """
    found: dict[str, list[tuple[int, float]]] = {}
    for rank, named in enumerate(distributed.gather_objects(local) if local else ()):
        for source, each in named.items():
            for i, metrics in zip(owners[rank], each, strict=True):
                for name, value in metrics.items():
                    found.setdefault(f"{source}/{name}", []).append((i, value))
    return {name: torch.tensor([v for _, v in sorted(found[name])], dtype=torch.float64) for name in sorted(found)}


def _said_of_tokens(
    local: Rollout, texts: ResponseTexts, pieces: Sequence[tuple[Tensor, ...]], sources: Sequence[TokenSource]
) -> list[Tensor]:
    """[R] fp32 of each source for this rank's share. One that fails on one rank raises RewardError on all.

    After a failure the others are asked all the same: under ZeRO-3 every rank must call every model.
    """
    if not sources:
        return []
    reference = torch.cat([p[2] for p in pieces]).cpu() if pieces else torch.zeros(0)
    said, failure = [], ""
    for source in sources:
        try:
            said.append(source.score(local, texts, reference).float().cpu())
        except RewardError as error:
            failure = failure or str(error)
    if failed := [f for f in distributed.gather_objects(failure) if f]:
        raise RewardError(failed[0])
    return said


def _token_scores(
    local: Rollout, scorers: Scorers, config: RTOConfig, placement: Placement, progress: Callable[[int], None]
) -> list[tuple[Tensor, ...]]:
    """For each sequence of this rank the fields of Scores in order, but for `score` and `tokens`; each [its response's
    length]. Entropies where credit goes by segments.

    One model after the other reads all micro-batches, so that those that park need the device one at a time.
    """
    temperatures = (config.temperature,) if config.temperature == 1 else (config.temperature, 1.0)
    batches = list(placement.micro(local.sequences(), local.prompt_lens.tolist()))
    dpo = scorers.dpo.models if isinstance(scorers.dpo, Mixture) else [scorers.dpo]
    asked = {id(m) for m in (scorers.reference, scorers.dpo_ref, *dpo, scorers.critic) if m is not None}
    passes, done = len(asked) + bool(config.scores_policy), 0

    def read(model: Model, ask: Callable[[PackedBatch], Tensor]) -> list[Tensor]:
        """What a model says of every micro-batch."""
        nonlocal done
        out = []
        with scorers.on_device(model):
            for index, batch in batches:
                out.append(ask(batch))
                tokens = sum(int(local.seq_lens[i]) for i in index)
                progress(tokens * (done + 1) // passes - tokens * done // passes)
        done += 1
        return out

    references = read(scorers.reference, scorers.reference)
    dpo_refs = references if scorers.dpo_ref is scorers.reference else read(scorers.dpo_ref, scorers.dpo_ref)
    if isinstance(scorers.dpo, Mixture):
        each = zip(dpo_refs, *(read(model, model) for model in scorers.dpo.models), strict=True)
        dpos = [scorers.dpo.mix(base, logps) for base, *logps in each]
    else:
        dpos = dpo_refs if scorers.dpo is None else read(scorers.dpo, scorers.dpo)
    policies = [torch.full_like(reference, math.nan)[None] for reference in references]
    if config.scores_policy:
        policy_read = (logps_and_entropy if config.credit == "segment" else logps_at)(temperatures)
        policies = read(scorers.policy, lambda batch: scorers.policy(batch, policy_read))
    values = [torch.zeros_like(_valued(batch), dtype=torch.float32) for _, batch in batches]
    if critic := scorers.critic:
        values = read(critic, lambda batch: critic(batch, _valued(batch)))

    out: list[tuple[Tensor, ...] | None] = [None] * len(local)
    for k, (index, batch) in enumerate(batches):
        of_states, after = values[k].split([batch.state_positions.numel(), len(batch.last_positions)])
        lens = batch.cu_responses.diff().tolist()
        logps, entropy = policies[k][: len(temperatures)], policies[k][len(temperatures) :]
        of_tokens = (logps[0], logps[-1], references[k], dpos[k], dpo_refs[k], of_states, *entropy)
        columns = [t.split(lens) for t in of_tokens]
        for j, i in enumerate(index):
            bootstrapped = config.truncation == "bootstrap" and bool(local.truncated[i])
            last = after[j : j + 1] if bootstrapped else torch.zeros_like(after[j : j + 1])
            found = [c[j].clone() for c in columns]
            out[i] = (*found[:6], last, *found[6:])
    return out  # type: ignore[return-value]


def _valued(batch: PackedBatch) -> Tensor:
    """Positions of one critic forward: of all states, then of the state after each last token."""
    return torch.cat([batch.state_positions, batch.last_positions])


def weighted_sum(named: Mapping[str, Tensor], weights: Sequence[float]) -> Tensor:
    """[B] fp32 sum of weight * score, weights in the order of `named`; weight 0 leaves its source out."""
    if not named or len(named) != len(weights):
        raise ValueError(f"weights: {len(weights)} given for {len(named)} reward sources")
    total = torch.zeros_like(next(iter(named.values())), dtype=torch.float32)
    for score, weight in zip(named.values(), weights, strict=True):
        if weight:
            total += weight * score.float()
    return total
