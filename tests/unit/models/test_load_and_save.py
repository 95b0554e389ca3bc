"""Loading and exporting: head names, missing heads, normalisation, the critic's start, other tokenizers."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from loop_helpers import save_llama, small_run, write_rows
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from rto_fast import build, distributed, trainer
from rto_fast.config import RTOConfig
from rto_fast.contract import Request, Rollout
from rto_fast.data.chat_template import load_template
from rto_fast.errors import ConfigError, DataError, RewardError, StorageError
from rto_fast.models import save
from rto_fast.models.attention import PACKED
from rto_fast.models.load import _load, check_reward_head, check_weights, load_policy, load_scalar, new_scalar
from rto_fast.models.packing import PackedBatch, Placement
from rto_fast.models.save import export, save_model
from rto_fast.supervised.reward_model import start_of

LOADING = {"dtype": torch.float32, "attention": PACKED, "argument": "reward_model"}
TOKENS = [torch.tensor([1, 9, 12, 30, 31]), torch.tensor([1, 40, 41])]


def copy_with(source: str, target: Path, **renamed: str | None) -> str:
    """The model at `source` with tensors renamed by prefix (None: left out)."""
    shutil.copytree(source, target)
    state = {}
    for name, tensor in load_file(target / "model.safetensors").items():
        new = next((r and name.replace(p, r) for p, r in renamed.items() if name.startswith(p + ".")), name)
        if new:
            state[new] = tensor
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)


def scores(model) -> torch.Tensor:
    batch = PackedBatch.make(TOKENS, [1, 1], torch.device("cpu"), "sdpa")
    with torch.no_grad():
        return model(batch, batch.last_positions)


def test_scores_are_normalised_by_the_stored_statistics(tiny):
    """(raw - mean) / std of transformers' own classifier at the last token."""
    raw = AutoModelForSequenceClassification.from_pretrained(tiny.reward, num_labels=1)
    with torch.no_grad():
        expected = torch.cat([raw.score(raw.model(t[None]).last_hidden_state[:, -1])[0] for t in TOKENS])
    config = json.loads((Path(tiny.reward) / "config.json").read_text())
    assert (config["mean"], config["std"]) == (0.3, 1.7)
    torch.testing.assert_close(scores(load_scalar(tiny.reward, **LOADING)), (expected - 0.3) / 1.7)


def test_openrlhfs_head_name(tiny, tmp_path):
    other = copy_with(tiny.reward, tmp_path / "value_head", score="value_head")
    assert torch.equal(scores(load_scalar(other, **LOADING)), scores(load_scalar(tiny.reward, **LOADING)))


def test_a_missing_head_is_an_error(tiny, tmp_path):
    headless = copy_with(tiny.reward, tmp_path / "headless", score=None)
    with pytest.raises(ConfigError, match=r"reward_model: .*headless.*no reward head.*score and value_head"):
        load_scalar(headless, **LOADING)


@pytest.mark.parametrize("value", [None, "0.3", True, float("nan")])
@pytest.mark.parametrize("name", ["mean", "std"])
def test_statistics_that_are_no_numbers(tiny, tmp_path, name, value):
    folder = tmp_path / "reward"
    shutil.copytree(tiny.reward, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {name: value}))
    for call in (lambda: check_reward_head(str(folder), "reward_model"), lambda: load_scalar(str(folder), **LOADING)):
        with pytest.raises(ConfigError, match=rf"reward_model: .* has {name} .* in its config.json, .*delete mean and"):
            call()


def test_a_reward_model_that_is_trained_on_keeps_its_head(tiny, capsys):
    """Its raw scores are those before; any other model gets a new head. Which one, is said."""
    loading = {"dtype": torch.float32, "attention": PACKED}
    kept, before = start_of(tiny.reward, loading), load_scalar(tiny.reward, **LOADING)
    assert torch.equal(kept.classifier.score.weight, before.classifier.score.weight)
    torch.testing.assert_close(scores(kept), scores(before) * before.std + before.mean)
    assert f"reward head: that of the reward model {tiny.reward}" in capsys.readouterr().out
    new = start_of(tiny.policy, loading)
    assert not torch.equal(new.classifier.score.weight, before.classifier.score.weight)
    assert f"reward head: a new one on {tiny.policy}" in capsys.readouterr().out


