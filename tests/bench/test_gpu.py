"""bench/gpu.py at toy sizes: its sections run and report, and the paths it compares compute the same numbers."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
import types

import pytest
import rto_kernels
import torch
from loop_helpers import ROOT

pytestmark = pytest.mark.slow

BENCH = ROOT / "bench"


@pytest.fixture(scope="module")
def bench():
    """The bench folder's modules, by name."""
    return lambda name: importlib.import_module(f"bench.{name}")


@pytest.fixture(scope="module")
def paths(bench, one_rank, tmp_path_factory):
    """(iteration module, parts, rollout): the toy shape, sampled by the transformers engine."""
    iteration = bench("iteration.measure")
    shape = iteration.SHAPES["toy"]
    parts = iteration.build(shape, tmp_path_factory.mktemp("policy"))
    requests, lengths = iteration.draw(shape)
    engine = iteration.transformers_engine(parts, lengths)
    rollout = iteration.rollouts(parts, engine, iteration.Clock(), requests, lengths)
    return iteration, parts, rollout, engine


def test_sections_run_and_report_on_a_cpu(tmp_path):
    sections = ["tests", "ceilings", "determinism", "kernels", "loop", "sanitizer", "tune"]
    argv = [sys.executable, BENCH / "gpu.py", "--device", "cpu", "--minutes", "8", "--out", tmp_path]
    run = subprocess.run([*argv, "--sections", *sections], capture_output=True, text=True, timeout=540)
    assert run.returncode == 0, run.stdout + run.stderr
    (path,) = tmp_path.glob("cpu-*.json")
    results = json.loads(path.read_text())
    assert results["run"]["toy"] is True
    assert list(results["sections"]) == sections
    for name in ("tests", "ceilings", "determinism", "kernels", "loop"):
        assert results["sections"][name]["status"] == "passed", results["sections"][name]
    assert results["sections"]["tests"]["passed"] == results["sections"]["tests"]["tests"] > 0
    assert (results["sections"]["loop"]["passed"], results["sections"]["loop"]["failed"]) == (2, {})
    assert results["sections"]["sanitizer"]["status"] == "not run"
    outcome = results["sections"]["tune"]["outcome"]
    assert outcome.startswith("written to ") or outcome == "nothing is faster than what is used already"
    assert not any(results["run"]["determinism"]["differing"].values())
    # Every time stands beside its floor, once the ceilings are there.
    ceilings, record = results["run"]["ceilings"], results["gae"]["64 × 512"]
    assert record["floor_ms"] == pytest.approx(64 * 512 * 17 / ceilings["copy_gb_per_s"] / 1e6)
    assert record["contenders"]["ours"]["of_floor"] == pytest.approx(
        record["floor_ms"] / record["contenders"]["ours"]["ms"]
    )
    before = (BENCH / "results").rglob(path.name)
    assert path.read_text() not in [p.read_text() for p in before]


def test_a_stage_that_fails_on_the_device_is_named(bench, tmp_path):
    found = {"rto": "", "dpo": "Traceback\n  line\nRuntimeError: tensors on two devices\n"}
    (tmp_path / "stages.json").write_text(json.dumps(found))
    assert bench("gpu").stages_run(tmp_path, ["", "RTO 3.00"]) == {
        "passed": 1, "failed": {"dpo": "RuntimeError: tensors on two devices"}, "recipe": "RTO 3.00"
    }  # fmt: skip


def gpu_command(out, *sections: str, minutes: float = 8) -> list:
    argv = [sys.executable, BENCH / "gpu.py", "--device", "cpu", "--minutes", str(minutes), "--out", out]
    return [*map(str, argv), "--sections", *sections]


def results_of(out) -> dict:
    (path,) = out.glob("cpu-*.json")
    return json.loads(path.read_text())


