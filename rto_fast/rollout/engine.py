"""The contract of a rollout engine: what it is asked and what it answers.

An engine holds its own copy of the policy. The trainer pushes its weights before each rollout and counts
a version; the engine stamps it on what it samples. Which engine runs is the config's `rollout_engine`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from rto_fast.contract import Request, Rollout
from rto_fast.errors import RolloutError, SyncError

GREEDY = 1e-6
"""Temperature that takes the largest logit; what happens to ties is the engine's choice."""
Progress = Callable[[int, int], None]
"""Called with (tokens, sequences): how many were sampled and how many ended since the last call."""


@dataclass(frozen=True)
class Sampling:
    """How every request of a rollout is sampled."""

    max_tokens: int
    """Response tokens at most, >= 1; a response that ends here without a stop token is truncated."""
    temperature: float
    """> 0; tokens come from softmax(logits / temperature), without top-k or top-p."""
    stop_ids: tuple[int, ...]
    """Token ids that end a response; the sampled one belongs to it. Empty = only the length ends it."""
    min_tokens: int = 0
    """Response tokens that come from softmax(logits / temperature) without the stop ids; below max_tokens, 0 = off."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens: must be at least 1, got {self.max_tokens}")
        if not self.temperature > 0:
            raise ValueError(f"temperature: must be positive, got {self.temperature}")
        if not 0 <= self.min_tokens < self.max_tokens:
            raise ValueError(f"min_tokens: must lie in [0, max_tokens {self.max_tokens}), got {self.min_tokens}")


@dataclass(frozen=True)
class SyncStats:
    """What one push moved."""

    bytes: int
    """Bytes received, in the sender's dtype."""
    seconds: float
    """Wall-clock seconds, the sender's gathering included."""
    tensors: int
    """Tensors received."""
    digests: dict[str, int]
    """Each received tensor's checksum by name (see fingerprint.py); tied names beyond the first may be left out."""


class RolloutEngine(Protocol):
    """Samples responses with weights that are pushed to it.

    One whose attribute `takes_adapter` is true is pushed the policy's adapter alone, by the names of PEFT's files;
    where that was wanted and cannot be, `merged_because` says why.

    One whose weights do not outlast `sleep` has an attribute `blank`: whether they are gone and only a push brings
    them back.
    """

    version: int
    """Version of the weights it holds; 0 = the model it was made from."""

    def push(self, weights: Iterable[tuple[str, Tensor]], version: int) -> SyncStats:
        """Takes over a full set of weights, one (checkpoint name, tensor) at a time.

        Every name must come exactly once; of tied embeddings one name is enough.

        Raises:
            SyncError: a name is missing, unknown or repeated, or a shape differs. The weights are then mixed,
                and the engine refuses to sample until a push succeeds.
        """
        ...

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, progress: Progress, keep: int | None = None
    ) -> Rollout:
        """Samples one response a request; the Rollout keeps the order of the requests.

        keep: stop when that many prompts have all their responses, and leave the other prompts out (see assignment.py);
        None = sample all.

        Raises:
            ValueError: a prompt is empty, has an unknown token, or leaves no room for the response; or min_tokens
                leaves no token to sample.
            RolloutError: the model's logits are not finite, or the engine is asleep.
            SyncError: the last push failed.
        """
        ...

    def sleep(self) -> None:
        """Frees the accelerator's memory until `wake`; calling it twice is harmless."""
        ...

    def wake(self) -> None:
        """Makes the engine ready to sample; the weights are those from before `sleep` or pushed since.

        Raises RolloutError where sleep has dropped them and nothing was pushed since.
        """
        ...


def sample_seed(run_seed: int, sample_index: int, epoch: int, response_index: int) -> int:
    """Seed of one response, in [0, 2**63): a hash, the same on every platform, rank and resume."""
    key = f"{run_seed}/{sample_index}/{epoch}/{response_index}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def check_requests(
    requests: Sequence[Request], sampling: Sampling, *, torn: str, asleep: bool, vocab: int, positions: int | None
) -> None:
    """Raises what `RolloutEngine.generate` says it raises before it samples; `torn`: what broke the last push."""
    if torn:
        raise SyncError(f"the engine's weights are incomplete: {torn}")
    if asleep:
        raise RolloutError("the engine is asleep; call wake() first")
    if sampling.min_tokens and not set(range(vocab)) - set(sampling.stop_ids):
        raise ValueError(
            f"min_tokens {sampling.min_tokens}: each of the {vocab} tokens ends a response, and none is left to sample"
        )
    for i, request in enumerate(requests):
        length = len(request.prompt)
        if not length:
            raise ValueError(f"request {i} (row {request.row}): the prompt is empty")
        if not 0 <= min(request.prompt) <= max(request.prompt) < vocab:
            raise ValueError(f"request {i} (row {request.row}): a prompt token is not in [0, {vocab})")
        if positions and length + sampling.max_tokens > positions:
            raise ValueError(
                f"request {i} (row {request.row}): {length} prompt tokens + max_tokens "
                f"{sampling.max_tokens} exceed the model's {positions} positions"
            )
