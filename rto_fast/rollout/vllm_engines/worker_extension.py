"""What vLLM's workers do for the trainer.

`vllm serve --worker-extension-cls` puts it into them (see server_process.py).
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from rto_fast.errors import SyncError
from rto_fast.rollout.vllm_engines.load_weights import receive
from rto_fast.rollout.weights import stream
from rto_fast.rollout.weights.fingerprint import Fingerprint

BROKEN_PUSH = (SyncError, stream.Abandoned, ValueError, KeyError, AssertionError)
"""Errors that say what is wrong with the weights; others are the engine's own."""


class WeightReceiver:
    """Methods of a vLLM worker, called over HTTP by name; arguments and results are JSON values."""

    def rto_describe(self) -> dict[str, Any]:
        """The settings that the trainer relies on."""
        model = self.model_config
        return {
            "dtype": str(model.dtype).removeprefix("torch."),
            "logprobs_mode": str(getattr(model.logprobs_mode, "value", model.logprobs_mode)),
            "max_model_len": model.max_model_len,
            "vocab_size": model.get_vocab_size(),
            "device": self.device.type,
        }

    def rto_join(self, host: str, port: int, file: str, rank: int, size: int, timeout_s: float) -> None:
        """Joins the trainer's group for weights; a second call leaves the first group.

        It meets the trainer in a file, or at a port of `host` where there is none.
        """
        store = (
            stream.open_file(file, size, timeout_s)
            if file
            else dist.TCPStore(host, port, is_master=False, wait_for_workers=False)
        )
        self.rto_group = stream.join(store, rank, size, self.device, stream.own_address(host), timeout_s)

    def rto_receive(self) -> dict[str, Any]:
        """Loads the set of weights that the trainer sends: {bytes, digests}, or {error} where they are not right."""
        received, weights = Fingerprint(), stream.receive(self.rto_group, self.device)
        try:
            receive(self, weights, received)
        except BROKEN_PUSH as error:
            for _ in weights:  # the sender is to notice nothing before its end
                pass
            return {"error": str(error)}
        return {"bytes": received.bytes, "digests": received.digests()}
