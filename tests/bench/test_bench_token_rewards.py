"""The measurements of token rewards: tables of known figures, and each part at toy size."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from recipe_helpers import needs_shared

from bench import token_rewards
from bench.token_rewards import Distillation, TokenRewardConfig, audit_table, distill_table, kept, main
from rto_fast.errors import ConfigError


def group(name: str, tokens: float, reward: float, clipped: float | None) -> dict:
    return {"name": name, "token_share": tokens, "reward_share": reward, "clipped": clipped}


def test_a_table_of_audits():
    agreement = {"score": 0.5, "score_within_prompt": None, "prompts": 12, "differences": -0.25,
                 "differences_before_last": 0.0}  # fmt: skip
    audits = {
        "SFT": {"kinds": [group("word start", 0.75, 0.5, None)], "places": [], "agreement": agreement},
        "RTO": {"kinds": [group("number", 0.5, 1.0, 0.125)], "places": [], "agreement": agreement},
    }
    lines = audit_table(audits).splitlines()
    assert lines[2] == "| word start | 75.0 % | 50.0 % |  |  |  |  |"
    assert lines[3] == "| number |  |  |  | 50.0 % | 100.0 % | 12.5 % |"
    assert [line.split(" | ")[1:] for line in lines[7:]] == [
        ["0.50", "0.50 |"], ["", " |"], ["12", "12 |"], ["-0.25", "-0.25 |"], ["0.00", "0.00 |"],
    ]  # fmt: skip


def test_a_table_of_students():
    lines = distill_table({"start": {"kl": 5.344}, "own": {"failed": "3 bad steps"}}).splitlines()
    assert lines[2:] == ["| start | 5.34 |", "| own | 3 bad steps |"]


def test_a_figure_is_made_once(tmp_path):
    made = [{"kl": 1.0}, {"kl": 2.0}]
    for _ in range(2):
        assert kept(tmp_path / "a.json", lambda: made.pop(0)) == {"kl": 1.0}
    assert made == [{"kl": 2.0}]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"parts": ("audit",)}, "parts: unknown audit; choose from audit-demo"),
        ({"parts": ()}, "parts: at least one is needed"),
        ({"each": 0}, "each: must be positive"),
        ({"own": ("1e-3", "fast")}, "own: 'fast' is neither a learning rate nor learning rate:gamma"),
        ({"own": ("1e-3:",)}, "own: '1e-3:' is neither"),
        ({"own": ("-1e-3",)}, "own: '-1e-3' is neither"),
        ({"own": ("1e-3:1.5",)}, "own: '1e-3:1.5' is neither"),
        ({"sft": (1e-3, 0.0)}, "sft: learning rates must be positive, got 0"),
    ],
)
def test_settings_that_cannot_work(setting, message):
    with pytest.raises(ConfigError, match=message):
        TokenRewardConfig(**setting).validate()


def test_parts_that_need_other_models_say_so(monkeypatch, tmp_path):
    monkeypatch.setattr(token_rewards, "PAIRS", tmp_path / "none.jsonl")
    TokenRewardConfig(parts=("audit-demo",)).validate()
    with pytest.raises(ConfigError, match=r"parts: audit-stories, distill need .*none.jsonl; pass --parts audit-demo"):
        TokenRewardConfig().validate()


def test_the_demos_audit(one_rank, tiny, tmp_path, monkeypatch):
    """Of small models in the demo's place, the first prompts alone; run again it audits nothing."""

    def run(demo):
        root = Path(demo.output_dir)
        for name, source in (("sft/model", tiny.policy), ("dpo/model", tiny.dpo), ("rm/model", tiny.reward)):
            shutil.copytree(source, root / name)
        shutil.copytree(tiny.dpo, root / "rto" / "policy")
        (root / "data").mkdir()
        shutil.copy(tiny.prompts, root / "data" / "prompts.jsonl")
        (root / "results.json").write_text("{}")

    monkeypatch.setattr(token_rewards.pipeline, "run", run)
    config = TokenRewardConfig(
        parts=("audit-demo",), runs=str(tmp_path), out=str(tmp_path / "out.json"), demo_prompts=3, each=2,
    )  # fmt: skip
    main(config)
    record = json.loads((tmp_path / "out.json").read_text())
    assert {name: audit["responses"] for name, audit in record["audit-demo"].items()} == {"SFT": 6, "RTO": 6}
    assert record["audit-demo"]["SFT"]["agreement"]["prompts"] == 3
    assert record["audit-demo"]["SFT"]["kinds"] != record["audit-demo"]["RTO"]["kinds"]
    monkeypatch.setattr(token_rewards, "generate", None)
    main(config)
    assert json.loads((tmp_path / "out.json").read_text()) == record
    with pytest.raises(ConfigError, match=r"runs: .*audit-demo holds figures of other sizes: demo_prompts=3 \(now 4\)"):
        main(dataclasses.replace(config, demo_prompts=4))
    assert json.loads((tmp_path / "out.json").read_text()) == record
    main(dataclasses.replace(config, story_tokens=7))  # of another part


@needs_shared
def test_more_openings_than_there_are_cannot_be_held_out(tmp_path):
    with pytest.raises(ConfigError, match=r"held_out: 100000 leaves none of the \d+ openings"):
        Distillation(TokenRewardConfig(held_out=100_000), tmp_path)


@needs_shared
@pytest.mark.slow
def test_the_stories_audit(one_rank, tmp_path):
    main(TokenRewardConfig(
        parts=("audit-stories",), runs=str(tmp_path), out=str(tmp_path / "out.json"), story_pairs=64, story_openings=3,
        story_tokens=12, each=2,
    ))  # fmt: skip
    audit = json.loads((tmp_path / "out.json").read_text())["audit-stories"]["stories260k"]
    assert audit["responses"] == 6
    assert {"word start", "word inside"} <= {g["name"] for g in audit["kinds"]}
    assert audit["agreement"]["differences"] is not None
