"""Beam search: the likeliest responses of a model, best first.

After each token the B likeliest prefixes of a prompt are kept. Under a DPO model a prefix's log-prob says what it has
earned and what is still to come (Rafailov et al., arXiv 2404.12358):

    sum_t log (pi_dpo / pi_ref)(y_t) = (sum_t r(y_t) + V*(prefix) - V*(prompt)) / beta

so a wider beam searches for a larger reward, without training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rto_fast.contract import Request, Rollout
from rto_fast.errors import RolloutError
from rto_fast.rollout.decoding import log_probs
from rto_fast.rollout.engine import Progress, Sampling, check_requests
from rto_fast.rollout.transformers_engine import TransformersEngine


@dataclass(frozen=True)
class Ended:
    """A response that is over."""

    score: float
    """Log-prob / length ** length_penalty."""
    tokens: list[int]
    logps: list[float]


def beam_search(
    engine: TransformersEngine,
    requests: Sequence[Request],
    sampling: Sampling,
    beams: int,
    length_penalty: float,
    progress: Progress = lambda tokens, ended: None,
) -> Rollout:
    """Each request's response is the `response_index`-th best of its prompt, ranked by log-prob / length ** penalty.

    Log-probs are those at temperature 1, whatever `sampling` says. Requests of one `sample_index` share a search.
    An ended response counts where it is among the `beams` best prefixes of its step, as in transformers.

    Raises what `RolloutEngine.generate` does, and RolloutError where a prompt has fewer responses than are asked for.
    """
    check_requests(
        requests, sampling, torn=engine.torn, asleep=engine.asleep, vocab=engine.vocab_size,
        positions=engine.max_positions,
    )  # fmt: skip
    asked: dict[int, list[Request]] = {}
    for request in requests:
        asked.setdefault(request.sample_index, []).append(request)
    prompts = [same[0] for same in asked.values()]
    found: dict[int, list[Ended]] = {}
    for index in engine.batches([len(q.prompt) for q in prompts], sampling.max_tokens, beams):
        group = [prompts[i] for i in index]
        with torch.inference_mode():
            ended = _search(engine, group, sampling, beams, length_penalty)
        for request, responses in zip(group, ended, strict=True):
            found[request.sample_index] = responses
            progress(sum(len(r.tokens) for r in responses), len(asked[request.sample_index]))
    picked = [_pick(found[q.sample_index], q, sampling) for q in requests]
    stop_ids = set(sampling.stop_ids)
    tokens = [r.tokens for r in picked]
    truncated = [r[-1] not in stop_ids for r in tokens]
    return Rollout.from_lists(requests, tokens, [r.logps for r in picked], truncated, engine.version)


def _pick(responses: Sequence[Ended], request: Request, sampling: Sampling) -> Ended:
    if request.response_index >= len(responses):
        tokens = f"{sampling.max_tokens} token" + "s" * (sampling.max_tokens > 1)
        raise RolloutError(
            f"row {request.row}: {len(responses)} responses of at most {tokens} exist, and the "
            f"{request.response_index + 1}th was asked for"
        )
    return responses[request.response_index]


def _search(
    engine: TransformersEngine, requests: Sequence[Request], sampling: Sampling, beams: int, power: float
) -> list[list[Ended]]:
    """The best responses of each request, at most `beams`, best first."""
    device, vocab = engine.device, engine.vocab_size
    stop_ids = torch.tensor([i for i in sampling.stop_ids if 0 <= i < vocab], dtype=torch.int64, device=device)
    ended: list[list[Ended]] = [[] for _ in requests]
    alive = list(range(len(requests)))  # requests still searched, in the order of the tensors' first dimension
    batch, logits = engine.prefill(requests, sampling.max_tokens)
    rows = torch.arange(len(alive), device=device).repeat_interleave(beams)
    engine.select(batch, rows)
    logits = logits[rows]
    total = torch.full((len(alive), beams), float("-inf"), dtype=torch.float64, device=device)
    total[:, 0] = 0  # the prompt itself; the other beams are empty as yet
    tokens = torch.zeros(len(alive), beams, 0, dtype=torch.int64, device=device)
    logps = torch.zeros(len(alive), beams, 0, device=device)
    width = min(beams * vocab, beams * (1 + len(stop_ids)))  # holds `beams` that do not stop
    for step in range(1, sampling.max_tokens + 1):
        if step > 1:
            logits = engine.forward(batch)
        if step <= sampling.min_tokens:
            logits = logits.index_fill(-1, stop_ids, float("-inf"))
        logp = log_probs(logits).view(len(alive), beams, vocab)
        total, best = (total[..., None] + logp).flatten(1).topk(width)
        _check_finite(total, requests, alive, engine.version)
        beam, token = best // vocab, best % vocab
        tokens = torch.cat([_taken(tokens, beam), token[..., None]], -1)
        logps = torch.cat([_taken(logps, beam), logp.flatten(1).gather(1, best)[..., None]], -1)
        stopped = torch.isin(token, stop_ids)
        over = stopped | (step == sampling.max_tokens)
        over[:, beams:] = False
        over &= total.isfinite()
        for i, k in over.nonzero().tolist():
            score = float(total[i, k]) / step**power
            ended[alive[i]].append(Ended(score, tokens[i, k].tolist(), logps[i, k].tolist()))
        for i in {i for i, _ in over.nonzero().tolist()}:
            ended[alive[i]] = sorted(ended[alive[i]], key=lambda r: -r.score)[:beams]
        if step == sampling.max_tokens:
            break
        total, order = total.masked_fill(stopped, float("-inf")).topk(beams)
        # Log-probs only fall, so no prefix can do better than its own at the greatest length.
        bound = (total[:, 0] / sampling.max_tokens**power).tolist()
        left = [
            i for i, r in enumerate(alive) if not (len(ended[r]) == beams and ended[r][-1].score >= bound[i])
            and bound[i] > float("-inf")
        ]  # fmt: skip
        if not left:
            break
        kept = torch.tensor(left, device=device)
        total, order, beam = total[kept], order[kept], beam[kept]
        tokens, logps = _taken(tokens[kept], order), _taken(logps[kept], order)
        rows = kept[:, None] * beams + beam.gather(1, order)
        batch.last = tokens[..., -1:].flatten(0, 1)
        engine.select(batch, rows.flatten())
        alive = [alive[i] for i in left]
    return ended


def _taken(values: Tensor, index: Tensor) -> Tensor:
    """[n, B, T], [n, K] -> [n, K, T]: the beams at `index`."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


def _check_finite(total: Tensor, requests: Sequence[Request], alive: Sequence[int], version: int) -> None:
    for i in total[:, 0].isnan().nonzero().flatten().tolist():
        raise RolloutError(
            f"the model's logits are not finite at prompt row {requests[alive[i]].row}; "
            f"its weights (version {version}) have diverged"
        )