def lives(pid: str) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_killed_command_goes_on_where_it_was(tmp_path):
    sections, logs = ("ceilings", "kernels"), tmp_path / "logs"
    first = subprocess.Popen(gpu_command(tmp_path, *sections), stdout=subprocess.DEVNULL)
    end = time.time() + 300
    while time.time() < end and not ((logs / "cases.txt").exists() and "gae" in (logs / "cases.txt").read_text()):
        time.sleep(0.02)
    cut = subprocess.run(["pgrep", "-P", str(first.pid)], capture_output=True, text=True).stdout.split()
    first.kill()
    first.wait()
    time.sleep(0.5)
    assert cut
    assert not [pid for pid in cut if lives(pid)], "a section outlived its command"
    before = results_of(tmp_path)
    assert "gae" in before
    assert "ppo_loss" not in before
    state = json.loads((logs / "progress.json").read_text())["sections"]
    assert state["ceilings"]["done"]
    assert not state["kernels"]["done"]
    second = subprocess.run(gpu_command(tmp_path, *sections), capture_output=True, text=True, timeout=300)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "ceilings: done at this commit" in second.stdout
    assert "nothing is left" in second.stdout
    after = results_of(tmp_path)
    assert after["run"]["ceilings"] == before["run"]["ceilings"]
    assert after["gae"] == before["gae"]
    assert {"ppo_loss", "rewards_gae"} <= set(after)
    assert after["sections"]["kernels"]["status"] == "passed"
    assert after["sections"]["kernels"]["measured"] == 3


def test_another_commit_starts_anew(bench, tmp_path):
    gpu, path = bench("gpu"), tmp_path / "progress.json"
    progress = gpu.Progress(path, "abc")
    progress.start("tests")
    assert not gpu.Progress(path, "abc").done("tests")  # as a kill leaves it
    progress.end("tests", {"status": "stopped"})
    assert not gpu.Progress(path, "abc").done("tests")
    progress.end("tests", {"status": "passed"})
    assert gpu.Progress(path, "abc").done("tests")
    assert not gpu.Progress(path, "other").done("tests")
    path.write_text("{")
    assert not gpu.Progress(path, "abc").done("tests")


def test_a_section_that_never_ends_lets_the_others_go_first(bench, tmp_path):
    progress = bench("gpu").Progress(tmp_path / "progress.json", "abc")
    for _ in range(bench("gpu").ATTEMPTS):
        assert not progress.done("tests")
        progress.start("tests")
        progress.end("tests", {"status": "stopped"})
    assert progress.done("tests")


def test_kernel_tests_run_in_order_of_what_they_tell(bench):
    files = [os.path.basename(path) for path in bench("gpu").in_order(ROOT / "tests" / "kernels")]
    assert files[0] == "test_confident_tokens.py"
    assert files[-1] == "test_large.py"
    assert len(files) == len(set(files))
    there = {path.name for path in (ROOT / "tests" / "kernels").glob("test_*.py")}
    without_gpu = {"test_aot.py", "test_meta_launches.py", "test_specialisations.py", "test_tile_check.py"}
    assert there - set(files) == without_gpu


