"""Update policy and critic from one train batch: PPO.

The batch is shared out over ranks and micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

import torch
from rto_kernels import PPOStats
from torch import Tensor

from rto_fast import distributed
from rto_fast.algo import losses
from rto_fast.algo.losses import OnlineStats, PairStats
from rto_fast.backend.train_engine import StepResult, TrainEngine
from rto_fast.config import RTOConfig
from rto_fast.contract import Rollout, Scores, Targets
from rto_fast.models.packing import PackedBatch, Placement, my_share
from rto_fast.supervised.stage import Row
from rto_fast.updates.ptx import PTXBatch

S = TypeVar("S", PPOStats, PairStats, OnlineStats)
LossAndStats: TypeAlias = tuple[Tensor, S]


class Trained(Protocol):
    """What an update needs of a run."""

    @property
    def policy(self) -> TrainEngine: ...

    @property
    def critic(self) -> TrainEngine | None: ...

    @property
    def online(self) -> TrainEngine | None: ...

    @property
    def config(self) -> RTOConfig: ...

    @property
    def placement(self) -> Placement: ...

    @property
    def ptx(self) -> Sequence[Row] | None: ...


@dataclass(frozen=True)
class UpdateStats(Generic[S]):
    """Loss and statistics of one train batch, summed over micro-batches and ranks."""

    result: StepResult
    loss: float
    stats: S
    lr: float
    router_aux: float | None = None
    """The router's auxiliary loss, None where it is off."""
    ptx_loss: float | None = None
    """Mean negative log-prob of the supervised tokens beside the batch; None where there were none."""


@dataclass(frozen=True)
class Share:
    """Where a micro-batch stands in the rollout."""

    sequences: list[int]
    tokens: Tensor
    """[R of the micro-batch] int64 positions in the rollout's [R] tensors."""


class TrainBatch:
    """The sequences of one optimiser step, shared out over ranks and micro-batches.

    Losses are divided by the global count of the whole train batch, so neither the number of ranks nor the size
    of a micro-batch changes them. Empty responses carry no loss and are left out.
    """

    def __init__(self, run: Trained, rollout: Rollout, scores: Scores, targets: Targets, index: list[int]) -> None:
        self.run, self.rollout, self.scores, self.targets = run, rollout, scores, targets
        self.index = index = [i for i in index if rollout.response_lens[i] > 0] or index[:1]
        self.micro = self.shared_out([[i] for i in index])
        counted = rollout.response_lens[torch.tensor(index)]
        self.denominator = losses.loss_denominator(counted, run.config.loss_aggregation).to(run.placement.device)

    def shared_out(self, units: Sequence[list[int]]) -> list[tuple[list[int], float]]:
        """This rank's micro-batches, (sequences, weight) each; a unit's sequences stay together.

        A rank with fewer micro-batches than another runs the shortest unit with weight 0 (see packing.plan).
        """
        lens = self.rollout.seq_lens.tolist()
        tokens = [sum(lens[i] for i in unit) for unit in units]
        share = my_share(tokens, self.run.config.micro_budget(self.run.config.micro_tokens))
        return [([i for u in part for i in units[u]], weight) for part, weight in share]

    def policy_terms(self, batch: PackedBatch, share: Share) -> losses.PolicyTerms:
        r, targets = share.tokens, self.targets
        return losses.PolicyTerms(
            self.scores.old_logp[r], targets.advantages[r], targets.whiten, batch.cu_responses, self.denominator
        )

    def update_policy(self, step: int) -> UpdateStats[Any]:
        config, policy = self.run.config, self.run.policy

        def loss(batch: PackedBatch, share: Share) -> LossAndStats[PPOStats]:
            read = partial(
                losses.policy_loss, terms=self.policy_terms(batch, share), temperature=config.temperature,
                clip=config.clip, entropy_coef=config.entropy_coef, aggregation=config.loss_aggregation,
            )  # fmt: skip
            out = policy(batch, read)
            return out.policy_loss, out.stats

        return self._update_policy(loss, step, PPOStats)

    def update_critic(self, step: int) -> UpdateStats[PPOStats]:
        config, critic = self.run.config, self.run.critic
        assert critic is not None, "a run without a critic has no critic's update"

        def loss(batch: PackedBatch, share: Share) -> LossAndStats[PPOStats]:
            r = share.tokens
            values = critic(batch, batch.state_positions)
            out = losses.value_loss(
                values, self.scores.values[r], self.targets.returns[r], batch.cu_responses, self.denominator,
                value_clip=config.value_clip, aggregation=config.loss_aggregation,
            )  # fmt: skip
            return out.value_loss, out.stats

        return self._update(critic, loss, step, PPOStats)

    def _update_policy(
        self, loss: Callable[[PackedBatch, Share], LossAndStats[S]], step: int, kind: type[S]
    ) -> UpdateStats[S]:
        """As `_update`, of the policy: with the PTX loss where the run has one."""
        run = self.run
        ptx = PTXBatch(run.policy, run.ptx, run.config, run.placement, step) if run.ptx else None
        return self._update(run.policy, loss, step, kind, ptx)

    def _update(
        self, engine: TrainEngine, loss: Callable[[PackedBatch, Share], LossAndStats[S]], step: int, kind: type[S],
        ptx: PTXBatch | None = None,
    ) -> UpdateStats[S]:  # fmt: skip
        """One optimiser step; `loss` gives a micro-batch's share of the loss and of the statistics."""
        device = self.run.placement.device
        sums = torch.zeros(1 + len(kind._fields), dtype=torch.float64, device=device)
        ratio_max, router_aux = torch.zeros((), device=device), torch.zeros((), dtype=torch.float64, device=device)
        tokens = int(self.rollout.seq_lens[self.index].sum())

        def micro_loss(item: tuple[list[int], float]) -> Tensor:
            nonlocal sums, ratio_max, router_aux
            index, weight = item
            part = self.rollout.select(index)
            batch = PackedBatch.make(part.sequences(), part.prompt_lens.tolist(), device, self.run.placement.kernel)
            stats: S
            value, stats = loss(batch, Share(index, self.rollout.response_index(index).to(device)))
            router = engine.router_loss()
            if weight:
                sums = sums + torch.stack([value.detach(), *stats]).double()
                ratio_max = torch.maximum(ratio_max, stats.ratio_max.float())
            if router is None:
                return value * weight
            router = router * (batch.tokens.numel() * weight / tokens)
            router_aux = router_aux + router.detach()
            return value * weight + self.run.config.router_aux_coef * router

        shares: list[Callable[[], Tensor]] = [partial(micro_loss, item) for item in self.micro]
        result = engine.update([*shares, *(ptx.shares() if ptx else [])], lambda share: share(), step=step)
        total = distributed.sum_over_ranks(torch.cat([sums, router_aux[None]]))
        if not math.isfinite(float(total[0])):
            result = StepResult(result.grad_norm, applied=False)
        most = max(distributed.gather_objects(float(ratio_max)))
        summed = kind(*total[1:-1].float())._replace(ratio_max=torch.tensor(most))
        aux = float(total[-1]) if getattr(engine.model, "router", None) else None
        return UpdateStats(result, float(total[0]), summed, engine.lr(step), aux, ptx.mean() if ptx else None)
