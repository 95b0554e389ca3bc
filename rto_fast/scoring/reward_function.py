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
from rto_fast.data.columns import DataColumns
from rto_fast.errors import ConfigError, RewardError

OFFERED = ("prompts", "responses", "token_ids", "messages")
"""What a function gets by these names, lists of B; a column of the data that shares one is hidden."""
Metrics = dict[str, float]
"""What a function says of a response beside its score."""
PLAIN = ("prompts", "responses")
"""What a function without a signature gets."""


class FunctionReward:
    """A Python function, called with those of `OFFERED` and the data's columns that its signature names, lists of B.

    It gives one number a response, or (number, {metric: number}). Rank 0 calls it once before the run
    (`try_sources`), each rank once an iteration for its own responses.
    """

    setting = "reward_fn"

    def __init__(self, name: str, fn: Callable[..., Sequence[Any]], wanted: Sequence[str] = PLAIN) -> None:
        self.name = name
        self.fn = fn
        self.wanted = wanted

    @classmethod
    def load(cls, spec: str, columns: DataColumns) -> FunctionReward:
        """From `module:function` or `path/to/file.py:function`; its ConfigErrors suggest near names."""
        fn = load_function(spec, cls.setting)
        return cls(spec, fn, wanted_by(fn, OFFERED, columns, f"{cls.setting}: {spec}", PLAIN))

    def score(self, rollout: Rollout, texts: ResponseTexts) -> Tensor:
        return self.score_texts(texts)

    def score_texts(self, texts: ResponseTexts) -> Tensor:
        """[B] fp32; RewardError as `judge`."""
        return self.judge(texts)[0]

    def judge(self, texts: ResponseTexts) -> tuple[Tensor, list[Metrics]]:
        """([B] fp32 scores, each response's metrics).

        Raises RewardError when the function raises (a RewardError of its own as it is), or answers anything but B
        numbers or pairs of one with its metrics.
        """
        if not texts.responses:  # a rank without a share; users' functions need not know of it
            return torch.zeros(0), []
        try:
            answer = self.fn(**given(texts, OFFERED, self.wanted))
        except RewardError:
            raise
        except (Exception, SystemExit) as error:  # an exit would end the run as if it were done
            raise RewardError(f"reward function {self.name} raised {self._blame(texts, error)}") from error
        count = len(texts.responses)
        if isinstance(answer, str | bytes | dict) or not hasattr(answer, "__len__"):
            raise RewardError(f"reward function {self.name} answered a {type(answer).__name__}, not {count} numbers")
        if len(answer) != count:
            raise RewardError(f"reward function {self.name} answered {len(answer)} scores for {count} responses")
        scores, metrics = [], []
        for i, value in enumerate(answer):
            try:
                score, more = _judgement(value)
            except ValueError as error:
                raise RewardError(
                    f"reward function {self.name}, sample {i}: {error} (response {texts.responses[i][:80]!r})"
                ) from None
            scores.append(score)
            metrics.append(more)
        return torch.tensor(scores, dtype=torch.float32), metrics

    def _blame(self, texts: ResponseTexts, error: BaseException) -> str:
        """The error's text, with the first sample that raises when it is scored alone."""
        text = f"{type(error).__name__}: {error}"
        for i, response in enumerate(texts.responses):
            try:
                self.fn(**given(texts.select([i]), OFFERED, self.wanted))
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


def _judgement(value: Any) -> tuple[float, Metrics]:
    """An entry of a function's answer, number or (number, {metric: number}); ValueError where it is neither."""
    if not (isinstance(value, tuple | list) and len(value) == 2 and isinstance(value[1], dict)):
        return _float(value, ""), {}
    for name in value[1]:
        if not isinstance(name, str) or not name:
            raise ValueError(f"metric {name!r} has no name")
    return _float(value[0], ""), {name: _float(number, f"metric {name}: ") for name, number in value[1].items()}


def _float(value: Any, what: str) -> float:
    """NaN and infinity among them; ValueError where it is no number."""
    try:
        if not isinstance(value, str | bytes):
            return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise ValueError(f"{what}{value!r} is not a number")


def wanted_by(
    fn: Callable[..., Any], offered: Sequence[str], columns: DataColumns, where: str, blind: Sequence[str] = ()
) -> tuple[str, ...]:
    """The names among `offered` and the data's columns that a function takes; all of them where it takes any name.

    The data are looked at only for a name that is not offered, and what is wanted of them is noted there. blind: the
    names for a builtin without a signature, `offered` by default. ConfigError where it needs another, or takes none.
    """
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return tuple(blind or offered)
    every = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    more = [c for c in columns.names if c not in offered] if every or {p.name for p in named} - set(offered) else []
    there = ", ".join(offered) + (f" and the data's columns {', '.join(more)}" if more else "")
    for p in parameters:
        needed = p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        if needed and (p not in named or p.name not in (*offered, *more)):
            near = _near(p.name, [*offered, *more])
            raise ConfigError(f"{where} wants {p.name!r}, and there are {there}, each given by its name{near}")
    taken = {p.name for p in named}
    found = tuple(name for name in (*offered, *more) if every or name in taken)
    if not found:
        raise ConfigError(f"{where} takes none of {there}")
    columns.want([name for name in found if name in more])
    return found


def given(texts: Any, offered: Sequence[str], wanted: Sequence[str]) -> dict[str, list[Any]]:
    """The arguments of a function: those fields of `texts` that are offered, and its columns; lists of its own."""
    return {name: list(getattr(texts, name) if name in offered else texts.columns[name]) for name in wanted}


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