def test_every_check_and_candidate_is_tried(tmp_path):
    run = subprocess.run(gpu_command(tmp_path, "compile", "checks"), capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stdout + run.stderr
    results = results_of(tmp_path)
    compiled = results["run"]["compiled"]
    assert len(compiled) == 3
    assert all("seconds" in record for record in compiled.values())
    checks = results["run"]["checks"]
    assert len(checks) == 8
    assert all(record["ok"] for record in checks.values()), checks
    assert checks["launches"]["launches"]["gae"]["ours"] == {}  # off a GPU nothing is launched
    assert checks["token_kl"]["ratio"] > 0


def test_a_section_is_stopped_at_its_box_and_leaves_no_process(bench, tmp_path, monkeypatch):
    gpu = bench("gpu")
    mark, script = tmp_path / "pid", tmp_path / "sleeper.py"
    script.write_text(
        "import os, pathlib, signal, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"pathlib.Path({str(mark)!r}).write_text(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    box = gpu.Section(1, 0, lambda *_: [gpu.Command([sys.executable, str(script)], {})], lambda *_: {})
    monkeypatch.setitem(gpu.SECTIONS, "sleeper", box)
    monkeypatch.setattr(gpu, "GRACE_S", 0.2)
    assert gpu.run_section("sleeper", 3 / 60, tmp_path, toy=False)["status"] == "stopped"
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)


def test_tests_that_are_stopped_still_report_what_they_found(bench, tmp_path):
    gpu = bench("gpu")
    (tmp_path / "test_slow.py").write_text("import time\ndef test_a(): pass\ndef test_b(): time.sleep(60)\n")
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    command = gpu.Command([*argv, str(tmp_path), f"--junitxml={tmp_path / 'tests.xml'}"], {})
    for seconds in (6, 20, 50):  # a busy machine takes its time to start
        status, _ = gpu.run(command, seconds, tmp_path / "log")
        assert status is None
        if found := gpu.counts(tmp_path, []).get("passed"):
            break
    assert found


def test_a_section_without_minutes_is_not_started(bench, tmp_path):
    record = bench("gpu").lacks_minutes("iteration", 0.5, toy=False)
    assert record["status"] == "not run"
    assert not bench("gpu").lacks_minutes("iteration", 5, toy=False)
    assert "0.5 minutes are left" in record["reason"]


def test_a_missing_trainer_is_not_run_and_says_why(bench, tmp_path):
    gpu = bench("gpu")
    (tmp_path / "deepspeed.py").write_text("raise ImportError('none here', name='deepspeed')")
    command = gpu.iteration(1.0, tmp_path, toy=True)[0]
    places = os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "kernels")])
    status, text = gpu.run(gpu.Command(command.argv, {"PYTHONPATH": places}), 120, tmp_path / "log")
    assert status
    assert gpu.last_lines(tmp_path, [text]) == {"reason": "deepspeed is not importable"}


