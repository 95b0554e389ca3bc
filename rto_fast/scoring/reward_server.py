"""Scores from a reward model behind HTTP."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import socket
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.request import proxy_bypass_environment as bypassed  # type: ignore[attr-defined]

import httpx
import tenacity
import torch
from torch import Tensor

from rto_fast.contract import ResponseTexts, Rollout
from rto_fast.data.columns import DataColumns
from rto_fast.errors import ConfigError, RewardError
from rto_fast.redact import ENCODED, without_credentials

ANSWER_BYTES = 4 << 20
"""Most bytes of an answer, unpacked; its numbers take a few hundred."""
ENCODINGS = ("", "identity", "gzip", "deflate")
"""Of answers that are read. None is asked for; of these, what one network read holds unpacks to 64 MiB at most."""
SHOWN = 200
"""Characters of an answer in an error message."""

LABELS = ("labels", "label")
"""Columns of the data that are sent to a server, the first that is there."""

Check = Callable[[int, Any], Any]
"""Of the index of a response and its reward: the reward as it is used. ValueError where it is none."""

logging.getLogger("httpx").setLevel(logging.WARNING)  # at INFO it prints the URL of each request, password and all


class RewardServer:
    """A server that is asked by POST and answers {"rewards": [...]}, one reward a response.

    Connection errors, time-outs, status 429 and 5xx are tried again after 1, 2, 4, ... times `wait_s`. The
    environment's proxies are used, but never for an address of this machine or of a private network.
    """

    setting = "reward_url"
    """Where the user named it."""
    unit = "numbers"
    """What a response gets one of."""

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 60.0,
        attempts: int = 5,
        wait_s: float = 0.5,
        max_wait_s: float = 30.0,
        chunk: int = 32,
        in_flight: int = 8,
        labels: str = "",
    ) -> None:
        """`timeout_s`: of each attempt as a whole; `chunk`: responses a request; `in_flight`: requests at a time;
        `labels`: column of the data that is sent as such.

        Raises ConfigError when `url` is no http(s) address, or the environment's proxy for it cannot be used.
        """
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL:  # its words may hold a part of a password
            raise ConfigError(f"{self.setting}: {without_credentials(url)!r} is no URL; {ENCODED}") from None
        self.name = without_credentials(url)
        """The URL without password and query, for messages and metrics."""
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ConfigError(f"{self.setting}: {self.name!r} must start with http:// or https:// and name a host")
        self.url = url
        self.secrets = [s for s in (parsed.password, parsed.query.decode(), *parsed.params.values()) if s]
        self.timeout_s = timeout_s
        self.chunk = chunk
        self.in_flight = in_flight
        self.labels = labels
        self.attempts = attempts
        self.wait = tenacity.wait_exponential(multiplier=wait_s, max=max_wait_s)
        self.proxy = proxy_of(parsed, urllib.request.getproxies())
        try:
            self._transport()
        except (ImportError, ValueError, OSError, httpx.InvalidURL) as error:
            through = f" through the proxy {without_credentials(self.proxy)} of the environment" if self.proxy else ""
            raise ConfigError(f"{self.setting}: {self.name} cannot be asked{through}: {error}") from None

    def _transport(self) -> httpx.AsyncHTTPTransport:
        return httpx.AsyncHTTPTransport(proxy=self.proxy or None)

    def ask(self, columns: Mapping[str, Sequence[Any]], check: Check) -> list[Any]:
        """The rewards of all responses.

        columns: what a request holds, each of all responses; check: what a reward must be.
        Raises RewardError after the last attempt, or at once for an answer of another form.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(self._ask_all(columns, check))
        with ThreadPoolExecutor(1) as elsewhere:  # a notebook has a loop of its own in this thread
            return elsewhere.submit(asyncio.run, self._ask_all(columns, check)).result()

    def labelled(self, columns: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """{"labels": [...]} where the data have some; RewardError where one cannot be written as JSON."""
        if not self.labels:
            return {}
        for label in columns[self.labels]:
            try:
                json.dumps(label, ensure_ascii=False, allow_nan=False).encode()
            except (TypeError, ValueError, RecursionError) as error:
                raise RewardError(
                    f"remote reward {self.name}: column {self.labels!r} holds {label!r:.80}, which is no JSON: {error}"
                ) from None
        return {"labels": columns[self.labels]}

    async def _ask_all(self, columns: Mapping[str, Sequence[Any]], check: Check) -> list[Any]:
        count = len(next(iter(columns.values())))
        starts = range(0, count, self.chunk)
        chunks = [{name: list(column[i : i + self.chunk]) for name, column in columns.items()} for i in starts]
        free = asyncio.Semaphore(self.in_flight)
        async with httpx.AsyncClient(
            transport=self._transport(), timeout=None, headers={"Accept-Encoding": "identity"}
        ) as client:

            async def ask(first: int, body: dict[str, Any]) -> list[Any]:
                async with free:
                    return self._checked(await self._post(client, body), first, min(self.chunk, count - first), check)

            answers: list[list[Any]] = await asyncio.gather(*map(ask, starts, chunks))
        return [reward for answer in answers for reward in answer]

    async def _post(self, client: httpx.AsyncClient, body: dict[str, Any]) -> str:
        """The answer to one chunk."""
        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self.attempts),
            wait=self.wait,
            retry=tenacity.retry_if_exception(_temporary),
            reraise=True,
        )
        try:
            return await retrying(self._request, client, body)
        except _BadStatus as error:
            tried = retrying.statistics["attempt_number"]
            raise RewardError(
                f"remote reward {self.name}: status {error.status} after {tried} attempt(s): {self._shown(error.text)}"
            ) from None
        except (httpx.HTTPError, TimeoutError) as error:
            tried = retrying.statistics["attempt_number"]
            through = f" through the proxy {without_credentials(self.proxy)}" if self.proxy else ""
            raise RewardError(
                f"remote reward {self.name}: no answer{through} after {tried} attempt(s) "
                f"(time-out {self.timeout_s:g} s): {type(error).__name__}: {error}"
            ) from None

    async def _request(self, client: httpx.AsyncClient, body: dict[str, Any]) -> str:
        """The text of one attempt's answer, whole within `timeout_s`."""
        try:
            async with asyncio.timeout(self.timeout_s):
                async with client.stream("POST", self.url, json=body) as answer:
                    status, text = answer.status_code, (await self._read(answer)).decode(errors="replace")
        except TimeoutError:
            raise TimeoutError("the answer was not whole in time") from None
        if not 200 <= status < 300:
            raise _BadStatus(status, text)
        return text

    async def _read(self, answer: httpx.Response) -> bytes:
        encoding = answer.headers.get("Content-Encoding", "").strip().lower()
        if encoding not in ENCODINGS:
            raise RewardError(f"remote reward {self.name}: Content-Encoding {encoding[:SHOWN]!r} was not asked for")
        content = bytearray()
        async for part in answer.aiter_bytes():
            content += part
            if len(content) > ANSWER_BYTES:
                raise RewardError(f"remote reward {self.name}: the answer has more than {ANSWER_BYTES:,} bytes")
        return bytes(content)

    def _checked(self, answer: str, first: int, count: int, check: Check) -> list[Any]:
        """The `rewards` of an answer, one for each of the `count` responses from the `first` on."""
        try:
            rewards = json.loads(answer)["rewards"]
        except (ValueError, RecursionError, KeyError, TypeError):  # ValueError: of a number with 5,000 digits, too
            raise RewardError(
                f'remote reward {self.name}: answer is not {{"rewards": [...]}}: {self._shown(answer)}'
            ) from None
        try:
            if not isinstance(rewards, list):
                raise ValueError(f"rewards is no flat list of {self.unit}")
            if len(rewards) != count:
                raise ValueError(f"{len(rewards)} rewards for {count} responses")
            found = [check(first + i, reward) for i, reward in enumerate(rewards)]
        except ValueError as error:
            raise RewardError(f"remote reward {self.name}: {error}: {self._shown(answer)}") from None
        except OverflowError:
            raise RewardError(
                f"remote reward {self.name}: a reward is beyond every float: {self._shown(answer)}"
            ) from None
        return found

    def _shown(self, text: str) -> str:
        """The start of a server's text, without what the URL keeps secret."""
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return repr(text[:SHOWN])


