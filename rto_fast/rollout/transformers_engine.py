"""Sample from a transformers causal LM.

Batches by length, a fixed KV cache, its own sampling loop.

Each token is the inverse of the cumulative distribution at a uniform number,

    token = min {v : sum_{w <= v} p_w > u * sum_w p_w},    p = softmax(logits / temperature),

and a request's uniforms come from its seed alone, so that the same request draws the same numbers in any
batch. What still depends on the batch is the rounding of the logits (matrix products round differently at
other sizes); it moves a token only when u falls within that rounding of a boundary between two tokens (in
fp32 on a 512-token vocabulary: 2 of 130,886 tokens between batches of 512 and of 20).
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from rto_fast.contract import Request, Rollout
from rto_fast.errors import RolloutError, SyncError
from rto_fast.rollout.assignment import Tally
from rto_fast.rollout.decoding import ATTENTION, FixedLayer, sample, uniforms
from rto_fast.rollout.engine import Progress, Sampling, SyncStats, check_requests
from rto_fast.rollout.weights.expected import ExpectedWeights
from rto_fast.rollout.weights.fingerprint import Fingerprint

CHECK_EVERY = 4
"""Steps between looks at which sequences have ended: a look waits for the device."""
COMPACT_SHARE = 1 / 8
"""Share of ended rows from which the others are moved together."""


@dataclass
class Batch:
    """Sequences in flight; n rows, the columns of the [max_tokens, n] tensors."""

    index: list[int]
    """Which request each row is."""
    cache: Cache
    mask: Tensor | None
    """[n, 1, 1, width] additive, or [n, width] for models that build their own; None = nothing is padded."""
    positions: Tensor
    """[n, 1] int64: position of the next token."""
    u: Tensor
    """[max_tokens, n] float64 uniforms."""
    tokens: Tensor
    """[max_tokens, n] int64 sampled."""
    logps: Tensor
    """[max_tokens, n] fp32."""
    lens: list[int]
    """Response length of each row, 0 while it goes on."""
    last: Tensor
    """[n, 1] int64: the newest token of each row."""
    width: int
    """Columns of the cache in use, padding included."""


class TransformersEngine:
    """A RolloutEngine in this process, on any transformers causal LM (see RolloutEngine for the contract).

    Models whose layers are all plain attention take the fast way: preallocated cache, prepared mask, grouped
    attention. Others (sliding windows, hybrids with recurrent layers, ALiBi) keep transformers' own cache and masks.
    """

    def __init__(
        self,
        model_path: str | Path,
        device: torch.device | str,
        dtype: torch.dtype,
        pad_token_id: int,
        rollout_tokens: int = 65536,
    ) -> None:
        """`rollout_tokens`: bound on rows x (longest prompt + max_tokens) of a batch; one row always goes.

        Raises ValueError when the checkpoint lacks weights of the model, or the model has no `past_key_values`
        (pure state-space models).
        """
        straight = {} if torch.device(device).type == "cpu" else {"device_map": {"": device}}
        model, info = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=dtype, output_loading_info=True, trust_remote_code=False, **straight
        )
        if info["missing_keys"]:
            raise ValueError(f"{model_path}: the checkpoint lacks {sorted(info['missing_keys'])[:5]}")
        accepted = inspect.signature(model.forward).parameters
        if "past_key_values" not in accepted:
            raise ValueError(f"{model_path}: {type(model).__name__} has no key-value cache and cannot be sampled from")
        self.model = model.to(device).eval().requires_grad_(False)
        self.device = torch.device(device)
        self.rollout_tokens = rollout_tokens
        self.version = 0
        self.asleep = False
        self.torn = ""
        config = self.model.config.get_text_config(decoder=True)
        self.pad_token_id = pad_token_id
        self.vocab_size = config.vocab_size
        self.max_positions = getattr(config, "max_position_embeddings", None)
        self.layers = [type(layer) for layer in DynamicCache(config=self.model.config).layers]
        self.expected = ExpectedWeights(self.model)
        self.fast = (
            bool(self.layers)
            and all(kind is DynamicLayer for kind in self.layers)
            and self.model.config._attn_implementation == "sdpa"
            and getattr(self.model, "_supports_attention_backend", False)
        )
        if self.fast:
            self.model.set_attn_implementation(ATTENTION)
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    # Weights

    def push(self, weights: Iterable[tuple[str, Tensor]], version: int) -> SyncStats:
        start = time.perf_counter()
        own = dict(self.model.named_parameters(remove_duplicate=False))
        first_names: dict[str, str] = {}
        received = Fingerprint()
        self.torn = "a push of weights did not end"
        try:
            for name, tensor in self.expected.checked(weights):
                first = first_names.setdefault(self.expected.tied.get(name, name), name)
                _copy(own[name], name, tensor, first)
                received.add(name, tensor)
            digests = received.digests()
            self.expected.require_all(digests)
        except SyncError as error:
            self.torn = str(error)
            raise
        self.torn = ""
        self.version = version
        return SyncStats(received.bytes, time.perf_counter() - start, len(digests), digests)

    def sleep(self) -> None:
        if not self.asleep and self.device.type != "cpu":
            self.model.to("cpu")
            torch.cuda.empty_cache()
        self.asleep = True

    def wake(self) -> None:
        self.model.to(self.device)
        self.asleep = False

    # Sampling

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        progress: Progress = lambda tokens, ended: None,
        keep: int | None = None,
    ) -> Rollout:
        check_requests(
            requests, sampling, torn=self.torn, asleep=self.asleep, vocab=self.vocab_size, positions=self.max_positions
        )
        stops = torch.zeros(self.vocab_size, dtype=torch.bool)
        stops[[i for i in sampling.stop_ids if 0 <= i < self.vocab_size]] = True
        stops = stops.to(self.device)
        responses: list[list[int]] = [[] for _ in requests]
        logps: list[list[float]] = [[] for _ in requests]
        tally = Tally(requests, keep)
        for index in self.batches([len(q.prompt) for q in requests], sampling.max_tokens):
            if tally.enough:
                break
            with torch.inference_mode():
                for row, tokens, values in self._run([requests[i] for i in index], sampling, stops, progress, tally):
                    responses[index[row]], logps[index[row]] = tokens, values
        stop_ids = set(sampling.stop_ids)
        truncated = [not r or r[-1] not in stop_ids for r in responses]
        rollout = Rollout.from_lists(requests, responses, logps, truncated, self.version)
        return rollout if keep is None else rollout.select(tally.kept([len(r) for r in responses]))

    def batches(self, prompt_lens: Sequence[int], max_tokens: int, each: int = 1) -> Iterator[list[int]]:
        """Groups of request indices, the longest prompts first, each within `rollout_tokens`; each: rows a request."""
        order = sorted(range(len(prompt_lens)), key=lambda i: -prompt_lens[i])
        while order:
            rows = max(1, self.rollout_tokens // (each * (prompt_lens[order[0]] + max_tokens)))
            yield order[:rows]
            order = order[rows:]

    def _run(
        self, requests: Sequence[Request], sampling: Sampling, stops: Tensor, progress: Progress, tally: Tally
    ) -> Iterator[tuple[int, list[int], list[float]]]:
        """Samples one batch, or as much of it as is enough; yields (row, response tokens, log-probs) as they end."""
        batch, logits = self.prefill(requests, sampling.max_tokens)
        for step in range(sampling.max_tokens):
            if step:
                logits = self.forward(batch)
            if step < sampling.min_tokens:
                logits = logits.masked_fill(stops, float("-inf"))
            batch.last, logp = sample(logits, batch.u[step], sampling.temperature)
            batch.tokens[step] = batch.last[:, 0]
            batch.logps[step] = logp[:, 0]
            last = step + 1 == sampling.max_tokens
            if not last and (step + 1) % CHECK_EVERY:
                continue
            for row in self._look(batch, step + 1, stops, last, progress):
                tally.end(requests[batch.index[row]])
            ended = [row for row, length in enumerate(batch.lens) if length]
            if len(ended) == len(batch.lens) or tally.enough:
                yield from self._finish(batch, ended, requests)
                return
            if len(ended) >= COMPACT_SHARE * len(batch.lens):
                yield from self._finish(batch, ended, requests)
                self._compact(batch, ended)

    def prefill(self, requests: Sequence[Request], max_tokens: int) -> tuple[Batch, Tensor]:
        """Runs the left-padded prompts; returns the batch and the [n, V] logits of their last tokens."""
        lens = [len(q.prompt) for q in requests]
        longest, n = max(lens), len(lens)
        ids = torch.tensor([[self.pad_token_id] * (longest - len(q.prompt)) + [*q.prompt] for q in requests])
        real = torch.arange(longest + max_tokens) >= longest - torch.tensor(lens)[:, None]
        positions = (real[:, :longest].cumsum(1) - 1).clamp_(min=0).to(self.device)
        mask = prefill_mask = None
        if not self.fast:
            cache = DynamicCache(config=self.model.config)
            mask = real.to(self.device)
            prefill_mask = mask[:, :longest]
        else:
            cache = Cache(layers=[FixedLayer(longest + max_tokens) for _ in self.layers])
            if min(lens) < longest:
                causal = torch.ones(longest, longest, dtype=torch.bool).tril()
                seen = causal & real[:, None, :longest] | torch.eye(longest, dtype=torch.bool)  # no empty rows
                prefill_mask = seen[:, None].to(self.device)
                mask = torch.zeros(real.shape, dtype=self.model.dtype).masked_fill_(~real, float("-inf"))
                mask = mask[:, None, None].to(self.device)
        logits = self.model(
            input_ids=ids.to(self.device),
            attention_mask=prefill_mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **self.last_only,
        ).logits[:, -1]
        batch = Batch(
            index=list(range(n)),
            cache=cache,
            mask=mask,
            positions=positions[:, -1:] + 1,
            u=torch.from_numpy(uniforms([q.seed for q in requests], max_tokens)).to(self.device),
            tokens=torch.zeros(max_tokens, n, dtype=torch.int64, device=self.device),
            logps=torch.zeros(max_tokens, n, dtype=torch.float32, device=self.device),
            lens=[0] * n,
            last=positions[:, -1:],
            width=longest,
        )
        return batch, logits

    def forward(self, batch: Batch) -> Tensor:
        """Feeds the last tokens; [n, V] logits."""
        batch.width += 1
        logits = self.model(
            input_ids=batch.last,
            attention_mask=None if batch.mask is None else batch.mask[..., : batch.width],
            position_ids=batch.positions,
            past_key_values=batch.cache,
            use_cache=True,
            **self.last_only,
        ).logits[:, -1]
        batch.positions += 1
        return logits

    def select(self, batch: Batch, rows: Tensor) -> None:
        """Puts the rows at `rows` [m] int64 into the places 0 .. m - 1, for a step of beam search.

        Only what `forward` reads moves, but for `batch.last`, which the caller sets.
        """
        batch.cache.reorder_cache(cast(torch.LongTensor, rows))
        batch.positions = batch.positions[rows]
        batch.mask = None if batch.mask is None else batch.mask[rows]

    def _look(self, batch: Batch, steps: int, stops: Tensor, last: bool, progress: Progress) -> list[int]:
        """Sets the lengths of the rows that have ended by `steps`, reports progress, and returns these rows."""
        first = (steps - 1) // CHECK_EVERY * CHECK_EVERY
        hits = stops[batch.tokens[first:steps]]  # [steps - first, n]
        found, at = hits.any(0).tolist(), hits.int().argmax(0).tolist()
        tokens, ended = 0, []
        for row, length in enumerate(batch.lens):
            if length:
                continue
            if found[row] or last:
                batch.lens[row] = first + at[row] + 1 if found[row] else steps
                ended.append(row)
            tokens += (batch.lens[row] or steps) - first
        progress(tokens, len(ended))
        return ended

    def _finish(
        self, batch: Batch, rows: list[int], requests: Sequence[Request]
    ) -> Iterator[tuple[int, list[int], list[float]]]:
        """Hands out the ended rows; RolloutError when a log-prob is not finite."""
        longest = max(batch.lens[row] for row in rows)
        columns = torch.tensor(rows, device=self.device)
        tokens = batch.tokens[:longest, columns].T.tolist()
        logps = batch.logps[:longest, columns].T.tolist()
        for row, ids, values in zip(rows, tokens, logps, strict=True):
            length = batch.lens[row]
            if not np.isfinite(values[:length]).all():
                raise RolloutError(
                    f"the policy's logits are not finite at prompt row {requests[batch.index[row]].row}; "
                    f"its weights (version {self.version}) have diverged"
                )
            yield batch.index[row], ids[:length], values[:length]

    def _compact(self, batch: Batch, ended: list[int]) -> None:
        """Moves the last live rows into the places of ended ones and drops the tail.

        Only as many rows move as there are holes, so that the cost is that of the rows dropped.
        """
        n = len(batch.lens) - len(ended)
        dead = set(ended)
        holes = [row for row in ended if row < n]
        movers = [row for row in range(n, len(batch.lens)) if row not in dead]
        order = list(range(n))
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        kept = torch.tensor(order, device=self.device)
        if self.fast:
            target, source = (torch.tensor(x, dtype=torch.int64, device=self.device) for x in (holes, movers))
            for layer in batch.cache.layers:
                layer.move(target, source, n)
        else:
            batch.cache.reorder_cache(kept)
        batch.index = [batch.index[row] for row in order]
        batch.lens = [batch.lens[row] for row in order]
        batch.positions = batch.positions[kept]
        batch.mask = None if batch.mask is None else batch.mask[kept]
        batch.u, batch.tokens, batch.logps = batch.u[:, kept], batch.tokens[:, kept], batch.logps[:, kept]
        batch.last = batch.last[kept]


@torch.no_grad()
def _copy(target: Tensor, name: str, tensor: Tensor, first: str) -> None:
    """Copies a tensor over its parameter; one of a further tied name must equal what came under the first."""
    if first == name:
        target.copy_(tensor)
    elif not torch.equal(target, tensor.to(target)):
        raise SyncError(f"{name}: tied to {first} here, but pushed with other values")
