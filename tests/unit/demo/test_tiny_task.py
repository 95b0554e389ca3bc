"""The embedded task: readable text, a reward that follows its rule, and files that the pipeline takes."""

import dataclasses
import itertools
import random
import statistics

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rto_fast.demo.config import DemoConfig
from rto_fast.demo.tiny_task import CONTENT, DIFFICULTIES, GRAMMAR, KIND, make_task

SEED = 100


@pytest.fixture(scope="module", params=list(DIFFICULTIES))
def task(request):
    return make_task(SEED, request.param)


def rewards_by_the_rule(task, prompt, response):
    """The rule of the module's docstring, from words, in another way than the code's."""
    words = (prompt + " " + response).replace(".", " .").split()
    start = len(prompt.replace(".", " .").split())
    content = [t for t, w in enumerate(words) if w in KIND]
    first: dict[tuple[str, str], int] = {}
    out = [0.0] * len(words)
    for rank, t in enumerate(content):
        if t < start or rank < task.difficulty.lag:
            continue
        before, told = words[t - 1], words[start:t].count(".")
        if told < task.difficulty.max_sentences and (KIND.get(before, before), KIND[words[t]]) in GRAMMAR:
            pair = (words[content[rank - task.difficulty.lag]], words[t])
            if first.setdefault(pair, t) == t:
                out[t] = task.table.get(pair, 0.0)
    return out[start:]


def test_text_survives_tokenisation(task):
    tokenizer = task.tokenizer
    for row in task.texts(100, 0):
        text = row["prompt"] + " " + row["response"]
        assert tokenizer.decode(task.encode(text)) == text
        assert task.encode(text) == task.encode(row["prompt"]) + task.encode(row["response"])
        assert tokenizer.unk_token_id not in task.encode(text)
        assert "  " not in text
        assert " ." not in text
        assert text.endswith(".")


def test_any_cut_survives_decoding(task):
    ids = task.encode(task.texts(1, 3)[0]["response"])
    for n in range(len(ids) + 1):
        assert task.encode(task.tokenizer.decode(ids[:n])) == ids[:n]
    stop = [*ids, task.tokenizer.eos_token_id]
    assert task.encode(task.tokenizer.decode(stop, skip_special_tokens=True)) == ids


def test_any_order_of_words_survives_decoding(task):
    rng = random.Random(0)
    ordinary = [i for i in range(len(task.tokenizer)) if i not in task.tokenizer.all_special_ids]
    for _ in range(50):
        ids = rng.choices(ordinary, k=20)
        assert task.encode(task.tokenizer.decode(ids)) == ids


def test_rewards_follow_the_rule(task):
    rng = random.Random(1)
    for row in task.texts(100, 1):
        words = row["response"].replace(".", " .").split()
        shuffled = rng.sample(words, len(words))
        for response in (row["response"], " ".join(shuffled), " ".join(words + words)):
            got = task.token_rewards(task.encode(row["prompt"]), task.encode(response))
            assert got == rewards_by_the_rule(task, row["prompt"], response)
            assert task.true_reward(row["prompt"], response) == sum(got)


def test_special_tokens_change_nothing(task):
    row = task.texts(1, 2)[0]
    prompt, response = task.encode(row["prompt"]), task.encode(row["response"])
    bos, eos = task.tokenizer.bos_token_id, task.tokenizer.eos_token_id
    plain = task.token_rewards(prompt, response)
    assert task.token_rewards([bos, *prompt], torch.tensor([*response, eos])) == [*plain, 0.0]
    assert task.token_rewards([bos, *prompt], []) == []
    for n in range(len(response)):
        assert task.token_rewards(prompt, response[:n]) == plain[:n]


def test_length_repetition_and_lists_of_words_do_not_pay(task):
    sentence = "It walked to the river."
    once = task.true_reward("Once there was a sad fox.", f"{sentence} {sentence} {sentence}")
    assert once == task.true_reward("Once there was a sad fox.", " ".join([sentence] * 9))
    assert task.true_reward("Once there was a sad fox.", "river lamp red walked sang snail") == 0
    story = " ".join(["It walked to the river."] * task.difficulty.max_sentences)
    for row in task.texts(20, 5):
        longer = f"{story} {row['response']}"
        assert task.true_reward(row["prompt"], longer) == task.true_reward(row["prompt"], story)


def test_reward_is_sparse_signed_and_blind_to_length(task):
    rows = task.texts(1500, 4)
    tokens = [task.token_rewards(task.encode(r["prompt"]), task.encode(r["response"])) for r in rows]
    sums, lens = [sum(t) for t in tokens], [len(t) for t in tokens]
    flat = list(itertools.chain(*tokens))
    spread = statistics.stdev(sums)
    assert set(flat) == {-1.0, 0.0, 1.0}
    assert abs(statistics.mean(sums)) < 0.3 * spread
    assert abs(statistics.correlation(lens, sums)) < 0.15
    assert max(lens) + 1 <= DemoConfig.max_response_length, "the demo would cut the corpus's responses"


