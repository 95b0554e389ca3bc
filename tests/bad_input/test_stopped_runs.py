"""What stops a run that had begun: exit code, message, what is kept; on many ranks too."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from loop_helpers import write_rows
from recipe_helpers import flags_of, run_deepspeed
from refusal_helpers import GOOD, REFUSED, STOPPED, message_of

pytestmark = pytest.mark.usefixtures("one_rank")

REWARDS = '''
"""Reward functions that misbehave."""
import math

calls = [-1]  # the trial before the run

def nan(prompts, responses):
    return [math.nan] * len(responses)

def inf_once(prompts, responses):
    calls[0] += 1
    return [math.inf if calls[0] == 2 else float(len(r)) for r in responses]

def raises(prompts, responses):
    raise KeyError("no such story")

def late(prompts, responses):
    if responses[0] != "A response.":
        raise KeyError("no such story")
    return [0.0] * len(responses)

def leaves(prompts, responses):
    if responses[0] != "A response.":
        raise SystemExit(0)
    return [0.0] * len(responses)

def too_few(prompts, responses):
    return [0.0]

async def later(prompts, responses):
    return [0.0] * len(responses)

def on_one_rank(prompts, responses):
    import os
    if os.environ.get("RANK") == "1":
        raise KeyError("only here")
    return [float(len(r)) for r in responses]
'''


@pytest.fixture
def rewards(tmp_path) -> str:
    """The path of a file of reward functions."""
    path = tmp_path / "rewards.py"
    path.write_text(REWARDS)
    return str(path)


def metrics_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def stopped(outcome: tuple[int, str, str], message: str) -> None:
    code, _, stderr = outcome
    found = message_of(stderr)
    assert re.search(message, found), found
    assert code == STOPPED


def test_nan_rewards_stop_the_run(run, rewards, tmp_path):
    outcome = run("rto_llama3.py", "--reward-fn", f"{rewards}:nan", iterations=9, max_bad_steps=3, save_every=1)
    stopped(outcome, r"3 bad steps in a row, the last: rollout 3 gave 8 non-finite score values\. .*Look at")
    assert outcome[1].count("warning: skipped: rollout") == 3
    assert [row["bad_steps"] for row in metrics_of(tmp_path / "out")] == [1, 2]
    assert not (tmp_path / "out" / "policy").exists()


def test_infinite_reward_is_skipped_and_counted(run, rewards, tmp_path):
    """One rollout of four: no update comes from it and the run goes on to its end."""
    code, stdout, _ = run("rto_llama3.py", "--reward-fn", f"{rewards}:inf_once", iterations=4, max_bad_steps=2)
    assert code == 0
    assert stdout.count("warning: skipped: rollout 2 gave 8 non-finite score values") == 1
    rows = metrics_of(tmp_path / "out")
    assert [row["bad_steps"] for row in rows] == [0, 1, 1, 1]
    assert [row["reward/score"] is None for row in rows] == [False, True, False, False]
    assert ["policy/loss" in row for row in rows] == [True, False, True, True]


def test_reward_function_that_fails_at_once(refused, rewards):
    """It is tried on a made-up response, before any model is loaded."""
    for function, message in (
        ("raises", r"raised at sample 0: KeyError: 'no such story'"),
        ("too_few", "answered 1 scores for 2 responses"),
        ("later", "answered a coroutine, not 2 numbers"),
    ):
        refused("rto_llama3.py", rf"reward_fn: tried on .*: reward function .*rewards.py:{function} {message}",
                "--reward-fn", f"{rewards}:{function}")  # fmt: skip


def test_reward_function_that_fails_in_the_run(run, rewards):
    stopped(run("rto_llama3.py", "--reward-fn", f"{rewards}:late"),
            r"reward function .*rewards.py:late raised at sample \d+: KeyError: 'no such story'")  # fmt: skip
    stopped(run("ppo_llama3.py", "--resume", "auto", "--reward-fn", f"{rewards}:leaves"),
            r"reward function .*rewards.py:leaves raised at sample \d+: SystemExit: 0")  # fmt: skip


def test_remote_reward_without_an_answer(refused):
    refused("rto_llama3.py", r"remote reward http://127.0.0.1:9/score: no answer after 1 attempt\(s\).*ConnectError",
            "--reward-url", "http://127.0.0.1:9/score", "--reward-retries", "0")  # fmt: skip


@pytest.fixture
def poisoned(tiny, tmp_path) -> str:
    """The policy with NaN in its last norm."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "poisoned"
    shutil.copytree(tiny.policy, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("recipe", ["sft_llama3.py", "rm_llama3.py", "dpo_llama3.py"])
def test_nan_losses_stop_a_stage(recipe, run, poisoned, tmp_path):
    outcome = run(recipe, model=poisoned, max_bad_steps=2, epochs=9)
    stopped(outcome, r"2 non-finite steps in a row at step 2; parameters are those before them\. Look at the learning")
    assert [row["train/loss"] for row in metrics_of(tmp_path / "out")] == [None, None]
    assert not (tmp_path / "out" / "model").exists()


def test_policy_of_nans_cannot_sample(run, poisoned):
    stopped(run("rto_llama3.py", policy=poisoned), r"not finite|non-finite")


# Many ranks


def test_other_ranks_are_quiet(run, monkeypatch):
    """A rank but the first says nothing of what every rank finds, and gives the first time to speak."""
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setenv("RANK", "1")
    for flags in (["--polcy", "x"], ["--seed", "x"], ["--train-batch", "3"]):
        code, stdout, stderr = run("rto_llama3.py", *flags)
        assert (code, stdout, stderr) == (REFUSED, "", "")
    assert len(waited) == 3
    assert min(waited) >= 1


@pytest.mark.slow
def test_two_ranks_refuse_together(settings, tmp_path, launch):
    path = write_rows(tmp_path / "pairs.jsonl", [GOOD, GOOD | {"chosen": ""}])
    flags = flags_of(settings["rm_llama3.py"] | {"data": path, "invalid_rows": "refuse"})
    result = launch(["recipes/rm_llama3.py", *flags], ranks=2)
    assert result.returncode == REFUSED, result.output
    assert result.output.count("error: ") == 1, result.output
    assert f"error: data: '{path}', line 2: 'chosen' is empty" in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_error_of_one_rank_stops_both(settings, rewards, tmp_path):
    """The reward function fails on rank 1 alone: its message is printed, once, and nobody waits for ever."""
    flags = flags_of(settings["rto_llama3.py"] | {"reward_fn": f"{rewards}:on_one_rank"})
    result = run_deepspeed("rto_llama3.py", flags)
    assert result.returncode == STOPPED, result.output
    assert result.output.count("error: ") == 1, result.output
    assert "KeyError: 'only here'" in result.output
    assert "Traceback" not in result.output


LOST = """
import os
from types import SimpleNamespace
from rto_fast import cli
from rto_fast.errors import DeviceLost

class Holder:
    def __del__(self):
        os.abort()  # as a library that calls the broken device at the end

held = Holder()

def train(config):
    raise DeviceLost("waking vLLM's cache broke the CUDA context")

cli._run(SimpleNamespace(), "__main__:train")
"""


def test_a_lost_device_ends_the_process_at_once(tmp_path):
    """Nothing else of the process runs: on a broken device it would end with a signal."""
    result = subprocess.run([sys.executable, "-c", LOST], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == STOPPED, result
    assert result.stderr.endswith("error: waking vLLM's cache broke the CUDA context\n")
