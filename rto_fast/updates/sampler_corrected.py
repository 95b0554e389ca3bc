"""The PPO update of the policy where the sampler's log-probs are the behaviour's.

The sampler's policy differs from the trainer's by rounding, or by an update where rollouts lag. Each token's loss is
weighted by a truncated importance weight, w = min(exp(old_logp - sampler_logp), is_cap).

old_logp is the trainer's at the start of the update where scoring has computed it; else (NaN) the policy's own at the
first forward over the batch, so that the ratio of the first pass over a rollout is 1 and w does all of the correction.
"""

from __future__ import annotations

from functools import partial

import torch
from rto_kernels import PPOStats, token_logprobs

from rto_fast import distributed
from rto_fast.algo import losses
from rto_fast.models.packing import PackedBatch
from rto_fast.updates.ppo import LossAndStats, Share, TrainBatch, UpdateStats


class SamplerBatch(TrainBatch):
    """A TrainBatch whose policy update corrects for the sampler."""

    def update_policy(self, step: int) -> UpdateStats[PPOStats]:
        config, policy, device = self.run.config, self.run.policy, self.run.placement.device
        old_logp, sampler_logp = self.scores.old_logp, self.rollout.sampler_logp.to(device)
        here = self.rollout.response_index(self.index).to(device)
        unseen = bool(old_logp[here].isnan().any())
        read = partial(token_logprobs, temperature=config.temperature, return_entropy=True)

        def loss(batch: PackedBatch, share: Share) -> LossAndStats[PPOStats]:
            r = share.tokens
            logp, entropy = policy(batch, read)
            old_logp[r] = torch.where(old_logp[r].isnan(), logp.detach(), old_logp[r])
            out = losses.sampled_policy_loss(
                logp, entropy, sampler_logp[r], terms=self.policy_terms(batch, share), clip=config.clip,
                entropy_coef=config.entropy_coef, aggregation=config.loss_aggregation, is_cap=config.is_cap,
            )  # fmt: skip
            return out.policy_loss, out.stats

        stats = self._update_policy(loss, step, PPOStats)
        if unseen:  # each rank has seen its share; the next pass deals them out again
            for seen in distributed.gather_objects(old_logp[here].cpu()):
                old_logp[here] = torch.where(old_logp[here].isnan(), seen.to(device), old_logp[here])
        return stats
