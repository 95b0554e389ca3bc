"""Every bad input gives one message that names the setting, before any work, with nothing written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from loop_helpers import small_run
from recipe_helpers import flags_of, run_recipe
from refusal_helpers import REFUSED, contents, message_of


@pytest.fixture
def settings(tiny, tmp_path):
    """Recipe -> settings that would run; every case below changes some of them."""
    small = {"dtype": "fp32", "output_dir": tmp_path / "out", "data_cache": False, "data_workers": 1}
    supervised = small | {"model": tiny.policy, "data": tiny.pairs, "data_split": "train", "eval_split": "",
                          "max_length": 64, "batch": 8, "gradient_checkpointing": False}  # fmt: skip
    rto = small_run(tiny, tmp_path / "out") | {"prompt_key": "auto"}
    return {
        "sft_llama3.py": supervised | {"data": tiny.texts},
        "rm_llama3.py": supervised,
        "dpo_llama3.py": supervised,
        "rto_llama3.py": rto,
        "ppo_llama3.py": {k: v for k, v in rto.items() if k != "dpo_model"},
        "distill.py": {k: v for k, v in rto.items() if k not in ("dpo_model", "reward_model")} | {"teacher": tiny.dpo},
        "rlvr_math.py": {k: v for k, v in rto.items() if k not in ("dpo_model", "reward_model")}
        | {
            "reward_fn": "rto_fast.scoring.math_answers:last_number",
            "responses_per_prompt": 2,
        },
    }


@pytest.fixture
def altered(tmp_path):
    """altered(model folder, **config values) -> a copy whose config.json says otherwise."""

    def copy(source: str, **values) -> Path:
        folder = tmp_path / f"altered{len(list(tmp_path.glob('altered*')))}"
        shutil.copytree(source, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))
        return folder

    return copy


@pytest.fixture
def run(settings, monkeypatch, capfd):
    """run(recipe, **changed settings) -> (exit code, stdout, stderr)."""

    def start(recipe: str, *extra: str, **changed):
        capfd.readouterr()
        code = run_recipe(recipe, [*flags_of(settings[recipe] | changed), *extra], monkeypatch)
        return code, *capfd.readouterr()

    return start


@pytest.fixture
def refused(run, settings, monkeypatch):
    """refused(recipe, message, **changed): exit code 2, the message (a regex), no model loaded, nothing written."""
    import transformers

    def loaded(*_, **__):
        raise AssertionError("a model was loaded before the input was refused")

    def check(recipe: str, message: str, *extra: str, **changed) -> None:
        folder = Path(changed.get("output_dir", settings[recipe]["output_dir"]))
        before = contents(folder)
        with monkeypatch.context() as patch:
            for name in ("AutoModelForCausalLM", "AutoModelForSequenceClassification"):
                patch.setattr(getattr(transformers, name), "from_pretrained", loaded)
            code, _, stderr = run(recipe, *extra, **changed)
        found = message_of(stderr)
        assert re.search(message, found), found
        assert code == REFUSED
        assert contents(folder) == before

    return check