@pytest.mark.parametrize("whole", [True, False])
def test_adapters_beside_whole_weights_or_without_a_base_are_refused(tiny, tmp_path, whole):
    folder = tmp_path / "merged"
    shutil.copytree(tiny.policy, folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    if not whole:
        (folder / "config.json").unlink()
        (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    remedy = "delete the adapter's files" if whole else "set base_model_name_or_path"
    for load in (load_policy, load_scalar):
        with pytest.raises(ConfigError, match=rf"reward_model: '.*merged' .*{remedy}"):
            load(str(folder), **LOADING)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": ["x"]}', "\xff", "[" * 10**5]
)
def test_a_malformed_index(tiny, tmp_path, text):
    shutil.copytree(tiny.policy, tmp_path / "model")
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"policy: '.*index.json' is no readable index .*fetch the file again"):
        check_weights(str(tmp_path / "model"), "policy")


def test_a_language_model_is_no_reward_model(tiny):
    with pytest.raises(ConfigError, match="no reward head"):
        load_scalar(tiny.policy, **LOADING)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_dropout_is_off(tiny, tmp_path, family):
    """In training a policy gives the log-probs that it was scored with, dropout by modules (GPT-2) or functions."""
    from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"vocab_size": 87, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = {
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**sizes)),
        "gpt_neox": lambda: GPTNeoXForCausalLM(
            GPTNeoXConfig(**sizes, intermediate_size=64, attention_dropout=0.5, hidden_dropout=0.5)
        ),
    }[family]()
    model.save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path), **LOADING)
    batch = PackedBatch.make(TOKENS, [1, 1], torch.device("cpu"), "sdpa")
    with torch.no_grad():
        trained, scored = (policy.train(mode)(batch)[0] for mode in (True, False))
    assert torch.equal(trained, scored)


def run_with(tiny, folder, **settings):
    return build.build(RTOConfig(**small_run(tiny, folder, prompt_key="prompt", **settings)))


def test_critic_starts_from_the_reward_model_in_its_units(one_rank, tiny, tmp_path, capsys):
    run = run_with(tiny, tmp_path / "run")
    assert f"critic: starts from the reward model {tiny.reward}" in capsys.readouterr().out
    assert torch.equal(scores(run.critic.model), scores(load_scalar(tiny.reward, **LOADING)))


