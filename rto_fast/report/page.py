"""report.html: what a run did, in one file that needs no network.

    rto-fast report RUN_DIR     builds it again from metrics.jsonl and samples.jsonl

The page shows end figures, settings, comparisons and tables (when given), every curve, and sampled responses
whose tokens are coloured by token reward, advantage, DPO reward, KL or value; before them what the token rewards of all
kept responses lean on.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rto_fast.logs.files import METRICS, REPORT, RUN, SAMPLES, duration, read_metrics, write_atomic
from rto_fast.redact import redacted
from rto_fast.report.assets import CSP, CSS, JS
from rto_fast.report.audit import Audit, audit, bound_of, grids, of_samples
from rto_fast.report.charts import WIDE_IN, Chart, colours_by_name, cut, draw, esc, figure_text
from rto_fast.report.samples import TOKEN_FIELDS, ReportSample, read_samples, special_text
from rto_fast.report.sections import sections

QUANTITIES = {
    "token_reward": ("token reward", "DPO reward − beta2 · KL, and the score at the last token: what RTO optimises."),
    "advantage": ("advantage", "GAE: how much better the token did than the critic had expected; its credit."),
    "dpo_reward": ("DPO reward", "beta1 · log(pi_dpo / pi_ref), clipped: the dense part of the token reward."),
    "kl": ("KL", "log(pi / pi_ref) in nats: positive where the policy likes the token more than the reference does."),
    "value": ("value", "The critic's estimate of the reward still to come, before the token."),
}
"""Per-token figures of a `ReportSample`: label and what it means."""
assert tuple(QUANTITIES) == TOKEN_FIELDS

QUANTILE = 0.95
"""Share of the tokens inside the colour scale; the rest, such as a score at the last token, saturate."""
TOKEN_CHARACTERS = 1_000
"""Characters shown of one token."""
OPACITY = 0.78
"""Of a token at the scale's end; less keeps the text readable. The page's script has the same."""

HEADLINES = (
    ("reward/score", "score"),
    ("true/reward", "true reward"),
    ("reward/dpo", "DPO token reward"),
    ("kl/response", "KL, nats"),
    ("response/length", "response length"),
    ("train/loss", "training loss"),
    ("eval/loss", "evaluation loss"),
    ("eval/accuracy", "evaluation accuracy"),
    ("train/accuracy", "training accuracy"),
    ("rate/tokens_s", "tokens/s"),
    ("memory/peak_gib", "peak memory, GiB"),
)
"""Metrics shown as end figures, in order, and their labels."""


@dataclass(frozen=True)
class Table:
    """A results table; the first column names the row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    best: int = -1
    """Row to set off; -1 = none."""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"Table {self.title!r}: {len(row)} cells for {len(self.columns)} columns: {row}")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def end_figures(metrics: Sequence[dict]) -> dict[str, str]:
    """Label -> last value and, after a newline, the first one: the summary of a run's metrics."""
    figures: dict[str, str] = {}
    if not metrics:
        return figures
    figures["steps"] = f"{metrics[-1].get('step', len(metrics)):,}"
    elapsed = metrics[-1].get("run/elapsed_s")
    if elapsed is not None:
        figures["steps"] += f"\nin {duration(elapsed)}"
    samples = next((r["samples"] for r in reversed(metrics) if r.get("samples") is not None), None)
    if samples is not None:
        figures["responses drawn"] = f"{samples:,.0f}"
    for key, label in HEADLINES:
        values = [r[key] for r in metrics if r.get(key) is not None]
        if values:
            figures[label] = figure_text(values[-1])
            if len(values) > 1 and not key.startswith(("rate/", "memory/")):
                figures[label] += f"\nat first {figure_text(values[0])}"
    return figures


