"""The language of `--token-reward`: where rewards of single tokens come from.

dpo                      log(pi_dpo / pi_ref), the paper's (`--dpo-model`)
logratio:MODEL[:BASE]    log(pi_MODEL / pi_BASE) of two causal language models; BASE: the KL reference
endogenous[:MODEL]       alpha log pi(a|s) + V(s) - V(s'), V = alpha logsumexp(z / alpha); of the KL reference
scalar:MODEL             the number that a model with a one-output head gives at each token
scalar-diff:MODEL        its change from the token before
fn:PLACE:FUNCTION        a Python function, of module:function or path/to/file.py:function
url:URL                  a server
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from rto_fast.errors import require
from rto_fast.redact import without_credentials

LEAST = {"dpo": 0, "logratio": 1, "endogenous": 0, "scalar": 1, "scalar-diff": 1, "fn": 1, "url": 1}
"""Kind -> models or places that it must name."""
MOST = LEAST | {"logratio": 2, "endogenous": 1}
REFERENCE = "reference"
"""Stands for the KL reference where a model may be named."""


@dataclass(frozen=True)
class TokenSpec:
    """One source of token rewards, as the user named it."""

    kind: str
    parts: tuple[str, ...]
    """Models (folders or Hub ids), or the one place of a function or URL."""

    @staticmethod
    def parse(text: str) -> TokenSpec:
        """Raises ConfigError where `text` is none of the forms above. A `~` before a path is the home folder."""
        kind, _, rest = text.partition(":")
        shown = without_credentials(text) if kind == "url" else text
        require(kind in LEAST, f"token_reward: {shown!r} is none of {', '.join(LEAST)}")
        parts = tuple(rest.split(":")) if rest and kind not in ("fn", "url") else (rest,) * bool(rest)
        require(
            LEAST[kind] <= len(parts) <= MOST[kind] and all(parts),
            f"token_reward: {shown!r} must be {FORMS[kind]}",
        )
        return TokenSpec(kind, tuple(map(os.path.expanduser, parts)))

    @property
    def models(self) -> tuple[str, ...]:
        """The models that it names, without those that the run has anyway."""
        return () if self.kind in ("fn", "url") else tuple(p for p in self.parts if self.scalar or p != REFERENCE)

    @property
    def against_reference(self) -> bool:
        """Whether it is some model's log-ratio against the KL reference."""
        return self.kind == "logratio" and self.parts[0] != REFERENCE and self.parts[1:] in ((), (REFERENCE,))

    @property
    def scalar(self) -> bool:
        """Whether its model has a head of one output."""
        return self.kind in ("scalar", "scalar-diff")


FORMS = {
    "dpo": "dpo, and its model --dpo-model", "logratio": "logratio:MODEL or logratio:MODEL:BASE",
    "endogenous": "endogenous or endogenous:MODEL", "scalar": "scalar:MODEL", "scalar-diff": "scalar-diff:MODEL",
    "fn": "fn:module:function or fn:path/to/file.py:function", "url": "url:http://... or url:https://...",
}  # fmt: skip
