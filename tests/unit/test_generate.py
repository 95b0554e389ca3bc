"""Exports of a model's answers: the formats' schemas, resuming, decoding, and input that cannot work."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from loop_helpers import save_llama, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from rto_fast import generate as module
from rto_fast.errors import ConfigError
from rto_fast.generate import GenerateConfig, generate

STORIES = ["Once there was a proud fox.", "One day a sad bear ran to the hill.", "Once there was a calm owl."]


@pytest.fixture
def settings(tiny, tmp_path):
    rows = [{"instruction": s, "dataset": "helpful_base"} for s in STORIES]
    return {
        "model": tiny.policy, "data": write_rows(tmp_path / "data.jsonl", rows), "dtype": "fp32",
        "max_response_length": 12, "output": str(tmp_path / "out.json"), "format": "alpaca_eval", "chunk": 2,
    }  # fmt: skip


def made(settings, **more):
    return generate(GenerateConfig(**(settings | more))).read_text()


def test_alpaca_eval_format(settings, tmp_path):
    rows = json.loads(made(settings, generator="rto"))
    assert [r["instruction"] for r in rows] == STORIES
    assert all(set(r) == {"instruction", "output", "generator", "dataset"} for r in rows)
    assert {r["generator"] for r in rows} == {"rto"}
    assert {r["dataset"] for r in rows} == {"helpful_base"}
    assert all(r["output"] and "</s>" not in r["output"] for r in rows)
    assert not (tmp_path / "out.json.partial").exists()


def test_alpaca_eval_own_loader_takes_it(settings):
    utils = pytest.importorskip("alpaca_eval.utils", reason="alpaca_eval is not installed")
    made(settings)
    frame = utils.load_or_convert_to_dataframe(settings["output"])
    assert list(frame["instruction"]) == STORIES
    assert utils.get_generator_name(None, frame)


def test_arena_hard_version_0_1(settings, tmp_path):
    questions = [{"question_id": f"q{i}", "turns": [{"content": s}], "cluster": "x"} for i, s in enumerate(STORIES)]
    data = write_rows(tmp_path / "question.jsonl", questions)
    text = made(settings, format="arena_hard", data=data, output=str(tmp_path / "m.jsonl"), generator="rto")
    rows = [json.loads(line) for line in text.splitlines()]
    assert [r["question_id"] for r in rows] == ["q0", "q1", "q2"]
    for r in rows:
        assert set(r) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert r["model_id"] == "rto"
        (choice,) = r["choices"]
        (turn,) = choice["turns"]
        assert isinstance(turn["content"], str)
        assert turn["token_len"] >= 1
    assert len({r["answer_id"] for r in rows}) == 3


def test_arena_hard_version_2(settings, tmp_path):
    questions = [{"uid": f"u{i}", "prompt": s, "category": "hard_prompt"} for i, s in enumerate(STORIES)]
    data = write_rows(tmp_path / "question.jsonl", questions)
    text = made(settings, format="arena_hard", data=data, output=str(tmp_path / "m.jsonl"))
    for r, s in zip(map(json.loads, text.splitlines()), STORIES, strict=True):
        assert set(r) == {"uid", "ans_id", "model", "messages", "tstamp", "metadata"}
        user, assistant = r["messages"]
        assert (user["role"], user["content"]) == ("user", s)
        assert assistant["role"] == "assistant"
        assert isinstance(assistant["content"]["answer"], str)


def test_jsonl_has_prompts_of_messages_too(settings, tmp_path):
    rows = [{"prompt": [{"role": "user", "content": s}]} for s in STORIES]
    data = write_rows(tmp_path / "chats.jsonl", rows)
    text = made(settings, format="jsonl", data=data, output=str(tmp_path / "x.jsonl"))
    found = [json.loads(line) for line in text.splitlines()]
    assert [r["row"] for r in found] == [0, 1, 2]
    assert [r["prompt"] for r in found] == STORIES
    assert all(r["tokens"] == 12 or not r["truncated"] for r in found)


def test_a_stopped_run_goes_on_to_the_same_file(settings, tmp_path, monkeypatch):
    whole = made(settings, output=str(tmp_path / "whole.json"))
    make, calls = module.make_engine, []

    def stopping(*args):
        engine = make(*args)
        sample = engine.generate

        def once(requests, sampling, progress):
            calls.append([r.row for r in requests])
            if len(calls) == 2:
                raise KeyboardInterrupt
            return sample(requests, sampling, progress)

        engine.generate = once
        return engine

    monkeypatch.setattr(module, "make_engine", stopping)
    with pytest.raises(KeyboardInterrupt):
        made(settings)
    assert not (tmp_path / "out.json").exists()
    with pytest.raises(ConfigError, match=r"other settings \(max_response_length\)"):
        made(settings, max_response_length=11)
    with (tmp_path / "out.json.partial").open("a") as file:
        file.write('{"text": "torn')
    assert made(settings) == whole
    assert calls == [[0, 1], [2], [2]]


def test_answers_do_not_depend_on_the_chunk_and_greedy_not_on_the_seed(settings, tmp_path):
    def outputs(name, **more):
        return [r["output"] for r in json.loads(made(settings, output=str(tmp_path / f"{name}.json"), **more))]

    assert outputs("a") == outputs("b", chunk=3)
    assert outputs("c", seed=1) != outputs("d", seed=2)
    assert outputs("e", seed=1, greedy=True) == outputs("f", seed=2, greedy=True)


def rows_of(settings, tmp_path, name, **more):
    text = made(settings, output=str(tmp_path / f"{name}.jsonl"), format="jsonl", **more)
    return [json.loads(line) for line in text.splitlines()]


def test_several_responses_to_each_prompt(settings, tmp_path, monkeypatch):
    """Each with a seed of its own: the first is that of a run with one; chunks cut anywhere."""
    single, several = (rows_of(settings, tmp_path, str(n), responses_per_prompt=n) for n in (1, 3))
    assert [(r["row"], r["response_index"]) for r in several] == [(i, j) for i in range(3) for j in range(3)]
    assert all("response_index" not in r for r in single)
    assert [r["response"] for r in several[::3]] == [r["response"] for r in single]
    assert all(len({r["response"] for r in several[i : i + 3]}) > 1 for i in (0, 3, 6))
    assert [r["prompt"] for r in several[::3]] == STORIES
    assert rows_of(settings, tmp_path, "chunk", responses_per_prompt=3, chunk=4) == several


def own_logps(path, prompt, ids):
    """Log-probs of a response's tokens, by transformers in fp64 at temperature 1."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    head = [tokenizer.bos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]
    with torch.no_grad():
        rows = torch.log_softmax(model(torch.tensor([[*head, *ids]])).logits[0], -1)
    return [float(rows[len(head) + t - 1, token]) for t, token in enumerate(ids)]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.6, "min_response_length": 4}, {"greedy": True}])