def test_share_of_earning_positions_falls_with_difficulty():
    shares = []
    for difficulty in DIFFICULTIES:
        task = make_task(SEED, difficulty)
        rows = task.texts(300, 0)
        tokens = [task.token_rewards(task.encode(r["prompt"]), task.encode(r["response"])) for r in rows]
        flat = list(itertools.chain(*tokens))
        shares.append(sum(r != 0 for r in flat) / len(flat))
    assert shares[0] > shares[1] > shares[2]
    assert abs(shares[1] - 1 / 8) < 0.02


def test_every_kind_has_as_many_words_and_none_twice():
    assert len({len(words.split()) for words in CONTENT.values()}) == 1
    assert len(KIND) == sum(len(words.split()) for words in CONTENT.values())


def test_table_is_balanced(task):
    for context in ("fox", "river", "red"):
        for words in CONTENT.values():
            assert sum(task.table.get((context, w), 0.0) for w in words.split()) == 0


def test_words_of_a_group_decide_alike(task):
    decides = {tuple(sorted((w, r) for (c, w), r in task.table.items() if c == context)) for context in KIND}
    assert len(decides) == task.difficulty.groups


def test_seeds_decide_everything():
    a, again, b = make_task(1), make_task(1), make_task(2)
    assert a.table == again.table != b.table
    assert a.texts(5, 0) == again.texts(5, 0) != a.texts(5, 1)
    assert a.prompts(5, 0) == again.prompts(5, 0) != a.prompts(5, 1)
    assert a.texts(5, 0) != b.texts(5, 0)
    assert a.texts(9, 0)[:5] == a.texts(5, 0)


def test_openings_are_split_in_two_and_all_by_default():
    task = make_task(SEED)
    parts = {o: dataclasses.replace(task, openings=o) for o in ("training", "held_out")}
    openings = {o: {r["prompt"] for r in t.prompts(1500, 0) + t.texts(1500, 1)} for o, t in parts.items()}
    assert not openings["training"] & openings["held_out"]
    assert 0.18 < len(openings["held_out"]) / len(openings["training"] | openings["held_out"]) < 0.32
    both = {r["prompt"] for r in task.prompts(1500, 0)}
    assert both & openings["training"], "the demo draws from both"
    assert both & openings["held_out"], "the demo draws from both"


def test_preferences_are_bradley_terry():
    task = make_task(SEED)
    rows = task.texts(200, 0)
    prompt = rows[0]["prompt"]
    reward = {r["response"]: task.true_reward(prompt, r["response"]) for r in rows}
    a = next(x for x, r in reward.items() if r == 1)
    b = next(x for x, r in reward.items() if r == 0)
    rng = random.Random(0)
    wins = sum(task.preference(prompt, a, b, rng)["chosen"] == a for _ in range(2000)) / 2000
    assert abs(wins - 0.731) < 0.04
    sharp = dataclasses.replace(task, temperature=0.01)
    assert sharp.preference(prompt, b, a, rng) == {"prompt": prompt, "chosen": a, "rejected": b}
    far = dataclasses.replace(task, temperature=1e-6)
    assert far.preference(prompt, b, a, rng)["chosen"] == a
    with pytest.raises(ValueError, match="response_a, response_b"):
        task.preference(prompt, a, a, rng)


def test_saved_model_is_a_hugging_face_folder(tmp_path):
    task = make_task(SEED)
    before = torch.get_rng_state()
    task.save_model(tmp_path / "a", seed=3)
    assert torch.equal(before, torch.get_rng_state())
    task.save_model(tmp_path / "b", seed=3)
    task.save_model(tmp_path / "c", seed=4)
    a, b, c = (AutoModelForCausalLM.from_pretrained(tmp_path / x) for x in "abc")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert a.config.vocab_size == len(tokenizer) == len(task.tokenizer)
    assert a.generation_config.eos_token_id == tokenizer.eos_token_id == task.tokenizer.eos_token_id
    assert tokenizer.chat_template is None
    assert {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} == {0, 1, 2}
    text = task.texts(1, 0)[0]["response"]
    assert tokenizer.encode(text, add_special_tokens=False) == task.encode(text)
    assert tokenizer.decode(task.encode(text)) == text
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"difficulty": "mild"}, "difficulty: 'mild'"), ({"temperature": 0}, "temperature")],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_task(0, **arguments)


def test_report_tokens_keep_the_words_apart():
    """This tokenizer's decoder writes the spaces; the report's tokens must add up to the text."""
    from rto_fast.data.tokenizer import token_texts

    tokenizer = make_task(0).tokenizer
    text = "The duck ran over the bridge and danced. Then it waited."
    assert "".join(token_texts(tokenizer, tokenizer.encode(text, add_special_tokens=False))) == text