@pytest.mark.parametrize("source", ["model", "function"])
def test_critic_starts_from_the_policy_with_a_zero_head(one_rank, tiny, tmp_path, capsys, source):
    """Where it is asked for, and where no reward model is there."""
    rewards = tmp_path / "rewards.py"
    rewards.write_text("def length(prompts, responses):\n    return [float(len(r)) for r in responses]\n")
    function = {"reward_model": (), "reward_fn": (f"{rewards}:length",)}
    run = run_with(tiny, tmp_path / "run", **({"critic": "policy"} if source == "model" else function))
    assert f"the policy's backbone {tiny.policy} with a zero head" in capsys.readouterr().out
    assert scores(run.critic.model).abs().max() == 0
    backbone = load_file(Path(tiny.policy) / "model.safetensors")
    assert all((t == backbone[n]).all() for n, t in run.critic.weights() if n.startswith("model."))


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


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("stage", [2, 3])
def test_exports_load_where_they_should(tiny, tmp_path, tied, stage):
    """Policy in AutoModelForCausalLM with the trained model's log-probs, critic in its own class, tied or not."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.policy)
    ids = {n: getattr(tokenizer, n) for n in ("bos_token_id", "eos_token_id", "pad_token_id")}
    start = tmp_path / "start"
    save_llama(start, seed=1, vocab=len(tokenizer), ids=ids, tied=tied)
    tokenizer.save_pretrained(start)
    settings = small_run(tiny, tmp_path / "run", prompt_key="prompt", policy_lr=1e-2, zero_stage=stage, iterations=1)
    run = trainer.train(RTOConfig(**(settings | {"policy": str(start), "dpo_model": str(start)})))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "policy")
    assert exported.config.tie_word_embeddings is tied
    trained = dict(run.policy.weights())
    assert trained.keys() == dict(exported.named_parameters()).keys()
    first = AutoModelForCausalLM.from_pretrained(start)
    moved = 0
    for (name, tensor), before in zip(exported.named_parameters(), first.parameters(), strict=True):
        moved += int(not torch.equal(tensor, before))
        for key, own in run.policy.weights():
            if key == name:
                assert torch.equal(tensor, own), name
    assert moved > 0
    critic = load_scalar(str(tmp_path / "run" / "critic"), **LOADING)
    assert (critic.mean, critic.std) == (0.3, 1.7)


def with_generation_config(source: str, target: Path, **settings) -> str:
    shutil.copytree(source, target)
    path = target / "generation_config.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | settings))
    return str(target)


def test_sampling_settings_of_a_policy_that_samples_nothing_do_not_stop_its_export(tiny, tmp_path):
    """`do_sample: false` beside a temperature, as on the Hub: transformers loads it and refuses to save it."""
    path = with_generation_config(tiny.policy, tmp_path / "policy", do_sample=False, temperature=0.6, top_p=0.9)
    raw = AutoModelForCausalLM.from_pretrained(path)
    with pytest.raises(ValueError, match="temperature"):
        raw.save_pretrained(tmp_path / "raw")
    policy = load_policy(path, **LOADING)
    export(policy, tmp_path / "out", write=True)
    kept = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert kept.get("do_sample", False) is False
    assert not {"temperature", "top_p"} & kept.keys()
    assert kept["eos_token_id"] == raw.generation_config.eos_token_id


def test_what_cannot_be_exported_ends_a_run_before_its_first_step(one_rank, tiny, tmp_path, monkeypatch):
    """With nothing written: here a tokenizer that cannot be saved."""

    def refuse(*args, **kw):
        raise OSError("no such codec")

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", refuse)
    with pytest.raises(ConfigError, match="would write at its end cannot be written: no such codec"):
        run_with(tiny, tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()
    assert not list(tmp_path.glob("run/*.jsonl"))


def tiny_export(tiny, folder) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.policy)
    model = load_policy(tiny.policy, **LOADING)
    save_model(model, folder, tokenizer, load_template("plain", tokenizer), writes=True)


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_exported_files_have_the_umasks_mode(tiny, tmp_path, mask):
    before = os.umask(mask)
    try:
        tiny_export(tiny, tmp_path / "policy")
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "policy").iterdir()}
    assert "model.safetensors" in modes
    assert set(modes.values()) == {0o666 & ~mask}, modes


def test_an_export_appears_whole_or_not_at_all(tiny, tmp_path, monkeypatch):
    """What fails on the way leaves the export that was there, and nothing else."""
    tiny_export(tiny, tmp_path / "policy")
    (tmp_path / "policy" / "mark").touch()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(save, "save_tokenizer", full)
        for name in ("policy", "other"):
            with pytest.raises(
                StorageError, match=rf"{name} cannot be written: No space left.*was saved before is whole"
            ):
                tiny_export(tiny, tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]
    assert (tmp_path / "policy" / "mark").exists()
    tiny_export(tiny, tmp_path / "policy")
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]
    assert not (tmp_path / "policy" / "mark").exists()


def test_a_least_length_where_every_token_ends_is_refused(one_rank, tiny, tmp_path):
    policy = with_generation_config(tiny.policy, tmp_path / "policy", eos_token_id=list(range(87)))
    with pytest.raises(ConfigError, match="min_response_length: each of the model's 87 tokens ends a response"):
        run_with(tiny, tmp_path / "run", policy=policy, min_response_length=3)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("home", "ranks", "kind", "straight"),
    [
        ("device", 1, "cuda", True),
        ("device", 8, "cuda", True),
        ("host", 1, "cuda", False),
        ("rank 0", 8, "cuda", False),
        ("rank 0", 1, "cuda", True),
        ("device", 8, "cpu", False),
    ],
)
@pytest.mark.parametrize("loader", [load_policy, load_scalar, new_scalar])
def test_weights_are_read_past_the_host_where_they_stay_whole(tiny, monkeypatch, loader, home, ranks, kind, straight):
    asked = {}

    def from_pretrained(*_, **settings):
        asked.update(settings)
        raise OSError("seen")

    for auto in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        monkeypatch.setattr(auto, "from_pretrained", from_pretrained)
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    monkeypatch.setattr(distributed, "broadcast_object", lambda item: item)
    placement = Placement(torch.device(kind), "sdpa", lockstep=False, micro_tokens=100)
    with pytest.raises(ConfigError, match="does not load: seen"):
        loader(tiny.reward, placement=placement, home=home, **LOADING)
    assert asked.get("device_map") == ({"": torch.device("cuda")} if straight else None)


def test_transformers_reads_weights_straight_to_a_device(tiny):
    """On a device that is always there, and holds nothing."""
    model, _ = _load(
        AutoModelForCausalLM, tiny.policy, "policy", Placement(torch.device("meta"), "sdpa", False, 100), "device"
    )
    assert {p.device.type for p in model.parameters()} == {"meta"}