def test_token_log_probs_and_the_kl_to_a_reference(settings, tiny, tmp_path, sampling):
    """The model's own at temperature 1, however its tokens were sampled."""
    plain = rows_of(settings, tmp_path, "plain", **sampling)
    rows = rows_of(settings, tmp_path, "scored", reference=tiny.dpo, **sampling)
    added = {"token_ids", "logprobs", "ref_logprobs", "kl"}
    assert [{k: v for k, v in r.items() if k not in added} for r in rows] == plain
    tokenizer = AutoTokenizer.from_pretrained(tiny.policy)
    for r in rows:
        assert len(r["token_ids"]) == r["tokens"]
        assert tokenizer.decode(r["token_ids"], skip_special_tokens=True).strip() == r["response"]
        for name, path in (("logprobs", tiny.policy), ("ref_logprobs", tiny.dpo)):
            assert r[name] == pytest.approx(own_logps(path, r["prompt"], r["token_ids"]), abs=1e-4)
        assert r["kl"] == pytest.approx(sum(r["logprobs"]) - sum(r["ref_logprobs"]), abs=1e-5)
    assert any(abs(r["kl"]) > 0.01 for r in rows)
    alone = rows_of(settings, tmp_path, "alone", token_logprobs=True, **sampling)
    assert alone == [{k: v for k, v in r.items() if k not in ("ref_logprobs", "kl")} for r in rows]


