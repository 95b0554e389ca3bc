"""Sources of token rewards against independent fp64 calculations, alone and added up; refusals."""

from __future__ import annotations

import json
import math
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import token_truth
import torch
from loop_helpers import save_moved, save_tagger, small_run
from reward_helpers import columns_of, token_server
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rto_fast import build
from rto_fast.config import RTOConfig
from rto_fast.config.token_spec import TokenSpec
from rto_fast.contract import Request, ResponseTexts, Rollout
from rto_fast.data.tokenizer import token_texts
from rto_fast.errors import ConfigError, RewardError
from rto_fast.models.load import load_scalar
from rto_fast.scoring.score import score_rollout
from rto_fast.scoring.token_function import TokenFunction, offsets_of
from rto_fast.trainer import compute_targets, train

RESPONSES = (5, 0, 1, 12, 3)
TRUNCATED = [False, True, False, True, False]
CUT = sum(RESPONSES[:3])


@pytest.fixture(scope="module")
def other(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    save_moved(Path(tiny.policy), folder, seed=4, by=0.05)
    AutoTokenizer.from_pretrained(tiny.policy).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tagger(tiny, tmp_path_factory):
    return save_tagger(tmp_path_factory.mktemp("tagger") / "model", tiny.reward, bias=0.625)


def rollout() -> Rollout:
    generator = torch.Generator().manual_seed(3)
    draw = [torch.randint(4, 87, (n,), generator=generator).tolist() for n in RESPONSES]
    prompts = [tuple(torch.randint(4, 87, (n,), generator=generator).tolist()) for n in (1, 4, 2, 3, 7)]
    requests = [Request(p, i, i, 0, i) for i, p in enumerate(prompts)]
    return Rollout.from_lists(requests, draw, [[-1.0] * n for n in RESPONSES], TRUNCATED, version=0)


def scored(tiny, folder, **settings):
    """(config, tokens [R, K] of the sources, targets) of a fixed rollout in a run with these settings."""
    config = RTOConfig(**small_run(tiny, folder, score_tokens=24, **settings))
    run = build.build(config)
    drawn = rollout()
    scores, _ = score_rollout(drawn, run.texts(drawn), run.scorers, config, run.placement, lambda n: None)
    run.logger.close()
    return config, scores, compute_targets(drawn, scores, config, config.beta2)


def logps(path):
    return token_truth.logps(rollout(), path)


def numbers(path, bias=0.0):
    return token_truth.numbers(rollout(), path, bias)


def endogenous(path, alpha):
    return token_truth.endogenous(rollout(), path, alpha)


WRITTEN = """
def vowels(token_texts, offsets, responses, token_ids, prompts):
    assert len(token_texts) == len(offsets) == len(responses) == len(token_ids) == len(prompts)
    return [[float(sum(c in "aeiou" for c in t)) for t in texts] for texts in token_texts]
"""


@pytest.fixture
def vowels(tmp_path):
    (tmp_path / "vowels.py").write_text(WRITTEN)
    return f"{tmp_path / 'vowels.py'}:vowels"


def counted_vowels(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny.policy)
    texts = [t for r in rollout().responses() for t in token_texts(tokenizer, r.tolist())]
    return torch.tensor([float(sum(c in "aeiou" for c in t)) for t in texts], dtype=torch.float64)


@pytest.fixture(scope="module")
def cases(tiny, other, tagger):
    """Source -> its fp64 numbers."""
    before, at = numbers(tiny.reward)
    raw = AutoModelForSequenceClassification.from_pretrained(tiny.reward).config
    tagged = numbers(tiny.reward)[1] * raw.std + raw.mean + 0.625
    return {
        f"logratio:{other}": logps(other) - logps(tiny.policy),
        f"logratio:{other}:{tiny.dpo}": logps(other) - logps(tiny.dpo),
        f"logratio:{tiny.dpo}:reference": logps(tiny.dpo) - logps(tiny.policy),
        f"logratio:reference:{other}": logps(tiny.policy) - logps(other),
        "endogenous": endogenous(tiny.policy, 0.7),
        f"endogenous:{other}": endogenous(other, 0.7),
        f"scalar:{tiny.reward}": at,
        f"scalar-diff:{tiny.reward}": at - before,
        f"scalar:{tagger}": tagged,
    }


def test_every_source_gives_its_numbers(one_rank, tiny, cases, vowels, tmp_path):
    """All at once, packed, with empty and truncated responses; then scaled, clipped and added to the DPO model's."""
    cases = cases | {f"fn:{vowels}": counted_vowels(tiny)}
    weights = [1.0, -0.3, 0.5, 0.7, 0.02, 0.01, 2.0, -1.5, 0.25, 0.125]
    config, scores, targets = scored(
        tiny, tmp_path / "run", token_reward=("dpo", *cases), token_reward_weight=(0.8, *weights),
        token_reward_alpha=0.7, beta1=0.1, dpo_clip=0.06,
    )  # fmt: skip
    assert scores.tokens.shape == (sum(RESPONSES), len(cases))
    for i, (name, expected) in enumerate(cases.items()):
        torch.testing.assert_close(
            scores.tokens[:, i].double(), expected, rtol=2e-5, atol=2e-5, msg=lambda m, n=name: n + m
        )
    ratio = logps(tiny.dpo) - logps(tiny.policy)
    dense = (0.1 * 0.8 * ratio).clamp(-0.06, 0.06)
    for weight, expected in zip(weights, cases.values(), strict=True):
        dense += (0.1 * weight * expected).clamp(-0.06, 0.06)
    torch.testing.assert_close(targets.dense.double(), dense, rtol=1e-4, atol=1e-5)
    score_at_end = targets.rewards - targets.dense.float() + config.beta2 * targets.kl
    assert score_at_end[CUT : CUT + 11].abs().max() < 1e-6 < score_at_end[CUT + 11].abs()


def test_dpo_alone_keeps_its_bits(one_rank, tiny, tmp_path):
    """`dpo` is the default; a further source of weight 0 is not even loaded."""
    _, scores, targets = scored(tiny, tmp_path / "a")
    _, named, same = scored(
        tiny, tmp_path / "b", token_reward=("dpo", "scalar:/nowhere"), token_reward_weight=(1.0, 0.0)
    )
    assert scores.tokens.numel() == named.tokens.numel() == 0
    for name in ("rewards", "dense", "dpo_reward", "advantages", "returns"):
        assert torch.equal(getattr(targets, name), getattr(same, name)), name
    assert torch.equal(targets.dense, targets.dpo_reward)


def test_without_dpo_its_model_is_not_needed(one_rank, tiny, tmp_path):
    _, _, targets = scored(tiny, tmp_path / "run", dpo_model=(), token_reward=("endogenous",), beta1=0.01)
    assert targets.dpo_reward.abs().max() == 0 < targets.dense.abs().max()


@pytest.mark.parametrize(("weights", "pessimism"), [((), 0.5), ((1.3, -0.3), 0.0), ((0.2, 0.8), 1.5)])
def test_several_dpo_models(one_rank, tiny, other, tmp_path, weights, pessimism):
    _, _, targets = scored(
        tiny, tmp_path / "run", dpo_model=(tiny.dpo, other), dpo_weight=weights, dpo_pessimism=pessimism, dpo_clip=0.0,
        beta1=0.1,
    )  # fmt: skip
    base = logps(tiny.policy)
    ratios = [logps(p) - base for p in (tiny.dpo, other)]
    a, b = weights or (0.5, 0.5)
    expected = a * ratios[0] + b * ratios[1] - pessimism * (ratios[0] - ratios[1]).abs() / 2
    torch.testing.assert_close(targets.dpo_reward.double(), 0.1 * expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("credit", ["response", "shaped"])
def test_credit_moves_the_sum_of_all_sources(one_rank, tiny, other, tmp_path, credit):
    settings = {"token_reward": ("dpo", f"logratio:{other}"), "beta2": 0.0, "beta3": 0.0}
    _, _, plain = scored(tiny, tmp_path / "a", **settings)
    _, _, moved = scored(tiny, tmp_path / "b", credit=credit, **settings)
    whole, paid = plain.dense[CUT : CUT + 12], moved.rewards[CUT : CUT + 12]
    if credit == "response":
        assert paid[:-1].abs().max() == 0
        torch.testing.assert_close(paid[-1], whole.sum())
    else:
        torch.testing.assert_close(paid.sum(), torch.tensor(0.0), atol=1e-6, rtol=0)
        torch.testing.assert_close(paid[:-1], whole[:-1])


def test_a_server_gets_the_tokens(one_rank, tiny, tmp_path):
    with token_server(lambda body: {"rewards": body["token_ids"]}) as server:
        _, scores, _ = scored(tiny, tmp_path / "run", token_reward=(f"url:{server.url}",))
    assert scores.tokens[:, 0].tolist() == rollout().response_tokens.tolist()
    for body in server.bodies:
        assert set(body) == {"prompts", "responses", "token_ids", "token_texts", "offsets"}
        for text, spans, pieces in zip(body["responses"], body["offsets"], body["token_texts"], strict=True):
            assert len(spans) == len(pieces)
            assert all(a[1] == b[0] for a, b in pairwise(spans))
            assert not spans or spans[-1][1] == len(text)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"rewards": [1.0, 2.0]}, "no list of lists"),
        ({"rewards": [[1.0]] * 2}, "tokens and got 1 numbers"),
        ({"rewards": [["a"] * 3] * 2}, "no list of numbers|not a number|no flat list"),
        ({"rewards": []}, "0 rewards for 2 responses"),
        ({}, "answer is not"),
    ],
)
def test_a_server_that_answers_otherwise_ends_the_run_before_it_starts(one_rank, tiny, tmp_path, answer, message):
    expected = f"token_reward: tried on.*({message})"
    with token_server(lambda body: answer) as server, pytest.raises(ConfigError, match=expected):
        scored(tiny, tmp_path / "run", token_reward=(f"url:{server.url}",))
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [[0.0]] * len(token_ids)", "response 0 has 5 tokens and got 1 numbers"),
        ("return [0.0] * len(token_ids)", "response 0 got a float, not a list of 5 numbers"),
        ("return [['1'] * len(i) for i in token_ids]", "'1', which is not a number"),
        ("return [[None] * len(i) for i in token_ids]", "not a number"),
        ("return []", "must answer a list of 5 lists"),
        ("return 1 / 0", "raised ZeroDivisionError"),
        ("raise SystemExit", "raised SystemExit"),
    ],
)
def test_a_function_that_answers_otherwise(tiny, tmp_path, body, message):
    (tmp_path / "wrong.py").write_text(f"def wrong(token_ids):\n    {body}\n")
    tokenizer = AutoTokenizer.from_pretrained(tiny.policy)
    source = TokenFunction.load(f"{tmp_path / 'wrong.py'}:wrong", tokenizer, columns_of())
    drawn = rollout()
    texts = [tokenizer.decode(r, skip_special_tokens=True) for r in drawn.responses()]
    with pytest.raises(RewardError, match=message):
        source.score(drawn, ResponseTexts([""] * 5, texts, [[]] * 5), torch.zeros(0))


