"""Losses and gradients depend on neither the number of ranks, nor the micro-batch size, nor the ZeRO stage.

Gradients are compared, not weights: Adam's first step would blow up rounding where a gradient is near 0.
"""

from __future__ import annotations

import dataclasses
import json

import pytest
import token_truth
import torch
from invariance_worker import CASES, EMPTY, GUIDED, RESPONSES, SEQUENCES, guided_settings
from loop_helpers import ROOT, save_tagger
from objective_truth import relative, truth_loss
from reward_helpers import token_server
from transformers import AutoModelForCausalLM

from rto_fast.config import DPOConfig

pytestmark = pytest.mark.slow

OBJECTIVES = ("policy", "critic", "ptx", "prime", "online dpo", "sft", "rm", "q_rm", "dpo", *GUIDED)


BIAS = 0.625
"""Of the token classifier's head."""


@pytest.fixture(scope="module")
def tagger(tiny, tmp_path_factory) -> str:
    return save_tagger(tmp_path_factory.mktemp("tagger") / "model", tiny.reward, bias=BIAS)


@pytest.fixture(scope="module")
def measured(tiny, tagger, tmp_path_factory):
    """{ranks: {(stage, budget): {objective: (loss, gradients, micro-batches of rank 0)}, responses: iteration}}."""
    from launches import Launch

    folder, paths = tmp_path_factory.mktemp("invariance"), json.dumps(dataclasses.asdict(tiny))
    found = {}
    for ranks in (1, 2):
        target = folder / f"{ranks}.pt"
        worker = ROOT / "tests" / "invariance_worker.py"
        with token_server(lambda body: {"rewards": [[i / 8 for i in ids] for ids in body["token_ids"]]}) as server:
            running = Launch([worker, paths, tagger, server.url, target], ranks=ranks, log=folder / f"{ranks}.log")
            result = running.wait(400)
        assert result.returncode == 0, result.output
        found[ranks] = torch.load(target, weights_only=False)
    return found


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("stage", "budget"), CASES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_same_loss_and_gradients(measured, ranks, stage, budget, objective):
    """Against one rank, ZeRO-2, everything in one micro-batch."""
    loss, gradients, _ = measured[1][2, 4096][objective]
    other_loss, other, _ = measured[ranks][stage, budget][objective]
    assert other_loss == pytest.approx(loss, rel=2e-6, abs=2e-7)
    assert other.keys() == gradients.keys()
    scale = max(float(g.abs().max()) for g in gradients.values())
    assert scale > 0
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            other[name], gradient, rtol=2e-4, atol=2e-6 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("objective", GUIDED)
@pytest.mark.parametrize(("stage", "budget"), CASES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_guides_weights_are_the_formulas(measured, tiny, ranks, stage, budget, objective):
    """TGDPO and TIS-DPO on ranks that hold unequal shares, against fp64."""
    loss, gradients, rows = measured[ranks][stage, budget][objective]
    assert len(rows) > ranks
    config = DPOConfig(**guided_settings(dataclasses.asdict(tiny), objective))
    model, reference = (
        AutoModelForCausalLM.from_pretrained(p, dtype=torch.float64) for p in (tiny.policy, tiny.dpo_ref)
    )
    truth = truth_loss(objective, config, model, reference, rows, None)
    truth.backward()
    assert loss == pytest.approx(truth.item(), rel=2e-5)
    theirs = {name: p.grad for name, p in model.named_parameters()}
    assert gradients.keys() == theirs.keys()
    assert relative([gradients[name] for name in theirs], list(theirs.values())) < 1e-4


def test_the_micro_batches_did_differ(measured):
    """The comparison is of different work: one batch, several, and one a sequence, unequal on two ranks."""
    counts = [measured[1][2, budget]["policy"][2] for budget in (4096, 512, 1)]
    assert counts[0] == 1 < counts[1] < counts[2]
    assert measured[2][2, 1]["policy"][2] < counts[2]


@pytest.mark.parametrize("responses", RESPONSES)
def test_a_whole_iteration(measured, responses):
    """The same tokens sampled and the same figures, even where a rank has no response of its own."""
    (alone, figures), (shared, others) = (measured[ranks][responses] for ranks in (1, 2))
    assert len(alone) == responses
    for name in ("tokens", "prompt_lens", "response_lens", "truncated", "rows", "sample_index"):
        assert torch.equal(getattr(shared, name), getattr(alone, name)), name
    assert figures.keys() == others.keys()
    for name, value in figures.items():
        if not name.startswith(("sampler/", "sync/seconds")):  # differences of rounding, and time
            assert others[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


@pytest.fixture(scope="module")
def token_numbers(measured, tiny, tagger):
    """{responses: [R, K] fp64 of the sources' formulas}."""
    found = {}
    for responses in (1, SEQUENCES):
        drawn, *_ = measured[1]["token rewards", 2, responses]
        ids = drawn.responses()
        before, at = token_truth.numbers(drawn, tiny.reward)
        found[responses] = torch.stack([
            token_truth.logps(drawn, tiny.dpo_ref) - token_truth.logps(drawn, tiny.dpo),
            token_truth.endogenous(drawn, tiny.policy, 1.0), at, at - before,
            torch.cat([torch.arange(len(i)).double() / 7 for i in ids]), torch.cat(ids).double() / 8,
            token_truth.logps(drawn, tiny.dpo_ref) - token_truth.logps(drawn, tiny.policy),
            token_truth.endogenous(drawn, tiny.dpo, 1.0), token_truth.numbers(drawn, tagger, BIAS)[1],
        ], 1)  # fmt: skip
    return found


@pytest.mark.parametrize("responses", [1, SEQUENCES])
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_token_rewards_of_every_source(measured, token_numbers, ranks, stage, responses):
    """On any number of ranks, models whole or partitioned: those of fp64, of empty and truncated responses too."""
    drawn, numbers, dense = measured[ranks]["token rewards", stage, responses]
    if responses > 1:
        assert [i for i, n in enumerate(drawn.response_lens.tolist()) if n == 0] == [*EMPTY]
        assert 1 < drawn.truncated.sum() < SEQUENCES
    torch.testing.assert_close(numbers.double(), token_numbers[responses], rtol=2e-5, atol=5e-5)
    _, alone, paid = measured[1]["token rewards", 2, responses]
    torch.testing.assert_close(numbers, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dense, paid, rtol=1e-4, atol=1e-6)
