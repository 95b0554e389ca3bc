"""Scores from a local reward model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rto_fast.contract import ResponseTexts, Rollout
from rto_fast.data.chat_template import ChatTemplate, Prompt
from rto_fast.models.packing import Placement
from rto_fast.scoring.reward_source import Model


@dataclass(frozen=True)
class OwnText:
    """A reward model's own way from a prompt and a response to tokens."""

    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    max_length: int
    """Positions of the model, tokens; longer text loses what stands before its end of turn. 0 = unlimited."""
    prompts: Sequence[Prompt]
    """The data's prompts by row, as strings or messages."""

    def encode(self, rows: Sequence[int], responses: Sequence[str]) -> tuple[list[Tensor], list[int]]:
        """(sequences of token ids, prompt lengths) of responses to the prompts at `rows`."""
        sequences, prompt_lens = [], []
        for row, response in zip(rows, responses, strict=True):
            head, tail = self.template.encode_pair(self.tokenizer, self.prompts[row], response)
            ids = head + tail
            if self.max_length and len(ids) > self.max_length:
                ids = [*ids[: self.max_length - 1], tail[-1]]
            sequences.append(torch.tensor(ids, dtype=torch.int64))
            prompt_lens.append(min(len(head), len(ids)))
        return sequences, prompt_lens


class ModelReward:
    """A local reward model, on the policy's tokens where the tokenizers agree, else on the text re-tokenised.

    It scores where it was trained to, at the end of turn: a response that was cut short gets one, for this model alone.
    """

    def __init__(
        self,
        name: str,
        model: Model,
        placement: Placement,
        end: int | None = None,
        max_length: int = 0,
        own_text: OwnText | None = None,
    ) -> None:
        """
        end: the template's end of turn, a token id.
        max_length: positions of the model, tokens; 0 = unlimited.
        own_text: how this model reads text, or None where the policy's tokens are its own.
        """
        self.name, self.model, self.placement, self.own_text = name, model, placement, own_text
        self.end, self.max_length = end, max_length

    @torch.no_grad()
    def score(self, rollout: Rollout, texts: ResponseTexts) -> Tensor:
        """[B] fp32: the model's normalised output at the last token of each sequence."""
        if self.own_text is not None:
            sequences, prompt_lens = self.own_text.encode(rollout.rows.tolist(), texts.responses)
        else:
            sequences, prompt_lens = self._ended(rollout), rollout.prompt_lens.tolist()
        out = torch.zeros(len(rollout))
        for index, batch in self.placement.micro(sequences, prompt_lens):
            values = self.model(batch, batch.last_positions)
            if index:
                out[torch.tensor(index)] = values.float().cpu()
        return out

    def _ended(self, rollout: Rollout) -> list[Tensor]:
        """The sequences, those that were cut short with an end of turn behind, or in place of what has no position."""
        if self.end is None:
            return rollout.sequences()
        end, limit = torch.tensor([self.end]), self.max_length
        return [
            torch.cat([s[: limit - 1] if limit and len(s) >= limit else s, end.to(s)]) if cut else s
            for s, cut in zip(rollout.sequences(), rollout.truncated.tolist(), strict=True)
        ]
