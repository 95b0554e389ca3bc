"""Sample from vLLM in the training process.

Each rank holds a whole engine on its own device and samples its share of the requests; or `tensor_parallel` ranks in a
row hold one together, a part of every matrix each, and step through the same requests side by side. vLLM's weight
loading changes between releases: what was tried stands in support.py, and a run proves its own at the start.
"""

from __future__ import annotations

import itertools
import random
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from rto_fast import distributed
from rto_fast.config import RTOConfig
from rto_fast.contract import Request, Rollout
from rto_fast.errors import ConfigError, DeviceLost, EngineFailure, OutOfMemory, RolloutError, SyncError, require
from rto_fast.models.adapters import AdapterForm
from rto_fast.rollout.assignment import Tally
from rto_fast.rollout.engine import Progress, Sampling, SyncStats, check_requests
from rto_fast.rollout.vllm_engines.load_adapter import layer_rank, receive_adapter, request
from rto_fast.rollout.vllm_engines.load_weights import receive
from rto_fast.rollout.vllm_engines.sleeping import Memory, failing_as, failure, release_pools
from rto_fast.rollout.vllm_engines.support import cpu_cache_bytes, no_adapter, temperature_of, unusable
from rto_fast.rollout.watchdog import watched
from rto_fast.rollout.weights.expected import ExpectedAdapter, ExpectedWeights
from rto_fast.rollout.weights.fingerprint import Fingerprint

HUNG = 2
"""Time-outs after which a step that has not returned ends the process; one that returns late gets a new engine."""


STEP_TOKENS = 4096
"""Tokens of one step of vLLM: each takes memory for activations from the cache, and longer prompts come in pieces."""


