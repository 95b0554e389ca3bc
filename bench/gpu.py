"""Everything there is to prove and measure on a GPU, in one command that fits the minutes it is given.

    python bench/gpu.py --minutes 30                        all sections, in this order
    python bench/gpu.py --minutes 8 --sections ceilings kernels
    python bench/gpu.py --device cpu --minutes 2            the same code at toy sizes, for testing it

    tests        the kernel tests, without the interpreter
    ceilings     copy bandwidth and the bf16 matrix product: what every floor is counted from
    kernels      every kernel bench with its peers, a case after the other, the most telling first
    iteration    one RTO iteration on a Llama-3.2-1B shape against the released code's data path, and the ablation
    determinism  20 runs of every kernel on the same inputs
    sanitizer    compute-sanitizer's memcheck and racecheck on small sizes
    largest      the largest batch of a Llama-3-8B shape, and a step with offload
    tune         tiles for Llama-3-8B's lm_head, into logs/tiles.json; with RTO_KERNELS_TILES naming that file
                 `--sections kernels` measures them

Each section is a process of its own with a time box. It writes bench/results/<device>.json as it goes, so that a
kill loses the case in flight at most; what did not fit is in there as not run, with the reason. Only `python
bench/tables.py` turns that file into the tables of docs/performance.md. Results of --device cpu go to
bench/results/toy/.

Clocks, power and the card's other settings are read, never set. Peers are measured where they can be imported:
pip install liger-kernel trl verl quack-kernels cut-cross-entropy (verl without its dependencies is enough).
`iteration` and `largest` need deepspeed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
PYTHON = sys.executable
GRACE_S = 15
"""Seconds that a section has to write its report once its time is up."""


@dataclass(frozen=True)
class Command:
    argv: list[str]
    env: Mapping[str, str]


@dataclass(frozen=True)
class Section:
    box: float
    """Minutes at most."""
    worth: float
    """Minutes below which it is not started."""
    commands: Callable[[float, Path, bool], list[Command]]
    """(minutes, folder for logs, toy) → what to run, one after the other."""
    read: Callable[[Path, list[str]], dict]
    """(folder for logs, each command's output) → what to record beside the status."""


def tests(minutes: float, folder: Path, toy: bool) -> list[Command]:
    # test_aot compiles for other chips, which needs no GPU and many minutes.
    chosen = ["tests/kernels/test_tiles.py"] if toy else ["tests/kernels", "--ignore=tests/kernels/test_aot.py"]
    argv = [PYTHON, "-m", "pytest", "-q", "-rf", *chosen, f"--junitxml={folder / 'tests.xml'}"]
    if not toy and importlib.util.find_spec("xdist"):
        # Most of the time goes into compiling on the host. The tests past 32 bits go to one worker, and so take the
        # GPU's memory in turn.
        argv += ["-n", str(min(15, os.cpu_count() or 1)), "--dist", "loadgroup"]
    return [Command(argv, {"TRITON_INTERPRET": "0"})]


def counts(folder: Path, _: list[str]) -> dict:
    """Tests by outcome, and the names of those that failed, from the junit file."""
    path = folder / "tests.xml"
    if not path.exists():
        return {"reason": "pytest wrote no report: it was stopped, or did not start"}
    suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
    total = {k: sum(int(s.get(k, 0)) for s in suites) for k in ("tests", "failures", "errors", "skipped")}
    total["passed"] = total["tests"] - total["failures"] - total["errors"] - total["skipped"]
    bad = [
        f"{case.get('classname')}.{case.get('name')}"
        for suite in suites
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return total | {"failed": bad}


def script(module: str, *args: str, **env: str) -> Command:
    return Command([PYTHON, "-m", f"bench.{module}", *args], env)


def ceilings(minutes: float, folder: Path, toy: bool) -> list[Command]:
    return [script("kernels.ceilings")]


# Seconds a case first, then what the goals are stated for, the plot of cost against tokens last.
KERNEL_BENCHES = (
    "bench_token_rewards.py",
    "bench_ppo_loss.py",
    "bench_logprob.py",
    "bench_linear_ppo.py",
    "bench_linear_logprob.py::test_forward",
    "bench_linear_logprob.py::test_token_logprobs",
    "bench_linear_logprob.py::test_cross_entropy",
    "bench_fused_rewards.py",
    "bench_linear_logprob.py::test_cost_against_tokens",
)


def kernels(minutes: float, folder: Path, toy: bool) -> list[Command]:
    chosen = ("bench_token_rewards.py", "bench_ppo_loss.py") if toy else KERNEL_BENCHES
    argv = [PYTHON, "-m", "pytest", "-q", "-s", "-rfs", "--benchmark-disable", f"--junitxml={folder / 'kernels.xml'}"]
    # The last minute is left to the case in flight.
    deadline = time.time() + 60 * max(0.0, minutes - 1)
    scale = {} if toy else {"RTO_BENCH": "full"}
    argv += [str(BENCH / "kernels" / name) for name in chosen]
    return [Command(argv, {"RTO_BENCH_DEADLINE": str(deadline), **scale})]


def cases(folder: Path, _: list[str]) -> dict:
    path = folder / "kernels.xml"
    if not path.exists():
        return {"reason": "stopped inside a case; what was measured before is kept"}
    every = list(ElementTree.parse(path).getroot().iter("testcase"))
    return {
        "cases": len(every),
        "not run": [c.get("name") for c in every if c.find("skipped") is not None],
        "failed": [c.get("name") for c in every if c.find("failure") is not None or c.find("error") is not None],
    }


def iteration(minutes: float, folder: Path, toy: bool) -> list[Command]:
    return [script("iteration.measure", "--shape", "toy" if toy else "llama-1b", "--minutes", str(minutes))]


def largest(minutes: float, folder: Path, toy: bool) -> list[Command]:
    shape = "toy" if toy else "llama-8b"
    return [script("iteration.largest", "--shape", shape, "--minutes", str(minutes))]


def determinism(minutes: float, folder: Path, toy: bool) -> list[Command]:
    return [script("kernels.determinism", *(["--runs", "2", "--small"] if toy else ["--runs", "20"]))]


TOOLS = ("memcheck", "racecheck")


def sanitizer(minutes: float, folder: Path, toy: bool) -> list[Command]:
    if toy or shutil.which("compute-sanitizer") is None:
        return []
    plain = script("kernels.determinism", "--runs", "1", "--small", PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    # A first run without the tool compiles the kernels, which would be slow under it.
    tool = ["compute-sanitizer", "--error-exitcode", "9", "--tool"]
    return [plain, *(Command([*tool, name, *plain.argv], plain.env) for name in TOOLS)]


def hazards(folder: Path, outputs: list[str]) -> dict:
    if not outputs:
        return {"reason": "compute-sanitizer is not installed"}
    found = {}
    for tool, text in zip(TOOLS, outputs[1:], strict=False):
        lines = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", text)
        found[tool] = lines[-1] if lines else "no summary: the tool did not finish"
    return found


def tune(minutes: float, folder: Path, toy: bool) -> list[Command]:
    shape = ["--hidden", "4096", "--vocab", "128256", "--minutes", f"{minutes - 0.5:.2f}"]
    if toy:
        shape = ["--hidden", "32", "--vocab", "70", "--tokens", "8", "--dtype", "float32", "--minutes", "0.05"]
    env = {"RTO_KERNELS_TILES": str(folder / "tiles.json")} | ({"TRITON_INTERPRET": "1"} if toy else {})
    return [Command([PYTHON, "-m", "rto_kernels.tune", *shape], env)]


def found_tiles(folder: Path, outputs: list[str]) -> dict:
    lines = [line for text in outputs for line in text.splitlines()]
    return {"tried": sum(line.startswith("  ") for line in lines), "outcome": lines[-1] if lines else ""}


def last_lines(folder: Path, outputs: list[str]) -> dict:
    """What a script had to say, for where it did not run."""
    lines = [line for text in outputs for line in text.splitlines() if line.startswith("not run: ")]
    return {"reason": lines[-1].removeprefix("not run: ")} if lines else {}


SECTIONS = {
    "tests": Section(7, 1, tests, counts),
    "ceilings": Section(1, 0.3, ceilings, last_lines),
    "kernels": Section(9, 1.5, kernels, cases),
    "iteration": Section(10, 3, iteration, last_lines),
    "determinism": Section(4, 0.5, determinism, last_lines),
    "sanitizer": Section(4, 2, sanitizer, hazards),
    "largest": Section(6, 2, largest, last_lines),
    "tune": Section(4, 1.5, tune, found_tiles),
}


def _heed_interrupts() -> None:
    """A shell's background jobs ignore SIGINT, and what they start would too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(command: Command, seconds: float, log: Path) -> tuple[int | None, str]:
    """(exit status, output); None where it was stopped at its limit, with every process it had started."""
    with log.open("a") as out:
        process = subprocess.Popen(
            command.argv, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1", **command.env}, stdout=out,
            stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_heed_interrupts,
        )  # fmt: skip
        try:
            status = process.wait(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            status = None
            process.send_signal(signal.SIGINT)  # pytest then still writes what it has found
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=GRACE_S)
        finally:
            # Workers that it had started are in its group, and outlive it.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return status, log.read_text()


def run_section(name: str, minutes: float, folder: Path, toy: bool) -> dict:
    """The section's record: status (passed, failed, stopped, not run), seconds, and what it counted."""
    section, start = SECTIONS[name], time.monotonic()
    if minutes < section.worth and not toy:
        return {"status": "not run", "reason": f"{minutes:.1f} minutes are left, it wants {section.worth}"}
    minutes = min(minutes, section.box)
    statuses, outputs = [], []
    for i, command in enumerate(section.commands(minutes, folder, toy)):
        left = 60 * minutes - (time.monotonic() - start)
        status, text = run(command, left, folder / f"{name}-{i}.log")
        statuses.append(status)
        outputs.append(text)
        if status is None:
            break
    found = section.read(folder, outputs)
    if not statuses or (statuses[-1] and "reason" in found):
        status = "not run"
    elif None in statuses:
        status = "stopped"
    else:
        status = "passed" if not any(statuses) else "failed"
    if status == "failed" and outputs:
        print("\n".join(outputs[-1].splitlines()[-25:]), flush=True)
    return {"status": status, "seconds": round(time.monotonic() - start, 1), **found}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, required=True, help="wall-clock minutes for all of it")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="folder of the results; default bench/results, for cpu its toy/")
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    toy = args.device == "cpu"
    out = (args.out or BENCH / "results" / ("toy" if toy else "")).resolve()
    logs = out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for left in (*logs.glob("*.log"), *logs.glob("*.xml")):
        left.unlink()
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    os.environ |= {"RTO_BENCH_RESULTS": str(out), "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    if toy:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "RTO_BENCH": "toy", "RTO_BENCH_ROUNDS": "2"}

    sys.path.insert(0, str(ROOT))
    from bench import harness  # reads the environment that was just set

    if not toy and not harness.ON_GPU:
        parser.error("no CUDA GPU is here; --device cpu tries the same code at toy sizes")
    header = {
        "commit": harness.commit(),
        "versions": harness.versions(),
        "clocks as found": harness.clocks(),
        "toy": toy,
    }
    for key, value in header.items():
        harness.save(harness.RUN, key, value)
    records = {}
    for name in args.sections:
        print(f"{name} ...", flush=True)
        records[name] = run_section(name, (end - time.monotonic()) / 60, logs, toy)
        harness.save("sections", name, records[name])
        shown = ", ".join(f"{k} {v}" for k, v in records[name].items() if k != "status" and v not in ([], ""))
        print(f"{name}: {records[name]['status']} ({shown})", flush=True)
    print(f"results: {harness.results_path()}; logs: {logs}; tables: python bench/tables.py")
    return 1 if any(r["status"] == "failed" for r in records.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
