"""Measuring contenders side by side: correct first, then time and memory in interleaved rounds, into JSON.

    compare(kernel, case, contenders, reference=..., tolerance=...)   what every bench_<kernel>.py calls

A contender is a function without arguments that returns {name: tensor}: its results and gradients. Each is
checked against `reference` before anything is timed, and one that fails has no figure. Rounds are
interleaved (A B C A B C), so that a busy machine is busy for all of them. Time: device events on a GPU,
else seconds of this process on one thread (`OMP_NUM_THREADS=1`), else the wall clock; on a GPU also what the
profiler counts on the device alone, and the launches. Memory: the peak above what was held before the call, from
CUDA's allocator, or from the kernel's high-water mark of resident pages. Once gpu.py has measured the ceilings,
each time stands beside its floor.
"""

import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

RESULTS = Path(os.environ.get("RTO_BENCH_RESULTS", Path(__file__).parent / "results"))
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# "quick" runs anywhere in minutes; "full" has the shapes that the goals are stated for.
FULL = os.environ.get("RTO_BENCH", "quick") == "full"
# 0: a single call of each gives its results, its time and its peak, for shapes of minutes.
ROUNDS = int(os.environ.get("RTO_BENCH_ROUNDS", "30" if ON_GPU else "5"))
# Names of peers, comma-separated, to be measured beside ours; empty: all.
ONLY = tuple(filter(None, os.environ.get("RTO_BENCH_ONLY", "").split(",")))

# A script whose minutes ended before its work ends with this status; gpu.py's next command takes it up.
UNFINISHED = 75

RUN = "run"  # in the results: what is no kernel's, such as the ceilings and the end-to-end times

Contender = Callable[[], dict[str, Tensor]]


def source(seed: int = 0) -> dict:
    """Keyword arguments of torch.randn and the like: drawn where they are used, not on the host a GPU waits for."""
    return {"generator": torch.Generator(DEVICE).manual_seed(seed), "device": DEVICE}


def device_name() -> str:
    if ON_GPU:
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    return f"cpu-{platform.machine()}-{torch.get_num_threads()}-thread"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in (
        "torch",
        "triton",
        "trl",
        "liger-kernel",
        "openrlhf",
        "verl",
        "quack-kernels",
        "cut-cross-entropy",
        "transformers",
        "deepspeed",
        "vllm",
    ):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit that is measured; $RTO_BENCH_COMMIT names it where the tree travels without its history."""
    if named := os.environ.get("RTO_BENCH_COMMIT"):
        return named
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return run.stdout.strip() or "unknown"


def clocks() -> dict[str, str]:
    """Clocks, temperature and power as found; nothing is ever set."""
    fields = ("clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw", "power.limit")
    if not ON_GPU or shutil.which("nvidia-smi") is None:
        return {}
    asked = ["nvidia-smi", f"--query-gpu={','.join((*fields, 'driver_version'))}", "--format=csv,noheader"]
    run = subprocess.run([*asked, f"--id={torch.cuda.current_device()}"], capture_output=True, text=True)
    values = run.stdout.strip().split(", ")
    return dict(zip((*fields, "driver"), values, strict=True)) if len(values) == len(fields) + 1 else {}


def on_device(contender: Contender, calls: int = 5) -> dict[str, float]:
    """{"device_ms", "launches"} of one call as the profiler sees the GPU alone; {} where there is none."""
    if not ON_GPU:
        return {}
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(calls):
                contender()
            torch.cuda.synchronize()
    except RuntimeError:  # a machine may forbid profiling; the other times stand without it
        return {}
    on_gpu = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [e for e in on_gpu if not getattr(e, "is_user_annotation", False)]
    total = sum(e.self_device_time_total for e in kernels)
    return {"device_ms": total / 1e3 / calls, "launches": len(kernels) / calls} if kernels else {}


def floor_ms(flops: float | None, moved: float | None) -> float | None:
    """The least time at the measured ceilings (matrix product, copy bandwidth); None before they are measured."""
    ceilings = read_results().get(RUN, {}).get("ceilings")
    if not ceilings or not (flops or moved):
        return None
    work = (flops or 0) / (ceilings["matmul_tflops"] * 1e12)
    return 1e3 * max(work, (moved or 0) / (ceilings["copy_gb_per_s"] * 1e9))


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{field} not in /proc/self/status")


def weighed(contender: Contender) -> tuple[dict[str, Tensor], float, int | None]:
    """(results, seconds, peak bytes above what was held before) of one call; None where memory cannot be read."""
    gc.collect()
    if ON_GPU:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        start = clock()
        results = contender()
        torch.cuda.synchronize()
        return results, clock() - start, torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # pages freed by earlier calls must not hide this one's
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _resident("VmRSS")
    except OSError:
        before = None
    start = clock()
    results = contender()
    took = clock() - start
    return results, took, None if before is None else max(0, _resident("VmHWM") - before)


def peak_bytes(contender: Contender) -> int | None:
    return weighed(contender)[2]


def clock() -> float:
    """Seconds of this process on one thread, else of the wall."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds(contender: Contender) -> float:
    if ON_GPU:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # Larger than any L2, and written between rounds, so that no contender finds its inputs in the cache.
        torch.empty(1 << 28, dtype=torch.int8, device="cuda").zero_()
        torch.cuda.synchronize()
        start.record()
        contender()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    start = clock()
    contender()
    return clock() - start


