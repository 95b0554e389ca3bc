"""Push the policy's weights to the engine, and verify that they arrived.

At the paper's learning rate a stale bf16 sampler differs from a fresh one by less than rounding, so log-probs alone
cannot show a broken sync. Three checks together do:

    at the start    every parameter is moved by far more than rounding, pushed, compared by log-prob and moved back
    at each sync    names, count, checksums of received against sent bytes, and the version the engine stored
    at each step    mean and largest |logp_trainer - logp_sampler| against limits set right after the first check
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import torch
from rto_kernels import token_logprobs
from torch import Tensor, nn

from rto_fast import distributed
from rto_fast.backend.train_engine import TrainEngine
from rto_fast.config import RTOConfig
from rto_fast.contract import Request, Rollout
from rto_fast.errors import EngineFailure, OutOfMemory, RolloutError, SyncError
from rto_fast.models.packing import Placement
from rto_fast.rollout.assignment import Share, share_out
from rto_fast.rollout.engine import RolloutEngine, Sampling, SyncStats
from rto_fast.rollout.weights.fingerprint import Fingerprint

PROOF_RESPONSES, PROOF_TOKENS = 16, 32
"""Responses (over all ranks) and tokens each that a comparison at the start samples."""
FLOOR = {"fp32": (1e-4, 0.05), "bf16": (0.03, 2.0)}
"""Mean and largest difference (nats) that rounding may always cause."""
PROVEN = {"fp32": 1e-4, "bf16": 0.1}
"""Mean difference (nats) that rounding may cause with all weights moved, however far an engine without a push is."""
SLACK = (5.0, 20.0)
"""How far mean and largest difference may grow over those measured at the start."""
MOVED_BIT = {torch.bfloat16: (torch.int16, 1 << 5, 0x3D80), torch.float32: (torch.int32, 1 << 21, 0x3D800000)}
"""By dtype: integer view, the mantissa bit worth 1/4, and 0.0625, which 0 becomes."""

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Gap:
    """|logp_trainer - logp_sampler| over sampled tokens of all ranks, nats."""

    mean: float
    max: float

    def __str__(self) -> str:
        return f"mean {self.mean:.2g}, largest {self.max:.2g} nat"


class WeightSync:
    """The rollout engine of a run and what is known of its weights. All methods but `check` are collective."""

    def __init__(
        self, config: RTOConfig, make: Callable[[], RolloutEngine], policy: TrainEngine, placement: Placement
    ) -> None:
        """make: gives a new engine; called again when the first one fails."""
        self.config, self.make, self.policy, self.placement = config, make, policy, placement
        self._make()
        self.version = 0
        self.limits = Gap(float("inf"), float("inf"))

    @property
    def takes_adapter(self) -> bool:
        """Whether a push is of the policy's adapter alone."""
        return getattr(self.engine, "takes_adapter", False)

    @property
    def said(self) -> str:
        """Which engine samples, and what of an adapter it is pushed, for the log."""
        name, why = type(self.engine).__name__, getattr(self.engine, "merged_because", "")
        if self.takes_adapter:
            return f"{name}; the adapter alone is pushed, to vLLM's own LoRA"
        if not self.policy.adapted:
            return name
        return f"{name}; whole weights are pushed, the adapter merged{f' ({why})' if why else ''}"

    def push(self, version: int) -> SyncStats:
        """The policy's weights, checked at both ends; SyncError on every rank where one rank's differ.

        An engine that fails is restarted once, on all ranks.
        """
        for attempt in (1, 2):
            stats, lost = self._push(version)
            if not (failed := [f for f in distributed.gather_objects(lost) if f]):
                break
            self._renew(failed, attempt)
        assert stats is not None  # else the second failure was raised
        self.version = version
        return stats

    def _push(self, version: int) -> tuple[SyncStats | None, EngineFailure | None]:
        """(what moved, None) or (None, how the engine failed)."""
        sent = Fingerprint()

        def told() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in self.policy.adapter_weights() if self.takes_adapter else self.policy.weights():
                sent.add(name, tensor)
                yield name, tensor

        stream, failure, lost, stats = told(), "", None, None
        try:
            stats = self.engine.push(stream, version)
        except SyncError as error:
            failure = str(error)
        except EngineFailure as error:
            lost = _alone(error)
        for _ in stream:  # ZeRO-3 gathers together: the other ranks wait for this one's part
            pass
        if stats is not None:
            failure = _difference(sent.digests(), stats.digests) or (
                "" if self.engine.version == version else f"the engine holds version {self.engine.version}"
            )
        if failed := [f for f in distributed.gather_objects(failure) if f]:
            raise SyncError(f"sync of version {version}: {failed[0]}")
        return stats, lost

    def _make(self) -> None:
        """An engine that leaves the device's memory to the trainer until the next push."""
        self.engine = self.make()
        self.engine.sleep()
        distributed.barrier()  # a push under ZeRO-3 is DeepSpeed's, which waits for an engine's start 10 minutes only

    def _renew(self, failures: list[EngineFailure], attempt: int) -> None:
        """Another engine in the place of one that failed, on all ranks.

        Raises RolloutError where this one was the second attempt, or another one would do no better.
        """
        for failure in failures:
            if isinstance(failure, OutOfMemory):
                raise RolloutError(f"{failure}. The last checkpoint is whole")
        if attempt == 2:
            raise RolloutError(f"the rollout engine failed twice in a row, the last time: {failures[0]}. "
                               "The last checkpoint is whole")  # fmt: skip
        self.close()
        self._make()

    def share(self, requests: Sequence[Request], sampling: Sampling, keep: int | None = None) -> Share:
        """What this rank's engine is to sample of the requests of all; keep: prompts that are enough, None = all."""
        ranks = self.config.vllm_tensor_parallel
        return share_out(requests, sampling.max_tokens, distributed.world_size() // ranks, keep)[
            distributed.rank() // ranks
        ]

    def gather(self, share: Share, local: Rollout) -> Rollout:
        """The rollout of all engines, the same on every rank, in the order of its requests.

        Raises RolloutError where the ranks of one engine have sampled different tokens.
        """
        parts = distributed.gather_objects((share.kept(local.sample_index.tolist()), local))
        ranks = self.config.vllm_tensor_parallel
        for i, (places, part) in enumerate(parts):
            first = parts[i - i % ranks]
            if places != first[0] or not torch.equal(part.tokens, first[1].tokens):
                raise RolloutError(
                    f"ranks {i - i % ranks} and {i} are one vLLM (vllm_tensor_parallel {ranks}) and sampled different "
                    "tokens. The last checkpoint is whole"
                )
        order = torch.tensor([place for places, _ in parts[::ranks] for place in places])
        return Rollout.cat([part for _, part in parts[::ranks]]).select(order.argsort())

    def close(self) -> None:
        """Frees what the engine holds."""
        getattr(self.engine, "close", lambda: None)()

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, report: Report = lambda *_: None, keep: int | None = None
    ) -> Rollout:
        """This rank's rollout. An engine that fails is restarted once, on all ranks, and samples again.

        One that sleep has left without weights is pushed the last version first.
        keep: prompts that are enough; None = all.
        Raises SyncError when the rollout is not of the version pushed last, RolloutError on the second failure.
        """
        for attempt in (1, 2):
            self._fill()
            rollout, failure = self._attempt(requests, sampling, report, keep)
            failed = [f for f in distributed.gather_objects(failure) if f]
            if not failed:
                break
            self._renew(failed, attempt)
            self.push(self.version)
        assert rollout is not None  # else the second failure was raised
        if rollout.version != self.version:
            raise SyncError(f"the rollout is of version {rollout.version}, {self.version} was pushed last")
        return rollout

    def _fill(self) -> None:
        """Brings the last version back to an engine that has dropped its weights."""
        if getattr(self.engine, "blank", False):
            self.push(self.version)

    def sample_ahead(self, requests: Sequence[Request], sampling: Sampling) -> Callable[[], tuple[Rollout | None, str]]:
        """Starts this rank's rollout beside what the caller does next; the engine must be one that can.

        Returns what waits for it and gives (rollout, "") or, on every rank, (None, how an engine failed).
        """
        outcome: Future[tuple[Rollout | None, EngineFailure | None]] = Future()

        def attempt() -> None:
            try:
                outcome.set_result(self._attempt(requests, sampling, lambda *_: None, None))
            except BaseException as error:
                outcome.set_exception(error)

        threading.Thread(target=attempt, daemon=True).start()  # one that hangs does not hold up the run's end

        def finish() -> tuple[Rollout | None, str]:
            rollout, failure = outcome.result()
            failed = [f for f in distributed.gather_objects(failure) if f]
            return (None, str(failed[0])) if failed else (rollout, "")

        return finish

    def _attempt(
        self, requests: Sequence[Request], sampling: Sampling, report: Report, keep: int | None
    ) -> tuple[Rollout | None, EngineFailure | None]:
        """(rollout, None) or (None, how the engine failed)."""
        try:
            self.engine.wake()
            rollout = self.engine.generate(requests, sampling, report, keep)
            self.engine.sleep()
        except EngineFailure as error:
            return None, _alone(error)
        return rollout, None

    def prove(self, requests: Sequence[Request], sampling: Sampling) -> str:
        """Shows that a push reaches everything the engine computes with, and sets the limits of `check`.

        requests: the same on every rank. Returns a sentence with the figures. Raises SyncError where the engine does
        not follow the trainer; the trainer's weights are bit for bit the old ones either way.
        """
        requests = requests[:PROOF_RESPONSES]
        sampling = Sampling(min(PROOF_TOKENS, sampling.max_tokens), sampling.temperature, sampling.stop_ids)
        own, version = self.share(requests, sampling).requests, self.version
        self._fill()  # what the engine gets below must not be the moved weights yet
        move(self.policy.model, trained=self.takes_adapter)
        try:
            blind = self._gap(self.sample(own, sampling), sampling.temperature)
            self.push(version)
            moved = self._gap(self.sample(own, sampling), sampling.temperature)
        finally:
            move(self.policy.model, trained=self.takes_adapter)
        self.push(version)
        still = self._gap(self.sample(own, sampling), sampling.temperature)
        floor, limit = Gap(*FLOOR[self.config.dtype]), proof_limit(self.config.dtype, blind)
        for name, gap in (("moved", moved), ("restored", still)):
            if not gap.mean <= limit:
                raise SyncError(
                    f"the sampler is not the policy: after a push of {name} weights their log-probs differ by {gap}; "
                    f"without the push by {blind}; a mean of {limit:.2g} is rounding. "
                    "Some weight does not reach the engine's computation"
                )
        self.limits = Gap(max(floor.mean, SLACK[0] * still.mean), max(floor.max, SLACK[1] * still.max))
        what = "the adapter" if self.takes_adapter else "all weights"
        return f"sampler agrees with the policy: {still} ({what} moved and pushed: {moved}; not pushed: {blind})"

    def check(self, gap: Gap) -> None:
        """SyncError where the sampler's log-probs are further from the policy's than rounding explains."""
        if gap.mean > self.limits.mean or gap.max > self.limits.max:
            raise SyncError(
                f"the sampler is not the policy: their log-probs differ by {gap}; at most {self.limits} is rounding. "
                "The last checkpoint is whole"
            )

    @torch.no_grad()
    def _gap(self, rollout: Rollout, temperature: float) -> Gap:
        logp = torch.zeros_like(rollout.sampler_logp)
        for index, batch in self.placement.micro(rollout.sequences(), rollout.prompt_lens.tolist()):
            out = self.policy.evaluate(batch, partial(token_logprobs, temperature=temperature))
            if index:
                logp[rollout.response_index(index)] = out.float().cpu()
        gap = (logp - rollout.sampler_logp).abs()
        parts = distributed.gather_objects((float(gap.sum()), gap.numel(), float(gap.max()) if gap.numel() else 0.0))
        sums, counts, most = zip(*parts, strict=True)
        return Gap(sum(sums) / max(1, sum(counts)), max(most))


