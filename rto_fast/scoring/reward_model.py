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
    """Positions of the model, tokens; longer text loses its end. 0 = unlimited."""
    prompts: Sequence[Prompt]
    """The data's prompts by row, as strings or messages."""

    def encode(self, rows: Sequence[int], responses: Sequence[str]) -> tuple[list[Tensor], list[int]]:
        """(sequences of token ids, prompt lengths) of responses to the prompts at `rows`."""
        sequences, prompt_lens = [], []
        for row, response in zip(rows, responses, strict=True):
            head, tail = self.template.encode_pair(self.tokenizer, self.prompts[row], response)
            ids = torch.tensor((head + tail)[: self.max_length or None], dtype=torch.int64)
            sequences.append(ids)
            prompt_lens.append(min(len(head), ids.numel()))
        return sequences, prompt_lens


class ModelReward:
    """A local reward model, on the policy's tokens where the tokenizers agree, else on the text re-tokenised."""

    def __init__(
        self,
        name: str,
        model: Model,
        placement: Placement,
        own_text: OwnText | None = None,
    ) -> None:
        """own_text: how this model reads text, or None where the policy's tokens are its own."""
        self.name, self.model, self.placement, self.own_text = name, model, placement, own_text

    @torch.no_grad()
    def score(self, rollout: Rollout, texts: ResponseTexts) -> Tensor:
        """[B] fp32: the model's normalised output at the last token of each sequence."""
        sequences, prompt_lens = rollout.sequences(), rollout.prompt_lens.tolist()
        if self.own_text is not None:
            sequences, prompt_lens = self.own_text.encode(rollout.rows.tolist(), texts.responses)
        out = torch.zeros(len(rollout))
        for index, batch in self.placement.micro(sequences, prompt_lens):
            values = self.model(batch, batch.last_positions)
            if index:
                out[torch.tensor(index)] = values.float().cpu()
        return out
