"""Keep the policy close to supervised data while it is trained: PPO-ptx.

The policy's loss gains the second term of InstructGPT's Eq. 2 (arXiv 2203.02155), as a mean over response tokens,

    ptx_coef * mean(-log pi(y_t | x, y_<t)),

over as many supervised rows an optimiser step as the train batch has responses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from rto_fast import distributed
from rto_fast.backend.train_engine import TrainEngine
from rto_fast.config import RTOConfig
from rto_fast.data.order import rows_of_step
from rto_fast.models.packing import Placement, my_share
from rto_fast.supervised.stage import Row, RowBatch


class PTXBatch:
    """The supervised rows of one optimiser step, shared out over ranks and micro-batches.

    Losses are divided by the response tokens of all of them, so neither the number of ranks nor the size of a
    micro-batch changes them.
    """

    def __init__(
        self, policy: TrainEngine, rows: Sequence[Row], config: RTOConfig, placement: Placement, step: int
    ) -> None:
        """rows: of the whole data set; step: of the policy, which says where in their order the batch stands."""
        self.policy, self.placement, self.coef = policy, placement, config.ptx_coef
        index = rows_of_step(f"ptx/{config.seed}", len(rows), config.train_batch, step)
        self.rows = [rows[i] for i in index]
        self.micro = my_share([row.tokens for row in self.rows], config.micro_budget(config.micro_tokens))
        self.tokens = sum(len(response) for row in self.rows for response in row.responses)
        self.sum = torch.zeros((), dtype=torch.float64, device=placement.device)

    def shares(self) -> list[Callable[[], Tensor]]:
        """What each of this rank's micro-batches adds to the loss, to be called in turn."""
        return [partial(self._share, part, weight) for part, weight in self.micro]

    def _share(self, part: list[int], weight: float) -> Tensor:
        batch = RowBatch([self.rows[i] for i in part], part, False, self.placement)
        loss = -self.policy(batch.packed).sum() / self.tokens
        self.sum += weight * loss.detach()
        return loss * (weight * self.coef)

    def mean(self) -> float:
        """Mean negative log-prob (nats) of all ranks' tokens, once the shares were called."""
        return float(distributed.sum_over_ranks(self.sum))