def proof_limit(dtype: str, blind: Gap) -> float:
    """Mean difference (nats) that proves a push; blind: the difference without one.

    Rounding sets it, not the size of what the push moves: in fp32 a sound engine shows some 3e-7, and an engine that
    computes otherwise by a tenth of the move is no sampler of this policy. In bf16 it grows with the moved weights.
    """
    return max(FLOOR[dtype][0], min(PROVEN[dtype], blind.mean / 10))


@torch.no_grad()
def move(model: nn.Module, *, trained: bool = False) -> None:
    """Moves every weight by up to a third of itself (0 becomes 0.0625); the second call undoes it bit for bit.

    A mantissa bit is flipped, so no copy is kept, and it works on ZeRO's partitions. trained: those alone that training
    changes.
    """
    for parameter in model.parameters():
        if trained and not parameter.requires_grad:
            continue
        parts = [parameter.data] if parameter.data.numel() else []
        if hasattr(parameter, "ds_tensor"):  # small ones are kept whole beside their partition; on one rank as a view
            parts.append(parameter.ds_tensor.data)
        for part in {part.data_ptr(): part for part in parts}.values():
            view, bit, one = MOVED_BIT[part.dtype]
            x = part.view(view)
            y = torch.where(x == 0, one, torch.where(x == one, 0, torch.where(x == one ^ bit, x, x ^ bit)))
            x.copy_(y)


def _alone(failure: EngineFailure) -> EngineFailure:
    """The failure without what it came from: that would hold the engine, and need not travel to other ranks."""
    return type(failure)(str(failure))


def _difference(sent: dict[str, int], received: dict[str, int]) -> str:
    """What was received otherwise than sent; empty when nothing was."""
    lost = [name for name in sent if name not in received]
    if lost:
        return f"{lost[0]}: sent but not received ({len(lost)} of {len(sent)})"
    changed = [name for name in received if received[name] != sent.get(name)]
    if changed:
        return f"{changed[0]}: received with other bytes than sent ({len(changed)} of {len(sent)} tensors)"
    return ""
