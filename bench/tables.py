"""README's benchmark tables and plots, made from bench/results/<device>.json and bench/results/aot/*.md.

    python bench/tables.py            rewrites README.md between the marks <!-- bench:begin --> ... <!-- bench:end -->
                                      and <!-- aot:begin --> ... <!-- aot:end -->
    python bench/tables.py --print    prints the tables instead

A ratio is ours over theirs, the median over interleaved rounds: below 1 is faster. Memory is the peak above
inputs and weight gradient. A contender whose result was wrong has no figure.
"""

import argparse
import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
CURVE = "cost_against_tokens"


def number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}g}" if value < 1000 else f"{value:,.0f}"


def table(cases: dict[str, dict]) -> list[str]:
    lines = []
    for case, record in cases.items():
        lines += [f"*{case}*, {record['shape'].get('dtype', 'float32').removeprefix('torch.')}", ""]
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


def curve(device: str, cases: dict[str, dict]) -> list[str]:
    """Plot time and memory against tokens; return the lines that show the picture."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = device  # the same data gives the same file
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
    return [f"![Cost against tokens]({path.relative_to(README.parent)})", ""]


def section() -> str:
    lines = []
    for path in sorted(RESULTS.glob("*.json")):
        kernels = json.loads(path.read_text())
        some = next(iter(next(iter(kernels.values())).values()))
        packages = ", ".join(f"{name} {version}" for name, version in some["versions"].items())
        lines += [f"### {path.stem}", "", f"{packages}.", ""]
        for kernel, cases in sorted(kernels.items()):
            if kernel == CURVE:
                lines += curve(path.stem, cases)
            else:
                lines += [f"**{kernel}**", "", *table(cases)]
    return "\n".join(lines)


def compiled() -> str:
    """What `python -m rto_kernels.aot --markdown` printed, a file for each Triton, newest first."""
    return "\n".join(path.read_text() for path in sorted((RESULTS / "aot").glob("*.md"), reverse=True))


def between(text: str, name: str, made: str) -> str:
    """The text with what stands between the marks of `name` replaced."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if begin not in text or end not in text:
        raise SystemExit(f"README.md lacks {begin} and {end}")
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n{made}\n{end}{rest.partition(end)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--print", action="store_true", help="print the tables, leave README.md alone")
    made = {"bench": section(), "aot": compiled()}
    if parser.parse_args().print:
        print("\n".join(made.values()))
        return
    text = README.read_text()
    for name, lines in made.items():
        text = between(text, name, lines)
    README.write_text(text)


if __name__ == "__main__":
    main()
