"""Charts as inline SVG.

Text stays text and colours become the page's CSS variables, so that a chart follows the page's font and its
dark or light scheme. The names in the SVG are made unique, its namespaces and addresses left out.
"""

from __future__ import annotations

import html
import io
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

SIZE_IN = (4.0, 2.1)
WIDE_IN = (7.4, 3.3)
"""Width and height of a chart; its text is set for about 72 screen pixels an inch."""
PALETTE = 8
"""Series colours the page defines, --c0 .. --c7."""
CHARACTERS = 20_000
"""Characters shown of one text, such as a prompt."""
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_INK, _MUTED, _GRID = "#fe0101", "#fe0102", "#fe0103"  # placeholders for var(--ink), ...
_SERIES = tuple(f"#fe02{i:02x}" for i in range(PALETTE))
STYLE = {
    "svg.fonttype": "none",
    "font.size": 9.5,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": _GRID,
    "xtick.labelcolor": _MUTED,
    "ytick.color": _GRID,
    "ytick.labelcolor": _MUTED,
    "ytick.major.size": 0,
    "xtick.major.size": 3,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
}


@dataclass(frozen=True)
class Curve:
    """One named line. Curves of one name share a colour and a legend entry (seeds of one method, say)."""

    name: str
    x: Sequence[float]
    """[n] positions; empty with a single y = a dashed level across the chart."""
    y: Sequence[float | None]
    """[n] values; None and NaN leave a gap."""
    low: Sequence[float] = ()
    """[n] lower edge of a band around the line; empty = none."""
    high: Sequence[float] = ()
    """[n] its upper edge."""
    faint: bool = False
    """Drawn thin: a single seed behind its mean."""
    colour: int = -1
    """Series colour, 0 .. 7; -1 = by order of the names in the chart."""

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y) and not (len(self.x) == 0 and len(self.y) == 1):
            raise ValueError(f"Curve {self.name!r}: {len(self.x)} x for {len(self.y)} y")
        if len(self.low) != len(self.high) or len(self.low) not in (0, len(self.y)):
            raise ValueError(f"Curve {self.name!r}: low and high need {len(self.y)} values each")


@dataclass(frozen=True)
class Chart:
    """A picture with its words."""

    title: str
    curves: Sequence[Curve]
    x_label: str = "step"
    y_label: str = ""
    note: str = ""
    """One sentence on how to read it."""
    stacked: bool = False
    """Areas on top of each other; all curves share their x."""


def cut(text: str, characters: int) -> str:
    """The text's beginning, and how much of it is not shown."""
    return text if len(text) <= characters else f"{text[:characters]}… ({len(text) - characters:,} characters more)"


def visible(text: object) -> str:
    """Text cut at CHARACTERS, with what a browser would drop or let turn the writing made visible.

    Control characters but newline and tab become their pictures (U+2400 ..), invisible marks of writing direction and
    of lines their code points.
    """
    return _HIDDEN.sub(_picture, cut(str(text), CHARACTERS))


def esc(text: object) -> str:
    """Visible text for HTML."""
    return html.escape(visible(text), quote=True)


def _picture(match: re.Match[str]) -> str:
    code = ord(match[0])
    return chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else f"[U+{code:04X}]"


def figure_text(value: float) -> str:
    """A number as people write it, to four digits: 0.05, −1.25, 12,300, 1.5M, 5e−7."""
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if size == 0:
        text = "0"
    elif size < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        text = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    elif size >= 1e6:
        scale, unit = (1e9, "G") if size >= 1e9 else (1e6, "M")
        text = f"{value / scale:.4g}{unit}"
    elif size >= 1e3:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.4g}"
    return text.replace("-", "−")


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _draw_lines(ax: Axes, chart: Chart, colours: dict[str, str]) -> None:
    for curve in chart.curves:
        colour = colours[curve.name]
        y = [_number(v) for v in curve.y]
        if not len(curve.x):
            ax.axhline(y[0], color=colour, linewidth=1.4, dashes=(5, 3))
            continue
        if len(curve.low):
            ax.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)
        finite = [math.isfinite(v) for v in y]
        # A point between two gaps is a line of no length, which only a marker shows.
        around = zip([False, *finite[:-1]], finite, [*finite[1:], False], strict=True)
        lonely = [here and not (before or after) for before, here, after in around]
        marked = [i for i, one in enumerate(lonely) if one or len(y) <= 12]
        ax.plot(
            curve.x, y, color=colour, linewidth=0.8 if curve.faint else 1.7, alpha=0.45 if curve.faint else 1,
            marker="o", markersize=3.5 if len(y) > 1 else 6, markevery=marked,
        )  # fmt: skip


