"""Scores of whole responses: Python functions, remote reward models, and their weighted sum.

A local reward model is one more `RewardSource`; it lives with the models. A source passes NaN and infinity
on: the trainer counts them and skips the step.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import json
import os
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Protocol

import httpx
import tenacity
import torch
from torch import Tensor

from rto_fast import distributed
from rto_fast.contract import ResponseTexts, Rollout
from rto_fast.errors import ConfigError, RewardError


class RewardSource(Protocol):
    """Scores each response as a whole."""

    name: str

    def score(self, rollout: Rollout, texts: ResponseTexts) -> Tensor:
        """[B] fp32 on the CPU; may hold NaN or infinity. Raises RewardError when there is no score."""
        ...


def weighted_sum(named: Mapping[str, Tensor], weights: Sequence[float]) -> Tensor:
    """[B] fp32 sum of weight * score, weights in the order of `named`; weight 0 leaves its source out."""
    if not named or len(named) != len(weights):
        raise ValueError(f"weights: {len(weights)} given for {len(named)} reward sources")
    total = torch.zeros_like(next(iter(named.values())), dtype=torch.float32)
    for score, weight in zip(named.values(), weights, strict=True):
        if weight:
            total += weight * score.float()
    return total


def try_functions(sources: Sequence[RewardSource], prompts: Sequence[str]) -> None:
    """Has rank 0 ask each Python function for scores of made-up responses to the first prompts; collective.

    Raises ConfigError, before any model is loaded, where one raises or answers otherwise than with numbers.
    """
    some = list(prompts[:2])
    texts = ResponseTexts(some, [TRIAL] * len(some), [[] for _ in some])
    failure = ""
    for source in sources if distributed.rank() == 0 else ():
        if isinstance(source, FunctionReward) and not failure:
            try:
                source.score_texts(texts)
            except RewardError as error:
                failure = f"reward_fn: tried on the response {TRIAL!r}: {error}"
    if failure := distributed.broadcast_object(failure):
        raise ConfigError(failure)


# Python functions

TRIAL = "A response."
"""What a function is tried on before a run."""


class FunctionReward:
    """A Python function, called as fn(prompts=[...], responses=[...]) -> one number a response.

    Rank 0 calls it once before the run (`try_functions`), each rank once an iteration for its own responses.
    """

    def __init__(self, name: str, fn: Callable[..., Sequence[float]]) -> None:
        self.name = name
        self.fn = fn

    @classmethod
    def load(cls, spec: str) -> FunctionReward:
        """From `module:function` or `path/to/file.py:function`; its ConfigErrors suggest near names."""
        place, colon, attribute = spec.rpartition(":")
        if not (colon and place and attribute):
            raise ConfigError(f"reward_fn: {spec!r} is not module:function or path/to/file.py:function")
        module = _load_file(spec, Path(place)) if place.endswith(".py") else _load_module(spec, place)
        fn = getattr(module, attribute, None)
        if not callable(fn):
            functions = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
            what = "has no" if fn is None else "has a non-callable"
            raise ConfigError(f"reward_fn: {place} {what} {attribute!r}{_near(attribute, functions)}")
        try:
            signature = inspect.signature(fn)
        except (TypeError, ValueError):  # a builtin without a signature: found out at the first call
            return cls(spec, fn)
        try:
            signature.bind(prompts=[], responses=[])
        except TypeError as error:
            raise ConfigError(
                f"reward_fn: {spec}{signature} cannot be called as fn(prompts=..., responses=...): {error}"
            ) from None
        return cls(spec, fn)

    def score(self, rollout: Rollout, texts: ResponseTexts) -> Tensor:
        return self.score_texts(texts)

    def score_texts(self, texts: ResponseTexts) -> Tensor:
        """[B] fp32. Raises RewardError when the function raises, or answers anything but B numbers."""
        if not texts.responses:  # a rank without a share; users' functions need not know of it
            return torch.zeros(0)
        try:
            answer = self.fn(prompts=list(texts.prompts), responses=list(texts.responses))
        except (Exception, SystemExit) as error:  # an exit would end the run as if it were done
            raise RewardError(f"reward function {self.name} raised {self._blame(texts, error)}") from error
        count = len(texts.responses)
        if isinstance(answer, str | bytes | dict) or not hasattr(answer, "__len__"):
            raise RewardError(f"reward function {self.name} answered a {type(answer).__name__}, not {count} numbers")
        if len(answer) != count:
            raise RewardError(f"reward function {self.name} answered {len(answer)} scores for {count} responses")
        scores = []
        for i, value in enumerate(answer):
            if isinstance(value, str | bytes):
                number = None
            else:
                try:
                    number = float(value)
                except (TypeError, ValueError, RuntimeError, OverflowError):
                    number = None
            if number is None:
                raise RewardError(
                    f"reward function {self.name}, sample {i}: {value!r} is not a number "
                    f"(response {texts.responses[i][:80]!r})"
                )
            scores.append(number)
        return torch.tensor(scores, dtype=torch.float32)

    def _blame(self, texts: ResponseTexts, error: Exception) -> str:
        """The error's text, with the first sample that raises when it is scored alone."""
        text = f"{type(error).__name__}: {error}"
        for i, (prompt, response) in enumerate(zip(texts.prompts, texts.responses, strict=True)):
            try:
                self.fn(prompts=[prompt], responses=[response])
            except (Exception, SystemExit):
                return f"at sample {i}: {text} (response {response[:80]!r})"
        return f"on the whole batch of {len(texts.responses)}, on no sample alone: {text}"


def _near(name: str, candidates: Sequence[str]) -> str:
    """'; did you mean a, b?' or '' when nothing is near."""
    found = difflib.get_close_matches(name, candidates, n=3, cutoff=0.6)
    return f"; did you mean {', '.join(found)}?" if found else ""


def _load_file(spec: str, path: Path) -> ModuleType:
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise ConfigError(f"reward_fn: file {path} of {spec!r} does not exist{_near(path.name, siblings)}")
    module_spec = importlib.util.spec_from_file_location(f"rto_reward_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_spec.name]
        raise ConfigError(f"reward_fn: importing {path} raised {type(error).__name__}: {error}") from error
    return module


def _load_module(spec: str, name: str) -> ModuleType:
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # a recipe's own folder comes first; a user's file lies where they stand
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name and not name.startswith(f"{error.name}."):
            raise ConfigError(f"reward_fn: importing {name} raised {error}") from error
        known = {m.name for m in pkgutil.iter_modules()}
        raise ConfigError(
            f"reward_fn: module {error.name!r} of {spec!r} not found{_near(name, sorted(known))}"
        ) from None
    except Exception as error:
        raise ConfigError(f"reward_fn: importing {name} raised {type(error).__name__}: {error}") from error


# Remote reward models


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