class RemoteReward(RewardServer):
    """A reward model on HTTP: POST {"query": [prompt + response], "prompts": [...], "labels": [...]} ->
    {"rewards": [number, ...]}; labels where the data have them."""

    def score(self, rollout: Rollout, texts: ResponseTexts) -> Tensor:
        return self.score_texts(texts)

    def score_texts(self, texts: ResponseTexts) -> Tensor:
        """[B] fp32; RewardError as `ask`."""
        query = [p + r for p, r in zip(texts.prompts, texts.responses, strict=True)]
        columns = {"query": query, "prompts": texts.prompts} | self.labelled(texts.columns)
        rewards = self.ask(columns, lambda _, reward: number(reward))
        return torch.tensor(rewards, dtype=torch.float32)


def label_column(columns: DataColumns) -> str:
    """The column that OpenRLHF's protocol sends as labels, or "" where the data have none; notes that it is wanted."""
    found = next((name for name in LABELS if name in columns.names), "")
    columns.want([found] if found else [])
    return found


def number(reward: Any) -> float:
    """ValueError where a reward is none."""
    if type(reward) not in (int, float):
        raise ValueError("rewards is no flat list of numbers")
    return float(reward)


class _BadStatus(Exception):
    def __init__(self, status: int, text: str) -> None:
        self.status, self.text = status, text


def _temporary(error: BaseException) -> bool:
    """Whether another attempt may do better."""
    if isinstance(error, _BadStatus):
        return error.status == 429 or error.status >= 500
    return isinstance(error, httpx.TransportError | TimeoutError)


def proxy_of(url: httpx.URL, proxies: Mapping[str, str]) -> str:
    """The proxy to ask for `url` through, or "".

    proxies: as `urllib.request.getproxies` reads them from the environment; its "no" (NO_PROXY) may hold host names,
    addresses and ranges of addresses.
    """
    proxy = proxies.get(url.scheme) or proxies.get("all") or ""
    if not proxy or _is_near(url.host) or bypassed(url.netloc.decode(), dict(proxies)):
        return ""
    address = _address(url.host)
    for entry in proxies.get("no", "").split(","):
        try:
            if address and address in ipaddress.ip_network(entry.strip().strip("[]"), strict=False):
                return ""
        except ValueError:  # a host name
            continue
    return proxy if "://" in proxy else f"http://{proxy}"


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _is_near(host: str) -> bool:
    """Whether a host is this machine or in a private network, where a proxy has no business."""
    if address := _address(host):
        return address.is_loopback or address.is_private or address.is_link_local
    try:
        found = [ipaddress.ip_address(i[4][0]) for i in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError, ValueError):  # a name that the proxy alone can resolve
        return host == "localhost" or host.endswith(".localhost")
    return all(a.is_loopback or a.is_private or a.is_link_local for a in found)