class VLLMEngine:
    """A RolloutEngine (see rollout/engine.py for the contract)."""

    def __init__(
        self, model_path: str | Path, device: torch.device | str, dtype: torch.dtype, *, seed: int = 0,
        max_length: int, memory_share: float = 0.4, max_sequences: int = 256, prefix_caching: bool = True,
        cuda_graphs: bool = True, timeout_s: float = 1800.0, tensor_parallel: int = 1,
        adapter: AdapterForm | None = None,
    ) -> None:  # fmt: skip
        """Every rank must come here together.

        max_length: tokens of prompt + response at most; memory_share: of the device's memory, for weights and cache
        (on a CPU the cache's share of what is free); timeout_s: seconds without a finished engine step;
        tensor_parallel: ranks in a row that are one engine; all of them must be asked the same in the same order, and
        give the same answer; adapter: of the policy on this model, pushed alone where vLLM's LoRA can compute with it.
        Raises ConfigError where `unusable` says so, or the model cannot be split.
        """
        self.device = torch.device(device)
        reason = unusable(model_path, self.device)
        if reason:
            raise ConfigError(f"rollout_engine: {reason}; use --rollout-engine transformers")
        distributed.init()
        self.merged_because = no_adapter(model_path, adapter) if adapter else ""
        self.adapter = None if self.merged_because else adapter
        self.version = 0
        self.torn = "no adapter was pushed yet" if self.adapter else ""
        self.timeout_s = timeout_s
        self.expected = ExpectedWeights.of(model_path)
        self.pushed = ExpectedAdapter(self.adapter.shapes) if self.adapter else self.expected
        text = self.expected.text
        self.vocab_size = text.vocab_size
        _check_split(text, tensor_parallel)
        self.max_positions = max_length
        settings: dict[str, Any] = {"enable_sleep_mode": True, "gpu_memory_utilization": memory_share}
        if self.device.type == "cpu":
            cache = cpu_cache_bytes(text, dtype, max_length, max_sequences, memory_share, tensor_parallel)
            settings = {"kv_cache_memory_bytes": cache}
        if self.adapter:
            settings |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": layer_rank(self.adapter.rank)}
        from vllm import LLM
        from vllm.v1.engine import core

        core.cleanup_dist_env_and_memory = lambda: None  # it would end the trainer's own process group
        with _trainers_own(), _shared_memory_of_its_own(self.device):
            try:
                self.llm = LLM(
                    model=str(model_path), dtype=str(dtype).removeprefix("torch."), seed=seed,
                    skip_tokenizer_init=True, distributed_executor_backend="external_launcher",
                    tensor_parallel_size=tensor_parallel,
                    max_model_len=max_length, max_num_seqs=max_sequences, enable_prefix_caching=prefix_caching,
                    max_num_batched_tokens=max(STEP_TOKENS, max_sequences),
                    generation_config="vllm", enforce_eager=not cuda_graphs or self.device.type == "cpu",
                    logprobs_mode="processed_logprobs", disable_log_stats=True, **settings,
                )  # fmt: skip
            except Exception as error:
                raise _does_not_start(error, memory_share, max_length) from error
        self.memory = Memory(self.llm, keeps=self.adapter is not None)
        self.names = itertools.count()

    @property
    def asleep(self) -> bool:
        """Whether a part of the engine holds no memory."""
        return bool(self.memory.asleep)

    @property
    def takes_adapter(self) -> bool:
        """Whether a push is of the adapter alone."""
        return self.adapter is not None

    @property
    def blank(self) -> bool:
        """Whether sleeping has dropped the weights; only a push brings them back."""
        return self.memory.lost

    # Weights

    def push(self, weights: Iterable[tuple[str, Tensor]], version: int) -> SyncStats:
        start = time.perf_counter()
        self.torn = "a push of weights did not end"
        self.memory.wake_weights()
        received = Fingerprint()
        try:
            if self.adapter:
                how = self.adapter.settings, self.adapter.scale
                self.llm.collective_rpc(receive_adapter, args=(self.pushed.checked(weights), *how, received))
            else:
                self.llm.collective_rpc(receive, args=(self.pushed.checked_once(weights), received))
            self.pushed.require_all(received.digests())
        except SyncError as error:
            self.torn = str(error)
            raise
        except (ValueError, KeyError, AssertionError) as error:
            remedy = "; use --lora-push merged" if self.adapter else ""
            self.torn = f"vLLM did not take the weights: {error}{remedy}"
            raise SyncError(self.torn) from error
        except RuntimeError as error:
            raise failure("pushing weights to vLLM", error) from error
        self.memory.lost = False
        emptied: list[bool] = []
        failing_as("emptying vLLM's cache", lambda: emptied.append(self.llm.reset_prefix_cache()))
        if not emptied[0]:
            self.torn = "keys and values of the old weights could not be dropped from vLLM's cache"
            raise SyncError(self.torn)
        self.torn = ""
        self.version = version
        digests = received.digests()
        return SyncStats(received.bytes, time.perf_counter() - start, len(digests), digests)

    def sleep(self) -> None:
        """Frees the device's memory; the weights are gone until the next push, but for those under an adapter."""
        self.memory.sleep()

    def wake(self) -> None:
        """Ready to sample. Raises RolloutError where no push came since `sleep`, or vLLM does not wake."""
        self.memory.wake()

    def close(self) -> None:
        """Frees what the engine holds; it cannot be used afterwards."""
        try:
            self.memory.close()
        except DeviceLost:
            return  # nothing on the device can be given back
        except EngineFailure:
            pass  # what does not wake stays where it is until the process ends
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm, self.memory
        release_pools(self.device)

    # Sampling

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, progress: Progress = lambda tokens, ended: None,
        keep: int | None = None,
    ) -> Rollout:  # fmt: skip
        check_requests(
            requests, sampling, torn=self.torn, asleep=self.asleep, vocab=self.vocab_size, positions=self.max_positions
        )
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        temperature, adapter = temperature_of(sampling), request() if self.adapter else None
        core = self.llm.llm_engine
        ids: dict[str, int] = {}
        for i, asked in enumerate(requests):
            params = SamplingParams(
                n=1, temperature=temperature, top_p=1.0, top_k=0, seed=asked.seed, logprobs=0, flat_logprobs=True,
                max_tokens=sampling.max_tokens, min_tokens=sampling.min_tokens,
                stop_token_ids=list(sampling.stop_ids), ignore_eos=True, detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )  # fmt: skip
            ids[name := str(next(self.names))] = i
            core.add_request(name, {"prompt_token_ids": list(asked.prompt)}, params, lora_request=adapter)
        responses: list[list[int]] = [[] for _ in requests]
        logps: list[list[float]] = [[] for _ in requests]
        truncated = [False] * len(requests)
        tally = Tally(requests, keep)
        with (
            _trainers_own(one_thread=self.device.type != "cpu"),
            watched(HUNG * self.timeout_s, "a step of vLLM has not returned") as beat,
        ):
            for output in self._steps(core, tally, beat):
                i, answer = ids[output.request_id], output.outputs[0]
                tokens = list(answer.token_ids)
                values = _logps(answer.logprobs, tokens)
                if not torch.isfinite(torch.tensor(values)).all():
                    raise RolloutError(
                        f"the policy's logits are not finite at prompt row {requests[i].row}; its weights (version "
                        f"{self.version}) have diverged"
                    )
                responses[i], logps[i] = tokens, values
                truncated[i] = answer.finish_reason == "length"
                tally.end(requests[i])
                progress(len(tokens), 1)
            if dropped := [name for name, i in ids.items() if not responses[i]]:
                core.abort_request(dropped)
                failing_as("sampling with vLLM", core.step)  # takes back what was under way for them
        rollout = Rollout.from_lists(requests, responses, logps, truncated, self.version)
        return rollout if keep is None else rollout.select(tally.kept([len(r) for r in responses]))

    def _steps(self, core: Any, tally: Tally, beat: Callable[[], None]) -> Iterator[Any]:
        """Finished outputs until there are enough; EngineFailure where vLLM breaks or a step takes too long."""
        while core.has_unfinished_requests() and not tally.enough:
            beat()
            start = time.monotonic()
            try:
                outputs = core.step()
            except Exception as error:
                raise failure("sampling with vLLM", error) from error
            if time.monotonic() - start > self.timeout_s:
                raise EngineFailure(f"one step of vLLM took longer than {self.timeout_s:g} s")
            yield from (o for o in outputs if o.finished)


