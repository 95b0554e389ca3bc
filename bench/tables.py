"""README's benchmark tables and plots, made from bench/results/<device>.json.

    python bench/tables.py            rewrites README.md between <!-- bench:begin --> and <!-- bench:end -->
    python bench/tables.py --print    prints the tables instead

A ratio is ours over theirs, the median over interleaved rounds: below 1 is faster. Memory is the peak above
inputs and weight gradient. A contender whose result was wrong has no figure.
"""

import argparse
import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--print", action="store_true", help="print the tables, leave README.md alone")
    made = section()
    if parser.parse_args().print:
        print(made)
        return
    text = README.read_text()
    if BEGIN not in text or END not in text:
        raise SystemExit(f"README.md lacks {BEGIN} and {END}")
    head, _, rest = text.partition(BEGIN)
    README.write_text(f"{head}{BEGIN}\n{made}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
