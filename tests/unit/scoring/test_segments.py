"""Credit by segment: entropies against fp64 from whole logits, what is paid, the same on two ranks."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from launches import Launch
from loop_helpers import ROOT
from segment_worker import CUT, RESPONSES, rollout, scored
from transformers import AutoModelForCausalLM

from rto_fast.algo.credit import segment_credit, segment_ends
from rto_fast.config import RTOConfig
from rto_fast.contract import offsets
from rto_fast.errors import ConfigError


def entropies(path):
    """[R] fp64 of the distributions that the response tokens come from."""
    model, found = AutoModelForCausalLM.from_pretrained(path).double(), []
    drawn = rollout()
    for tokens, start in zip(drawn.sequences(), drawn.prompt_lens.tolist(), strict=True):
        with torch.no_grad():
            logp = model(tokens[None]).logits[0, start - 1 : -1].log_softmax(-1)
        found.append(-(logp.exp() * logp).sum(-1))
    return torch.cat(found)


def paid(dense, entropy):
    """The definition, response by response."""
    out = []
    for rewards, peaks in zip(dense.split(RESPONSES), entropy.split(RESPONSES), strict=True):
        segments = []
        for reward, peak in zip(rewards.tolist(), peaks.tolist(), strict=True):
            if not segments or peak > CUT:
                segments.append([])
            segments[-1].append(reward)
        out += [sum(s) / len(s) for s in segments for _ in s]
    return torch.tensor(out, dtype=torch.float64)


def test_by_hand():
    """Responses of 4, 0 and 2 tokens; the first token's own entropy ends nothing before it."""
    cu = offsets(torch.tensor([4, 0, 2]))
    entropy = torch.tensor([9.0, 0.1, 2.0, 0.0, 0.0, 1.0])
    ends = segment_ends(entropy, 1.0)
    assert ends.tolist() == [False, True, False, False, False, False]  # 1.0 is not above 1.0
    dense = torch.tensor([1.0, 3.0, -1.0, 0.0, 0.5, 1.5])
    assert segment_credit(dense, cu, ends).tolist() == [2.0, 2.0, -0.5, -0.5, 1.0, 1.0]
    assert segment_credit(dense, cu, torch.ones(6, dtype=torch.bool)).tolist() == dense.tolist()


def test_a_peak_at_a_responses_start_changes_nothing():
    cu, dense = offsets(torch.tensor([2, 2])), torch.tensor([1.0, 3.0, 5.0, 7.0])
    ends = segment_ends(torch.tensor([0.0, 0.0, 9.0, 0.0]), 1.0)
    assert segment_credit(dense, cu, ends).tolist() == [2.0, 2.0, 6.0, 6.0]


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"behaviour_logp": "sampler"}])
def test_the_rollouts_entropies_cut_and_each_token_gets_the_mean(settings, one_rank, tiny, tmp_path):
    config, scores, targets = scored(tiny, tmp_path / "run", credit="segment", **settings)
    expected = entropies(tiny.policy)
    torch.testing.assert_close(scores.entropy.double(), expected, rtol=1e-5, atol=1e-5)
    assert 0 < (expected > CUT).double().mean() < 1
    due = paid(targets.dense.double(), expected)
    ends = offsets(torch.tensor(RESPONSES))[1:][torch.tensor(RESPONSES) > 0] - 1
    due -= config.beta2 * targets.kl
    due[ends] += scores.score[torch.tensor(RESPONSES) > 0]
    torch.testing.assert_close(targets.rewards.double(), due, rtol=1e-5, atol=1e-6)


def test_other_credit_asks_for_no_entropies_and_the_log_probs_are_the_same(one_rank, tiny, tmp_path):
    _, with_them, _ = scored(tiny, tmp_path / "a", credit="segment")
    _, without, targets = scored(tiny, tmp_path / "b")
    assert without.entropy.numel() == 0
    for name in ("old_logp", "policy_logp", "ref_logp", "dpo_logp", "values", "score"):
        torch.testing.assert_close(getattr(with_them, name), getattr(without, name), rtol=1e-6, atol=1e-6)
    assert torch.equal(targets.dense, targets.dpo_reward)


def test_the_same_on_two_ranks(tiny, tmp_path):
    found = {}
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}.pt"
        args = [ROOT / "tests" / "segment_worker.py", json.dumps(dataclasses.asdict(tiny)), out]
        result = Launch(args, ranks=ranks, log=tmp_path / f"{ranks}.log").wait(200)
        assert result.returncode == 0, result.output
        found[ranks] = torch.load(out)
    for one, two in zip(found[1], found[2], strict=True):
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)


def test_a_negative_cut_is_refused():
    base = {"policy": "p", "dpo_model": "d", "reward_model": ("r",), "data": "x"}
    with pytest.raises(ConfigError, match="segment_entropy: must not be negative"):
        RTOConfig(**base, credit="segment", segment_entropy=-0.1).validate()
    with pytest.raises(ConfigError, match="credit: beta1 = 0 has no token rewards for 'segment'"):
        RTOConfig(**base, credit="segment", beta1=0.0).validate()
