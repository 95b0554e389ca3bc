"""From `--token-reward` to sources: checks before any model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from rto_fast.config import RTOConfig
from rto_fast.config.token_spec import REFERENCE, TokenSpec
from rto_fast.data.columns import DataColumns
from rto_fast.data.tokenizer import check_max_length, load_tokenizer, tokenizer_difference
from rto_fast.errors import ConfigError, require
from rto_fast.models.load import check_reward_head, check_weights, load_config, reward_outputs
from rto_fast.models.packing import Placement
from rto_fast.scoring.reward_server import label_column
from rto_fast.scoring.reward_source import Model
from rto_fast.scoring.token_function import TokenFunction, TokenServer
from rto_fast.scoring.token_source import Endogenous, LogRatio, Scalar, TokenSource

ARGUMENT = "token_reward"
Written = dict[TokenSpec, TokenFunction | TokenServer]
"""The sources of `fn` and `url`."""
Load = Callable[[str, str], Model]
"""Of a path and the setting that names it: the frozen model."""


def load_written(config: RTOConfig, tokenizer: PreTrainedTokenizerBase, columns: DataColumns) -> Written:
    """Imports functions and reads URLs; calls and requests nothing. ConfigError where one cannot be."""
    found: Written = {}
    for spec, _ in config.other_token_sources:
        if spec.kind == "fn":
            found[spec] = TokenFunction.load(spec.parts[0], tokenizer, columns)
        elif spec.kind == "url":
            settings = {"timeout_s": config.reward_timeout_s, "attempts": config.reward_retries + 1}
            found[spec] = TokenServer(spec.parts[0], tokenizer, labels=label_column(columns), **settings)
    return found


def check_token_models(config: RTOConfig, tokenizer: PreTrainedTokenizerBase, special: frozenset[str]) -> None:
    """ConfigError where a source's model has other tokens, too few positions, or no head of one output.

    special: the special tokens that the run uses.
    """
    length = config.max_prompt_length + config.max_response_length
    for spec, _ in config.other_token_sources:
        more = spec.kind == "endogenous"  # it looks at the state behind a truncated response
        for path in spec.models or ((config.reference or config.policy,) if more else ()):
            check_weights(path, ARGUMENT)
            if spec.scalar:
                check_reward_head(path, ARGUMENT)
                outputs = reward_outputs(path)
                require(outputs in (0, 1), f"{ARGUMENT}: {path!r} gives {outputs} numbers a token, not one")
            check_tokens(path, ARGUMENT, tokenizer, config.policy, special, exact=not spec.scalar)
            limits = f"max_prompt_length + max_response_length ({ARGUMENT})"
            check_max_length(length + more, load_config(path, ARGUMENT), limits)


def check_tokens(
    path: str, argument: str, tokenizer: PreTrainedTokenizerBase, policy: str, special: frozenset[str], *, exact: bool
) -> None:
    """ConfigError where the model at `path` has other tokens than the policy; exact: or vocabularies differ in size."""
    ours, theirs = (load_config(p, a).get_text_config().vocab_size for p, a in ((policy, "policy"), (path, argument)))
    require(
        theirs == ours if exact else theirs > max(tokenizer.get_vocab().values()),
        f"{argument}: {path!r} has a vocabulary of {theirs} tokens, the policy's has {ours}; token rewards compare the "
        "two token by token",
    )
    try:
        own = load_tokenizer(path, argument)
    except ConfigError:  # a folder without one: its vocabulary must do
        return
    if difference := tokenizer_difference(tokenizer, own, special):
        raise ConfigError(
            f"{argument}: {path!r} has another tokenizer than the policy ({difference}); token rewards compare the two "
            "token by token"
        )


def load_token_sources(
    config: RTOConfig, written: Written, placement: Placement, language: Load, scalar: Load
) -> list[TokenSource]:
    """The sources beside the DPO models, in the order of the setting. language, scalar: load a model of the kind."""
    return [_source(spec, config, written, placement, language, scalar) for spec, _ in config.other_token_sources]


def _source(
    spec: TokenSpec, config: RTOConfig, written: Written, placement: Placement, language: Load, scalar: Load
) -> Any:
    if spec in written:
        return written[spec]
    if spec.scalar:
        return Scalar(scalar(spec.parts[0], ARGUMENT), spec.kind == "scalar-diff", placement)
    reference = config.reference or config.policy
    named = [reference if part == REFERENCE else part for part in spec.parts] or [reference]
    model = language(named[0], ARGUMENT)
    if spec.kind == "endogenous":
        return Endogenous(model, config.token_reward_alpha, placement)
    base = None if named[1:] in ([], [reference]) else language(named[1], ARGUMENT)
    return LogRatio(model, base, placement)
