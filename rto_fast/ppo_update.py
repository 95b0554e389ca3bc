"""One PPO update of the policy and of the critic from a train batch, shared out over ranks and micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from rto_kernels import PPOStats
from torch import Tensor

from rto_fast import algo, distributed
from rto_fast.batch import Rollout, Scores, Targets
from rto_fast.build import Run
from rto_fast.engine import StepResult, TrainEngine
from rto_fast.packing import PackedBatch, plan

LossAndStats = tuple[Tensor, PPOStats]


class UpdateStats:
    """Losses and statistics of one train batch, summed over micro-batches and ranks."""

    def __init__(self, result: StepResult, sums: Tensor, ratio_max: float, lr: float) -> None:
        self.result, self.lr = result, lr
        self.loss = float(sums[0])
        self.stats = PPOStats(*sums[1:].float())._replace(ratio_max=torch.tensor(ratio_max))


class TrainBatch:
    """The sequences of one optimiser step, shared out over ranks and micro-batches.

    Losses are divided by the global count of the whole train batch, so neither the number of ranks nor the size
    of a micro-batch changes them. Empty responses carry no loss and are left out.
    """

    def __init__(self, run: Run, rollout: Rollout, scores: Scores, targets: Targets, index: list[int]) -> None:
        self.run, self.rollout, self.scores, self.targets = run, rollout, scores, targets
        lens = rollout.seq_lens.tolist()
        index = [i for i in index if rollout.response_lens[i] > 0] or index[:1]
        share = plan([lens[i] for i in index], distributed.world_size(), run.config.micro_tokens)
        shortest = min(index, key=lambda i: lens[i])
        # A rank with fewer micro-batches runs the shortest sequence with weight 0 (see packing.plan).
        self.micro = [
            ([index[i] for i in part], 1.0) if part else ([shortest], 0.0) for part in share[distributed.rank()]
        ]
        counted = rollout.response_lens[torch.tensor(index)]
        self.denominator = algo.loss_denominator(counted, run.config.loss_aggregation).to(run.placement.device)

    def update_policy(self, step: int) -> UpdateStats:
        config, policy = self.run.config, self.run.policy

        def loss(batch: PackedBatch, r: Tensor) -> LossAndStats:
            logp, entropy = policy(batch, temperatures=(config.temperature,), entropy=True)
            out = algo.policy_loss(
                logp[0], entropy, self.scores.old_logp[r], self.targets.advantages[r], self.targets.whiten,
                batch.cu_responses, self.denominator, config,
            )  # fmt: skip
            return out.policy_loss, out.stats

        return self._update(policy, loss, step)

    def update_critic(self, step: int) -> UpdateStats:
        config, critic = self.run.config, self.run.critic

        def loss(batch: PackedBatch, r: Tensor) -> LossAndStats:
            values = critic(batch, batch.state_positions)
            out = algo.value_loss(
                values, self.scores.values[r], self.targets.returns[r], batch.cu_responses, self.denominator, config
            )
            return out.value_loss, out.stats

        return self._update(critic, loss, step)

    def _update(
        self, engine: TrainEngine, loss: Callable[[PackedBatch, Tensor], LossAndStats], step: int
    ) -> UpdateStats:
        device = self.run.placement.device
        sums = torch.zeros(1 + len(PPOStats._fields), dtype=torch.float64, device=device)
        ratio_max = torch.zeros((), device=device)

        def micro_loss(item: tuple[list[int], float]) -> Tensor:
            nonlocal sums, ratio_max
            index, weight = item
            part = self.rollout.select(index)
            batch = PackedBatch.make(part.sequences(), part.prompt_lens.tolist(), device, self.run.placement.kernel)
            value, stats = loss(batch, self.rollout.response_index(index).to(device))
            if weight:
                sums = sums + torch.stack([value.detach(), *stats]).double()
                ratio_max = torch.maximum(ratio_max, stats.ratio_max.float())
            return value * weight

        result = engine.update(self.micro, micro_loss, step=step)
        total = distributed.sum_over_ranks(sums)
        if not math.isfinite(float(total[0])):
            result = StepResult(result.grad_norm, applied=False)
        most = max(distributed.gather_objects(float(ratio_max)))
        return UpdateStats(result, total, most, engine.lr(step))
