"""Sampled responses token by token, as the report shows them."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from rto_fast.contract import ResponseTexts, Rollout, Scores, Targets
from rto_fast.data.tokenizer import token_texts
from rto_fast.runfiles import ReportSample


def report_samples(
    tokenizer: PreTrainedTokenizerBase,
    rollout: Rollout,
    scores: Scores,
    targets: Targets,
    texts: ResponseTexts,
    rows: Iterable[int],
    step: int,
) -> list[ReportSample]:
    """The sequences at `rows`, with reward, advantage (whitened), DPO reward, KL and value of each token."""
    mean, rstd = targets.whiten
    whitened = (targets.advantages - mean) * rstd
    columns = {
        "token_reward": targets.rewards,
        "advantage": whitened,
        "dpo_reward": targets.dpo_reward,
        "kl": targets.kl,
        "value": scores.values,
    }
    cu = rollout.cu_responses.tolist()
    responses = rollout.responses()
    return [
        ReportSample(
            prompt=texts.prompts[i],
            tokens=token_texts(tokenizer, responses[i].tolist()),
            **{name: values[cu[i] : cu[i + 1]].float().tolist() for name, values in columns.items()},
            score=float(scores.score[i]),
            truncated=bool(rollout.truncated[i]),
            step=step,
        )
        for i in rows
    ]
