"""An embedded task of readable English whose true token reward is known.

It is small enough to train on in seconds.

A prompt opens a story ("Once there was a proud fox near the garden."), a response tells it in a few sentences
of a small grammar. Some words earn +1 or -1, depending on the *content word* a little earlier (nouns, verbs,
adjectives and times count, function words do not). The rule, for response token t that is content word w:

    r_t = table[c, w]   c = the content word `lag` content words before w, the prompt's included
    r_t = 0             if the grammar does not allow w after token t - 1, if the pair (c, w) stood in this
                        response before, or if the response already has as many sentences as a story may

For each context word and each kind of word as many words earn +1 as -1, so the corpus has a mean reward near 0 at
every length. Longer answers than the corpus's, repetition and bare lists of words do not pay. Preferences are
Bradley-Terry on the sum over the response.

Nothing is downloaded: vocabulary, grammar and table are in this file and the seed. Rewards have no unit.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD, UNK = SPECIALS = ("<s>", "</s>", "<pad>", "<unk>")

CONTENT = {
    "HERO": "fox bear mouse owl cat frog",
    "FRIEND": "rabbit duck goat wolf deer snail",
    "PLACE": "river forest garden bridge village hill",
    "THING": "apple lamp key kite drum book",
    "LOOK": "red big tiny golden broken shiny",
    "MOOD": "happy proud tired calm brave sad",
    "MOVE": "walked ran jumped hopped crept hurried",
    "TAKE": "found lost carried hid painted wanted",
    "PLAY": "sang danced laughed waited slept cried",
    "TIME": "noon night dawn dusk sunrise sunset",
}
"""The kinds of content word; every kind has the same number of words."""

OPENINGS = (
    "Once there was a MOOD HERO .",
    "Once there was a MOOD HERO near the PLACE .",
    "One day a MOOD HERO MOVE to the PLACE .",
)
MIDDLES = (
    "It MOVE to the PLACE .",
    "There it TAKE a LOOK THING .",
    "A MOOD FRIEND PLAY near the PLACE .",
    "At TIME it TAKE the LOOK THING .",
    "The FRIEND MOVE over the PLACE and PLAY .",
    "Then it PLAY with the MOOD FRIEND .",
)
ENDINGS = (
    "In the end the HERO was MOOD .",
    "At TIME the HERO MOVE home .",
)

KIND = {word: kind for kind, words in CONTENT.items() for word in words.split()}
"""Content word -> its kind."""


def _kind(word: str) -> str:
    """The word's kind; a function word, full stop or special token is its own."""
    return KIND.get(word, word)


def _grammar_bigrams() -> frozenset[tuple[str, str]]:
    """Pairs of kinds that follow each other in some story."""
    pairs = set()
    for sentence in (*OPENINGS, *MIDDLES, *ENDINGS):
        kinds = sentence.split()
        pairs |= set(itertools.pairwise(kinds)) | {(".", kinds[0])}
    return frozenset(pairs)


GRAMMAR = _grammar_bigrams()


@dataclass(frozen=True)
class Difficulty:
    """How long and how sparse the credit is."""

    middles: tuple[int, int]
    """Fewest and most sentences before the ending: sets the length of a response."""
    lag: int
    """Content words from a rewarded word back to the one that decides its reward."""
    groups: int
    """Groups that the content words fall into: words of one group decide alike."""
    earning: int
    """Words of a kind that earn +1 after a given context, and as many that earn -1."""
    active: float
    """Share of (context, kind) combinations that have such words at all."""

    @property
    def max_sentences(self) -> int:
        """Sentences of a response at most; words of later ones earn nothing."""
        return self.middles[1] + 1


DIFFICULTIES = {
    "easy": Difficulty(middles=(1, 2), lag=1, groups=2, earning=2, active=1.0),
    "medium": Difficulty(middles=(2, 3), lag=1, groups=2, earning=1, active=1.0),
    "hard": Difficulty(middles=(3, 4), lag=2, groups=2, earning=1, active=0.5),
}


def _tokenizer() -> PreTrainedTokenizerFast:
    """Word-level: a word or a full stop is a token; decoded, words have one space between them, as in a text.

    Any sequence of ordinary tokens survives ids -> text -> ids, cut or not.
    """
    words = [w for s in (*OPENINGS, *MIDDLES, *ENDINGS) for w in s.split() if w not in CONTENT]
    vocabulary = dict.fromkeys((*SPECIALS, *words, *KIND))
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), behavior="removed", invert=True)
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )


def _reward_table(rng: random.Random, difficulty: Difficulty) -> dict[tuple[str, str], float]:
    """(context word, word) -> +1 or -1; pairs that are not there earn 0."""
    contexts = rng.sample(list(KIND), len(KIND))
    table: dict[tuple[str, str], float] = {}
    for group in range(difficulty.groups):
        for kind, words in CONTENT.items():
            if kind != "HERO" and rng.random() < difficulty.active:
                drawn = rng.sample(words.split(), 2 * difficulty.earning)
                for context in contexts[group :: difficulty.groups]:
                    table |= {(context, w): 1.0 for w in drawn[: difficulty.earning]}
                    table |= {(context, w): -1.0 for w in drawn[difficulty.earning :]}
    return table


POSITIONS = 128
"""Tokens that a model of the embedded tasks takes, unless more are asked for."""

HELD_OUT = 4
"""Where openings are split, one in so many is held out."""


