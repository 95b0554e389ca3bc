"""The reference's log-probs, computed once a data set and kept on disk.

A file belongs to one combination of reference weights, tokenizer, template, rows, length limit and dtype, whose
hash is its name; it appears under that name only when it is whole, and a damaged one is computed again.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import tempfile
from collections.abc import Sequence
from pathlib import Path

import datasets
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rto_fast import distributed
from rto_fast.backend.frozen import frozen
from rto_fast.config import DPOConfig
from rto_fast.data.chat_template import ChatTemplate
from rto_fast.data.tokenizer import tokenizer_hash
from rto_fast.models.adapters import adapter_settings
from rto_fast.models.packing import Placement
from rto_fast.models.save import full_parameters
from rto_fast.supervised.loop import held_out_batches
from rto_fast.supervised.stage import Row

_FORMAT = 1


@torch.no_grad()
def reference_logps(model: nn.Module, rows: Sequence[Row], placement: Placement) -> Tensor:
    """Summed log-prob of each row's responses, [rows, responses a row] fp32 on the CPU, the same on every rank."""
    mine: dict[int, Tensor] = {}
    for batch in held_out_batches(rows, placement, held_out=False) if rows else ():
        sums = batch.sequence_sums(model(batch.packed)).float().cpu()
        mine |= dict(zip(batch.index, sums.unbind(0), strict=False))
    merged = {i: t for part in distributed.gather_objects(mine) for i, t in part.items()}
    return torch.stack([merged[i] for i in range(len(rows))]) if rows else torch.zeros(0, 2)


def cached_reference_logps(
    reference: nn.Module,
    parts: Sequence[tuple[Sequence[int], Sequence[Row]]],
    config: DPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    placement: Placement,
) -> tuple[Tensor, ...]:
    """`reference_logps` of every part, from the disk where they are there; collective.

    reference: not yet frozen or moved. parts: (row numbers in the data set, rows) each. With data_cache off
    nothing is read or written.
    """
    path = None
    if config.data_cache and distributed.rank() == 0:
        key = cache_key(reference, parts, config, tokenizer, template)
        path = Path(datasets.config.HF_DATASETS_CACHE) / "rto_fast" / f"reference-{key}.pt"
    tables = distributed.broadcast_object(_read(path) if path else None)
    if tables is None:
        model = frozen(reference, config)
        tables = tuple(reference_logps(model, rows, placement) for _, rows in parts)
        if path:
            _write(path, tables)
    return tables


def cache_key(
    reference: nn.Module, parts: Sequence[tuple[Sequence[int], Sequence[Row]]], config: DPOConfig,
    tokenizer: PreTrainedTokenizerBase, template: ChatTemplate,
) -> str:  # fmt: skip
    """Hash of all that the log-probs depend on; reads every weight (about a second a gigabyte)."""
    alone = ("alone",) if config.packing == "off" else ()
    digest = hashlib.sha256(
        repr((_FORMAT, tokenizer_hash(tokenizer), template.hash, config.max_length, config.dtype, *alone)).encode()
    )
    if getattr(reference, "adapter", None):
        digest.update(adapter_settings(reference).encode())
    for name, tensor in full_parameters(reference):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    for numbers, rows in parts:
        for number, row in zip(numbers, rows, strict=True):
            digest.update(repr((number, row.prompt, row.responses)).encode())
    return digest.hexdigest()[:32]


def _read(path: Path) -> tuple[Tensor, ...] | None:
    try:
        tables = torch.load(path, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        return None  # not there, or damaged
    return tuple(tables)


def _write(path: Path, tables: tuple[Tensor, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=".part-")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(list(tables), file)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise
