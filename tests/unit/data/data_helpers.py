"""Rows, files of them, and each stage's loading with few settings, for the tests of data sets."""

from __future__ import annotations

import json
from pathlib import Path

from rto_fast.config import PreferenceConfig, RTOConfig, SFTConfig
from rto_fast.data.load import load_preferences, load_prompts, load_sft

ROWS = [
    {"prompt": "Once there was a dog", "chosen": "who barked at the cat.", "rejected": "at the dog."},
    {"prompt": "Who barks?", "chosen": "A dog does.", "rejected": "A cat does, once upon a time."},
    {"prompt": "Who purrs?", "chosen": "A cat does.", "rejected": "Nobody."},
]


def write_jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def as_conversations(rows: list[dict]) -> list[dict]:
    """ultrafeedback_binarized's schema."""
    return [
        {
            "prompt": r["prompt"],
            "chosen": [turn("user", r["prompt"]), turn("assistant", r["chosen"])],
            "rejected": [turn("user", r["prompt"]), turn("assistant", r["rejected"])],
            "score_chosen": 8.0,
            "score_rejected": 3.0,
        }
        for r in rows
    ]


def preferences(data: str, tokenizer, template, **settings):
    settings = {"max_length": 200, "eval_fraction": 0.0} | settings
    return load_preferences(PreferenceConfig(data=data, model="m", **settings), tokenizer, template)[0]


def prompts(data: str, tokenizer, template, **settings):
    return load_prompts(RTOConfig(data=data, policy="m", **settings), tokenizer, template)


def sft(data: str, tokenizer, template, **settings):
    settings = {"max_length": 200, "eval_fraction": 0.0} | settings
    return load_sft(SFTConfig(data=data, model="m", **settings), tokenizer, template)[0]


def bad_file(tmp_path: Path, name: str, content: str | bytes) -> str:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return str(tmp_path / name)


GOOD = json.dumps(ROWS[0]) + "\n"


class Hub:
    """Stands for datasets.load_dataset where there is no network: some Hub ids are known, files go to the real one."""

    def __init__(self, known: dict, real):
        self.known, self.real, self.asked = known, real, []

    def __call__(self, name: str, split: str, **settings):
        if settings:
            return self.real(name, split=split, **settings)
        self.asked.append((name, split))
        if (name, split) not in self.known:
            raise ConnectionError(f"Couldn't reach {name!r} on the Hub")
        return self.known[name, split]