def held_out(opening: str) -> bool:
    """Whether a split keeps this opening from training: by its SHA-256, the same for every seed."""
    return int.from_bytes(hashlib.sha256(opening.encode()).digest()[:8], "big") % HELD_OUT == 0


@dataclass(frozen=True)
class TinyTask:
    """One task: all share the grammar, the reward table is the seed's. Build it with `make_task`."""

    seed: int
    difficulty: Difficulty
    temperature: float
    """Bradley-Terry temperature: P(a preferred to b) = sigmoid((reward a - reward b) / temperature)."""
    table: dict[tuple[str, str], float]
    """(context word, word) -> reward."""
    tokenizer: PreTrainedTokenizerFast
    openings: Literal["all", "training", "held_out"] = "all"
    """Which openings prompts and texts have."""

    def _rng(self, purpose: str, seed: int) -> random.Random:
        return random.Random(f"{self.seed} {purpose} {seed}")

    def _opening(self, rng: random.Random) -> str:
        while True:
            opening = _fill(rng.choice(OPENINGS), rng)
            if self.openings == "all" or held_out(opening) == (self.openings == "held_out"):
                return opening

    def prompts(self, n: int, seed: int) -> list[dict[str, str]]:
        """n rows {prompt}, drawn with replacement."""
        rng = self._rng("prompts", seed)
        return [{"prompt": self._opening(rng)} for _ in range(n)]

    def texts(self, n: int, seed: int) -> list[dict[str, str]]:
        """n rows {prompt, response} of the SFT corpus, drawn from the grammar, blind to the reward."""
        rng = self._rng("texts", seed)
        rows = []
        for _ in range(n):
            prompt = self._opening(rng)
            hero = next(w for w in re.findall(r"\w+", prompt) if _kind(w) == "HERO")
            middles = [rng.choice(MIDDLES) for _ in range(rng.randint(*self.difficulty.middles))]
            sentences = (*middles, rng.choice(ENDINGS).replace("HERO", hero))
            rows.append({"prompt": prompt, "response": " ".join(_fill(s, rng) for s in sentences)})
        return rows

    def token_rewards(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> list[float]:
        """The truth: one reward for each response token, 0 for function words and special tokens.

        prompt_ids: with or without BOS; the response's first context words come from there.
        response_ids: with or without EOS; may be cut anywhere or empty.
        """
        tokens = self.tokenizer.convert_ids_to_tokens([int(i) for i in (*prompt_ids, *response_ids)])
        start, limit = len(prompt_ids), self.difficulty
        content: list[str] = []
        paid: set[tuple[str, str]] = set()
        rewards = []
        sentences = 0
        for t, word in enumerate(tokens):
            reward = 0.0
            if word in KIND:
                told = sentences < limit.max_sentences and (_kind(tokens[t - 1]), KIND[word]) in GRAMMAR
                if t >= start and told and len(content) >= limit.lag:
                    pair = (content[-limit.lag], word)
                    reward = 0.0 if pair in paid else self.table.get(pair, 0.0)
                    paid.add(pair)
                content.append(word)
            sentences += t >= start and word == "."
            rewards.append(reward)
        return rewards[start:]

    def true_reward(self, prompt: str, response: str) -> float:
        """Sum of the token rewards of a response given as text."""
        return sum(self.token_rewards(self.encode(prompt), self.encode(response)))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without BOS and EOS."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def preference(self, prompt: str, response_a: str, response_b: str, rng: random.Random) -> dict[str, str]:
        """A row {prompt, chosen, rejected}: Bradley-Terry. Raises ValueError on equal responses."""
        if response_a == response_b:
            raise ValueError(f"response_a, response_b: the same text, nothing to prefer: {response_a!r}")
        margin = self.true_reward(prompt, response_a) - self.true_reward(prompt, response_b)
        a_wins = rng.random() < (1 + math.tanh(margin / self.temperature / 2)) / 2
        chosen, rejected = (response_a, response_b) if a_wins else (response_b, response_a)
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}

    def save_model(self, folder: str | Path, seed: int, heads: int = 4, positions: int = POSITIONS) -> None:
        """As `save_llama`."""
        save_llama(self.tokenizer, folder, seed, heads, positions)


def save_llama(
    tokenizer: PreTrainedTokenizerFast, folder: str | Path, seed: int, heads: int = 4, positions: int = POSITIONS
) -> None:
    """Writes a random Llama (2 layers, 64 wide), the tokenizer and a generation_config to `folder`.

    The global random state of torch is left as it was.
    """
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        **ids,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, **ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _fill(sentence: str, rng: random.Random) -> str:
    """Replaces each kind in a template by one of its words, and writes it as text."""
    words = [rng.choice(CONTENT[w].split()) if w in CONTENT else w for w in sentence.split()]
    return " ".join(words).replace(" .", ".")


def make_task(
    seed: int, difficulty: Literal["easy", "medium", "hard"] = "medium", temperature: float = 1.0
) -> TinyTask:
    """The task of a seed. Raises ValueError on an unknown difficulty or a non-positive temperature."""
    if difficulty not in DIFFICULTIES:
        raise ValueError(f"difficulty: {difficulty!r} is not one of {', '.join(DIFFICULTIES)}")
    if temperature <= 0:
        raise ValueError(f"temperature: must be positive, got {temperature}")
    setting = DIFFICULTIES[difficulty]
    rng = random.Random(f"{seed} table")
    return TinyTask(seed, setting, temperature, _reward_table(rng, setting), _tokenizer())