def write_report(
    path: Path | str,
    *,
    title: str,
    summary: Mapping[str, str] | None = None,
    metrics: Sequence[dict] = (),
    samples: Sequence[ReportSample] = (),
    settings: Mapping[str, object] | None = None,
    subtitle: str = "",
    comparison: Sequence[Chart] = (),
    tables: Sequence[Table] = (),
    audited: Audit | None = None,
) -> Path:
    """Writes the page atomically and returns its path.

    summary: end figures, label -> value (after a newline: small print); None = taken from `metrics`.
    metrics: rows of metrics.jsonl; settings: the run's configuration. Sections without content are left out.
    In `comparison` curves of one name have one colour in all charts.
    """
    parts: list[tuple[str, str]] = []
    if tables:
        parts.append(("Results", "".join(_table(t) for t in tables)))
    if comparison:
        colours = colours_by_name(c for chart in comparison for c in chart.curves)
        drawn = "".join(draw(chart, f"x{i}", colours, WIDE_IN) for i, chart in enumerate(comparison))
        parts.append(("Comparison", f'<div class="charts wide">{drawn}</div>'))
    for s, (name, charts) in enumerate(sections(metrics)):
        drawn = "".join(draw(chart, f"c{s}-{i}") for i, chart in enumerate(charts))
        parts.append((name, f'<div class="charts">{drawn}</div>'))
    if audited:
        parts.append(("Token rewards", "".join(_table(Table(*grid)) for grid in grids(audited))))
    if samples:
        parts.append(("Sampled responses", _samples(samples)))

    tiles = "".join(map(_tile, (end_figures(metrics) if summary is None else summary).items()))
    links = "".join(f'<a href="#{_slug(name)}">{esc(name)}</a>' for name, _ in parts)
    body = "".join(f'<section id="{_slug(name)}"><h2>{esc(name)}</h2>{content}</section>' for name, content in parts)
    body = body or '<p class="empty">Nothing has been logged yet.</p>'
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{esc(CSP)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{esc(title)}</title><style>{CSS}</style></head>\n<body><header><h1>{esc(title)}</h1>"
        + (f'<p class="subtitle">{esc(subtitle)}</p>' if subtitle else "")
        + (f'<dl class="tiles">{tiles}</dl>' if tiles else "")
        + (_settings(settings) if settings else "")
        + (f'<nav aria-label="Sections">{links}</nav>' if len(parts) > 1 else "")
        + f"</header>\n<main>{body}</main>\n"
        f"<footer>Written by rto_fast. This file is whole in itself.</footer><script>{JS}</script></body></html>\n"
    )
    # A lone surrogate, which half an emoji decodes to, has no UTF-8.
    write_atomic(path, page.encode("utf-8", "replace").decode("utf-8"))
    return Path(path)


def _tile(item: tuple[str, str]) -> str:
    label, value = item
    main, _, small = str(value).partition("\n")
    small = f"<small>{esc(small)}</small>" if small else ""
    return f'<div class="tile"><dt>{esc(label)}</dt><dd>{esc(main)}{small}</dd></div>'


def _setting_text(value: object) -> str:
    if isinstance(value, str):
        return value or "(empty)"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "(none)"
    return str(value)


def _settings(settings: Mapping[str, object]) -> str:
    rows = "".join(f"<div><dt>{esc(k)}</dt><dd>{esc(_setting_text(v))}</dd></div>" for k, v in settings.items())
    return f'<details class="settings"><summary>{len(settings)} settings</summary><dl>{rows}</dl></details>'


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{esc(c)}</th>' for c in table.columns)
    rows = "".join(
        ('<tr class="best">' if i == table.best else "<tr>")
        + f'<th scope="row">{esc(row[0])}</th>'
        + "".join(f"<td>{esc(c)}</td>" for c in row[1:])
        + "</tr>"
        for i, row in enumerate(table.rows)
    )
    note = f"<p>{esc(table.note)}</p>" if table.note else ""
    return (
        f'<div class="table"><table><caption>{esc(table.title)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table>{note}</div>"
    )


def colour_scale(values: Sequence[float]) -> float:
    """Half-width of the colour scale, two digits: the QUANTILE of |values|, or their maximum where that is 0."""
    sizes = sorted(abs(v) for v in values if math.isfinite(v))
    if not sizes or sizes[-1] == 0:
        return 1.0
    scale = sizes[math.ceil(QUANTILE * len(sizes)) - 1] or sizes[-1]
    return float(f"{scale:.2g}")


def _samples(samples: Sequence[ReportSample]) -> str:
    scales = {f: colour_scale([v for s in samples for v in getattr(s, f)]) for f in QUANTITIES}
    first = next(iter(QUANTITIES))
    radios = "".join(
        f'<label><input type="radio" name="quantity" value="{k}" data-scale="{scales[f]!r}" '
        f'data-limit="{esc(figure_text(scales[f]))}" data-meaning="{esc(meaning)}"'
        f"{' checked' if f == first else ''}>{esc(label)}</label>"
        for k, (f, (label, meaning)) in enumerate(QUANTITIES.items())
    )
    limit = esc(figure_text(scales[first]))
    bar = (
        f'<div class="bar"><fieldset class="switch"><legend>Colour tokens by</legend>{radios}</fieldset>'
        f'<div class="scale"><span class="ramp"><span id="low">≤ −{limit}</span><i></i>'
        f'<span id="high">≥ +{limit}</span></span><span id="meaning">{esc(QUANTITIES[first][1])}</span></div></div>'
    )
    return bar + "".join(_response(s, scales[first]) for s in samples)


