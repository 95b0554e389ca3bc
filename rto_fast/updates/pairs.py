"""Update the policy from pairs of responses to one prompt: P3O and REBEL.

There is no critic.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial

import torch
from rto_kernels import token_logprobs
from torch import Tensor

from rto_fast.algo import losses
from rto_fast.contract import Rollout, Scores, Targets
from rto_fast.models.packing import PackedBatch
from rto_fast.updates.ppo import Share, TrainBatch, Trained, UpdateStats


class PairBatch(TrainBatch, ABC):
    """The pairs of one optimiser step, each within one micro-batch; losses are divided by the batch's pairs."""

    def __init__(self, run: Trained, rollout: Rollout, scores: Scores, targets: Targets, index: list[int]) -> None:
        """index: 2k and 2k + 1 of the batch are the two responses to one prompt."""
        self.run, self.rollout, self.scores, self.targets = run, rollout, scores, targets
        self.index = index
        self.micro = self.shared_out([index[i : i + 2] for i in range(0, len(index), 2)])
        self.denominator = torch.tensor(len(index) / 2, device=run.placement.device)
        lens = rollout.response_lens.to(run.placement.device)
        self.totals = torch.segment_reduce(targets.rewards, "sum", lengths=lens)

    @abstractmethod
    def pair_loss(self, log_ratios: Tensor, reward_gap: Tensor) -> tuple[Tensor, losses.PairStats]:
        """[P, 2] log(pi / pi_old) of the two responses, [P] difference of their rewards -> the batch's share."""

    def update_policy(self, step: int) -> UpdateStats[losses.PairStats]:
        config, policy = self.run.config, self.run.policy

        def loss(batch: PackedBatch, share: Share) -> tuple[Tensor, losses.PairStats]:
            logp = policy(batch, partial(token_logprobs, temperature=config.temperature))
            change = logp - self.scores.old_logp[share.tokens]
            log_ratios = torch.segment_reduce(change, "sum", lengths=batch.cu_responses.diff()).view(-1, 2)
            first, second = self.totals[share.sequences].view(-1, 2).unbind(1)
            return self.pair_loss(log_ratios, first - second)

        return self._update_policy(loss, step, losses.PairStats)


class P3OBatch(PairBatch):
    """arXiv 2310.00212."""

    def pair_loss(self, log_ratios: Tensor, reward_gap: Tensor) -> tuple[Tensor, losses.PairStats]:
        config = self.run.config
        form = losses.p3o_loss if config.p3o_clip == "joint" else losses.p3o_separate_loss
        return form(log_ratios, reward_gap, self.denominator, config.clip)


class RebelBatch(PairBatch):
    """arXiv 2404.16767."""

    def pair_loss(self, log_ratios: Tensor, reward_gap: Tensor) -> tuple[Tensor, losses.PairStats]:
        return losses.rebel_loss(log_ratios, reward_gap, self.denominator, self.run.config.rebel_eta)
