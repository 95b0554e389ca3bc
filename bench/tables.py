"""The tables and plots of docs/performance.md, made from bench/results/<device>.json and bench/results/aot/*.md.

    python bench/tables.py            rewrites the page between its marks bench (CPUs), gpu and aot
    python bench/tables.py --print    prints the tables instead

A ratio is ours over theirs, the median over interleaved rounds: below 1 is faster. Memory is the peak above
inputs and weight gradient. A contender whose result was wrong has no figure. A floor is the time at the measured
ceilings. Results of a GPU (bench/gpu.py) come with the goals, a roofline plot and the end-to-end times; without
any, that part of the page stays as it is.
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
CURVE = "cost_against_tokens"
NO_KERNELS = ("run", "sections")


def number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}g}" if value < 1000 else f"{value:,.0f}"


def table(cases: dict[str, dict]) -> list[str]:
    lines = []
    for case, record in cases.items():
        floor = f", floor {number(record['floor_ms'])} ms" if record.get("floor_ms") else ""
        lines += [f"*{case}*, {record['shape'].get('dtype', 'float32').removeprefix('torch.')}{floor}", ""]
        if floor:
            lines += on_a_gpu(record)
            continue
        lines += ["| | ms | ours / it | peak MB | relative error |", "|---|---|---|---|---|"]
        for name, row in record["contenders"].items():
            if "failed" in row:
                lines.append(f"| {name} | no figure: {row['failed']} | | | |")
                continue
            error = "" if row["error"] is None else f"{row['error']:.0e}"
            cells = [number(row["ms"]), number(row["ratio"], 2), number(row["peak_mb"]), error]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    return lines


def on_a_gpu(record: dict) -> list[str]:
    """The contenders with what only a GPU's record has: floors, device time, launches, the spread."""
    lines = [
        "| | ms (spread) | of floor | on the device, ms | launches | ours / it | peak MB | relative error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in record["contenders"].items():
        if "failed" in row:
            lines.append(f"| {name} | no figure: {row['failed']} | | | | | | |")
            continue
        error = "" if row["error"] is None else f"{row['error']:.0e}"
        cells = [
            f"{number(row['ms'])} ({number(row['spread_ms'], 2)})", number(row.get("of_floor"), 2),
            number(row.get("device_ms")), number(row.get("launches")), number(row["ratio"], 2),
            number(row["peak_mb"]), error,
        ]  # fmt: skip
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


# The goals


class Goal(NamedTuple):
    """One of the goals that these kernels are built for; `value` reads it from the results."""

    text: str
    value: Callable[[dict], float]
    bound: float
    at_least: bool


def _case(results: dict, kernel: str, **shape: int) -> dict:
    """The contenders of the case of this shape; KeyError where it was not measured."""
    for record in results[kernel].values():
        if all(record["shape"].get(k) == v for k, v in shape.items()):
            return record["contenders"]
    raise KeyError(kernel)


LARGE = {"H": 4096, "V": 128256}
TOKENS = {"B": 128, "T": 1024}


GOALS = (
    Goal(
        "linear log-prob forward, N 8192: rate, as a share of the bare product's",
        lambda r: (rows := _case(r, "token_logprobs_forward", N=8192, **LARGE))["one product"]["ms"]
        / rows["ours"]["ms"],
        0.90, True,
    ),
    Goal(
        "three models' forward, in bare products",
        lambda r: (rows := _case(r, "fused_token_rewards", N=8192, **LARGE))["ours"]["ms"] / rows["one product"]["ms"],
        3.4, False,
    ),
    Goal(
        "extra memory of a forward, MB",
        lambda r: _case(r, "token_logprobs_forward", N=8192, **LARGE)["ours"]["peak_mb"], 64, False,
    ),
    Goal(
        "`fused_linear_ppo_loss` with gradients, N 4096, ms",
        lambda r: _case(r, "fused_linear_ppo_loss", N=4096, **LARGE)["ours"]["ms"], 17.3, False,
    ),
    Goal(
        "`token_logprobs` with gradients, N 4096, recomputed, ms",
        lambda r: _case(r, "token_logprobs", N=4096, **LARGE)["ours"]["ms"], 23.5, False,
    ),
    Goal(
        "`token_logprobs` with gradients, N 4096, probabilities kept, ms",
        lambda r: _case(r, "token_logprobs", N=4096, **LARGE)["ours, bf16 kept"]["ms"], 18.5, False,
    ),
    Goal(
        "log-prob error of bf16 eager PyTorch over ours",
        lambda r: (rows := _case(r, "token_logprobs", N=4096, **LARGE))["eager"]["errors"]["logp"]
        / rows["ours"]["errors"]["logp"],
        10, True,
    ),
    Goal(
        "logits-in log-probs with gradient: share of the copy bandwidth",
        lambda r: _case(r, "logprobs_from_logits", N=8192, V=128256)["ours"]["gb_per_s"]
        / r["run"]["ceilings"]["copy_gb_per_s"],
        0.90, True,
    ),
    Goal(
        "three models' logits to rewards: share of the copy bandwidth",
        lambda r: _case(r, "logits_token_rewards", N=8192, V=128256)["ours"]["gb_per_s"]
        / r["run"]["ceilings"]["copy_gb_per_s"],
        0.90, True,
    ),
    Goal(
        "rewards, GAE and moments at 128 × 1024: µs on the device",
        lambda r: _case(r, "rewards_gae", **TOKENS)["ours"]["device_ms"] * 1e3, 5, False,
    ),
    Goal(
        "PPO losses with gradients at 128 × 1024: µs on the device",
        lambda r: _case(r, "ppo_loss", **TOKENS)["ours"]["device_ms"] * 1e3, 5, False,
    ),
    Goal(
        "a whole iteration: tokens/s over the released data path's",
        lambda r: r["run"]["iteration"]["comparison"]["ratio to released"], 5, True,
    ),
)  # fmt: skip


def goals(results: dict) -> list[str]:
    lines = ["| goal | bound | measured | |", "|---|---|---|---|"]
    for goal in GOALS:
        bound = f"{'≥' if goal.at_least else '≤'} {goal.bound:g}"
        try:
            value = goal.value(results)
        except KeyError:
            lines.append(f"| {goal.text} | {bound} | not measured | |")
            continue
        met = value >= goal.bound if goal.at_least else value <= goal.bound
        lines.append(f"| {goal.text} | {bound} | {number(value)} | {'met' if met else '**missed**'} |")
    return [*lines, ""]


# A GPU's own section


def proofs(results: dict) -> list[str]:
    """What ran, what did not and why; the card as found."""
    run, lines = results["run"], []
    clocks = ", ".join(f"{k} {v}" for k, v in run.get("clocks as found", {}).items())
    lines += [f"Commit {run['commit']}. {clocks}.", ""]
    if ceilings := run.get("ceilings"):
        rate, copy = ceilings["matmul_tflops"], ceilings["copy_gb_per_s"]
        lines += [f"Ceilings: {rate:.0f} TFLOP/s (bf16 product), {copy:.0f} GB/s (copy, read + written).", ""]
    lines += ["| section | | seconds | |", "|---|---|---|---|"]
    for name, record in results.get("sections", {}).items():
        rest = {k: v for k, v in record.items() if k not in ("status", "seconds") and v not in ([], "")}
        words = "; ".join(f"{k}: {', '.join(v) if isinstance(v, list) else v}" for k, v in rest.items())
        lines.append(f"| {name} | {record['status']} | {number(record.get('seconds'))} | {words} |")
    return [*lines, ""]


def end_to_end(results: dict) -> list[str]:
    record = results["run"].get("iteration", {})
    if not record.get("paths"):
        return []
    shape, base = record["shape"], record["paths"]["ours"]["phases"]
    lines = [
        f"One RTO iteration, {shape['sequences']} sequences, {record['tokens']:,} tokens, random weights: hidden size "
        f"{shape['model']['hidden_size']}, {shape['model']['num_hidden_layers']} layers, vocabulary "
        f"{shape['model']['vocab_size']:,}; policy, reference, DPO model, critic and reward model of that shape. "
        f"Lengths: {record['lengths']}. Seconds (tokens/s); a phase's tokens are those of the sequences that a path "
        "ran, response tokens in rollout.",
        "",
        "| | sequences | " + " | ".join(base) + " | peak GB | tokens/s, iteration |",
        "|---" * (len(base) + 4) + "|",
    ]
    for name, path in record["paths"].items():
        phases = path["phases"]
        cells = []
        for phase in base:
            row = phases.get(phase)
            rate = f" ({number(row['tokens_per_s'])})" if row and row.get("tokens") else ""
            cells.append(f"{number(row['seconds'])}{rate}" if row else "as ours")
        peaks = [row["peak_gb"] for row in phases.values() if row.get("peak_gb")]
        cells += [number(max(peaks)) if peaks else "", number(record.get("comparison", {}).get(name))]
        lines.append(f"| {name} | {path['sequences']} | " + " | ".join(cells) + " |")
    lines += [f"| {name} | not run: {why} |" + " |" * (len(base) + 2) for name, why in record["not_run"].items()]
    return [*lines, ""]


def largest(results: dict) -> list[str]:
    record = results["run"].get("largest_batch")
    if not record:
        return []
    lines = [
        f"Policy of {record['parameters'] / 1e9:.2f} billion random weights, forward and backward in one micro-batch:",
        "", "| tokens | seconds | tokens/s | peak GB |", "|---|---|---|---|",
    ]  # fmt: skip
    rows = dict(record["forward and backward"])
    if step := record.get("step with offload"):
        rows[f"{step['tokens']}, with the optimiser's step on the host"] = step
    for tokens, row in rows.items():
        cells = (number(row["seconds"]), number(row["tokens_per_s"]), number(row["peak_gb"]))
        lines.append(f"| {tokens} | " + " | ".join(cells) + " |")
    lines += [f"| {name} | not run: {why} | | |" for name, why in record["not_run"].items()]
    return [*lines, ""]


def roofline(device: str, results: dict) -> list[str]:
    """Every case's rate against its operations a byte of least traffic, under the two measured ceilings."""
    ceilings = results["run"].get("ceilings")
    if not ceilings:
        return []
    pyplot = _pyplot(device)
    figure, panel = pyplot.subplots(figsize=(9, 4), layout="constrained")
    peak, bandwidth = ceilings["matmul_tflops"], ceilings["copy_gb_per_s"] / 1e3  # TFLOP/s, TB/s
    marks = iter("osD^v<>Ph*X")
    for kernel, cases in sorted(results.items()):
        points = [
            (intensity(record), row["of_floor"] * min(peak, intensity(record) * bandwidth))
            for record in cases.values()
            if kernel not in (*NO_KERNELS, CURVE) and intensity(record)
            for name, row in record["contenders"].items()
            if name == "ours" and "of_floor" in row
        ]
        if points:
            panel.plot(*zip(*points, strict=True), next(marks), label=kernel)
    span = [0.1, peak / bandwidth, 1e5]
    panel.plot(span, [min(peak, x * bandwidth) for x in span], color="black", linewidth=1)
    panel.set(xscale="log", yscale="log", xlabel="operations a byte (least traffic)", ylabel="TFLOP/s")
    panel.legend(frameon=False, fontsize=8)
    panel.set_title(f"{device}: ours under the measured ceilings", fontsize=10)
    path = RESULTS / f"{device}-roofline.svg"
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return [f"![Roofline]({os.path.relpath(path, PAGE.parent)})", ""]


def intensity(record: dict) -> float | None:
    """Operations a byte. Products: against operands and results; token and logits kernels: about 5 an element."""
    shape, flops, moved = record["shape"], record.get("flops"), record.get("moved")
    if flops:
        bytes_ = 2 * (shape["N"] * shape["H"] + shape["V"] * shape["H"])
        return flops / (2 * bytes_ if flops >= 6 * shape["N"] * shape["H"] * shape["V"] else bytes_)
    elements = shape["N"] * shape["V"] if "V" in shape else shape["B"] * shape["T"]
    return 5 * elements / moved if moved else None


def _pyplot(device: str):
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = device  # the same data gives the same file
    return pyplot


def curve(device: str, cases: dict[str, dict]) -> list[str]:
    """Plot time and memory against tokens; return the lines that show the picture."""
    pyplot = _pyplot(device)
    points = sorted((record["shape"]["N"], record["contenders"]) for record in cases.values())
    shape = next(iter(cases.values()))["shape"]
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for panel, key, label in (
        (panels[0], "ms", "milliseconds"),
        (panels[1], "peak_mb", "peak MB above inputs and dW"),
    ):
        for name in points[0][1]:
            drawn = [(n, rows[name][key]) for n, rows in points if rows[name].get(key) is not None]
            panel.plot(*zip(*drawn, strict=True), marker="o", label=name)
        panel.set(xlabel="thousand tokens", ylabel=label, xlim=(0, None), ylim=(0, None))
        panel.xaxis.set_major_formatter(lambda n, _: f"{n / 1000:g}")
    panels[0].legend(frameon=False)
    figure.suptitle(f"Linear log-prob, forward and backward, H {shape['H']}, V {shape['V']}", fontsize=10)
    path = RESULTS / f"{device}-tokens.svg"
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return [f"![Cost against tokens]({os.path.relpath(path, PAGE.parent)})", ""]


def section(path: Path) -> list[str]:
    """A device's results under its name."""
    results = json.loads(path.read_text())
    versions = results.get("run", {}).get("versions") or next(iter(next(iter(results.values())).values()))["versions"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [f"### {path.stem}", "", f"{packages}.", ""]
    kernels = []
    for kernel, cases in sorted(results.items()):
        if kernel == CURVE:
            kernels += curve(path.stem, cases)
        elif kernel not in NO_KERNELS:
            kernels += [f"**{kernel}**", "", *table(cases)]
    if "run" not in results:
        return lines + kernels
    lines += proofs(results) + goals(results) + end_to_end(results) + largest(results) + roofline(path.stem, results)
    return [*lines, "<details><summary>Every kernel and its peers</summary>", "", *kernels, "</details>", ""]


def devices(gpu: bool) -> str:
    """The sections of all GPUs or all CPUs with results; '' where there are none."""
    paths = [path for path in sorted(RESULTS.glob("*.json")) if path.stem.startswith("cpu") != gpu]
    return "\n".join(line for path in paths for line in section(path))


def compiled() -> str:
    """What `python -m rto_kernels.aot --markdown` printed, a file for each Triton, newest first."""
    return "\n".join(path.read_text() for path in sorted((RESULTS / "aot").glob("*.md"), reverse=True))


def between(text: str, name: str, made: str) -> str:
    """The text with what stands between the marks of `name` replaced."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if begin not in text or end not in text:
        raise SystemExit(f"{PAGE} lacks {begin} and {end}")
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n{made}\n{end}{rest.partition(end)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--print", action="store_true", help="print the tables, leave the page alone")
    # What there are no results for stays as it is.
    made = {k: v for k, v in (("bench", devices(False)), ("gpu", devices(True)), ("aot", compiled())) if v}
    if parser.parse_args().print:
        print("\n".join(made.values()))
        return
    text = PAGE.read_text()
    for name, lines in made.items():
        text = between(text, name, lines)
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
