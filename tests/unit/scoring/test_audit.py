"""`rto-fast audit`: rewards and prefix differences against fp64 from whole logits, a run's own, and refusals."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from loop_helpers import save_llama, small_run, write_rows
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rto_fast.config import RTOConfig
from rto_fast.errors import ConfigError
from rto_fast.report.audit import correlation
from rto_fast.report.samples import read_samples
from rto_fast.scoring import audit as module
from rto_fast.scoring.audit import AuditConfig, show
from rto_fast.trainer import train

TEXTS = [
    {"prompt": "Once there was a calm owl.", "response": "It slept near the hill.", "score": 1.0},
    {"prompt": "Once there was a calm owl.", "response": "The sad bear ran home.", "score": 3.0},
    {"prompt": "One day a fox ran to the hill.", "response": "At dusk it crept to the river. It cried.", "score": 2.0},
]


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """Output folder of an iteration of RTO with four responses kept."""
    folder = tmp_path_factory.mktemp("runs") / "rto"
    train(RTOConfig(**small_run(tiny, folder, iterations=1, report_samples=16)))
    return folder


@pytest.fixture
def settings(tiny, tmp_path):
    return {
        "data": write_rows(tmp_path / "data.jsonl", TEXTS), "dpo_model": tiny.dpo, "reference": tiny.policy,
        "dtype": "fp32", "beta1": 0.2, "dpo_clip": 0.1, "output": str(tmp_path / "audit.json"), "score_tokens": 24,
    }  # fmt: skip


def ids_of(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny.policy)
    ids = [(tokenizer(r["prompt"])["input_ids"], tokenizer(" " + r["response"])["input_ids"]) for r in TEXTS]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return [([bos, *(i for i in p if i != bos)], [*(i for i in r if i != bos), eos]) for p, r in ids]


def ratios(tiny, sequences):
    """fp64 log-ratios of each response's tokens."""
    out = []
    for prompt, response in sequences:
        logps = []
        for path in (tiny.dpo, tiny.policy):
            model = AutoModelForCausalLM.from_pretrained(path).double()
            with torch.no_grad():
                logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            logps.append(logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0])
        out.append(logps[0] - logps[1])
    return out


def values(tiny, sequences):
    """fp64 numbers of the reward model before the response and behind each of its tokens."""
    model = AutoModelForSequenceClassification.from_pretrained(tiny.reward, num_labels=1).double()
    out = []
    for prompt, response in sequences:
        with torch.no_grad():
            raw = model.score(model.model(torch.tensor([prompt + response])).last_hidden_state[0])[:, 0]
        out.append(((raw - model.config.mean) / model.config.std)[len(prompt) - 1 :])
    return out


def test_a_file_of_responses_equals_fp64(one_rank, tiny, settings):
    found = show(AuditConfig(**settings, reward_model=tiny.reward))
    sequences = ids_of(tiny)
    rewards = [(0.2 * r).clamp(-0.1, 0.1) for r in ratios(tiny, sequences)]
    flat = torch.cat(rewards)
    assert (found.responses, found.tokens) == (3, flat.numel())
    assert 0 < found.clipped < 1
    assert found.clipped == pytest.approx(float((flat.abs() >= 0.1).double().mean()))
    ends = torch.stack([r[-1] for r in rewards])
    (special,) = [k for k in found.kinds if k.name == "special"]
    assert special.tokens == 3
    assert special.reward_share == pytest.approx(float(ends.abs().sum() / flat.abs().sum()), abs=1e-5)
    said = found.agreement
    sums, scores = [float(r.sum()) for r in rewards], [r["score"] for r in TEXTS]
    assert said.score == pytest.approx(correlation(list(zip(sums, scores, strict=True))), abs=1e-5)
    assert (abs(said.score_within_prompt), said.prompts) == (pytest.approx(1.0), 1)
    steps = torch.cat([v.diff() for v in values(tiny, sequences)])
    pairs = list(zip(flat.tolist(), steps.tolist(), strict=True))
    assert said.differences == pytest.approx(correlation(pairs), abs=1e-5)
    written = json.loads((module.Path(settings["output"])).read_text())
    assert written["agreement"]["differences"] == said.differences
    assert [k["name"] for k in written["kinds"]] == [k.name for k in found.kinds]


def test_rows_without_a_score_get_the_reward_models(one_rank, tiny, settings, tmp_path):
    data = write_rows(tmp_path / "bare.jsonl", [{k: v for k, v in r.items() if k != "score"} for r in TEXTS])
    found = show(AuditConfig(**settings | {"data": data}, reward_model=tiny.reward))
    sequences = ids_of(tiny)
    sums = [float((0.2 * r).clamp(-0.1, 0.1).sum()) for r in ratios(tiny, sequences)]
    ends = [float(v[-1]) for v in values(tiny, sequences)]
    assert found.agreement.score == pytest.approx(correlation(list(zip(sums, ends, strict=True))), abs=1e-5)
    assert show(AuditConfig(**settings | {"data": data})).agreement.score is None


