"""The data that the stages of one RTO step hand on: packed tokens.

There is no padding anywhere.

Shape legend
    B   sequences (responses) in the batch
    N   tokens of all sequences, prompt and response, one after the other
    R   response tokens of all sequences, one after the other (R <= N)

A sequence is its prompt (at least one token) followed by its response (possibly empty). The log-prob, the
value and the rewards of response token t all belong to the *state before* it, so they are read from the
hidden state one position earlier (the prompt's last token for the response's first).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Request:
    """One response to sample. `seed` alone decides its randomness: never its rank, batch or neighbours."""

    prompt: tuple[int, ...]
    """Prompt token ids, at least one."""
    row: int
    """Row of the prompt data set, for reward sources that need the text."""
    sample_index: int
    """Index of this prompt draw in the whole run."""
    response_index: int
    """0 .. responses_per_prompt - 1."""
    seed: int
    """Non-negative, below 2**63."""


def offsets(lens: Tensor) -> Tensor:
    """[B] lengths -> [B + 1] int64 boundaries (cu_seqlens)."""
    return torch.cat([lens.new_zeros(1), lens.cumsum(0)]).to(torch.int64)


def ragged_arange(starts: Tensor, lens: Tensor) -> Tensor:
    """Concatenates arange(starts[i], starts[i] + lens[i]) over i: [B], [B] -> [sum lens] int64."""
    cu = offsets(lens)
    total = int(cu[-1])
    return torch.arange(total, device=lens.device) + torch.repeat_interleave(starts - cu[:-1], lens, output_size=total)


@dataclass(frozen=True)
class Rollout:
    """Sampled responses behind their prompts, on the CPU."""

    tokens: Tensor
    """[N] int64."""
    prompt_lens: Tensor
    """[B] int64, each >= 1."""
    response_lens: Tensor
    """[B] int64, each >= 0; a sampled end-of-sequence token belongs to the response."""
    truncated: Tensor
    """[B] bool: stopped by the length limit, not by a stop token."""
    sampler_logp: Tensor
    """[R] fp32: log-prob of each response token under the sampler, temperature included (nats). Where a response may
    not end yet (config.min_response_length) it is that among the tokens that do not stop."""
    rows: Tensor
    """[B] int64: row of the prompt data set."""
    sample_index: Tensor
    """[B] int64: index of the prompt draw in the whole run."""
    version: int
    """Version of the policy's weights that sampled this."""

    def __len__(self) -> int:
        return self.prompt_lens.numel()

    @property
    def seq_lens(self) -> Tensor:
        return self.prompt_lens + self.response_lens

    @property
    def cu_seqlens(self) -> Tensor:
        """[B + 1] boundaries of the sequences in `tokens`."""
        return offsets(self.seq_lens)

    @property
    def cu_responses(self) -> Tensor:
        """[B + 1] boundaries of the responses in any [R] tensor."""
        return offsets(self.response_lens)

    @property
    def response_tokens(self) -> Tensor:
        """[R] int64: the sampled tokens alone."""
        return self.tokens[self.state_positions + 1]

    @property
    def state_positions(self) -> Tensor:
        """[R] int64: index into `tokens` of the position that predicts each response token."""
        return ragged_arange(self.cu_seqlens[:-1] + self.prompt_lens - 1, self.response_lens)

    def sequences(self) -> list[Tensor]:
        """B tensors of token ids, prompt and response."""
        return list(self.tokens.split(self.seq_lens.tolist()))

    def responses(self) -> list[Tensor]:
        """B tensors of token ids, response only."""
        return list(self.response_tokens.split(self.response_lens.tolist()))

    def prompts(self) -> list[Tensor]:
        """B tensors of token ids, prompt only."""
        return [s[:p] for s, p in zip(self.sequences(), self.prompt_lens.tolist(), strict=True)]

    def select(self, index: Sequence[int] | Tensor) -> Rollout:
        """The sequences at `index`, in that order."""
        index = torch.as_tensor(index, dtype=torch.int64)
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("prompt_lens", "response_lens", "truncated", "rows", "sample_index"):
            fields[name] = fields[name][index]
        fields["tokens"] = self.tokens[ragged_arange(self.cu_seqlens[:-1][index], self.seq_lens[index])]
        fields["sampler_logp"] = self.sampler_logp[self.response_index(index)]
        return Rollout(**fields)

    def response_index(self, index: Sequence[int] | Tensor) -> Tensor:
        """Positions in any [R] tensor of the responses at `index`, in that order."""
        index = torch.as_tensor(index, dtype=torch.int64)
        return ragged_arange(self.cu_responses[:-1][index], self.response_lens[index])

    @staticmethod
    def cat(parts: Sequence[Rollout]) -> Rollout:
        """Concatenates rollouts of one version."""
        names = [f.name for f in dataclasses.fields(Rollout) if f.name != "version"]
        return Rollout(**{n: torch.cat([getattr(p, n) for p in parts]) for n in names}, version=parts[0].version)

    @staticmethod
    def from_lists(
        requests: Sequence[Request],
        responses: Sequence[Sequence[int]],
        logps: Sequence[Sequence[float]],
        truncated: Sequence[bool],
        version: int,
    ) -> Rollout:
        """Packs an engine's answers, in the order of the requests."""
        flat = [t for q, r in zip(requests, responses, strict=True) for t in (*q.prompt, *r)]
        return Rollout(
            tokens=torch.tensor(flat, dtype=torch.int64),
            prompt_lens=torch.tensor([len(q.prompt) for q in requests], dtype=torch.int64),
            response_lens=torch.tensor([len(r) for r in responses], dtype=torch.int64),
            truncated=torch.tensor(list(truncated), dtype=torch.bool),
            sampler_logp=torch.tensor([x for lp in logps for x in lp], dtype=torch.float32),
            rows=torch.tensor([q.row for q in requests], dtype=torch.int64),
            sample_index=torch.tensor([q.sample_index for q in requests], dtype=torch.int64),
            version=version,
        )