# Settings


def _does_not_start(error: Exception, memory_share: float, max_length: int) -> Exception:
    """The run's own error for what vLLM's constructor raised."""
    own, setting = failure("starting vLLM", error), isinstance(error, ValueError)
    if isinstance(own, OutOfMemory) or (setting and re.search("memory|kv cache", str(error), re.IGNORECASE)):
        return ConfigError(
            f"vllm_memory_share: vLLM does not start with {memory_share:g} of the memory and sequences of "
            f"{max_length} tokens: {error if setting else own}"
        )
    if setting:  # positions beyond the model's, a kind of layer that it does not have
        return ConfigError(
            f"rollout_engine: vLLM does not start with this model and sequences of {max_length} tokens: {error}; "
            "mend what it names, or use --rollout-engine transformers"
        )
    return own


def _logps(flat: Any, tokens: list[int]) -> list[float]:
    """Log-prob of each sampled token; flat: vLLM's FlatLogprobs, or None of an answer without tokens."""
    if not tokens:
        return []
    places = flat.start_indices  # of each token's first entry, which is its own
    if [flat.token_ids[i] for i in places] != tokens:
        raise EngineFailure("vLLM's log-probs are not those of the tokens that it sampled")
    return [flat.logprobs[i] for i in places]


@contextmanager
def _trainers_own(one_thread: bool = False) -> Iterator[None]:
    """Inside, vLLM may seed and bind as it likes: random state and thread count are the trainer's again afterwards.

    one_thread: vLLM's small tensors on the host are served by one thread, for more would wait for each other.
    """
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
    threads, set_threads = torch.get_num_threads(), torch.set_num_threads
    try:
        if one_thread:
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads = set_threads  # vLLM on a CPU replaces it by one that does nothing
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        numpy.random.set_state(states[2])


@contextmanager
def _shared_memory_of_its_own(device: torch.device) -> Iterator[None]:
    """Ranks that start an engine together inside meet in memory that no other run on this machine can name.

    On a CPU vLLM names it after the address where ranks meet, which is the same for all engines of outside launchers:
    two runs would share it, and one that was killed would leave a file of which all later ones die. Here the
    name is drawn for each engine, and the file unlinked as soon as all ranks have it open.
    """
    if device.type != "cpu":
        yield
        return
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed as Memory

    drawn = distributed.broadcast_object(uuid.uuid4().hex)
    named = Memory.make_group_name
    Memory.make_group_name = staticmethod(lambda communicator: f"rto-{drawn}-{named(communicator).lstrip('/-')}")
    try:
        yield
    finally:
        Memory.make_group_name = staticmethod(named)
        for file in Path("/dev/shm").glob(f"rto-{drawn}-*"):
            file.unlink(missing_ok=True)


def _check_split(text: Any, ranks: int) -> None:
    """ConfigError where the model's matrices cannot be dealt out to `ranks` ranks."""
    heads = text.num_attention_heads
    keys = getattr(text, "num_key_value_heads", None) or heads
    copied = keys < ranks and ranks % keys == 0  # ranks may share a key-value head
    for name, size, splits in (
        ("attention heads", heads, heads % ranks == 0),
        ("key-value heads", keys, keys % ranks == 0 or copied),
        ("intermediate features", width := getattr(text, "intermediate_size", ranks), width % ranks == 0),
    ):
        require(splits, f"vllm_tensor_parallel: {size} {name} cannot be split over {ranks} ranks; use 1 or a divisor")


def from_config(
    config: RTOConfig, model_path: str | Path, device: torch.device, dtype: torch.dtype,
    adapter: AdapterForm | None = None,
) -> VLLMEngine:  # fmt: skip
    """The engine with the run's settings."""
    return VLLMEngine(
        model_path, device, dtype, seed=config.seed,
        max_length=config.max_prompt_length + config.max_response_length,
        memory_share=config.vllm_memory_share, max_sequences=config.vllm_max_sequences,
        prefix_caching=config.vllm_prefix_caching, cuda_graphs=config.vllm_cuda_graphs,
        timeout_s=config.rollout_timeout_s, tensor_parallel=config.vllm_tensor_parallel,
        adapter=adapter,
    )  # fmt: skip
