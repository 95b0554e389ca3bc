"""Replacing a library's functions by ours, and putting them back."""

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .._dispatch import FLOATS


class Swaps:
    """The replacements one integration has in place. `prefix`: the library's top-level package."""

    def __init__(self, prefix: str):
        self.prefix = prefix
        self._pairs: list[tuple[Any, Any]] = []
        self._attributes: list[tuple[Any, str, Any]] = []

    @property
    def active(self) -> bool:
        return bool(self._pairs or self._attributes)

    def function(self, original: Any, replacement: Any) -> None:
        """Replace a module-level object wherever a loaded module of the library holds it, by any name."""
        self._pairs.append((original, replacement))
        self._sweep(original, replacement)

    def attribute(self, owner: Any, name: str, replacement: Any) -> None:
        """Replace a method, or an entry of a dict."""
        if isinstance(owner, dict):
            self._attributes.append((owner, name, owner[name]))
            owner[name] = replacement
        else:
            self._attributes.append((owner, name, getattr(owner, name)))
            setattr(owner, name, replacement)

    def undo(self) -> None:
        for original, replacement in self._pairs:
            # Modules loaded since took our function over from the patched ones: sweep again.
            self._sweep(replacement, original)
        for owner, name, original in reversed(self._attributes):
            if isinstance(owner, dict):
                owner[name] = original
            else:
                setattr(owner, name, original)
        self._pairs, self._attributes = [], []

    def _sweep(self, old: Any, new: Any) -> None:
        for module_name, module in list(sys.modules.items()):
            if module_name.partition(".")[0] == self.prefix:
                for name in [name for name, value in vars(module).items() if value is old]:
                    setattr(module, name, new)


def partitioned(tensor: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO-3 splits this parameter over ranks, though it may be whole just now."""
    return hasattr(tensor, "ds_id")


def supported(*tensors: Tensor | None, zero3: bool = False) -> bool:
    """Whether our functions take these: plain local tensors of a dtype that the kernels know (zero3: or parameters
    that ZeRO-3 splits)."""
    return all(
        x is None
        or (
            isinstance(x, Tensor)
            and x.dtype in FLOATS
            and not x.is_nested
            and not hasattr(x, "device_mesh")
            and (zero3 or not partitioned(x))
        )
        for x in tensors
    )


def bounded_logp(logp: Tensor, old_logp: Tensor, advantages: Tensor, limit: float, dual_log: float | None) -> Tensor:
    """logp with logp − old_logp kept within ±limit, and below `dual_log` where the advantage is negative.

    A ratio bounded here has no gradient, so a plain PPO loss of the result is the dual-clipped loss
    (arXiv 1912.09729) of the original, with the overflow guard that both libraries have.
    """
    upper = old_logp + limit
    if dual_log is not None:
        upper = upper.where(advantages >= 0, old_logp + min(dual_log, limit))
    return logp.clamp(min=old_logp - limit, max=upper)


def once(function: Callable[[], None], swaps: Swaps) -> None:
    """Run a patching function unless its swaps are in place already."""
    if not swaps.active:
        function()