def _scale(values: Iterable[float]) -> tuple[float, float] | None:
    """Limits that give a flat curve some room; None where the default will do."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite or max(finite) - min(finite) > 1e-9 * max(1e-12, *map(abs, finite)):
        return None
    middle = finite[0]
    pad = abs(middle) * 0.1 or 0.5
    return (middle - pad, middle + pad)


def colours_by_name(curves: Iterable[Curve]) -> dict[str, int]:
    """Curve name -> series colour, in order of appearance unless a curve has its own."""
    colours: dict[str, int] = {}
    for curve in curves:
        if curve.name not in colours:
            colours[curve.name] = curve.colour if curve.colour >= 0 else len(colours) % PALETTE
    return colours


def draw(chart: Chart, key: str, colours: dict[str, int] | None = None, size_in: tuple[float, float] = SIZE_IN) -> str:
    """A chart as an HTML <figure>: caption, legend, inline SVG, and its data for the pointer.

    `key` makes the names inside the SVG unique on the page. `colours`: name -> series colour, to share
    between charts; None = by this chart's order.
    """
    series = colours or colours_by_name(chart.curves)
    names = list(dict.fromkeys(c.name for c in chart.curves))
    with rc_context({**STYLE, "svg.hashsalt": key}):
        figure = Figure(figsize=size_in, dpi=72, layout="constrained")
        figure.patch.set_alpha(0)
        ax = figure.add_subplot()
        ax.patch.set_alpha(0)
        if chart.stacked:
            ax.stackplot(
                list(chart.curves[0].x),
                [[0.0 if math.isnan(_number(v)) else float(v) for v in c.y] for c in chart.curves],
                colors=[_SERIES[series[c.name]] for c in chart.curves], alpha=0.8, linewidth=0,
            )  # fmt: skip
        else:
            _draw_lines(ax, chart, {n: _SERIES[series[n]] for n in names})
            limits = _scale(_number(v) for c in chart.curves for v in c.y)
            if limits:
                ax.set_ylim(*limits)
        _axes(ax, chart)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = clean_svg(out.getvalue(), key, _description(chart))
    return _figure(chart, svg, series, names, _pointer_data(ax, chart, series))


def _axes(ax: Axes, chart: Chart) -> None:
    steps = [x for c in chart.curves for x in c.x]
    whole = all(float(x).is_integer() for x in steps)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=whole, min_n_ticks=1, steps=[1, 2, 5, 10]))
    ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: figure_text(value)))
    ax.margins(x=0.01)
    if steps and min(steps) == max(steps):
        ax.set_xlim(steps[0] - 1, steps[0] + 1)
    ax.set_xlabel(chart.x_label)
    if chart.y_label:
        ax.set_ylabel(chart.y_label)


def _description(chart: Chart) -> str:
    """What a screen reader says of a chart."""
    parts = []
    for curve in chart.curves:
        y = [v for v in map(_number, curve.y) if math.isfinite(v)]
        if y:
            parts.append(f"{curve.name} from {figure_text(y[0])} to {figure_text(y[-1])}")
    return f"{chart.title} against {chart.x_label}: " + ("; ".join(parts) or "no finite value")


def clean_svg(svg: str, key: str, description: str) -> str:
    """matplotlib's SVG made fit to stand in a page: names unique, colours as variables, nothing to fetch."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{key}-\1"', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{key}-", svg)
    for name, placeholder in (("ink", _INK), ("muted", _MUTED), ("grid", _GRID)):
        svg = svg.replace(placeholder, f"var(--{name})")
    for i, placeholder in enumerate(_SERIES):
        svg = svg.replace(placeholder, f"var(--c{i})")
    svg = _HIDDEN.sub(_picture, svg)
    head = f'<svg role="img" aria-label="{esc(description)}"'
    return re.sub(r'^<svg width="[^"]*" height="[^"]*"', head, svg.strip(), count=1)


def _pointer_data(ax: Axes, chart: Chart, series: dict[str, int]) -> dict:
    """Values of every curve and the map from them to SVG units: x' = x0 + x1 * x, y' = y0 + y1 * y."""
    height = ax.figure.bbox.height
    (ox, oy), (ux, uy) = ax.transData.transform([(0.0, 0.0), (1.0, 1.0)])
    box = ax.get_window_extent()
    base = [0.0] * len(chart.curves[0].y) if chart.stacked else None
    curves = []
    for curve in chart.curves:
        if not len(curve.x) or curve.faint:
            continue
        y = [v if math.isfinite(v) else None for v in map(_number, curve.y)]
        entry = {
            "n": visible(curve.name),
            "c": series[curve.name],
            "x": list(curve.x),
            "y": [v and float(f"{v:.6g}") for v in y],
        }
        if base is not None:  # where the area's upper edge lies
            base = [b + (v or 0.0) for b, v in zip(base, y, strict=True)]
            entry["top"] = [float(f"{b:.6g}") for b in base]
        curves.append(entry)
    return {
        "x": [ox, ux - ox], "y": [height - oy, oy - uy], "label": visible(chart.x_label),
        "box": [box.x0, height - box.y1, box.x1, height - box.y0], "curves": curves,
    }  # fmt: skip


def _figure(chart: Chart, svg: str, series: dict[str, int], names: list[str], data: dict) -> str:
    legend = "".join(f'<li><i style="background:var(--c{series[n]})"></i>{esc(n)}</li>' for n in names)
    legend = f'<ul class="legend">{legend}</ul>' if len(names) > 1 else ""
    note = f"<p>{esc(chart.note)}</p>" if chart.note else ""
    points = html.escape(json.dumps(data, separators=(",", ":"), allow_nan=False), quote=True)
    title = esc(chart.title)
    return (
        f'<figure class="chart" data-points="{points}">'
        f"<figcaption><h3>{title}</h3>{note}{legend}</figcaption>"
        f'<div class="plot">{svg}</div></figure>'
    )
