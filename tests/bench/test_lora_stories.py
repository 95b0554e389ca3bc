"""bench/lora_stories.py: its flags are those of the stages, each takes the last one's folder, and its table."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from bench import lora_stories
from rto_fast import cli, commands
from rto_fast.errors import ConfigError


@pytest.mark.parametrize("rank", [0, 16])
def test_each_stage_takes_the_last_ones_folder(tmp_path, rank):
    asked = lora_stories.stages(tmp_path, rank, "transformers", 3)
    parsed = {name: cli.parse(commands.COMMANDS[name].defaults, lora_stories.flags(s)) for name, s in asked.items()}
    for config in parsed.values():
        config.validate()
        assert config.lora_rank == rank
    rto, rate = parsed["rto"], lora_stories.RATES["rto"]["policy_lr"] / (1 if rank else 10)
    assert (rto.lora_policy_lr if rank else rto.policy_lr) == pytest.approx(rate)
    assert parsed["dpo"].model == rto.policy == str(tmp_path / "sft/model")
    assert rto.dpo_model == (f"{parsed['dpo'].output_dir}/model",)
    assert rto.reward_model == (f"{parsed['rm'].output_dir}/model",)


def test_a_whole_stage_is_not_run_again_and_the_table_has_its_figures(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(
        lora_stories.subprocess, "run", lambda args, **_: ran.append(args[3]) or SimpleNamespace(returncode=0)
    )
    for name, figures in lora_stories.FIGURES.items():
        folder = tmp_path / name / ("policy" if name == "rto" else "model")
        if name != "dpo":
            folder.mkdir(parents=True)
            (folder / "adapter_model.safetensors").write_bytes(b"x" * 5000)
        (tmp_path / name).mkdir(exist_ok=True)
        rows = [{"step": i, **dict.fromkeys(figures, i + 0.5)} for i in range(3)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, settings in lora_stories.stages(tmp_path, 16, "transformers", 3).items():
        lora_stories.run(name, settings)
    assert ran == ["dpo"]
    assert "| rto | reward/score | 0.5 | 2.5 | 5 |" in lora_stories.table(tmp_path)


def test_a_folder_of_other_settings_is_refused_before_anything_runs(tmp_path, monkeypatch, capsys):
    """What lies there would be shown as that of a rank that was never trained."""
    monkeypatch.setattr(lora_stories, "MODEL", tmp_path)
    monkeypatch.setattr(lora_stories, "PAIRS", tmp_path / "pairs.jsonl")
    (tmp_path / "pairs.jsonl").touch()
    ran = []
    monkeypatch.setattr(lora_stories, "run", lambda name, settings: ran.append(name))
    monkeypatch.setattr(lora_stories, "table", lambda runs: "the table")
    asked = ["--runs", str(tmp_path / "runs")]
    for _ in range(2):
        lora_stories.main([*asked, "--rank", "4"])
    assert ran == [*lora_stories.RATES] * 2
    for other in (["--rank", "0"], ["--rank", "4", "--iterations", "3"], ["--rank", "4", "--engine", "vllm"]):
        with pytest.raises(ConfigError, match=r"holds stages of other sizes: .*; use another --runs"):
            lora_stories.main([*asked, *other])
    with pytest.raises(SystemExit):
        lora_stories.main([*asked, "--engine", "vlm"])
    assert "invalid choice: 'vlm'" in capsys.readouterr().err
    assert len(ran) == 2 * len(lora_stories.RATES)
