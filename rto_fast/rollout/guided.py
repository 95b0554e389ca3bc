"""Sampling guided by two models' log-ratio.

    token ~ softmax((log pi + w * (log pi_guide - log pi_ref)) / temperature)

With pi = pi_ref, pi_guide a DPO model and w = beta1 / beta2 it stands in for RTO's unclipped optimum without a
sentence-level reward, whose responses have a probability in proportion to pi_ref * (pi_dpo / pi_ref)^w (Rafailov et
al., arXiv 2404.12358, on DPO models as token-wise advantages). At w = 1 the two are equal: the DPO model. At other w
the optimum also weighs each token by what can still follow it, which a product taken token by token leaves out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rto_fast.contract import Request
from rto_fast.rollout.decoding import log_probs
from rto_fast.rollout.transformers_engine import Batch, TransformersEngine


class GuidedEngine(TransformersEngine):
    """A TransformersEngine whose logits a guide and its reference move; each model keeps a cache of its own."""

    def __init__(self, model_path: str, *loading: Any, guide: str, reference: str, scale: float) -> None:
        """`loading`: TransformersEngine's own arguments, the same for the guides; scale: w.

        reference: "" = the model itself, which is then not loaded again.
        """
        super().__init__(model_path, *loading)
        self.scale = scale
        paths = [guide, reference] if reference else [guide]
        self.guides = [TransformersEngine(path, *loading) for path in paths]
        self.guide_batches: list[Batch] = []

    def prefill(self, requests: Sequence[Request], max_tokens: int) -> tuple[Batch, Tensor]:
        batch, logits = super().prefill(requests, max_tokens)
        parts = [guide.prefill(requests, max_tokens) for guide in self.guides]
        self.guide_batches = [part for part, _ in parts]
        return batch, self._moved(logits, [theirs for _, theirs in parts])

    def forward(self, batch: Batch) -> Tensor:
        for part in self.guide_batches:
            part.last = batch.last
        theirs = [guide.forward(part) for guide, part in zip(self.guides, self.guide_batches, strict=True)]
        return self._moved(super().forward(batch), theirs)

    def select(self, batch: Batch, rows: Tensor) -> None:
        super().select(batch, rows)
        for guide, part in zip(self.guides, self.guide_batches, strict=True):
            guide.select(part, rows)

    def _compact(self, batch: Batch, ended: list[int]) -> None:
        for guide, part in zip(self.guides, self.guide_batches, strict=True):
            part.lens = list(batch.lens)
            guide._compact(part, ended)
        super()._compact(batch, ended)

    def _moved(self, logits: Tensor, theirs: Sequence[Tensor]) -> Tensor:
        """[n, V] logits of the model and of its guides -> [n, V] fp32."""
        guide, reference = (theirs[0], theirs[1]) if len(theirs) > 1 else (theirs[0], logits)
        return logits.float() + self.scale * (log_probs(guide) - log_probs(reference))

    def sleep(self) -> None:
        super().sleep()
        for guide in self.guides:
            guide.sleep()

    def wake(self) -> None:
        super().wake()
        for guide in self.guides:
            guide.wake()
