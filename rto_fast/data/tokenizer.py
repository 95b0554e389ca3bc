"""What a tokenizer is asked: stop tokens, texts of tokens, whether it fits."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from rto_fast.data.adapter_folder import holder_of
from rto_fast.data.chat_template import ChatTemplate
from rto_fast.errors import ConfigError, require


def load_tokenizer(path: str, argument: str = "model") -> PreTrainedTokenizerBase:
    """Tokenizer of a model folder or Hub id. Raises ConfigError, naming `argument`, when there is none."""
    try:
        return AutoTokenizer.from_pretrained(holder_of(path, "tokenizer_config.json"), trust_remote_code=False)
    except ConfigError:
        raise
    except Exception as e:  # transformers and huggingface_hub raise many unrelated types here
        reason = " ".join(str(e).split())
        raise ConfigError(f"{argument}: no tokenizer in {path!r}: {reason}") from e


def end_of_turn(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> int | None:
    """The token that a training response ends with: the template's end of turn, or EOS; None where it has neither."""
    end = template.encode_pair(tokenizer, "Hello", "Hi there")[1][-1]
    special = getattr(tokenizer.added_tokens_decoder.get(end), "special", False)
    return end if special or end == tokenizer.eos_token_id else None


def stop_token_ids(model_path: str, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> tuple[int, ...]:
    """Ids that end a response: all of generation_config.eos_token_id, else the tokenizer's EOS, and the template's end.

    A base model's generation_config does not know the end of turn that its fine-tuning has taught; a policy sampled
    past it would never stop. Raises ConfigError when nothing ends a response.
    """
    try:
        ids = GenerationConfig.from_pretrained(holder_of(model_path, "generation_config.json")).eos_token_id
    except OSError:
        ids = None
    if ids is None:
        ids = tokenizer.eos_token_id
    ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    end = end_of_turn(tokenizer, template)
    if end is not None:
        ids.append(end)
    require(
        bool(ids),
        f"{model_path!r}: neither generation_config.json nor the tokenizer names an end-of-sequence token; "
        "no response would ever stop; set eos_token_id in generation_config.json",
    )
    return tuple(dict.fromkeys(ids))


def check_min_length(tokens: int, stop_ids: Sequence[int], model_config: PretrainedConfig) -> None:
    """Raises ConfigError when a least length, in tokens, leaves no token to sample before it."""
    size = model_config.get_text_config().vocab_size
    require(
        not tokens or bool(set(range(size)) - set(stop_ids)),
        f"min_response_length: each of the model's {size} tokens ends a response, and before {tokens} tokens none may; "
        "use 0, or mend eos_token_id in the model's generation_config.json",
    )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig, argument: str) -> None:
    """Raises ConfigError when the tokenizer has ids that the model's embedding has no row for."""
    top, size = max(tokenizer.get_vocab().values()), model_config.get_text_config().vocab_size
    require(
        top < size,
        f"{argument}: the tokenizer has ids up to {top}, the model has {size} (up to {size - 1}); "
        "use the model's own tokenizer, or resize its embeddings",
    )


def check_max_length(max_length: int, model_config: PretrainedConfig, argument: str) -> None:
    """Raises ConfigError when `max_length` (tokens) is more than the model's positions."""
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    require(
        positions is None or max_length <= positions,
        f"{argument}: {max_length} tokens exceed the model's {positions} positions; use at most {positions}",
    )


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the tokenizer's class, rules and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    special = json.dumps({k: str(v) for k, v in tokenizer.special_tokens_map.items()}, sort_keys=True)
    return hashlib.sha256((type(tokenizer).__name__ + rules + special).encode()).hexdigest()