@dataclass(frozen=True)
class Scores:
    """What the frozen models and the models before the update say of a rollout; fp32, no gradient."""

    old_logp: Tensor
    """[R] policy before the update, at the sampling temperature (the PPO ratio's denominator). NaN where scoring
    leaves it to the update (config.scores_policy)."""
    policy_logp: Tensor
    """[R] behaviour policy at temperature 1 (the KL term)."""
    ref_logp: Tensor
    """[R] reference at temperature 1."""
    dpo_logp: Tensor
    """[R] DPO model at temperature 1; equal to dpo_ref_logp when beta1 = 0."""
    dpo_ref_logp: Tensor
    """[R] the DPO model's own reference; equal to ref_logp unless another model is given."""
    values: Tensor
    """[R] critic; 0 in a run without one."""
    bootstrap: Tensor
    """[B] value after the last token: the critic's where a truncated response is bootstrapped, else 0."""
    score: Tensor
    """[B] weighted sum of the reward sources."""
    tokens: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0, 0))
    """[R, K] what K sources of token rewards beside the DPO models say of each token, unscaled."""
    entropy: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))
    """[R] of the policy's distribution at temperature 1 that each token comes from, nats; empty unless credit goes by
    segments."""


@dataclass(frozen=True)
class Targets:
    """What PPO optimises against; fp32, no gradient."""

    rewards: Tensor
    """[R] token rewards (Eq. 4.7), the dense part paid where `credit` says."""
    dpo_reward: Tensor
    """[R] clip(beta1 * log(pi_dpo / pi_ref)) of each token."""
    dense: Tensor
    """[R] the sum of all sources of token rewards, each scaled and clipped, where each token earns it."""
    kl: Tensor
    """[R] log(pi / pi_ref), unscaled."""
    advantages: Tensor
    """[R] GAE or another estimate, not whitened."""
    returns: Tensor
    """[R] GAE + values; the reward still to come where there is no critic."""
    whiten: tuple[Tensor, Tensor]
    """(mean, rstd) of the advantages over the whole rollout; (0, 1) where the estimate is not whitened."""

    @property
    def mean_kl(self) -> float:
        """Mean KL of a token, nats."""
        return float(self.kl.sum()) / max(1, self.kl.numel())


@dataclass(frozen=True)
class ResponseTexts:
    """The texts of a rollout, in its order; each list has B entries."""

    prompts: list[str]
    """Prompt as rendered for the policy (chat template included)."""
    responses: list[str]
    """Response decoded without special tokens."""
    messages: list[list[dict]]
    """The prompt's messages, for sources with a chat template of their own."""
    token_ids: list[list[int]] = dataclasses.field(default_factory=list)
    """The response's tokens; empty where nobody reads them."""
    columns: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    """Columns of the prompts' rows that a reward wants."""

    def select(self, index: Sequence[int]) -> ResponseTexts:
        """The entries at `index`, in that order."""

        def some(entries: list[Any]) -> list[Any]:
            return [entries[i] for i in index] if entries else []

        return ResponseTexts(
            some(self.prompts), some(self.responses), some(self.messages), some(self.token_ids),
            {name: some(column) for name, column in self.columns.items()},
        )  # fmt: skip