def test_a_runs_samples_give_what_the_same_responses_give_as_a_file(one_rank, tiny, run, tmp_path, capsys):
    """Its rewards were clipped in the run; the file's are computed anew from token ids."""
    of_run = show(AuditConfig(run=str(run), reward_model=tiny.reward, dtype="fp32"))
    assert json.loads((run / "audit.json").read_text())["tokens"] == of_run.tokens
    assert "Token rewards by kind of token" in capsys.readouterr().out
    config = json.loads((run / "run.json").read_text())["config"]
    rows = [
        {"prompt": s.prompt, "response": "", "token_ids": s.token_ids, "score": s.score}
        for s in read_samples(run / "samples.jsonl")
    ]
    again = show(
        AuditConfig(
            data=write_rows(tmp_path / "same.jsonl", rows), dpo_model=config["dpo_model"][0],
            reference=config["policy"], beta1=config["beta1"], dpo_clip=config["dpo_clip"], dtype="fp32",
            reward_model=tiny.reward,
        )
    )  # fmt: skip
    assert again.clipped == pytest.approx(of_run.clipped)
    for ours, theirs in zip(again.kinds + again.places, of_run.kinds + of_run.places, strict=True):
        assert (ours.name, ours.tokens) == (theirs.name, theirs.tokens)
        assert ours.reward_share == pytest.approx(theirs.reward_share, abs=1e-5)
    for name in ("score", "differences", "differences_before_last"):
        assert getattr(again.agreement, name) == pytest.approx(getattr(of_run.agreement, name), abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ""}, "run: pass either --run"),
        ({"run": "x"}, "run: pass either --run"),
        ({"dpo_model": ""}, "dpo_model: missing"),
        ({"reference": ""}, "reference: missing"),
        ({"data": "", "run": "x"}, "dpo_model: the responses of --run have their token rewards"),
        ({"beta1": 0.0}, "beta1: must be positive"),
        ({"dpo_clip": -1.0}, "dpo_clip: must not be negative"),
        ({"max_rows": -1}, "max_rows: must not be negative"),
        ({"response_key": "answer"}, "no column 'answer'"),
        ({"score_key": "prompt"}, "'prompt' is 'Once there was a calm owl.', no number"),
        ({"output": "{data}/a.json"}, "output: .* is no folder"),
        ({"output": "."}, "output: . is no file"),
    ],
)
def test_settings_that_cannot_work(changes, message, settings, one_rank):
    changes = {k: v.format(**settings) if isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises(ConfigError, match=message):
        show(AuditConfig(**settings | changes))
    assert not module.Path(settings["output"]).exists()


@pytest.mark.parametrize("ids", ["x", [1, "a"], [1, 10_000], [True]])
def test_token_ids_that_are_none(ids, settings, tmp_path, one_rank):
    rows = write_rows(tmp_path / "ids.jsonl", [TEXTS[0], TEXTS[1] | {"token_ids": ids}])
    with pytest.raises(ConfigError, match="'token_ids' is no list of ids below"):
        show(AuditConfig(**settings | {"data": rows}))


def test_models_with_other_tokens_are_refused(tiny, settings, tmp_path, one_rank):
    save_llama(tmp_path / "other", seed=1, vocab=50, ids={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    with pytest.raises(ConfigError, match=r"reference: .* has a vocabulary of 50 tokens, the DPO model's has"):
        show(AuditConfig(**settings | {"reference": str(tmp_path / "other")}))
    with pytest.raises(ConfigError, match="reward_model"):
        show(AuditConfig(**settings, reward_model=tiny.policy))


def test_runs_that_cannot_be_audited(tiny, run, tmp_path, one_rank):
    with pytest.raises(ConfigError, match=r"holds no samples\.jsonl"):
        show(AuditConfig(run=str(tmp_path)))
    old = tmp_path / "old"
    old.mkdir()
    for name in ("samples.jsonl", "run.json"):
        shutil.copy(run / name, old)
    rows = [json.loads(line) for line in (old / "samples.jsonl").read_text().splitlines()]
    write_rows(old / "samples.jsonl", [{k: v for k, v in r.items() if not k.endswith("_ids")} for r in rows])
    with pytest.raises(ConfigError, match="row 1 has no token ids"):
        show(AuditConfig(run=str(old), reward_model=tiny.reward))
    assert math.isfinite(show(AuditConfig(run=str(old))).kinds[0].mean)
    write_rows(old / "samples.jsonl", [r | {"dpo_reward": [0.0] * len(r["tokens"])} for r in rows])
    with pytest.raises(ConfigError, match="holds no token reward other than 0"):
        show(AuditConfig(run=str(old)))
    (old / "run.json").write_text("[")
    with pytest.raises(ConfigError, match="cannot be read"):
        show(AuditConfig(run=str(old)))