def errors(got: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """‖got − expected‖ / ‖expected‖ of every result; NaN never passes."""
    out = {}
    for name, truth in expected.items():
        # In slices: an fp64 copy of a d(weight) would dwarf what is measured.
        rows = zip(got[name].reshape(-1).split(1 << 22), truth.reshape(-1).split(1 << 22), strict=True)
        sums = [((a.double() - b.double()).square().sum(), b.double().square().sum()) for a, b in rows]
        difference, size = (float(sum(column)) for column in zip(*sums, strict=True))
        out[name] = (difference / size) ** 0.5 if size else difference**0.5
    return out


def compare(
    kernel: str,
    case: str,
    contenders: dict[str, Contender],
    *,
    reference: Contender,
    tolerance: float | dict[str, float],
    flops: float | None = None,
    moved: float | None = None,
    held: int = 0,
    shape: dict | None = None,
    rounds: int = ROUNDS,
    floors: tuple[str, ...] = (),
) -> dict:
    """Check, time and weigh the contenders; print a table, record it, return the record.

    tolerance: the largest relative error allowed, for all or by contender. flops and moved (bytes) are the
    fewest the job needs, for the achieved rates. held: bytes of results that every contender returns (such as
    d(weight)), taken off its peak. floors: contenders that do only the unavoidable part of the job, and so
    have nothing to check.
    """
    if ONLY:
        contenders = {n: c for n, c in contenders.items() if n.startswith("ours") or n in ONLY}
    expected = {name: x.clone() for name, x in reference().items()}
    rows: dict[str, dict] = {}
    times: dict[str, list[float]] = {}
    peaks: dict[str, int | None] = {}
    for name, contender in contenders.items():
        if name in floors:
            rows[name] = {"error": None}
            _, took, peaks[name] = weighed(contender)
            times[name] = [took]
            continue
        limit = tolerance[name] if isinstance(tolerance, dict) else tolerance
        try:
            results, took, peaks[name] = weighed(contender)
            times[name] = [took]
            error = errors(results, expected)
        except Exception as problem:  # a peer may fail in any way; ours is asserted on below
            rows[name] = {"failed": f"{type(problem).__name__}: {problem}".splitlines()[0][:200]}
            continue
        worst = max(error.values())
        failed = {} if worst <= limit else {"failed": f"relative error {worst:.2g} > {limit:.2g}"}
        rows[name] = {"error": worst, "errors": error} | failed
    del expected
    right = [name for name, row in rows.items() if "failed" not in row]
    for name in right:
        peak = peak_bytes(contenders[name]) if rounds else peaks[name]
        rows[name]["peak_mb"] = None if peak is None else max(0, peak - held) / 1e6
    times = {name: [] if rounds else times[name] for name in right}
    for _ in range(rounds):
        for name in right:
            times[name].append(seconds(contenders[name]))
    floor = floor_ms(flops, moved)
    for name in right:
        median = statistics.median(times[name])
        rows[name] |= {"ms": median * 1e3, "spread_ms": (max(times[name]) - min(times[name])) * 1e3}
        rows[name] |= on_device(contenders[name])
        if floor:
            rows[name]["of_floor"] = floor / rows[name]["ms"]
        if "ours" in times:
            rows[name]["ratio"] = statistics.median(a / b for a, b in zip(times["ours"], times[name], strict=True))
        if flops:
            rows[name]["tflops"] = flops / median / 1e12
        if moved:
            rows[name]["gb_per_s"] = moved / median / 1e9
    record = {
        "shape": shape or {},
        "rounds": rounds,
        "flops": flops,
        "moved": moved,
        "floor_ms": floor,
        "clocks": clocks(),
        "commit": commit(),
        "versions": versions(),
        "contenders": rows,
    }
    save(kernel, case, record)
    show(kernel, case, record)
    assert "failed" not in rows["ours"], f"{kernel} {case}: {rows['ours']['failed']}"
    return record


def results_path() -> Path:
    return RESULTS / f"{device_name()}.json"


def read_results() -> dict:
    path = results_path()
    return json.loads(path.read_text()) if path.exists() else {}


def save(kernel: str, case: str, record: object) -> None:
    """Put one record into the device's results; a kill at any moment leaves the old file or the new one."""
    everything = read_results()
    everything.setdefault(kernel, {})[case] = record
    RESULTS.mkdir(parents=True, exist_ok=True)
    aside = results_path().with_suffix(".tmp")
    aside.write_text(json.dumps(everything, indent=1, ensure_ascii=False) + "\n")
    os.replace(aside, results_path())


def resumed(key: str) -> dict:
    """What an earlier command has put under this key of the run, where gpu.py goes on with it; else {}."""
    return read_results().get(RUN, {}).get(key, {}) if os.environ.get("RTO_BENCH_RESUME") == "1" else {}


def show(kernel: str, case: str, record: dict) -> None:
    print(f"\n{kernel}: {case}")
    print(f"  {'contender':28} {'ms':>10} {'of floor':>8} {'ours/it':>8} {'peak MB':>9} {'error':>9}", flush=True)
    for name, row in record["contenders"].items():
        if "failed" in row:
            print(f"  {name:28} {row['failed']}")
            continue
        peak = "" if row["peak_mb"] is None else f"{row['peak_mb']:9.1f}"
        error = "" if row["error"] is None else f"{row['error']:9.1e}"
        floor, ratio = (f"{row[k]:8.2f}" if k in row else "" for k in ("of_floor", "ratio"))
        print(f"  {name:28} {row['ms']:10.3f} {floor:>8} {ratio:>8} {peak:>9} {error:>9}", flush=True)


def gradients(outputs: dict[str, Tensor], ups: dict[str, Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """{outputs, and d_<leaf> of Σ up·output}: what a contender returns."""
    total = [(outputs[name], up) for name, up in ups.items()]
    grads = torch.autograd.grad([x for x, _ in total], list(leaves.values()), [up for _, up in total])
    done = {name: x.detach() for name, x in outputs.items()}
    return done | {f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