def _response(sample: ReportSample, scale: float) -> str:
    label = f'<span class="label">{esc(sample.label)}</span>' if sample.label else ""
    figures = [("step", f"{sample.step:,}"), ("score", figure_text(sample.score))]
    figures += [
        (name, figure_text(sum(getattr(sample, field))))
        for name, field in (("token rewards", "token_reward"), ("DPO", "dpo_reward"), ("KL", "kl"))
    ]
    figures += [("tokens", f"{len(sample.tokens):,}")]
    figures += [(name, figure_text(value)) for name, value in sample.extra.items()]
    head = label + "".join(f"<span>{esc(name)} <b>{esc(value)}</b></span>" for name, value in figures)
    if sample.truncated:
        head += '<span class="cut">cut at the length limit</span>'
    tokens = "".join(_token(sample, i, scale) for i in range(len(sample.tokens)))
    tokens = tokens or '<span class="empty">an empty response</span>'
    hint = "Point at a token, or step through with the arrow keys, for its figures." if sample.tokens else ""
    return (
        f'<article class="response"><header>{head}</header>'
        f'<div class="prompt" aria-label="prompt">{esc(sample.prompt)}</div>'
        f'<div class="tokens" role="group" aria-label="response">{tokens}</div>'
        f'<p class="readout" aria-live="polite">{hint}</p></article>'
    )


def _token(sample: ReportSample, i: int, scale: float) -> str:
    values = [float(getattr(sample, f)[i]) for f in QUANTITIES]
    reward = values[0]
    finite = math.isfinite(reward)
    kind = "x" if not finite else "p" if reward > 0 else "n" if reward < 0 else ""
    opacity = min(1.0, abs(reward) / scale) * OPACITY if finite else 0.0
    text = sample.tokens[i]
    special = " s" if special_text(text) else ""
    figures = ", ".join(f"{label} {signed(v)}" for (label, _), v in zip(QUANTITIES.values(), values, strict=True))
    title = f"{i + 1}/{len(sample.tokens)} {json.dumps(cut(text, TOKEN_CHARACTERS), ensure_ascii=False)}: {figures}"
    data = " ".join(f"{v:.5g}" if math.isfinite(v) else "NaN" for v in values)
    return (
        f'<span class="t {kind}{special}" tabindex="{0 if i == 0 else -1}" style="--a:{opacity:.3f}" '
        f'data-v="{data}" title="{esc(title)}">{_token_html(text)}</span>'
    )


def signed(value: float) -> str:
    """Five significant digits with a sign; `not finite` for NaN and infinities."""
    return f"{value:+.5g}".replace("-", "−") if math.isfinite(value) else "not finite"


def _token_html(text: str) -> str:
    """A token with its spaces, tabs and newlines made visible; a newline also breaks the line."""
    if not text:
        return "<u>∅</u>"
    # <wbr>: the line may break where the space is, since the dot in its place is a letter to the browser.
    marks = {" ": "<wbr><u>·</u>", "\t": "<u>⇥\t</u>", "\n": "<u>↵</u>\n"}
    return "".join(marks.get(c) or esc(c) for c in cut(text, TOKEN_CHARACTERS))


def pick_samples(samples: Sequence[ReportSample], limit: int) -> list[ReportSample]:
    """At most `limit` samples: a quarter from the first iteration, the rest from the last ones, newest first."""
    if len(samples) <= limit:
        return list(reversed(samples))
    early = [s for s in samples if s.step == samples[0].step][: limit // 4]
    return list(reversed(samples[len(samples) - (limit - len(early)) :])) + early


def report_run(run_dir: Path | str, *, title: str = "", limit: int = 16) -> Path:
    """Builds RUN_DIR/report.html from the run's files and returns its path; at most `limit` responses are shown.

    Raises FileNotFoundError when the folder holds no run, ValueError for a malformed file.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not (folder / METRICS).exists():
        raise FileNotFoundError(f"{folder}: holds no run (no {METRICS})")
    run: dict[str, Any] = {"stage": "run", "config": {}}
    if (folder / RUN).exists():
        try:
            run |= json.loads((folder / RUN).read_text(encoding="utf-8"))
        except (ValueError, TypeError):
            raise ValueError(f"{folder / RUN}: not a JSON object") from None
    samples = read_samples(folder / SAMPLES)
    return write_report(
        folder / REPORT,
        title=title or f"{run['stage']}: {folder.resolve().name}",
        subtitle=str(folder.resolve()),
        settings=redacted(run["config"]),
        metrics=read_metrics(folder / METRICS),
        samples=pick_samples(samples, limit),
        audited=audit(of_samples(samples), bound_of(run["config"])),
    )
