"""The tilting oracle, against the exact optimum of a model whose every response can be enumerated."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from matplotlib import pyplot
from transformers import LlamaConfig, LlamaForCausalLM

from bench.claim import oracle, tilting
from bench.claim.report import draw_oracle
from bench.claim.tilting import Samples, at_kl, line, tilt
from rto_fast.errors import ConfigError

TOKENS, LENGTH, END, PROMPTS = 5, 4, 0, ((1, 2), (3, 4, 1))


def responses() -> list[tuple[int, ...]]:
    """Every response: ended by END, or cut at LENGTH."""
    found = [r for n in range(1, LENGTH + 1) for r in itertools.product(range(TOKENS), repeat=n)]
    return [r for r in found if END not in r[:-1] and (r[-1] == END or len(r) == LENGTH)]


def small_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=TOKENS, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2, initializer_range=0.5)  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


@torch.no_grad()
def log_probabilities(model: LlamaForCausalLM) -> torch.Tensor:
    """[P, N] of every response to each prompt, fp64."""
    rows = []
    for prompt in PROMPTS:
        row = []
        for r in responses():
            logits = model(torch.tensor([[*prompt, *r]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            row.append(logits.gather(-1, torch.tensor(r)[:, None]).sum())
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.fixture(scope="module")
def world() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs of two models, a reward and a truth that it only correlates with; all [P, N]."""
    sft, dpo = (log_probabilities(small_model(s)) for s in (0, 1))
    assert torch.allclose(sft.exp().sum(1), torch.ones(2, dtype=torch.float64)), "every response is there"
    generator = torch.Generator().manual_seed(0)
    reward, noise = (torch.randn(sft.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return sft, dpo, reward, 2 * reward + noise


def exact(sft: torch.Tensor, reward: torch.Tensor, truth: torch.Tensor, beta2: float) -> tuple[float, float]:
    """(KL, true reward) of the optimum, by its definition."""
    found = []
    for log_p, r, t in zip(sft, reward, truth, strict=True):
        weights = [math.exp(a + b / beta2) for a, b in zip(log_p.tolist(), r.tolist(), strict=True)]
        best = [w / sum(weights) for w in weights]
        kl = sum(q * (math.log(q) - a) for q, a in zip(best, log_p.tolist(), strict=True))
        found.append((kl, sum(q * x for q, x in zip(best, t.tolist(), strict=True))))
    return sum(k for k, _ in found) / len(found), sum(x for _, x in found) / len(found)


@pytest.mark.parametrize("beta2", [3.0, 1.0, 0.5, 0.3])
def test_every_response_once_gives_the_optimum(world, beta2):
    """Each counted as often as the SFT model draws it."""
    sft, _, reward, truth = world
    point = tilt(sft, reward, truth, beta2)
    assert (point.kl, point.true_reward) == pytest.approx(exact(sft, reward, truth, beta2), rel=1e-9)


def test_the_optimum_beats_every_other_model_at_its_penalty(world):
    """E[reward] - beta2 KL of the tilted model is above that of models beside it."""
    sft, dpo, reward, truth = world
    point = tilt(sft, reward, truth, 0.7)
    best = point.reward - 0.7 * point.kl
    for other in (sft, dpo, torch.log_softmax(sft + reward / 0.6, 1), torch.log_softmax(sft + reward / 0.8, 1)):
        value = (other.exp() * reward).sum(1).mean() - 0.7 * (other.exp() * (other - sft)).sum(1).mean()
        assert float(value) < best


def draw(sft: torch.Tensor, dpo: torch.Tensor, each: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(indices of responses, log of the SFT model's density over the mixture's); `each` of both models, [P, 2 each]."""
    generator = torch.Generator().manual_seed(1)
    index = torch.cat([torch.multinomial(m.exp(), each, True, generator=generator) for m in (sft, dpo)], dim=1)
    return index, (sft - torch.logaddexp(sft, dpo) + math.log(2)).gather(1, index)


@pytest.mark.parametrize("beta2", [3.0, 1.0, 0.5])
def test_samples_of_both_models_come_close_to_the_optimum(world, beta2):
    sft, dpo, reward, truth = world
    index, base = draw(sft, dpo, 20_000)
    point = tilt(base, reward.gather(1, index), truth.gather(1, index), beta2)
    kl, best = exact(sft, reward, truth, beta2)
    assert point.kl == pytest.approx(kl, abs=0.03 + 0.02 * kl)
    assert point.true_reward == pytest.approx(best, abs=0.06)
    unweighted = tilt(torch.zeros_like(base), reward.gather(1, index), truth.gather(1, index), beta2)
    assert abs(unweighted.true_reward - best) > 0.06, "the mixture alone is not the SFT model"


def test_a_line_meets_its_kl_and_ends_where_samples_run_out(world):
    sft, dpo, reward, truth = world
    index, base = draw(sft, dpo, 100)
    samples = Samples(base, {"rm": reward.gather(1, index), "truth": truth.gather(1, index)})
    points = line(samples, "rm", grid=(0.25, 0.5, 1.0, 2.0, 30.0))
    assert points[0].kl == pytest.approx(0, abs=1e-12)
    assert [p.kl for p in points[1:4]] == pytest.approx([0.25, 0.5, 1.0], rel=1e-6)
    assert points[-1].kl < 30, "no tilt of 200 samples is 30 nats away"
    assert all(p.ess >= tilting.MIN_ESS for p in points)
    assert sorted(p.true_reward for p in points[:4]) == [p.true_reward for p in points[:4]]
    better = at_kl(base, truth.gather(1, index), truth.gather(1, index), 1.0)
    assert better.true_reward > points[3].true_reward, "nothing beats the truth at its own KL"


def test_effective_samples_of_equal_weights_are_all():
    base = torch.zeros(3, 50, dtype=torch.float64)
    assert tilt(base, torch.ones_like(base), base, 0.1).ess == pytest.approx(50)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"seeds": ()}, "seeds: at least one is needed"),
        (
            {"tasks": ("medium", "mediun")},
            "tasks: unknown mediun; choose from easy, medium, hard, whole, long, stories",
        ),
        ({"tasks": ("medium-few",)}, "tasks: unknown medium-few"),
        ({"prompts": 0}, "prompts: must be positive, got 0"),
        ({"each": -1}, "each: must be positive, got -1"),
    ],
)
def test_settings_that_cannot_work(setting, message):
    oracle.OracleConfig(tasks=("medium-250", "whole"), seeds=(3,)).validate()
    with pytest.raises(ConfigError, match=message):
        oracle.OracleConfig(**setting).validate()


def test_lines_of_seeds_are_averaged_as_far_as_all_go():
    def of(*truths: float) -> dict:
        return {"oracle": {n: [{"kl": float(i), "true_reward": t, "ess": 20.0 + i} for i, t in enumerate(truths)]
                           for n in tilting.REWARDS}}  # fmt: skip

    results = [of(0.0, 1.0, 2.0), of(1.0, 2.0)]
    lines = oracle.table(results, at=(1, 2)).splitlines()
    assert lines[2] == "| rm | 1.50 ± 6.35 (21) |  |", "2 nats is not reached by all"
    axis = pyplot.figure().add_subplot()
    draw_oracle(axis, results)
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axis.get_lines()}
    assert drawn["SFT, tilted by the RM"] == [[0.0, 0.5], [1.0, 1.5]]
    assert len(drawn) == len(axis.collections) == 3, "a band for each"
    draw_oracle(empty := pyplot.figure().add_subplot(), [])
    assert not empty.get_lines()
    pyplot.close("all")
