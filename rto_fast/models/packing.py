"""Which sequences go into which micro-batch of which rank.

Balanced by tokens; no padding.

Every rank computes the whole plan from the same lengths, so no rank waits for another to know it. The plan
changes the order of sums only: losses are divided by the train batch's global count, never by a micro-batch's.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rto_fast import distributed
from rto_fast.contract import offsets, ragged_arange
from rto_fast.models.attention import PackedLayout


@dataclass(frozen=True)
class PackedBatch:
    """Whole sequences side by side on the device; see contract.py for B, N and R."""

    tokens: Tensor
    """[N] int64."""
    layout: PackedLayout
    state_positions: Tensor
    """[R] int64: the position that predicts each response token."""
    response_tokens: Tensor
    """[R] int64."""
    cu_responses: Tensor
    """[B + 1] int64."""
    last_positions: Tensor
    """[B] int64: the last token of each sequence."""

    @staticmethod
    def make(sequences: Sequence[Tensor], prompt_lens: Sequence[int], device: torch.device, kernel: str) -> PackedBatch:
        """sequences: B tensors [len] int64, prompt then response; kernel: see attention.PackedLayout."""
        lens = torch.tensor([s.numel() for s in sequences])
        prompts = torch.tensor(list(prompt_lens))
        cu = offsets(lens)
        tokens = torch.cat(list(sequences))
        states = ragged_arange(cu[:-1] + prompts - 1, lens - prompts)
        return PackedBatch(
            tokens=tokens.to(device),
            layout=PackedLayout.make(lens.tolist(), device, kernel),
            state_positions=states.to(device),
            response_tokens=tokens[states + 1].to(device),
            cu_responses=offsets(lens - prompts).to(device),
            last_positions=(cu[1:] - 1).to(device),
        )


def balance(lens: Sequence[int], ranks: int) -> list[list[int]]:
    """Indices for each rank, longest first to the rank with the fewest tokens (at most 4/3 of the best split)."""
    heap = [(0, r) for r in range(ranks)]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for i in sorted(range(len(lens)), key=lambda i: (-lens[i], i)):
        tokens, r = heapq.heappop(heap)
        shares[r].append(i)
        heapq.heappush(heap, (tokens + lens[i], r))
    return shares


def micro_batches(index: Sequence[int], lens: Sequence[int], budget: int) -> list[list[int]]:
    """Splits `index` into batches of at most `budget` tokens, first fit of the longest first.

    A sequence longer than the budget goes alone. Each batch is sorted by length, so that equally long
    sequences lie side by side (one attention call for all of them).
    """
    batches: list[list[int]] = []
    room: list[int] = []
    for i in sorted(index, key=lambda i: (-lens[i], i)):
        for b, left in enumerate(room):
            if lens[i] <= left:
                batches[b].append(i)
                room[b] -= lens[i]
                break
        else:
            batches.append([i])
            room.append(budget - lens[i])
    return batches


def plan(lens: Sequence[int], ranks: int, budget: int) -> list[list[list[int]]]:
    """[rank][micro-batch][index]; every rank gets as many micro-batches as the busiest one.

    A shorter rank is padded with empty batches: the engine runs the shortest sequence with weight zero there,
    since ZeRO-2 and 3 communicate in every backward pass.
    """
    plans = [micro_batches(share, lens, budget) for share in balance(lens, ranks)]
    most = max(len(p) for p in plans)
    return [p + [[] for _ in range(most - len(p))] for p in plans]


def my_share(lens: Sequence[int], budget: int) -> list[tuple[list[int], float]]:
    """This rank's micro-batches of a train batch, (indices, weight) each: the shortest with weight 0 for empty ones."""
    shortest = min(range(len(lens)), key=lambda i: lens[i])
    mine = plan(lens, distributed.world_size(), budget)[distributed.rank()]
    return [(part, 1.0) if part else ([shortest], 0.0) for part in mine]


@dataclass(frozen=True)
class Placement:
    """Where and how forwards run."""

    device: torch.device
    kernel: str
    """Kernel of packed attention, see attention.PackedLayout."""
    lockstep: bool
    """ZeRO-3: every rank must do equally many forwards."""
    micro_tokens: int
    """Tokens a micro-batch holds at most."""
    longest: int = 0
    """Tokens of the longest sequence that will come; 0 = not known."""

    def micro(self, sequences: Sequence[Tensor], prompt_lens: Sequence[int]) -> Iterator[tuple[list[int], PackedBatch]]:
        """(indices, packed batch) over this rank's sequences; empty index lists are dummies of lockstep."""
        lens = [s.numel() for s in sequences]
        batches = micro_batches(range(len(lens)), lens, self.micro_tokens)
        if self.lockstep:
            most = max(distributed.gather_objects(len(batches)))
            batches += [[] for _ in range(most - len(batches))]
        for index in batches:
            chosen = [sequences[i] for i in index] or [torch.zeros(2, dtype=torch.int64)]
            prompts = [prompt_lens[i] for i in index] or [1]
            yield index, PackedBatch.make(chosen, prompts, self.device, self.kernel)
