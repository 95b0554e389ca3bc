"""Sample from vLLM servers in processes of their own.

The recipe starts one server, or is given the URLs of several; each holds a whole model, and requests are dealt out
to them by prompt. Rank 0 of the trainer broadcasts the weights to all of them (weights/stream.py), every rank sends
its own requests. Tested with vLLM 0.32.0 on a CPU of one machine.

Pushing weights needs vLLM's development mode, in which whoever reaches a server can call any method of it: those that
the recipe starts listen on a socket that no other account reaches (server_process.py), others belong on such a socket
or in a private network.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import torch
from torch import Tensor
from torch.distributed import Store

from rto_fast import distributed
from rto_fast.config import RTOConfig
from rto_fast.contract import Request, Rollout
from rto_fast.errors import ConfigError, DeviceLost, EngineFailure, RolloutError, SyncError
from rto_fast.models.adapters import AdapterForm
from rto_fast.redact import without_credentials
from rto_fast.rollout.engine import Progress, Sampling, SyncStats, check_requests
from rto_fast.rollout.vllm_engines import address
from rto_fast.rollout.vllm_engines.load_adapter import NAME, layer_rank
from rto_fast.rollout.vllm_engines.server_process import EXTENSION, Server
from rto_fast.rollout.vllm_engines.sleeping import failure
from rto_fast.rollout.vllm_engines.support import (
    OLDEST_SERVED,
    cpu_cache_bytes,
    no_adapter,
    no_form,
    temperature_of,
    too_old,
    unusable,
)
from rto_fast.rollout.weights import stream
from rto_fast.rollout.weights.expected import ExpectedAdapter, ExpectedWeights

BUCKET_BYTES = 256 << 20
ATTEMPTS, PAUSE_S = 4, 0.25
"""Tries of a request that does not reach its server, and the first pause between them; it doubles."""
RELEASE_S = 30.0
"""Seconds that requests given up may hold on to a server's cache."""
BUSY = (429, 502, 503, 504)
NOT_FINITE = -9999.0
"""What a server says of a log-prob that is NaN or -inf."""
TAKES_NONE = "takes none of rank {0}: start it with --enable-lora --max-lora-rank {0} and "
TAKES_NONE += "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
GENERATE = "/inference/v1/generate"
LOG = "vllm-{}.log"
"""Of the n-th server that the recipe starts, in the run's folder."""


