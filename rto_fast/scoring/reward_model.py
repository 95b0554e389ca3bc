"""Scores from a local reward model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jinja2
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rto_fast import distributed
from rto_fast.contract import ResponseTexts, Rollout
from rto_fast.data.bounds import MESSAGE
from rto_fast.data.chat_template import ChatTemplate
from rto_fast.data.load import PromptData
from rto_fast.errors import DataError, RewardError, shown
from rto_fast.models.packing import Placement
from rto_fast.scoring.reward_source import TRIAL, Model

REFUSALS = (jinja2.TemplateError, TypeError, ValueError)
"""What a template raises on a conversation that it does not take."""


@dataclass(frozen=True)
class OwnText:
    """A reward model's own way from a prompt and a response to tokens."""

    path: str
    """Folder or Hub id of the model."""
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    max_length: int
    """Positions of the model, tokens; longer text loses what stands before its end of turn. 0 = unlimited."""
    prompts: PromptData

    def check(self, tokens: int) -> str:
        """Reads every prompt with a made-up answer, each rank a share; collective.

        Returns how many prompts leave less than `tokens` for a response, in words, or "". Raises DataError on all ranks
        for the first prompt that the template refuses, or that leaves no position for a response.
        """
        wrong, tight = [], 0
        for i in range(distributed.rank(), len(self.prompts), distributed.world_size()):
            head, message = self._try(i)
            if message:
                wrong.append((i, message))
                break
            tight += bool(self.max_length) and head + tokens > self.max_length
        found = distributed.gather_objects((wrong, tight))
        if first := min((w for part, _ in found for w in part), default=None):
            raise DataError(f"{self.prompts.at(first[0])}: {first[1]}")
        if not (short := sum(n for _, n in found)):
            return ""
        return (
            f"behind {short:,} of {len(self.prompts):,} prompts its {self.max_length} positions leave less than "
            f"{tokens} tokens for a response, and what is longer is cut"
        )

    def _try(self, index: int) -> tuple[int, str]:
        """(tokens of the prompt, what is wrong with it or "")."""
        prompt, reader = self.prompts.prompts[index], f"the chat template of the reward model {self.path!r}"
        try:
            head, _ = self.template.encode_pair(self.tokenizer, prompt, TRIAL)
        except REFUSALS as error:
            return 0, (
                f"{reader} refuses the prompt: {shown(error, MESSAGE)}; leave the row out, or use another reward model"
            )
        if self.max_length and len(head) + 2 > self.max_length:
            return 0, (
                f"its {len(head)} tokens leave the reward model {self.path!r} no room for a response in its "
                f"{self.max_length} positions; lower --max-prompt-length, or use another reward model"
            )
        try:
            if index == 0:
                self.template.encode_pair(self.tokenizer, prompt, "")
        except REFUSALS as error:
            return 0, f"{reader} refuses an empty answer: {shown(error, MESSAGE)}; use another reward model"
        return len(head), ""

    def encode(self, rows: Sequence[int], responses: Sequence[str]) -> tuple[list[Tensor], list[int]]:
        """(sequences of token ids, prompt lengths) of responses to the prompts at `rows`.

        Raises RewardError for a response that the template refuses.
        """
        sequences, prompt_lens = [], []
        for row, response in zip(rows, responses, strict=True):
            try:
                head, tail = self.template.encode_pair(self.tokenizer, self.prompts.prompts[row], response)
            except REFUSALS as error:
                raise RewardError(
                    f"reward model {self.path}, {self.prompts.at(row)}: its chat template refuses the response "
                    f"{shown(response, 80)!r}: {shown(error, MESSAGE)}"
                ) from error
            ids = head + tail
            if self.max_length and len(ids) > self.max_length:
                ids = [*ids[: self.max_length - 1], ids[-1]]
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
