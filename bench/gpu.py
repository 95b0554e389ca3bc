"""Everything there is to prove and measure on a GPU, in commands of a few minutes that resume one another.

    python bench/gpu.py                                     9 minutes: what fits; the same command again goes on
    python bench/gpu.py --minutes 3                         correctness alone, which comes first
    python bench/gpu.py --sections ceilings kernels         these, in this order
    python bench/gpu.py --sections tests --again            once more, although it is done
    python bench/gpu.py --device cpu --minutes 2            the same code at toy sizes, for testing it

    tests        the kernel tests, without the interpreter, those of the gradients first
    determinism  20 runs of every kernel on the same inputs
    compile      the kernels of Llama-3-8B's lm_head and their candidate tiles, by a pool of processes
    ceilings     copy bandwidth and the bf16 matrix product: what every floor is counted from
    checks       what only a GPU can show: first ratio 1, host time a call, launches, CUDA graphs, new sizes
    kernels      every kernel bench with its peers, a case after the other, the most telling first
    loop         every stage and way to update on a tiny model, with DeepSpeed: devices, resume; recipes/rto_tiny.py
    iteration    one RTO iteration on a Llama-3.2-1B shape, the ablation, and the released code's data path
    vllm         push, wake, tokens/s and sleep of a colocated vLLM engine, on the same shape
    largest      the largest batch of a Llama-3-8B shape, and a step with offload
    sanitizer    compute-sanitizer's memcheck and racecheck on small sizes
    tune         tiles for Llama-3-8B's lm_head, into logs/tiles.json; with RTO_KERNELS_TILES naming that file
                 `--sections kernels` measures them

Each section is a process of its own with a time box. It writes bench/results/<device>.json as it goes, so that a
kill loses the case in flight at most; what did not fit is in there as not run, with the reason. logs/progress.json
says which sections are done at this commit: they are left out, and one that was cut is taken up where its last result
stands (tests, sanitizer and tune from the beginning). Another commit starts anew. Only `python bench/tables.py` turns
the results into the tables of docs/performance.md. Results of --device cpu go to bench/results/toy/.

Clocks, power and the card's other settings are read, never set. Peers are measured where they can be imported:
pip install liger-kernel trl verl quack-kernels cut-cross-entropy (verl without its dependencies is enough).
`loop`, `iteration`, `vllm` and `largest` need deepspeed.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
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
UNFINISHED = 75
"""Exit status of a script whose minutes ended before its work; harness.UNFINISHED."""
ATTEMPTS = 6
"""A section that was cut as often is left as it is, so that the others have their turn."""


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


# Wrong gradients are what nothing else may be measured before; what takes the most memory comes last.
FIRST = ("confident_tokens", "linear_ppo", "linear_logprob", "ppo_loss", "gae", "token_rewards", "logits_logprob")
LAST = ("large",)
# They compile for other chips or look at files alone, which needs no GPU and many minutes.
WITHOUT_GPU = ("aot", "meta_launches", "specialisations", "tile_check")


def in_order(folder: Path) -> list[str]:
    """Paths of the kernel tests, the most telling first."""
    names = [path.stem.removeprefix("test_") for path in sorted(folder.glob("test_*.py"))]
    middle = [name for name in names if name not in (*FIRST, *LAST, *WITHOUT_GPU)]
    return [str(folder / f"test_{name}.py") for name in (*FIRST, *middle, *LAST)]


def tests(minutes: float, folder: Path, toy: bool) -> list[Command]:
    chosen = ["tests/kernels/test_tiles.py"] if toy else in_order(ROOT / "tests" / "kernels")
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
    "bench_packed_attention.py",
    "bench_linear_logprob.py::test_cost_against_tokens",
)


def kernels(minutes: float, folder: Path, toy: bool) -> list[Command]:
    chosen = ("bench_token_rewards.py", "bench_ppo_loss.py") if toy else KERNEL_BENCHES
    argv = [PYTHON, "-m", "pytest", "-q", "-s", "-rfs", "--benchmark-disable", f"--junitxml={folder / 'kernels.xml'}"]
    # The last minute is left to the case in flight.
    deadline = time.time() + 60 * max(0.0, minutes - 1)
    scale = {} if toy else {"RTO_BENCH": "full"}
    argv += [str(BENCH / "kernels" / name) for name in chosen]
    return [Command(argv, {"RTO_BENCH_DEADLINE": str(deadline), "RTO_BENCH_DONE": str(folder / CASES), **scale})]


CASES = "cases.txt"
"""Names of the kernel benches that were measured, a line each; conftest.py writes and heeds it."""


def cases(folder: Path, _: list[str]) -> dict:
    """Measured cases of every command so far, and what this one failed or had no minutes for."""
    path, done = folder / "kernels.xml", folder / CASES
    measured = len(done.read_text().split()) if done.exists() else 0
    if not path.exists():
        return {"measured": measured, "stopped inside": "a case; what was measured before is kept"}
    every = list(ElementTree.parse(path).getroot().iter("testcase"))
    late = [c.get("name") for c in every if any("no minutes left" in x.get("message", "") for x in c.iter("skipped"))]
    return {
        "measured": measured,
        "not run": late,
        "failed": [c.get("name") for c in every if c.find("failure") is not None or c.find("error") is not None],
    }


def compile_ahead(minutes: float, folder: Path, toy: bool) -> list[Command]:
    small = ["--hidden", "32", "--vocab", "70", "--dtype", "float32", "--processes", "2", "--most", "3"] if toy else []
    env = {"TRITON_INTERPRET": "1"} if toy else {}
    return [script("kernels.compile_ahead", "--minutes", f"{minutes - 0.2:.2f}", *small, **env)]


def checks(minutes: float, folder: Path, toy: bool) -> list[Command]:
    return [script("kernels.checks", *(["--small"] if toy else []))]


def loop(minutes: float, folder: Path, toy: bool) -> list[Command]:
    cases = ["ppo", "generate"] if toy else []
    path = os.pathsep.join([str(ROOT / "tests"), os.environ["PYTHONPATH"]])
    (folder / "stages.json").unlink(missing_ok=True)
    stages = Command(
        [PYTHON, "tests/devices/dry_run.py", "--real", str(folder / "stages.json"), *cases], {"PYTHONPATH": path}
    )
    tiny = [
        PYTHON, "recipes/rto_tiny.py", "--iterations", "2", "--corpus-rows", "400", "--pairs", "64", "--prompts", "128",
        "--eval-prompts", "32", "--output-dir", str(folder / f"tiny-{time.time_ns()}"),
    ]  # fmt: skip
    return [stages] if toy else [stages, Command(tiny, {})]


def stages_run(folder: Path, outputs: list[str]) -> dict:
    """Cases that passed, and the last line of each that failed."""
    path = folder / "stages.json"
    if importlib.util.find_spec("deepspeed") is None:
        return {"reason": "deepspeed is not installed"}
    found = json.loads(path.read_text()) if path.exists() else {}
    bad = {name: error.strip().splitlines()[-1] for name, error in found.items() if error}
    return {"passed": len(found) - len(bad), "failed": bad, **({"recipe": outputs[1][-300:]} if outputs[1:] else {})}


def vllm(minutes: float, folder: Path, toy: bool) -> list[Command]:
    return [script("iteration.vllm_engine", "--shape", "toy" if toy else "llama-1b")]


def iteration(minutes: float, folder: Path, toy: bool) -> list[Command]:
    return [
        script(
            "iteration.measure",
            "--shape",
            "toy" if toy else "llama-1b",
            "--minutes",
            str(minutes),
            "--rollout",
            str(folder / "rollout.pt"),
        )
    ]


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


# "tests" and "determinism" fit three minutes together.
SECTIONS = {
    "tests": Section(2, 1, tests, counts),
    "determinism": Section(2, 0.5, determinism, last_lines),
    "compile": Section(3, 0.5, compile_ahead, last_lines),
    "ceilings": Section(1, 0.3, ceilings, last_lines),
    "checks": Section(3, 0.5, checks, last_lines),
    "kernels": Section(8.5, 1.5, kernels, cases),
    "loop": Section(5, 1.5, loop, stages_run),
    "iteration": Section(8.5, 3, iteration, last_lines),
    "vllm": Section(6, 3, vllm, last_lines),
    "largest": Section(6, 2, largest, last_lines),
    "sanitizer": Section(4, 2, sanitizer, hazards),
    "tune": Section(4, 1.5, tune, found_tiles),
}


class Progress:
    """Which sections are done at this commit, in a file that every command reads and writes."""

    def __init__(self, path: Path, commit: str) -> None:
        self.path, self.sections = path, {}
        try:
            before = json.loads(path.read_text())
        except (OSError, ValueError):
            before = {}
        if before.get("commit") == commit:
            self.sections = before["sections"]
        self.commit = commit

    def keep(self) -> None:
        """A kill at any moment leaves the old file or the new one."""
        aside = self.path.with_suffix(".tmp")
        aside.write_text(json.dumps({"commit": self.commit, "sections": self.sections}, indent=1) + "\n")
        os.replace(aside, self.path)

    def done(self, name: str) -> bool:
        return self.sections.get(name, {}).get("done", False)

    def attempts(self, name: str) -> int:
        """How often the section was started and cut."""
        return self.sections.get(name, {}).get("attempts", 0)

    def forget(self, name: str) -> None:
        self.sections.pop(name, None)

    def start(self, name: str) -> None:
        self.sections[name] = {"done": False, "attempts": self.attempts(name) + 1}
        self.keep()

    def end(self, name: str, record: dict) -> None:
        """A section that had no minutes, or not enough, is for the next command."""
        late = record["status"] == "stopped" and self.attempts(name) < ATTEMPTS
        self.sections[name]["done"] = not late
        self.keep()


PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _as_a_child() -> None:
    """A shell's background jobs ignore SIGINT, and what they start would too; and no section outlives its command."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with suppress(OSError, AttributeError):  # where there is no prctl, a killed command leaves its section running
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def run(command: Command, seconds: float, log: Path) -> tuple[int | None, str]:
    """(exit status, output); None where it was stopped at its limit, with every process it had started."""
    with log.open("a") as out:
        process = subprocess.Popen(
            command.argv, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1", **command.env}, stdout=out,
            stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_as_a_child,
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


def lacks_minutes(name: str, minutes: float, toy: bool) -> dict:
    """The record of a section that is not started for want of time; {} where there is enough."""
    worth = SECTIONS[name].worth
    if minutes >= (0.05 if toy else worth):
        return {}
    return {"status": "not run", "reason": f"{minutes:.1f} minutes are left, it wants {worth}"}


def run_section(name: str, minutes: float, folder: Path, toy: bool) -> dict:
    """The section's record: status (passed, failed, stopped, not run), seconds, and what it counted.

    "stopped" has more to do.
    """
    section, start = SECTIONS[name], time.monotonic()
    for old in (*folder.glob(f"{name}-*.log"), folder / f"{name}.xml"):
        old.unlink(missing_ok=True)
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
    if None in statuses or UNFINISHED in statuses or found.get("not run"):
        status = "stopped"
    elif not statuses or (statuses[-1] and "reason" in found):
        status = "not run"
    else:
        status = "passed" if not any(statuses) else "failed"
    if status == "failed" and outputs:
        print("\n".join(outputs[-1].splitlines()[-25:]), flush=True)
    return {"status": status, "seconds": round(time.monotonic() - start, 1), **found}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9, help="wall-clock minutes of this command")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--again", action="store_true", help="run the sections although they are done")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="folder of the results; default bench/results, for cpu its toy/")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    end = time.monotonic() + 60 * args.minutes
    toy = args.device == "cpu"
    out = (args.out or BENCH / "results" / ("toy" if toy else "")).resolve()
    logs = out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    os.environ |= {"RTO_BENCH_RESULTS": str(out), "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    if toy:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "RTO_BENCH": "toy", "RTO_BENCH_ROUNDS": "2"}

    sys.path.insert(0, str(ROOT))
    from bench import harness  # reads the environment that was just set

    if not toy and not harness.ON_GPU:
        sys.exit("gpu.py: no CUDA GPU is here; --device cpu tries the same code at toy sizes")
    progress = Progress(logs / "progress.json", f"{harness.commit()} on {harness.device_name()}")
    for name in args.sections if args.again else ():
        progress.forget(name)
    header = {
        "commit": harness.commit(),
        "versions": harness.versions(),
        "clocks as found": harness.clocks(),
        "toy": toy,
    }
    for key, value in header.items():
        harness.save(harness.RUN, key, value)
    failed = False
    for name in args.sections:
        if progress.done(name):
            print(f"{name}: done at this commit", flush=True)
            continue
        minutes = (end - time.monotonic()) / 60
        record = lacks_minutes(name, minutes, toy)
        if record and progress.attempts(name):
            continue  # what it had measured when it was cut stays in the results
        if not record:
            print(f"{name} ...", flush=True)
            begun = progress.attempts(name) > 0
            if name == "kernels" and not begun:
                (logs / CASES).unlink(missing_ok=True)
            os.environ["RTO_BENCH_RESUME"] = str(int(begun))
            progress.start(name)
            record = run_section(name, minutes, logs, toy)
            progress.end(name, record)
        harness.save("sections", name, record)
        failed |= record["status"] == "failed"
        shown = ", ".join(f"{k} {v}" for k, v in record.items() if k != "status" and v not in ([], ""))
        print(f"{name}: {record['status']} ({shown})", flush=True)
    print(f"results: {harness.results_path()}; logs: {logs}; tables: python bench/tables.py")
    left = [name for name in args.sections if not progress.done(name)]
    print(f"left for the same command: {', '.join(left)}" if left else "nothing is left at this commit")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
