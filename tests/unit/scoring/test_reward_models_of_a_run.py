"""What a run's reward models read: the policy's tokens, or a text by a tokenizer of their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from loop_helpers import run_with, save_llama, write_rows
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from rto_fast import build
from rto_fast.contract import Request, Rollout
from rto_fast.errors import ConfigError, DataError, RewardError
from rto_fast.models.attention import PACKED

LOADING = {"dtype": torch.float32, "attention": PACKED, "argument": "reward_model"}


@pytest.fixture(scope="module")
def foreign(tiny, tmp_path_factory):
    """A reward model whose tokenizer has the same words in another order."""
    folder = tmp_path_factory.mktemp("foreign") / "reward"
    shutil.copytree(tiny.reward, folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    special = {t["content"] for t in tokenizer["added_tokens"]}
    words = [w for w in vocabulary if w not in special]
    ids = [vocabulary[w] for w in words]
    vocabulary.update(zip(words, reversed(ids), strict=True))
    path.write_text(json.dumps(tokenizer))
    return str(folder)


def test_a_reward_model_with_another_tokenizer_reads_the_text(one_rank, tiny, foreign, tmp_path, capsys):
    """Its scores are those of its own tokens; and the critic cannot start from it."""
    run = run_with(tiny, tmp_path / "run", reward_model=(foreign,))
    said = capsys.readouterr().out
    assert "with a zero head, since the reward model" in said
    assert f"reward model: {foreign} tokenises the texts anew, since the token" in said
    words = run.tokenizer.encode("Then it danced with the happy duck .", add_special_tokens=False)
    prompt = tuple(run.prompts.prompt_ids[0])
    rollout = Rollout.from_lists([Request(prompt, 0, 0, 0, 0)], [words], [[0.0] * len(words)], [False], version=0)
    (source,) = run.scorers.rewards
    own = AutoTokenizer.from_pretrained(foreign)
    text = f"{run.prompts.prompts[0]} {run.tokenizer.decode(words)}"
    ids = [own.bos_token_id, *own.encode(text, add_special_tokens=False), own.eos_token_id]
    raw = AutoModelForSequenceClassification.from_pretrained(foreign, num_labels=1)
    with torch.no_grad():
        expected = raw.score(raw.model(torch.tensor([ids])).last_hidden_state[:, -1])[0]
    torch.testing.assert_close(source.score(rollout, run.texts(rollout)), (expected - 0.3) / 1.7, rtol=1e-4, atol=1e-5)


def with_template(source: str, folder: Path, template: str, **settings) -> str:
    """A copy of a model with a chat template of its own; settings: of its config."""
    shutil.copytree(source, folder)
    (folder / "chat_template.jinja").write_text(template)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    return str(folder)


TURNS = "{% for m in messages %}{{ m.content }} {% endfor %}"
REFUSING = {
    "a system turn, which the policy's template has a place for": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        "{{ m.content }} {% endfor %}",
        r"line 2: the chat template of the reward model '.*' refuses the prompt: no system turn; leave the row out",
    ),
    "an answer behind a system turn": (
        "{% if messages[-1].role == 'assistant' and messages[0].role == 'system' %}{{ raise_exception('no answer') }}"
        "{% endif %}" + TURNS, r"line 2: the chat template of the reward model '.*' refuses the prompt: no answer; lea",
    ),
    "what is no text to it": (
        "{% if messages[0].role == 'system' %}{{ messages[0].content + 1 }}{% endif %}" + TURNS,
        r"line 2: the chat template of the reward model '.*' refuses the prompt: can only concatenate str",
    ),
    "an empty answer": (
        "{% for m in messages %}{% if not m.content %}{{ raise_exception('empty') }}{% endif %}{% endfor %}" + TURNS,
        r"line 1: the chat template of the reward model '.*' refuses an empty answer: empty; use",
    ),
}  # fmt: skip


@pytest.mark.parametrize("refused", REFUSING)
def test_a_prompt_that_the_reward_models_own_template_refuses_ends_the_run_before_it_starts(
    one_rank, tiny, foreign, tmp_path, monkeypatch, refused
):
    template, message = REFUSING[refused]
    reward = with_template(foreign, tmp_path / "reward", template)
    rows = [json.loads(line) for line in Path(tiny.prompts).read_text().splitlines()]
    turns = [{"role": "system", "content": rows[2]["prompt"]}, {"role": "user", "content": rows[1]["prompt"]}]
    data = write_rows(tmp_path / "d.jsonl", [rows[0], {"prompt": turns}])
    settings = {"data": data, "max_prompt_length": 60}
    with monkeypatch.context() as patched:
        patched.setattr(build, "load_policy", lambda *a, **k: pytest.fail("it loaded a model"))
        with pytest.raises(DataError, match=rf"data: '.*d.jsonl', {message}"):
            run_with(tiny, tmp_path / "run", **settings, reward_model=(reward,))
    assert not (tmp_path / "run").exists()
    run_with(tiny, tmp_path / "other", **settings, reward_model=(foreign,)).logger.close()


def test_a_prompt_that_leaves_a_reward_model_no_position_for_a_response_is_refused(
    one_rank, tiny, foreign, tmp_path, capsys
):
    """Its score would say nothing of the response. Where some room is left, it is said how many may be cut."""
    longest, second = (" ".join(["the"] * n) for n in (9, 3))
    data = write_rows(tmp_path / "d.jsonl", [{"prompt": second}, {"prompt": longest}])
    words = json.loads((Path(foreign) / "config.json").read_text())
    assert words["max_position_embeddings"] == 128
    template = "{{ bos_token }}" + TURNS
    settings = {"data": data, "overlong": "refuse"}
    tight = with_template(foreign, tmp_path / "tight", template, max_position_embeddings=11)
    room = (
        r"its 10 tokens leave the reward model '.*tight' no room for a response in its 11 positions; lower --max-prompt"
    )
    with pytest.raises(DataError, match=rf"data: '.*d.jsonl', line 2: {room}"):
        run_with(tiny, tmp_path / "run", **settings, reward_model=(tight,))
    some = with_template(foreign, tmp_path / "some", template, max_position_embeddings=13)
    run = run_with(tiny, tmp_path / "other", **settings, reward_model=(some,))
    run.logger.close()
    said = capsys.readouterr().out
    assert "; behind 2 of 2 prompts its 13 positions leave less than 12 tokens for a response" in said
    (source,) = run.scorers.rewards
    sequences, lens = source.own_text.encode([1, 0], ["happy happy happy happy", ""])
    assert [len(s) for s in sequences] == [13, 5]
    assert sequences[0][-1] == sequences[1][-1] == run.tokenizer.eos_token_id
    assert lens == [10, 4]


def test_an_answer_that_the_reward_models_template_refuses_in_mid_run_is_a_reward_error(
    one_rank, tiny, foreign, tmp_path
):
    template = "{% if 'duck' in messages[-1].content %}{{ raise_exception('no ducks') }}{% endif %}" + TURNS
    run = run_with(tiny, tmp_path / "run", reward_model=(with_template(foreign, tmp_path / "reward", template),))
    run.logger.close()
    with pytest.raises(
        RewardError,
        match=r"reward model .*reward, data: .*, line 1: its chat template refuses .*'a duck': no ducks",
    ):
        run.scorers.rewards[0].own_text.encode([0], ["a duck"])


@pytest.fixture(scope="module")
def cousin(tiny, tmp_path_factory):
    """A reward model whose tokenizer has a special token more, which nothing here uses, and pads."""
    folder = tmp_path_factory.mktemp("cousin") / "reward"
    shutil.copytree(tiny.reward, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.enable_padding(length=7)
    tokenizer.backend_tokenizer.add_special_tokens(["<|unused|>"])
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    # A row of the embedding for it.
    config = json.loads((folder / "config.json").read_text())
    state = load_file(folder / "model.safetensors")
    table = state["model.embed_tokens.weight"]
    state["model.embed_tokens.weight"] = torch.cat([table, torch.zeros(1, table.shape[1], dtype=table.dtype)])
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 1}))
    return str(folder)


@pytest.mark.parametrize("critic", ["auto", "reward"])
def test_unused_special_tokens_leave_a_reward_model_its_place(one_rank, tiny, cousin, tmp_path, capsys, critic):
    """As Llama-3.2's beside Llama-3: it reads the policy's tokens, and the critic starts from it."""
    run = run_with(tiny, tmp_path / "run", reward_model=(cousin,), critic=critic)
    said = capsys.readouterr().out
    assert f"critic: starts from the reward model {cousin}" in said
    assert f"reward model: {cousin} reads the policy's tokens" in said
    (source,) = run.scorers.rewards
    assert source.own_text is None


def test_a_reward_model_without_a_row_for_a_token_of_the_policy_reads_the_text(one_rank, tiny, cousin, tmp_path):
    """The policy may sample any of its tokens, those that nothing uses too."""
    policy = tmp_path / "policy"
    shutil.copytree(tiny.policy, policy)
    tokenizer = AutoTokenizer.from_pretrained(cousin)
    tokenizer.save_pretrained(policy)
    config = json.loads((Path(tiny.policy) / "config.json").read_text())
    ids = {n: getattr(tokenizer, n) for n in ("bos_token_id", "eos_token_id", "pad_token_id")}
    save_llama(policy, seed=1, vocab=config["vocab_size"] + 1, ids=ids, tied=True)
    with pytest.raises(ConfigError, match=r"another tokenizer than the policy \(the policy's tokens have ids up to"):
        run_with(
            tiny, tmp_path / "run", policy=str(policy), dpo_model=str(policy), critic="reward", reference=str(policy)
        )


@pytest.mark.parametrize("limit", [0, 11])
def test_a_reward_model_judges_a_cut_response_at_an_end_of_turn(one_rank, tiny, tmp_path, limit):
    """It gets one, for this model alone; where its positions end, in place of the last token."""
    run = run_with(tiny, tmp_path / "run")
    words = run.tokenizer.encode("Then it danced with the happy duck .", add_special_tokens=False)
    prompt = (1, 9, 12)
    requests = [Request(prompt, i, i, 0, 0) for i in range(3)]
    whole = [*words[:5], run.tokenizer.eos_token_id]
    responses = [whole, words, []]
    rollout = Rollout.from_lists(
        requests, responses, [[0.0] * len(r) for r in responses], [False, True, True], version=0
    )
    before = [s.tolist() for s in rollout.sequences()]
    (source,) = run.scorers.rewards
    source.max_length = limit
    assert len(prompt) + len(words) == 11
    got = source.score(rollout, run.texts(rollout))
    assert [s.tolist() for s in rollout.sequences()] == before  # the policy's tokens stay as sampled
    read = [[*prompt, *whole], [*prompt, *words[: limit - 4 if limit else None], run.tokenizer.eos_token_id]]
    read.append([*prompt, run.tokenizer.eos_token_id])
    raw = AutoModelForSequenceClassification.from_pretrained(tiny.reward, num_labels=1)
    with torch.no_grad():
        ends = [raw.score(raw.model(torch.tensor([ids])).last_hidden_state[:, -1])[0, 0] for ids in read]
    torch.testing.assert_close(got, (torch.stack(ends) - 0.3) / 1.7, rtol=1e-4, atol=1e-5)


def test_a_critic_from_a_reward_model_with_another_tokenizer_is_refused(one_rank, tiny, foreign, tmp_path):
    with pytest.raises(ConfigError, match=r"critic: .*another tokenizer"):
        run_with(tiny, tmp_path / "run", reward_model=(foreign,), critic="reward")
