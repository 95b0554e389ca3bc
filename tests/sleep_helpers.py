"""A stand-in for vLLM's memory on a GPU: each version's rules of sleep, and CUDA's errors where they are broken."""

from __future__ import annotations

from collections.abc import Callable

PARTS = ("weights", "kv_cache")
RULES = ("0.26", "0.28", "0.31")
"""First versions with rules of their own. 0.26 and 0.27: sleep does nothing while a part sleeps, and unmaps and maps
all parts that it is told, mapped or not. 0.28 to 0.30: parts that are as asked stay as they are. From 0.31 on an
engine with its weights awake can be put to sleep."""


class SleepingMemory:
    """Stands for `LLM.sleep` and `LLM.wake_up`, as the executor and the allocator of a version act together."""

    def __init__(self, version: str, spoil: Callable[[], object] = lambda: None) -> None:
        """version: one of RULES; spoil: called where memory with weights is mapped again without them."""
        self.version, self.spoil = version, spoil
        self.mapped = dict.fromkeys(PARTS, True)
        self.copied = False
        """Whether the host holds a copy of the weights."""
        self.copies = 0
        """Copies of the weights to the host and back."""
        self.sleeping_tags: set[str] = set()
        self.log: list[str] = []
        """What was called and did something."""

    def sleep(self, level: int = 1) -> None:
        part_sleeps = "weights" in self.sleeping_tags if self.version >= "0.31" else self.sleeping_tags
        if part_sleeps:
            return  # vLLM warns
        self.log.append(f"sleep {level}")
        for part in PARTS:
            if not self.mapped[part]:
                if self.version >= "0.28":
                    continue
                raise RuntimeError("CUDA Error: invalid argument at cumem_allocator.cpp:182")
            self.mapped[part] = False
        self.copied = level == 1
        self.copies += self.copied
        self.sleeping_tags = set(PARTS)

    def wake_up(self, tags: list[str] | None = None) -> None:
        if not self.sleeping_tags or not set(tags or ()) <= self.sleeping_tags:
            return  # vLLM warns
        self.log.append("wake " + ", ".join(tags or ["all"]))
        for part in tags or PARTS:
            if self.mapped[part]:
                if self.version >= "0.28":
                    continue
                raise RuntimeError("CUDA Error: invalid argument at cumem_allocator.cpp:132")
            self.mapped[part] = True
            if part == "weights":
                self.copies += self.copied
                if not self.copied:
                    self.spoil()
        self.sleeping_tags -= set(tags or PARTS)

    def touch(self, *parts: str) -> None:
        """RuntimeError, as CUDA's, where a part that is read or written holds no memory."""
        for part in parts:
            if not self.mapped[part]:
                raise RuntimeError(f"CUDA error: an illegal memory access was encountered ({part})")