def special_tokens_used(
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    stop_ids: Iterable[int] = (),
    prompts: Iterable[Sequence[int]] = (),
) -> frozenset[str]:
    """The special tokens that a run meets: its template's, those that end a response, those in its rendered prompts."""
    special = {i: str(t) for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    met = set(chain(*template.encode_pair(tokenizer, "Hello", "Hi there"), stop_ids, *prompts))
    return frozenset(token for i, token in special.items() if i in met)


def tokenizer_difference(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase, special_used: Iterable[str]) -> str:
    """Why some text of the run would get other ids from b than from a; "" where none would.

    Ordinary tokens and the rules that find them must agree, and of the special tokens those that the run uses. What
    the unused ones are called (Llama-3's and Llama-3.2's differ), padding, truncation and decoding change no id.
    """
    if a.is_fast != b.is_fast or (not a.is_fast and type(a) is not type(b)):
        return f"one is a {type(a).__name__}, the other a {type(b).__name__}"
    ours, theirs = _ordinary(a), _ordinary(b)
    for token in sorted(ours.keys() | theirs.keys()):
        if ours.get(token) != theirs.get(token):
            return f"the token {token!r} has the ids {ours.get(token, 'none')} and {theirs.get(token, 'none')}"
    if a.is_fast:
        rules, others = _rules(a), _rules(b)
        for part, rule in rules.items():
            if rule != others[part]:
                return f"their {part} differ"
    ours, theirs = a.get_vocab(), b.get_vocab()
    for token in sorted(special_used):
        if ours.get(token) != theirs.get(token):
            return f"the special token {token!r} has the ids {ours.get(token, 'none')} and {theirs.get(token, 'none')}"
    return ""


def _ordinary(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The vocabulary without special tokens."""
    special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
    return {token: i for token, i in tokenizer.get_vocab().items() if token not in special}


def _rules(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a fast tokenizer finds ordinary tokens by."""
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    model = {k: v for k, v in whole["model"].items() if k not in ("vocab", "merges")}
    return {
        "normalizers": whole["normalizer"],
        "pre-tokenizers": whole["pre_tokenizer"],
        "merges": whole["model"].get("merges"),
        "models": model,
    }


def token_texts(tokenizer, ids: Sequence[int]) -> list[str]:
    """[H] token ids -> [H] texts that keep their leading spaces; special tokens keep their names.

    `decode` on a single id would lose SentencePiece's leading space.
    """
    special = set(tokenizer.all_special_ids)
    texts, before = [], None
    for token, piece in zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True):
        byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece or "")
        if piece is None or token in special:
            texts.append(piece or f"<{int(token)}>")
        elif byte:
            code = int(byte[1], 16)
            texts.append(chr(code) if code < 128 else piece)
        elif "▁" in piece:
            texts.append(piece.replace("▁", " "))
        else:
            texts.append(_after(tokenizer, before, piece))
        before = None if piece is None or token in special else piece
    return texts


def _after(tokenizer, before: str | None, piece: str) -> str:
    """What `piece` adds to the text behind `before`: some decoders put the space between words in themselves."""
    alone = tokenizer.convert_tokens_to_string([piece])
    if before is None:
        return alone
    first, both = (tokenizer.convert_tokens_to_string(p) for p in ([before], [before, piece]))
    return both[len(first) :] if both.startswith(first) and both.endswith(alone) else alone


CLOSING = " \"'”’»)]}*_"
"""What may stand behind the delimiter in a token that ends a sentence, such as `."`."""


def delimiter_ids(tokenizer: PreTrainedTokenizerBase, delimiters: Sequence[str]) -> Tensor:
    """[K] int64: ids of the ordinary tokens whose text ends with a delimiter, but for closing quotes and brackets."""
    special = set(tokenizer.all_special_ids)
    closing = "".join(c for c in CLOSING if c not in delimiters)
    found = [
        i
        for i, text in enumerate(token_texts(tokenizer, range(len(tokenizer))))
        if i not in special and text.rstrip(closing).endswith(tuple(delimiters))
    ]
    return torch.tensor(found, dtype=torch.int64)