def test_a_reference_with_other_tokens_is_refused(settings, tmp_path):
    other = tmp_path / "other"
    save_llama(other, seed=1, vocab=90, ids={"eos_token_id": 2})
    with pytest.raises(ConfigError, match=r"reference: '.*other' has a vocabulary of 90 tokens, the model's has 87"):
        rows_of(settings, tmp_path, "x", reference=str(other))


def ends_often(model: str, folder):
    """The model at a folder of its own, with half of its tokens as stop tokens."""
    shutil.copytree(model, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(0, 86, 2))}))
    return str(folder)


def test_no_answer_ends_before_its_least_length(settings, tmp_path):
    settings |= {"model": ends_often(settings["model"], tmp_path / "ends"), "format": "jsonl"}

    def tokens(name, **more):
        text = made(settings, output=str(tmp_path / name), **more)
        return [row["tokens"] for row in map(json.loads, text.splitlines())]

    free = tokens("free.jsonl")
    assert min(free) <= 7
    assert tokens("zero.jsonl", min_response_length=0) == free
    assert min(tokens("least.jsonl", min_response_length=7)) >= 8
    assert min(tokens("greedy.jsonl", min_response_length=7, greedy=True)) >= 8


def test_a_least_length_where_every_token_ends_is_refused(settings, tmp_path):
    model = tmp_path / "stops"
    shutil.copytree(settings["model"], model)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(87))}))
    message = "min_response_length: each of the model's 87 tokens ends a response, and before 3 tokens none may; use 0"
    with pytest.raises(ConfigError, match=message):
        made(settings, model=str(model), min_response_length=3)
    assert not (tmp_path / "out.json").exists()
    assert len(json.loads(made(settings, model=str(model)))) == 3


def test_beams_find_the_likeliest_responses_best_first(settings, tiny, tmp_path):
    """In any chunks; the first of three is that of one."""
    rows = rows_of(settings, tmp_path, "three", beams=8, responses_per_prompt=3, token_logprobs=True)
    totals = [sum(r["logprobs"]) for r in rows]
    assert all(totals[i] >= totals[i + 1] >= totals[i + 2] for i in (0, 3, 6))
    greedy = rows_of(settings, tmp_path, "greedy", greedy=True, token_logprobs=True)
    assert sum(totals[::3]) > sum(sum(r["logprobs"]) for r in greedy)
    for r in rows[:2]:
        assert r["logprobs"] == pytest.approx(own_logps(tiny.policy, r["prompt"], r["token_ids"]), abs=1e-4)
    assert rows_of(settings, tmp_path, "chunk", beams=8, responses_per_prompt=3, token_logprobs=True, chunk=4) == rows
    single = rows_of(settings, tmp_path, "one", beams=8)
    assert [r["response"] for r in single] == [r["response"] for r in rows[::3]]
    means = [
        [sum(r["logprobs"]) / r["tokens"] for r in rows_of(
            settings, tmp_path, f"penalty{p}", beams=8, length_penalty=p, token_logprobs=True)]
        for p in (0.0, 1.0)
    ]  # fmt: skip
    assert sum(means[1]) >= sum(means[0])