def test_cases_past_the_deadline_are_not_run(bench, monkeypatch):
    spec = importlib.util.spec_from_file_location("bench_conftest", BENCH / "conftest.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    monkeypatch.delenv("RTO_BENCH_DEADLINE", raising=False)
    hooks.pytest_runtest_setup(None)
    monkeypatch.setenv("RTO_BENCH_DEADLINE", str(time.time() + 60))
    hooks.pytest_runtest_setup(None)
    monkeypatch.setenv("RTO_BENCH_DEADLINE", str(time.time() - 1))
    with pytest.raises(pytest.skip.Exception, match="no minutes left"):
        hooks.pytest_runtest_setup(None)


def test_clocks_are_read_never_set(bench, monkeypatch):
    harness, asked = bench("harness"), []
    line = "345 MHz, 3201 MHz, 1980 MHz, 31, 76.12 W, 700.00 W, 580.159.03\n"

    def smi(argv, **kw):
        asked.extend(argv)
        return subprocess.CompletedProcess(argv, 0, line, "")

    monkeypatch.setattr(harness, "ON_GPU", True)
    monkeypatch.setattr(harness.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(harness.torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(harness.subprocess, "run", smi)
    found = harness.clocks()
    assert found["clocks.sm"] == "345 MHz"
    assert found["power.limit"] == "700.00 W"
    assert found["driver"] == "580.159.03"
    assert [a for a in asked if a.startswith("-")] == [
        a for a in asked if a.startswith(("--query", "--format", "--id"))
    ]
    line = "no devices were found\n"
    assert harness.clocks() == {}


def test_what_the_sanitizer_found_is_read_from_its_summary(bench, tmp_path):
    gpu = bench("gpu")
    clean = "========= COMPUTE-SANITIZER\n...\n========= ERROR SUMMARY: 0 errors\n"
    raced = "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n"
    assert gpu.hazards(tmp_path, ["compiled", clean, raced]) == {
        "memcheck": "ERROR SUMMARY: 0 errors",
        "racecheck": "RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)",
    }
    assert "did not finish" in gpu.hazards(tmp_path, ["compiled", "========= COMPUTE-SANITIZER\n"])["memcheck"]
    assert gpu.hazards(tmp_path, []) == {"reason": "compute-sanitizer is not installed"}


def test_the_released_data_path_and_ours_agree_token_by_token(paths):
    iteration, parts, rollout, _ = paths
    scores, targets = iteration.score_and_targets(parts, rollout, iteration.Clock())
    with iteration.released_forwards(parts):
        experiences = iteration.released_experience(parts, rollout, iteration.Clock())
    whitening = iteration.released.whiten(experiences)

    def inside(name: str) -> torch.Tensor:
        return torch.cat([getattr(e, name)[e.batch.action_mask] for e in experiences])

    close = {"atol": 2e-5, "rtol": 1e-4}
    torch.testing.assert_close(inside("logp"), scores.policy_logp, **close)
    torch.testing.assert_close(inside("values"), scores.values, **close)
    torch.testing.assert_close(inside("rewards"), targets.rewards, **close)
    torch.testing.assert_close(inside("advantages"), targets.advantages, **close)
    torch.testing.assert_close(inside("returns"), targets.returns, **close)
    torch.testing.assert_close(torch.stack(whitening), torch.stack(targets.whiten).float(), **close)
    # Something to compare: the DPO term is there, and clipped for some tokens but not for all.
    assert 0 < (targets.dpo_reward.abs() >= 0.0499).float().mean() < 1


def test_losses_and_gradients_agree_on_every_path(paths):
    iteration, parts, rollout, _ = paths
    expected = iteration.our_losses(parts, rollout)
    with iteration.released_forwards(parts):
        experiences = iteration.released_experience(parts, rollout, iteration.Clock())
        got = iteration.released_updates(parts, experiences, len(rollout.tokens), iteration.Clock())
    assert iteration.apart(got, expected) < 1e-4
    for name, switched_off in iteration.ABLATION.items():
        with switched_off():
            assert iteration.apart(iteration.our_losses(parts, rollout), expected) < 1e-4, name


def test_a_path_that_computes_something_else_has_no_figure(paths, monkeypatch):
    iteration, parts, rollout, _ = paths
    record = {"paths": {}, "not_run": {}}
    iteration.ours(parts, rollout, iteration.Clock(), record, "ours", 1)
    monkeypatch.setattr("rto_fast.models.heads.token_logprobs", wrong)
    iteration.attempt(record, "wrong", lambda: iteration.ours(parts, rollout, iteration.Clock(), record, "wrong", 1))
    assert "wrong" not in record["paths"]
    assert "from ours" in record["not_run"]["wrong"]


def wrong(hidden, weight, targets, **kw):
    """Log-probs of a soft distribution: not what is asked for."""
    return sys.modules["bench.iteration.ablation"]._eager_token_logprobs(hidden / 2, weight, targets, **kw)


def test_the_ablation_switches_off_what_it_says(paths, monkeypatch):
    iteration, parts, rollout, _ = paths
    rows, tokens = [], []
    original = rto_kernels.token_logprobs

    def watched(hidden, *args, **kw):
        rows.append(len(hidden))
        return original(hidden, *args, **kw)

    def cost(switched_off) -> tuple[int, int]:
        rows.clear()
        tokens.clear()
        with switched_off(), monkeypatch.context() as patch:
            if switched_off is not iteration.ABLATION["without fused kernels"]:
                patch.setattr("rto_fast.models.heads.token_logprobs", watched)
            hook = parts.reference.lm.model.register_forward_pre_hook(
                lambda _, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
            )
            iteration.score_and_targets(parts, rollout, iteration.Clock())
            hook.remove()
        return sum(rows), sum(tokens)

    response, every = int(rollout.response_lens.sum()), len(rollout.tokens)
    assert cost(iteration.ABLATION["ours"]) == (3 * response, every)
    assert cost(iteration.ABLATION["without response-only head"]) == (3 * every, every)
    assert cost(iteration.ABLATION["without fused kernels"]) == (0, every)
    padded = cost(iteration.ABLATION["without packing"])
    assert padded[0] == 3 * response
    assert padded[1] > every


def test_lengths_are_those_drawn_whatever_the_engine(paths):
    iteration, parts, rollout, engine = paths
    requests, lengths = iteration.draw(parts.shape)
    assert rollout.response_lens.tolist() == lengths
    assert len(set(lengths)) > 1
    assert not rollout.truncated.any()
    before = engine.model.config._attn_implementation
    engine.wake()
    engine.model.set_attn_implementation("sdpa")
    sampled = iteration.released.generate(engine.model, requests, lengths, iteration.STOP, iteration.PAD)
    engine.model.set_attn_implementation(before)
    assert sampled == sum(lengths)


def test_vllm_is_given_each_requests_own_length(bench, one_rank, monkeypatch):
    iteration = bench("iteration.workload")
    fake = types.ModuleType("vllm")
    fake.SamplingParams = lambda **settings: settings
    monkeypatch.setitem(sys.modules, "vllm", fake)
    requests, lengths = iteration.draw(iteration.SHAPES["toy"])
    with iteration.vllm_lengths(requests, lengths):
        asked = [fake.SamplingParams(seed=q.seed, max_tokens=40, stop_token_ids=[1], logprobs=0) for q in requests]
    assert [a["max_tokens"] for a in asked] == lengths
    assert all(a["stop_token_ids"] == [] and a["logprobs"] == 0 for a in asked)
    assert fake.SamplingParams(max_tokens=40) == {"max_tokens": 40}


def test_padded_micro_batches_stay_in_order_and_within_the_budget(bench, one_rank):
    lens = [5, 9, 3, 7, 20, 2]
    batches = bench("iteration.ablation")._padded_micro_batches(range(6), lens, 20)
    assert batches == [[0, 1], [2, 3], [4], [5]]
    assert [i for b in batches for i in b] == list(range(6))


def test_the_ratio_scales_phases_by_tokens_and_the_step_once(bench, one_rank):
    def phases(tokens: int, seconds: float, step: float, rollout: int) -> dict:
        each = {"seconds": seconds, "tokens": tokens}
        return {
            "rollout": {"seconds": seconds, "tokens": rollout}, "score": each, "train policy": each,
            "train critic": each, "optimiser (inside train)": {"seconds": step, "tokens": tokens},
            "sync": {"seconds": 1.0, "tokens": 0},
        }  # fmt: skip

    record = {
        "tokens": 800,
        "paths": {
            "ours": {"phases": phases(800, 4.0, 2.0, 400)},
            "released": {"phases": {k: v for k, v in phases(100, 6.0, 2.0, 50).items() if k != "sync"}},
        },
    }
    rates = bench("iteration.measure").comparison(record)
    assert rates["ours"] == pytest.approx(800 / (4 * 4 + 1))
    # 8 times the phases, less 7 of the 8 optimiser steps in them, and ours' sync.
    assert rates["released"] == pytest.approx(800 / (8 * 4 * 6 - 7 * 2 + 1))
    assert rates["ratio to released"] == pytest.approx(rates["ours"] / rates["released"])


def gpu_results() -> dict:
    """A device's file as gpu.py leaves it when the minutes ended before the iteration."""

    def case(shape: dict, flops: float | None, moved: float | None, **rows: dict) -> dict:
        each = {"error": 1e-3, "errors": {"logp": 1e-3}, "spread_ms": 0.1, "peak_mb": 10.0, "ratio": 1.0}
        contenders = {name.replace("_", " "): each | row for name, row in rows.items()}
        return {"shape": shape, "flops": flops, "moved": moved, "floor_ms": 10.0, "contenders": contenders}

    product = {"N": 8192, "H": 4096, "V": 128256, "dtype": "torch.bfloat16"}
    gathered = {"N": 8192, "V": 128256, "dtype": "torch.bfloat16"}
    return {
        "run": {
            "commit": "abc", "versions": {"torch": "2.11.0"}, "clocks as found": {"clocks.sm": "1980 MHz"},
            "ceilings": {"matmul_tflops": 800.0, "copy_gb_per_s": 4000.0},
        },
        "sections": {
            "tests": {"status": "failed", "seconds": 12.0, "passed": 8, "failed": ["tests.kernels.test_gae.test_x"]},
            "iteration": {"status": "not run", "reason": "deepspeed is not importable"},
        },
        "token_logprobs_forward": {
            "a": case(product, 8.6e12, None, ours={"ms": 12.5, "of_floor": 0.8}, one_product={"ms": 10.0}),
        },
        "logprobs_from_logits": {
            "b": case(gathered, None, 6.3e9, ours={"ms": 1.6, "gb_per_s": 3900.0, "of_floor": 0.98}),
        },
        "gae": {"c": case({"B": 128, "T": 1024}, None, 2.2e6, ours={"failed": "relative error 1"})},
    }  # fmt: skip


def test_the_page_takes_a_gpus_tables_from_its_file_alone(bench, tmp_path, monkeypatch):
    tables = bench("tables")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "PAGE", tmp_path / "performance.md")
    monkeypatch.setattr(sys, "argv", ["tables.py"])
    before = (
        "a\n<!-- gpu:begin -->\nno figures\n<!-- gpu:end -->\nb\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nc\n"
    )
    tables.PAGE.write_text(before)
    tables.main()
    assert tables.PAGE.read_text() == before  # no results, no change

    (tmp_path / "nvidia-x.json").write_text(json.dumps(gpu_results()))
    tables.main()
    text = tables.PAGE.read_text()
    assert "no figures" not in text
    assert "old" in text  # the CPU's part
    assert "| ≥ 0.9 | 0.8 | **missed** |" in text
    assert "| ≥ 0.9 | 0.975 | met |" in text
    assert "not measured" in text
    assert "iteration | not run | " in text
    assert "deepspeed is not importable" in text
    assert "no figure: relative error 1" in text
    assert "800 TFLOP/s" in text
    assert (tmp_path / "nvidia-x-roofline.svg").stat().st_size > 0
    tables.main()
    assert tables.PAGE.read_text() == text


def test_the_end_to_end_table_has_every_path(bench, paths):
    iteration, parts, rollout, _ = paths
    shape = iteration.asdict(parts.shape)
    record = {"shape": shape, "tokens": 10, "lengths": "", "paths": {}, "not_run": {"ours, vLLM": "not installed"}}
    clock = iteration.Clock()
    with clock.phase("rollout", 5), clock.phase("sync", 0):
        pass
    iteration.ours(parts, rollout, clock, record, "ours", 1)
    iteration.ours(parts, rollout, iteration.Clock(), record, "without packing", 1)
    record["comparison"] = iteration.comparison(record)
    lines = bench("tables").end_to_end({"run": {"iteration": record}})
    assert [line.split(" | ")[0] for line in lines if line.startswith("| ")] == [
        "|", "| ours", "| without packing", "| ours, vLLM",
    ]  # fmt: skip
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert set(record["comparison"]) == {"ours", "without packing"}


def test_without_rounds_one_call_gives_everything(bench, tmp_path, monkeypatch):
    harness, calls = bench("harness"), []
    monkeypatch.setattr(harness, "RESULTS", tmp_path)

    def contender(name: str, value: float):
        def run():
            calls.append(name)
            return {"x": torch.full((1000,), value)}

        return run

    contenders = {"ours": contender("ours", 1.0), "wrong": contender("wrong", 2.0)}
    record = harness.compare("kernel", "case", contenders, reference=contender("truth", 1.0), tolerance=1e-6, rounds=0)
    assert calls == ["truth", "ours", "wrong"]
    assert record["contenders"]["ours"]["ms"] > 0
    assert record["contenders"]["ours"]["peak_mb"] >= 0
    assert record["contenders"]["wrong"] == {
        "error": 1.0, "errors": {"x": 1.0}, "failed": "relative error 1 > 1e-06",
    }  # fmt: skip
