"""Scores from a reward model behind HTTP."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import tenacity
import torch
from torch import Tensor

from rto_fast.contract import ResponseTexts, Rollout
from rto_fast.errors import ConfigError, RewardError


class RemoteReward:
    """A reward model on HTTP: POST {"query": [prompt + response], "prompts": [...]} -> {"rewards": [...]}.

    Connection errors, time-outs, status 429 and 5xx are tried again after 1, 2, 4, ... times `wait_s`.
    """

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
    ) -> None:
        """`timeout_s`: of each attempt; `chunk`: responses a request; `in_flight`: requests at a time.

        Raises ConfigError when `url` is no http(s) address.
        """
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise ConfigError(f"reward_url: {url!r} is no URL: {error}") from None
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ConfigError(f"reward_url: {url!r} must start with http:// or https:// and name a host")
        self.url = url
        self.name = str(parsed.copy_with(userinfo=b"", query=None))
        """The URL without password and query, for messages and metrics."""
        self.timeout_s = timeout_s
        self.chunk = chunk
        self.in_flight = in_flight
        self.attempts = attempts
        self.wait = tenacity.wait_exponential(multiplier=wait_s, max=max_wait_s)

    def score(self, rollout: Rollout, texts: ResponseTexts) -> Tensor:
        """[B] fp32. Raises RewardError after the last attempt, or at once for an answer of another form."""
        pairs = list(zip(texts.prompts, texts.responses, strict=True))
        chunks = [pairs[i : i + self.chunk] for i in range(0, len(pairs), self.chunk)]
        with httpx.Client(timeout=self.timeout_s) as client, ThreadPoolExecutor(self.in_flight) as pool:
            futures = [pool.submit(self._post, client, part) for part in chunks]
            try:
                rewards = [value for future in futures for value in future.result()]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return torch.tensor(rewards, dtype=torch.float32)

    def _post(self, client: httpx.Client, pairs: list[tuple[str, str]]) -> list[float]:
        """The rewards of one chunk."""
        body = {"query": [p + r for p, r in pairs], "prompts": [p for p, _ in pairs]}
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self.attempts),
            wait=self.wait,
            retry=tenacity.retry_if_exception(_temporary),
            reraise=True,
        )
        try:
            answer = retrying(self._request, client, body)
        except httpx.HTTPStatusError as error:
            tried = retrying.statistics["attempt_number"]
            raise RewardError(
                f"remote reward {self.name}: status {error.response.status_code} after {tried} attempt(s): "
                f"{error.response.text[:200]!r}"
            ) from error
        except httpx.HTTPError as error:
            tried = retrying.statistics["attempt_number"]
            raise RewardError(
                f"remote reward {self.name}: no answer after {tried} attempt(s) "
                f"(time-out {self.timeout_s:g} s): {type(error).__name__}: {error}"
            ) from error
        return self._parse(answer, len(pairs))

    def _request(self, client: httpx.Client, body: dict) -> httpx.Response:
        return client.post(self.url, json=body).raise_for_status()

    def _parse(self, answer: httpx.Response, count: int) -> list[float]:
        """The `rewards` of an answer: `count` numbers."""
        try:
            rewards = answer.json()["rewards"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
            raise RewardError(
                f'remote reward {self.name}: answer is not {{"rewards": [...]}}: {answer.text[:200]!r}'
            ) from None
        if not isinstance(rewards, list) or not all(type(r) in (int, float) for r in rewards):
            raise RewardError(f"remote reward {self.name}: rewards is no flat list of numbers: {str(rewards)[:200]}")
        if len(rewards) != count:
            raise RewardError(f"remote reward {self.name}: {len(rewards)} rewards for {count} responses")
        return rewards


def _temporary(error: BaseException) -> bool:
    """Whether another attempt may do better."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code == 429 or error.response.status_code >= 500
    return isinstance(error, httpx.TransportError)
