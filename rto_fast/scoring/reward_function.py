"""Scores from a Python function that the user wrote."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import os
import pkgutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rto_fast.contract import ResponseTexts, Rollout
from rto_fast.errors import ConfigError, RewardError


class FunctionReward:
    """A Python function, called as fn(prompts=[...], responses=[...]) -> one number a response.

    Rank 0 calls it once before the run (`try_sources`), each rank once an iteration for its own responses.
    """

    setting = "reward_fn"

    def __init__(self, name: str, fn: Callable[..., Sequence[float]]) -> None:
        self.name = name
        self.fn = fn

    @classmethod
    def load(cls, spec: str) -> FunctionReward:
        """From `module:function` or `path/to/file.py:function`; its ConfigErrors suggest near names."""
        fn = load_function(spec, cls.setting)
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

    def _blame(self, texts: ResponseTexts, error: BaseException) -> str:
        """The error's text, with the first sample that raises when it is scored alone."""
        text = f"{type(error).__name__}: {error}"
        for i, (prompt, response) in enumerate(zip(texts.prompts, texts.responses, strict=True)):
            try:
                self.fn(prompts=[prompt], responses=[response])
            except (Exception, SystemExit):
                return f"at sample {i}: {text} (response {response[:80]!r})"
        return f"on the whole batch of {len(texts.responses)}, on no sample alone: {text}"


def load_function(spec: str, setting: str) -> Callable[..., Any]:
    """The function of `module:function` or `path/to/file.py:function`; its ConfigErrors suggest near names."""
    place, colon, attribute = spec.rpartition(":")
    if not (colon and place and attribute):
        raise ConfigError(f"{setting}: {spec!r} is not module:function or path/to/file.py:function")
    module = _load_file(spec, Path(place), setting) if place.endswith(".py") else _load_module(spec, place, setting)
    fn = getattr(module, attribute, None)
    if not callable(fn):
        functions = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        what = "has no" if fn is None else "has a non-callable"
        raise ConfigError(f"{setting}: {place} {what} {attribute!r}{_near(attribute, functions)}")
    return fn


def _near(name: str, candidates: Sequence[str]) -> str:
    """'; did you mean a, b?' or '' when nothing is near."""
    found = difflib.get_close_matches(name, candidates, n=3, cutoff=0.6)
    return f"; did you mean {', '.join(found)}?" if found else ""


def _load_file(spec: str, path: Path, setting: str) -> ModuleType:
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise ConfigError(f"{setting}: file {path} of {spec!r} does not exist{_near(path.name, siblings)}")
    module_spec = importlib.util.spec_from_file_location(f"rto_reward_{path.stem}", path)
    assert module_spec is not None
    assert module_spec.loader is not None  # the name ends with .py
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_spec.name]
        raise ConfigError(f"{setting}: importing {path} raised {type(error).__name__}: {error}") from error
    return module


def _load_module(spec: str, name: str, setting: str) -> ModuleType:
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # a recipe's own folder comes first; a user's file lies where they stand
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name and not name.startswith(f"{error.name}."):
            raise ConfigError(f"{setting}: importing {name} raised {error}") from error
        known = {m.name for m in pkgutil.iter_modules()}
        raise ConfigError(
            f"{setting}: module {error.name!r} of {spec!r} not found{_near(name, sorted(known))}"
        ) from None
    except Exception as error:
        raise ConfigError(f"{setting}: importing {name} raised {type(error).__name__}: {error}") from error