def test_a_guide_moves_the_model(settings, tiny, tmp_path):
    """Scale 1 without a reference of its own is the guide; the log-probs written are those that were drawn from."""
    guided = rows_of(settings, tmp_path, "guided", guide_model=tiny.dpo, reference=tiny.dpo)
    other = rows_of(settings | {"model": tiny.dpo}, tmp_path, "dpo")
    assert [r["response"] for r in guided] == [r["response"] for r in other]
    assert all(abs(r["kl"]) < 1e-3 for r in guided)
    plain = rows_of(settings, tmp_path, "plain")
    assert [r["response"] for r in guided] != [r["response"] for r in plain]
    off = rows_of(settings, tmp_path, "off", guide_model=tiny.dpo, guide_scale=0.0)
    assert off == plain
    far = rows_of(settings, tmp_path, "far", guide_model=tiny.dpo, guide_ref=tiny.policy, guide_scale=3.0, beams=2)
    assert [r["response"] for r in far] != [r["response"] for r in guided]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beams": -1}, "beams: must not be negative, got -1"),
        ({"beams": 2, "length_penalty": -1.0}, "length_penalty: must not be negative"),
        ({"length_penalty": 1.0}, "length_penalty: ranks beams; pass --beams too"),
        ({"beams": 2, "greedy": True}, "greedy: beams take the likeliest responses already"),
        ({"beams": 2, "temperature": 0.7}, "temperature: beams rank by log-probs at temperature 1, got 0.7"),
        ({"beams": 2, "responses_per_prompt": 3, "format": "jsonl"}, "responses_per_prompt: 2 beams end in that many"),
        ({"beams": 2, "rollout_engine": "vllm"}, "beams: vLLM cannot do it; use --rollout-engine transformers"),
        ({"guide_model": "x", "rollout_engine": "vllm"}, "guide_model: vLLM cannot do it"),
        ({"guide_ref": "x"}, "guide_ref: works on a guide; pass --guide-model too"),
        ({"guide_scale": 2.0}, "guide_scale: works on a guide"),
        ({"guide_model": "x", "guide_scale": float("nan")}, "guide_scale: must be a number, got nan"),
        ({"guide_model": "no/where/model"}, "guide_model: no model at"),
        ({"model": "no/where/model"}, "model: no model at"),
        ({"data": "missing.jsonl"}, "data: no file"),
        ({"prompt_key": "question"}, "has no column 'question'"),
        ({"format": "arena_hard", "output": "x.jsonl"}, "neither question_id nor uid"),
        ({"output": "x.txt"}, r"end in .json"),
        ({"temperature": 0.0}, "temperature: must be positive"),
        ({"max_response_length": 500}, "lower --max-response-length"),
        ({"responses_per_prompt": 0}, "responses_per_prompt: must be at least 1, got 0"),
        (
            {"responses_per_prompt": 2},
            "responses_per_prompt: alpaca_eval holds one answer a prompt; use --format jsonl",
        ),
        ({"token_logprobs": True}, "token_logprobs: alpaca_eval has no place for it; use --format jsonl"),
        ({"reference": "x"}, "reference: alpaca_eval has no place for it; use --format jsonl"),
        (
            {"format": "jsonl", "responses_per_prompt": 2, "greedy": True},
            "greedy: all 2 responses to a prompt would be the same",
        ),
        ({"format": "jsonl", "reference": "no/where/model"}, "reference: no model at"),
        ({"min_response_length": -1}, "min_response_length: must not be negative, got -1"),
        (
            {"min_response_length": 12},
            "min_response_length: 12 leaves no room for an end within max_response_length 12",
        ),
        ({"model": ""}, "model: missing"),
    ],
)
def test_input_that_cannot_work(change, message, settings, tmp_path):
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(ConfigError, match=message):
        made(settings, **change)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_rows_that_cannot_be_answered_are_named(settings, tmp_path):
    for rows, message in (
        ([{"prompt": "A fox."}, {"prompt": "  "}], "line 2: 'prompt' is empty"),
        (
            [{"turns": [{"content": "a"}, {"content": "b"}], "question_id": "q"}],
            "line 1: 'turns' must be a list of one",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            made(settings, data=write_rows(tmp_path / "bad.jsonl", rows), format="jsonl")


def test_a_kept_column_that_no_file_takes(settings, tmp_path):
    """Half a surrogate pair in a column that the answers' file repeats is refused before anything is sampled."""
    for format, column, key in (("alpaca_eval", "dataset", "instruction"), ("arena_hard", "uid", "prompt")):
        (tmp_path / "s.jsonl").write_text(json.dumps({key: "Who?", column: "a\ud800"}) + "\n")
        with pytest.raises(ConfigError, match=f"line 1: '{column}' holds .* half a character"):
            made(settings, data=str(tmp_path / "s.jsonl"), format=format)


@pytest.mark.slow
def test_command_line(settings, tmp_path, launch):
    """As a user starts it: a good run, then the same again, which must not overwrite the first."""
    flags = [f for k, v in settings.items() for f in (f"--{k.replace('_', '-')}", str(v))]
    first = launch(["-m", "rto_fast.generate", *flags])
    assert first.returncode == 0, first.output
    assert "3 answers" in first.output
    text = (tmp_path / "out.json").read_text()
    second = launch(["-m", "rto_fast.generate", *flags])
    assert second.returncode == 2
    assert "error: output: " in second.output
    assert (tmp_path / "out.json").read_text() == text