def test_nan_is_a_bad_step(one_rank, tiny, tmp_path):
    """Counted and skipped, as for rewards of whole responses."""
    (tmp_path / "nan.py").write_text("def nan(token_ids):\n    return [[float('nan')] * len(i) for i in token_ids]\n")
    run = train(RTOConfig(**small_run(tiny, tmp_path / "run", token_reward=("dpo", f"fn:{tmp_path / 'nan.py'}:nan"))))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["bad_steps"] for row in rows] == [1.0, 2.0]
    assert run.state.bad_steps == 2


def test_a_run_logs_each_source(one_rank, tiny, other, vowels, tmp_path):
    train(RTOConfig(**small_run(
        tiny, tmp_path / "run", token_reward=("dpo", f"logratio:{other}", f"logratio:{tiny.dpo_ref}", f"fn:{vowels}"),
    )))  # fmt: skip
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    for name in ("logratio0", "logratio1", "fn"):
        assert math.isfinite(row[f"token/{name}"])
        assert 0 <= row[f"token/{name}_clipped"] <= 1
    assert row["token/fn"] > 0
    assert row["reward/dense"] != row["reward/dpo"]


@pytest.mark.parametrize("text", ["a b , c", "Then it danced with the happy duck ."])
def test_offsets_are_places_in_the_text(tiny, text):
    tokenizer = AutoTokenizer.from_pretrained(tiny.policy)
    ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    spans = offsets_of(tokenizer, ids, text)
    assert "".join(text[a:b] for a, b in spans) == text
    assert spans[-1] == (len(text), len(text))
    special = set(tokenizer.all_special_ids)
    for i, (a, b), piece in zip(ids, spans, token_texts(tokenizer, ids), strict=True):
        assert text[a:b].strip() == ("" if i in special else piece.strip())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"token_reward": ("dpo", "guess")}, "token_reward: 'guess' is none of dpo, logratio"),
        ({"token_reward": ("logratio",)}, "token_reward: 'logratio' must be logratio:MODEL or"),
        ({"token_reward": ("logratio:a:b:c",)}, "must be logratio:MODEL"),
        ({"token_reward": ("scalar:",)}, "must be scalar:MODEL"),
        ({"token_reward": ()}, "token_reward: no source"),
        ({"token_reward": ("dpo", "dpo")}, "comes twice"),
        ({"token_reward": ("endogenous",), "token_reward_alpha": 0.0}, "token_reward_alpha: must be positive"),
        ({"token_reward": ("dpo", "endogenous"), "token_reward_weight": (1.0,)}, "1 weights for 2 sources"),
        ({"token_reward": ("endogenous",), "beta1": 0.0}, "beta1 = 0 pays no token rewards"),
        ({"token_reward_weight": (math.nan,)}, "token_reward_weight: must be finite, got nan"),
        ({"dpo_weight": (1.0, 2.0)}, "dpo_weight: 2 weights for 1 DPO models"),
        ({"dpo_pessimism": 1.0}, "dpo_pessimism: a deviation over DPO models needs at least 2"),
        ({"dpo_pessimism": -1.0, "dpo_model": ("a", "b")}, "dpo_pessimism: must not be negative"),
        ({"token_reward": ("fn:nowhere_at_all:f",)}, "token_reward: module 'nowhere_at_all'"),
        ({"token_reward": ("url:ftp://x",)}, "token_reward: 'ftp://x' must start with http"),
        ({"token_reward": ("scalar:/nowhere",)}, "token_reward: .*'/nowhere'"),
    ],
)
def test_contradictions_are_refused_before_anything_is_loaded(one_rank, tiny, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        build.build(RTOConfig(**small_run(tiny, tmp_path / "run", **settings)))
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_function_that_wants_what_is_not_there(one_rank, tiny, tmp_path):
    (tmp_path / "wants.py").write_text("def f(token_ids, answer):\n    return []\n\ndef g(x=1):\n    return []\n")
    for name, message in (("f", "wants 'answer', and there are prompts, responses"), ("g", "takes none of prompts")):
        with pytest.raises(ConfigError, match=message):
            TokenFunction.load(f"{tmp_path / 'wants.py'}:{name}", None, columns_of())


def test_models_with_other_tokens_or_heads_are_refused(one_rank, tiny, other, tmp_path):
    foreign = shutil.copytree(other, tmp_path / "foreign")
    path = foreign / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    words = tokenizer["model"]["vocab"]
    (a, i), (b, j) = list(words.items())[-2:]
    words[a], words[b] = j, i
    path.write_text(json.dumps(tokenizer))
    twice = shutil.copytree(tiny.reward, tmp_path / "twice")
    weights = load_file(twice / "model.safetensors")
    weights["score.weight"] = weights["score.weight"].repeat(2, 1)
    save_file(weights, twice / "model.safetensors", {"format": "pt"})
    for settings, message in (
        ({"token_reward": ("dpo", f"logratio:{foreign}")}, "token_reward: .*another tokenizer than the policy"),
        ({"dpo_model": (str(foreign),)}, "dpo_model: .*another tokenizer than the policy"),
        ({"token_reward": (f"scalar:{twice}",)}, "token_reward: .* gives 2 numbers a token, not one"),
        ({"token_reward": (f"scalar:{other}",)}, "token_reward: .* has no reward head"),
    ):
        with pytest.raises(ConfigError, match=message):
            build.build(RTOConfig(**small_run(tiny, tmp_path / "run", **settings)))


def test_a_path_as_text_is_one_model(tiny):
    """As it was before there could be several."""
    assert RTOConfig(dpo_model="a").dpo_model == ("a",)
    assert RTOConfig(dpo_model="").dpo_model == ()
    assert TokenSpec.parse("logratio:~/a:b").parts[0].startswith("/")


def test_a_token_classifier_is_read_with_its_bias(tagger, tiny):
    model = load_scalar(tagger, dtype=torch.float32, attention=None, argument="reward_model")
    assert model.classifier.score.bias.item() == 0.625


def test_functions_see_the_rows_that_their_prompts_come_from(one_rank, tiny, tmp_path):
    """Where rows before them were skipped, too; and what they say beside the score is logged."""
    rows = [json.loads(line) for line in Path(tiny.prompts).read_text().splitlines()]
    rows = [r | {"word": r["prompt"].split()[-1], "labels": i} for i, r in enumerate(rows)]
    rows[0]["prompt"] = rows[5]["prompt"] = "the " * 30  # longer than the limit
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "see.py").write_text(
        "def whole(prompts, responses, messages, token_ids, word):\n"
        "    assert all(m[-1]['content'].split()[-1] == w for m, w in zip(messages, word))\n"
        "    assert all(p.endswith(w) for p, w in zip(prompts, word))\n"
        "    return [(len(i), {'tokens': len(i)} | ({'even': 1} if len(i) % 2 == 0 else {})) for i in token_ids]\n"
        "def each(messages, token_ids, word):\n"
        "    assert all(m[-1]['content'].split()[-1] == w for m, w in zip(messages, word))\n"
        "    return [[float(len(w))] * len(i) for w, i in zip(word, token_ids)]\n"
    )
    name = f"{tmp_path / 'see.py'}:whole"
    with token_server(lambda body: {"rewards": body["token_ids"]}) as server:
        train(RTOConfig(**small_run(
            tiny, tmp_path / "run", data=str(tmp_path / "rows.jsonl"), overlong="skip", reward_model=(),
            reward_fn=(name,), token_reward=("dpo", f"fn:{tmp_path / 'see.py'}:each", f"url:{server.url}"),
        )))  # fmt: skip
    sent = {(p, label) for body in server.bodies for p, label in zip(body["prompts"], body["labels"], strict=True)}
    assert len(sent) > 8
    assert all(prompt.endswith(rows[label]["prompt"]) for prompt, label in sent)
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row[f"reward/{name}/tokens"] == row[f"reward/{name}"] == row["response/length"]
        assert row.get(f"reward/{name}/even", 1) == 1
        assert row["token/fn"] > 0


@pytest.mark.parametrize("flag", ["reward_fn", "token_reward"])
def test_a_column_that_is_not_there_ends_the_run_before_a_model_is_loaded(one_rank, tiny, tmp_path, flag, monkeypatch):
    (tmp_path / "wants.py").write_text("def f(token_ids, answer):\n    return []\n")
    name = f"{tmp_path / 'wants.py'}:f"
    monkeypatch.setattr(build, "load", None)
    message = f"{flag}: .*wants.py:f wants 'answer', and there are .* the data's columns prompt, each"
    with pytest.raises(ConfigError, match=message):
        build.build(
            RTOConfig(**small_run(tiny, tmp_path / "run", **{flag: (f"fn:{name}" if flag[0] == "t" else name,)}))
        )
    assert not (tmp_path / "run" / "run.json").exists()
