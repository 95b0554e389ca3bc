"""What vLLM's workers do for the trainer.

`vllm serve --worker-extension-cls` puts it into them (see server_process.py).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from rto_fast.errors import SyncError
from rto_fast.rollout.vllm_engines.load_adapter import Delivery
from rto_fast.rollout.vllm_engines.load_weights import receive
from rto_fast.rollout.weights import stream
from rto_fast.rollout.weights.fingerprint import Fingerprint

BROKEN_PUSH = (SyncError, stream.Abandoned, ValueError, KeyError, AssertionError)
"""Errors that say what is wrong with the weights; others are the engine's own."""


class WeightReceiver:
    """Methods of a vLLM worker, called over HTTP by name; arguments and results are JSON values."""

    # What the worker has, or the methods put there.
    device: torch.device
    model_config: Any
    vllm_config: Any
    rto_group: Any
    rto_delivery: Delivery

    def rto_describe(self) -> dict[str, Any]:
        """The settings that the trainer relies on; adapter_rank: the most that a pushed adapter may have, 0 = none."""
        from vllm import envs

        model, lora = self.model_config, self.vllm_config.lora_config
        loads = lora is not None and envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING
        return {
            "dtype": str(model.dtype).removeprefix("torch."),
            "logprobs_mode": str(getattr(model.logprobs_mode, "value", model.logprobs_mode)),
            "max_model_len": model.max_model_len,
            "vocab_size": model.get_vocab_size(),
            "device": self.device.type,
            "adapter_rank": lora.max_lora_rank if loads else 0,
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

    def rto_receive_adapter(self, settings: dict[str, Any], scale: float) -> dict[str, Any]:
        """Takes the adapter that the trainer sends: {folder}, for the server to load, or {error}."""
        weights = stream.receive(self.rto_group, self.device)
        try:
            self.rto_delivery = Delivery(self, weights, settings, scale)
        except BROKEN_PUSH as error:
            for _ in weights:
                pass
            return {"error": str(error)}
        return {"folder": self.rto_delivery.folder.name}

    def rto_adapter_taken(self) -> dict[str, Any]:
        """What the layers took of it, as `rto_receive`; its folder is gone then."""
        received = Fingerprint()
        try:
            self.rto_delivery.check(received)
        except SyncError as error:
            return {"error": str(error)}
        finally:
            self.rto_delivery.close()
        return {"bytes": received.bytes, "digests": received.digests()}