class VLLMServeEngine:
    """A RolloutEngine (see rollout/engine.py for the contract).

    It must be pushed to once before it samples: a server may hold the weights of an earlier run.
    """

    def __init__(
        self, model_path: str | Path, device: torch.device | str, dtype: torch.dtype, *, urls: Sequence[str] = (),
        devices: Sequence[str] = (), folder: str | Path = ".", seed: int = 0, max_length: int,
        memory_share: float = 0.4, max_sequences: int = 256, prefix_caching: bool = True, cuda_graphs: bool = True,
        timeout_s: float = 1800.0, start_timeout_s: float = 600.0, adapter: AdapterForm | None = None,
    ) -> None:  # fmt: skip
        """Every rank must come here together.

        urls: running servers, http(s)://... or unix:PATH of a socket; empty = start them here, one on each of the
        `devices` (CUDA's numbers; on a CPU one server), with their logs in `folder`. timeout_s: seconds without any
        finished response, or without progress of a push. start_timeout_s: seconds until a server must answer.
        adapter: of the policy on this model, pushed alone where every server's LoRA can compute with it. Raises
        ConfigError where a server's settings do not fit, EngineFailure where one does not answer.
        """
        self.device, self.dtype = torch.device(device), dtype
        distributed.init()
        self.version, self.asleep, self.torn = 0, False, "no weights were pushed yet"
        self.max_positions, self.max_sequences = max_length, max_sequences
        self.timeout_s, self.start_timeout_s = timeout_s, start_timeout_s
        self.expected = ExpectedWeights.of(model_path)
        text = self.expected.text
        self.vocab_size = text.vocab_size
        self.urls = [url.rstrip("/") for url in urls]
        self.apis: dict[str, httpx.Client] = {}
        self.servers: list[Server] = []
        flags = {
            "model": model_path, "dtype": _name(dtype), "seed": seed, "max-model-len": max_length,
            "max-num-seqs": max_sequences, "gpu-memory-utilization": memory_share,
        }  # fmt: skip
        if self.device.type == "cpu":
            flags["kv-cache-memory-bytes"] = cpu_cache_bytes(text, dtype, max_length, max_sequences, memory_share)
        switches = [] if prefix_caching else ["no-enable-prefix-caching"]
        switches += [] if cuda_graphs and self.device.type != "cpu" else ["enforce-eager"]

        def start() -> tuple[list[str], str]:
            merged_because = no_form(adapter) if adapter else ""
            if not self.urls:
                self._check_own(model_path, devices)
                if adapter:
                    merged_because = no_adapter(model_path, adapter)
                    flags.update({} if merged_because else {"max-lora-rank": layer_rank(adapter.rank)})
                    switches.extend([] if merged_because else ["enable-lora"])
                for i, device_id in enumerate(devices or [""]):
                    self.servers.append(Server(flags, switches, Path(folder) / LOG.format(i), device_id))
                self.urls = [server.url for server in self.servers]
            timeout = httpx.Timeout(timeout_s, connect=10)
            self.apis.update((url, address.client(url, timeout)) for url in self.urls)
            self.threads = ThreadPoolExecutor(len(self.urls))
            self._await_health()
            ranks = {url: self._check_settings(url).get("adapter_rank", 0) for url in self.urls}
            self._join()
            low = [url for url, rank in ranks.items() if adapter and rank < adapter.rank]
            if adapter and low and not merged_because:
                merged_because = f"{without_credentials(low[0])} {TAKES_NONE.format(layer_rank(adapter.rank))}"
            return self.urls, merged_because

        try:
            self.urls, self.merged_because = _on_first_rank(start)
        except BaseException:
            self.close()
            raise
        self.adapter = None if self.merged_because else adapter
        self.pushed = ExpectedAdapter(self.adapter.shapes) if self.adapter else self.expected

    # Weights

    @property
    def takes_adapter(self) -> bool:
        """Whether a push is of the adapter alone."""
        return self.adapter is not None

    def push(self, weights: Iterable[tuple[str, Tensor]], version: int) -> SyncStats:
        start = time.perf_counter()
        self.torn = "a push of weights did not end"
        weights = iter(weights)
        try:
            received = _on_first_rank(lambda: self._transfer(weights, version), meanwhile=weights)
        except SyncError as error:
            self.torn = str(error)
            raise
        self.torn = ""
        self.version = version
        return SyncStats(received["bytes"], time.perf_counter() - start, len(received["digests"]), received["digests"])

    def _transfer(self, weights: Iterator[tuple[str, Tensor]], version: int) -> dict[str, Any]:
        """Rank 0's part of a push: what the first server says it received; the others must say the same."""
        call: tuple[Any, ...] = ("rto_receive",)
        if self.adapter:
            call = ("rto_receive_adapter", self.adapter.settings, self.adapter.scale)
        replies = [self.threads.submit(self._call, url, *call) for url in self.urls]
        try:
            pairs = self.pushed.checked_once(weights)
            stream.send(self.group, pairs, self.device, BUCKET_BYTES, lambda: _raise(replies))
        except SyncError:
            _ = [reply.exception() for reply in replies]
            raise
        except (torch.OutOfMemoryError, torch.AcceleratorError) as error:  # this process's own, not a server's
            raise failure("sending weights to vLLM", error, remedy="lower --micro-tokens") from error
        except RuntimeError as error:
            raise EngineFailure(f"the weights did not reach vLLM: {error}") from error
        answers = [_whole(url, reply.result()) for url, reply in zip(self.urls, replies, strict=True)]
        if self.adapter:
            answers = [self._load(url, a["folder"]) for url, a in zip(self.urls, answers, strict=True)]
        for url, answer in zip(self.urls, answers, strict=True):
            if answer["digests"] != answers[0]["digests"]:
                raise SyncError(
                    f"{without_credentials(url)}: received other weights than {without_credentials(self.urls[0])}"
                )
        self.pushed.require_all(answers[0]["digests"])
        for url in self.urls:
            self._post(url, "/update_weight_version", {"new_version": str(version)})
            self._forget_old_keys(url)
        return answers[0]

    def _load(self, url: str, folder: str) -> dict[str, Any]:
        """Has a server load the adapter in a folder of its own, in the place of the last; what its layers took.

        Under a new id: one that is loaded in place would be read from disk again in every step.
        """
        self._ask_once(url, "/v1/unload_lora_adapter", {"lora_name": NAME})  # the first time there is none
        answer = self._ask_once(url, "/v1/load_lora_adapter", {"lora_name": NAME, "lora_path": folder})
        taken = self._call(url, "rto_adapter_taken")
        if answer.status_code >= 400:
            shown = f"{without_credentials(url)}: vLLM did not take the adapter: {answer.text[:500]}"
            raise SyncError(f"{shown}; use --lora-push merged")
        return _whole(url, taken)

    def _forget_old_keys(self, url: str) -> None:
        """Empties a server's prefix cache; requests that were given up may hold it for a moment."""
        deadline = time.monotonic() + RELEASE_S
        while not self._post(url, "/reset_prefix_cache")["success"]:
            if time.monotonic() > deadline:
                raise SyncError(f"{without_credentials(url)}: its cache still holds keys and values of the old weights")
            time.sleep(PAUSE_S)

    def sleep(self) -> None:
        """Nothing: a server does not share the trainer's memory."""

    def wake(self) -> None:
        """Nothing, as `sleep`."""

    def close(self) -> None:
        """Ends the servers that the engine has started."""
        for server in self.servers:
            server.kill()
        for api in self.apis.values():
            api.close()

    # Sampling

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, progress: Progress = lambda tokens, ended: None,
        keep: int | None = None,
    ) -> Rollout:  # fmt: skip
        """As the contract says, but for all of the requests: ValueError where `keep` asks for a part of them."""
        if keep is not None:
            raise ValueError(f"keep: servers answer in no fixed order, so all requests are kept; got {keep}")
        check_requests(
            requests, sampling, torn=self.torn, asleep=self.asleep, vocab=self.vocab_size, positions=self.max_positions
        )
        params = {
            "n": 1, "temperature": temperature_of(sampling), "top_p": 1.0, "top_k": 0, "logprobs": 0,
            "max_tokens": sampling.max_tokens, "min_tokens": sampling.min_tokens,
            "stop_token_ids": list(sampling.stop_ids), "ignore_eos": True, "detokenize": False,
        }  # fmt: skip
        choices = asyncio.run(self._ask_all(requests, params, progress))
        responses, logps = [], []
        for request, choice in zip(requests, choices, strict=True):
            content = choice["logprobs"]["content"] if choice["token_ids"] else []
            values = [at["logprob"] for at, _ in zip(content, choice["token_ids"], strict=True)]
            if any(x <= NOT_FINITE for x in values):
                raise RolloutError(
                    f"the policy's logits are not finite at prompt row {request.row}; its weights (version "
                    f"{self.version}) have diverged"
                )
            versions = {span["version"] for span in choice["weight_versions"] or ()}
            if not versions <= {str(self.version)}:
                raise EngineFailure(
                    f"a server sampled with weights of version {', '.join(sorted(versions))}, {self.version} was "
                    "pushed last: was it restarted, or is it another run's too?"
                )
            responses.append(choice["token_ids"])
            logps.append(values)
        truncated = [choice["finish_reason"] == "length" for choice in choices]
        return Rollout.from_lists(requests, responses, logps, truncated, self.version)

    async def _ask_all(
        self, requests: Sequence[Request], params: dict[str, Any], progress: Progress
    ) -> list[dict[str, Any]]:
        """One choice a request; EngineFailure where no answer comes for `timeout_s` seconds."""
        answers: list[dict[str, Any]] = [{} for _ in requests]
        done: asyncio.Queue[int] = asyncio.Queue()
        timeout = httpx.Timeout(None, connect=30)
        async with contextlib.AsyncExitStack() as stack:
            clients = {
                url: await stack.enter_async_context(address.async_client(url, timeout, self.max_sequences))
                for url in self.urls
            }

            async def ask(i: int) -> None:
                url = self.urls[requests[i].sample_index % len(self.urls)]  # a prompt's responses share its cache
                body = {"token_ids": list(requests[i].prompt), "sampling_params": params | {"seed": requests[i].seed}}
                body |= {"model": NAME} if self.adapter else {}
                answers[i] = (await self._ask(clients[url], url, body))["choices"][0]
                done.put_nowait(i)

            async with _Tasks(ask(i) for i in range(len(requests))) as tasks:
                for _ in requests:
                    finished = asyncio.ensure_future(done.get())
                    await asyncio.wait(
                        [finished, tasks.failed], timeout=self.timeout_s, return_when=asyncio.FIRST_COMPLETED
                    )
                    if tasks.failed.done():
                        raise tasks.failed.result()
                    if not finished.done():
                        raise EngineFailure(f"no response from vLLM for {self.timeout_s:g} s")
                    progress(len(answers[finished.result()]["token_ids"]), 1)
        return answers

    async def _ask(self, client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer of a server, asked again where it was not reached or is busy."""
        for attempt in range(ATTEMPTS):
            last = attempt + 1 == ATTEMPTS
            try:
                answer = await client.post(GENERATE, json=body)
                if answer.status_code not in BUSY or last:
                    return _content(answer, url + GENERATE)
            except httpx.TransportError as error:
                if last or not self._lives():
                    raise EngineFailure(
                        f"{without_credentials(url)}{GENERATE} does not answer: {error!r}{self._log_tail()}"
                    ) from error
            await asyncio.sleep(PAUSE_S * 2**attempt)
        raise AssertionError("unreachable")

    # Servers

    def _lives(self) -> bool:
        """False where a server that this engine has started is known to be dead."""
        return all(server.process.poll() is None for server in self.servers)

    def _log_tail(self) -> str:
        return "".join(server.log_tail() for server in self.servers)

    def _await_health(self) -> None:
        deadline = time.monotonic() + self.start_timeout_s
        for url in self.urls:
            while True:
                healthy = False
                with contextlib.suppress(httpx.TransportError):
                    healthy = self.apis[url].get("/health").status_code == 200
                if not self._lives():  # asked after the answer: another process may have taken a dead server's port
                    raise EngineFailure(f"vLLM ended while it started{self._log_tail()}")
                if healthy:
                    break
                if time.monotonic() > deadline:
                    raise EngineFailure(
                        f"{without_credentials(url)}: no answer after {self.start_timeout_s:g} s{self._log_tail()}"
                    )
                time.sleep(0.2)

    def _check_own(self, model_path: str | Path, devices: Sequence[str]) -> None:
        """ConfigError where no server can be started here."""
        if reason := unusable(model_path, self.device, OLDEST_SERVED):
            raise ConfigError(f"rollout_engine: {reason}; use --rollout-engine transformers")
        if self.device.type != "cpu" and not devices:
            raise ConfigError("vllm_devices: name the servers' devices, which the trainer must not use")

    def _check_settings(self, url: str) -> dict[str, Any]:
        """What the server's worker describes; ConfigError where it cannot be what the trainer needs."""
        shown = without_credentials(url)
        version = str(self.apis[url].get("/version").json()["version"])
        if refused := too_old(version, OLDEST_SERVED):
            raise ConfigError(f"vllm_url: {shown}: {refused}")
        try:
            workers = self._call_all(url, "rto_describe")
        except EngineFailure as error:
            raise ConfigError(
                f"vllm_url: {shown} takes no weights; start it with VLLM_SERVER_DEV_MODE=1 and --worker-extension-cls "
                f"{EXTENSION} ({error})"
            ) from error
        if len(workers) != 1:
            raise ConfigError(f"vllm_url: {shown} has {len(workers)} workers; give several servers of one worker each")
        wanted = {"dtype": _name(self.dtype), "logprobs_mode": "processed_logprobs", "vocab_size": self.vocab_size}
        for name, value in wanted.items():
            if workers[0][name] != value:
                raise ConfigError(f"vllm_url: {shown} has {name} {workers[0][name]}, the run needs {value}")
        if workers[0]["max_model_len"] < self.max_positions:
            raise ConfigError(
                f"vllm_url: {shown} holds {workers[0]['max_model_len']} tokens a sequence (max_model_len), "
                f"max_prompt_length + max_response_length is {self.max_positions}"
            )
        if workers[0]["device"] != self.device.type:
            raise ConfigError(f"vllm_url: {shown} runs on {workers[0]['device']}, the trainer on {self.device.type}")
        return workers[0]

    def _join(self) -> None:
        """Makes the group that weights are broadcast over: this rank and every server's worker."""
        addresses = [stream.own_address(httpx.URL(address.base(url)).host) for url in self.urls]
        host = next((a for a in addresses if not a.startswith("127.")), addresses[0])
        size, port, file = 1 + len(self.urls), 0, ""
        store: Store
        if self.servers:  # they meet where no other account can
            file = str(self.servers[0].folder / "weights")
            store = stream.open_file(file, size, self.timeout_s)
        else:
            store = listening = distributed.open_store(host, 0, timedelta(seconds=self.timeout_s))
            port = listening.port
        replies = [
            self.threads.submit(self._call, url, "rto_join", host, port, file, rank, size, self.timeout_s)
            for rank, url in enumerate(self.urls, start=1)
        ]
        self.group = stream.join(store, 0, size, self.device, host, self.timeout_s)
        for reply in replies:
            reply.result()

    def _call(self, url: str, method: str, *args: Any) -> Any:
        return self._call_all(url, method, *args)[0]

    def _call_all(self, url: str, method: str, *args: Any) -> list[Any]:
        """Calls a method of a server's workers."""
        return self._post(url, "/collective_rpc", {"method": method, "args": args})["results"]

    def _post(self, url: str, path: str, body: dict[str, Any] | None = None) -> Any:
        return _content(self._ask_once(url, path, body), url + path)

    def _ask_once(self, url: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        """A server's answer, whatever its status; EngineFailure where none comes."""
        try:
            return self.apis[url].post(path, json=body)
        except httpx.TransportError as error:
            raise EngineFailure(
                f"{without_credentials(url)}{path} does not answer: {error!r}{self._log_tail()}"
            ) from error


class _Tasks:
    """Coroutines that run together; `failed` becomes the first error. At the end the others are cancelled."""

    def __init__(self, coroutines: Iterable[Any]) -> None:
        self.coroutines = list(coroutines)

    async def __aenter__(self) -> _Tasks:
        self.failed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self.tasks = [asyncio.create_task(c) for c in self.coroutines]
        for task in self.tasks:
            task.add_done_callback(self._look)
        return self

    def _look(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and not self.failed.done():
            self.failed.set_result(error)

    async def __aexit__(self, *_: object) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


def _on_first_rank(act: Callable[[], Any], meanwhile: Iterable[object] = ()) -> Any:
    """What `act` gives or raises on rank 0, on every rank. meanwhile: run through to its end, on all of them."""
    result, error = None, None
    if distributed.rank() == 0:
        try:
            result = act()
        except DeviceLost:
            raise  # this process cannot even tell the other ranks
        except (ConfigError, RolloutError, SyncError) as e:
            error = e
    for _ in meanwhile:  # ZeRO-3 gathers together
        pass
    result, error = distributed.broadcast_object((result, error))
    if error is not None:
        raise error
    return result


def _content(answer: httpx.Response, url: str) -> Any:
    """The JSON of an answer; EngineFailure on an error of the server's, RolloutError on one of the request's."""
    shown = without_credentials(url)
    if answer.status_code >= 500 or answer.status_code in BUSY:
        raise EngineFailure(f"{shown}: status {answer.status_code}: {answer.text[:500]}")
    if answer.status_code == 404:
        raise EngineFailure(f"{shown}: not found")
    if answer.status_code >= 400:
        raise RolloutError(f"{shown}: status {answer.status_code}: {answer.text[:500]}")
    return answer.json() if answer.content else None


def _whole(url: str, answer: dict[str, Any]) -> dict[str, Any]:
    """A worker's answer to a push; SyncError where it says what was wrong."""
    if "error" in answer:
        raise SyncError(f"{without_credentials(url)}: {answer['error']}")
    return answer


def _raise(replies: Sequence[Future[Any]]) -> None:
    """The error of the first call that has failed already."""
    for reply in replies:
        if reply.done() and reply.exception():
            raise reply.exception()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def from_config(
    config: RTOConfig, model_path: str | Path, device: torch.device, dtype: torch.dtype,
    adapter: AdapterForm | None = None,
) -> VLLMServeEngine:  # fmt: skip
    """The engine with the run's settings."""
    return VLLMServeEngine(
        model_path, device, dtype, urls=config.vllm_url, devices=config.vllm_devices, folder=config.output_dir,
        seed=config.seed, max_length=config.max_prompt_length + config.max_response_length,
        memory_share=config.vllm_memory_share, max_sequences=config.vllm_max_sequences,
        prefix_caching=config.vllm_prefix_caching, cuda_graphs=config.vllm_cuda_graphs,
        timeout_s=config.rollout_timeout_s, start_timeout_s=config.vllm_start_timeout_s,
        adapter=adapter,
    )  # fmt: skip
