"""Which metrics of a run share a chart, in which section, and with which words."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass

from rto_fast.report.charts import PALETTE, Chart, Curve

POINTS = 300
"""Points of a curve at most; longer runs are drawn as means over equal stretches of steps."""


@dataclass(frozen=True)
class Spec:
    """Which metrics share a chart. A pattern with * takes every match; the part in it names the curve."""

    title: str
    keys: tuple[str, ...]
    y_label: str = ""
    note: str = ""
    stacked: bool = False
    without: tuple[str, ...] = ()
    """Matches left out."""


_BETA = "beta1 · log(pi_dpo / pi_ref), clipped a token, summed over a response."
SECTIONS: tuple[tuple[str, tuple[Spec, ...]], ...] = (
    (
        "Training",
        (
            Spec("Loss", ("train/loss", "eval/loss")),
            Spec("Accuracy", ("train/accuracy", "eval/accuracy"), "share", "Pairs ranked as in the data."),
            Spec("Margin", ("train/margin", "eval/margin"), "", "Chosen minus rejected."),
            Spec("Gradient norm", ("train/grad_norm",), "", "Before clipping."),
            Spec("Learning rate", ("train/lr",)),
        ),
    ),
    (
        "Reward",
        (
            Spec("Score by source", ("reward/score", "reward/*"), "",
                 "Mean of a response; score is the weighted sum.", without=("reward/dpo", "reward/total")),
            Spec("True reward", ("true/reward",), "", "The task's own reward, which training never sees."),
            Spec("DPO token reward", ("reward/dpo",), "", _BETA),
            Spec("Total reward", ("reward/total",), "", "Sum of all token rewards: DPO, KL and score."),
        ),
    ),
    (
        "Distance from the reference",
        (
            Spec("KL of a response", ("kl/response",), "nats", "log(pi / pi_ref), summed over a response."),
            Spec("KL of a token", ("kl/token", "kl/k3"), "nats", "k3 estimates the same with less noise."),
            Spec("KL coefficient", ("kl/beta2",), "beta2"),
            Spec("Entropy of the policy", ("policy/entropy",), "nats a token"),
        ),
    ),
    (
        "Policy and critic updates",
        (
            Spec("Clip fraction", ("policy/clip_fraction", "critic/clip_fraction"), "share of tokens"),
            Spec("Ratio to the behaviour policy", ("policy/ratio_mean", "policy/ratio_max"), "pi / pi_old"),
            Spec("Move of an update", ("policy/kl_k3",), "nats a token", "k3 estimate of KL(behaviour | policy)."),
            Spec("Explained variance", ("critic/explained_variance",), "",
                 "1: the critic predicts the returns; 0: no better than their mean."),
            Spec("Policy loss", ("policy/loss",)),
            Spec("PTX loss", ("policy/ptx_loss",), "nats a token", "Mean negative log-prob of the supervised rows."),
            Spec("Value loss", ("critic/loss",)),
            Spec("Loss of the online token reward", ("online/loss",)),
            Spec("Accuracy of the online token reward", ("online/accuracy",), "share",
                 "Of outcomes or pairs, before the update; a half is chance."),
            Spec("Gradient norm", ("policy/grad_norm", "critic/grad_norm", "online/grad_norm"), "", "Before clipping."),
            Spec("Advantage", ("advantage/mean", "advantage/std"), "", "Before whitening."),
            Spec("Learning rate", ("policy/lr", "critic/lr", "online/lr")),
        ),
    ),
    (
        "Responses",
        (
            Spec("Length", ("response/length",), "tokens"),
            Spec("Truncated or empty", ("response/truncated", "response/empty"), "share"),
        ),
    ),
    (
        "Speed and memory",
        (
            Spec("Seconds a phase", ("time/*_s",), "seconds", stacked=True),
            Spec("Share of the time", ("time/*_share",), "of an iteration"),
            Spec("Tokens a second in each phase", ("rate/*_tokens_s",), "tokens/s"),
            Spec("Peak memory", ("memory/peak_gib",), "GiB"),
        ),
    ),
    (
        "Numerical health",
        (
            Spec("Sampler against trainer", ("sampler/logp_diff_mean", "sampler/logp_diff_max"), "nats",
                 "Log-prob of the sampled tokens as the sampler and the trainer see it."),
            Spec("Importance weights", ("sampler/weight_mean", "sampler/weight_clip_fraction"), "",
                 "Where the sampler's log-probs are the behaviour's: mean weight, and share of tokens at its cap."),
            Spec("Skipped steps", ("bad_steps",), "", "Non-finite losses, rewards or gradients so far."),
        ),
    ),
)  # fmt: skip
HIDDEN = ("step", "samples", "run/elapsed_s", "rate/tokens_s")
"""Row entries that are no curve of their own."""


def _short(key: str, pattern: str) -> str:
    """Curve name of `key`: what the pattern's * stands for, or policy/critic, or mean/max, or the last part."""
    if "*" in pattern:
        head, tail = pattern.split("*")
        return key.removeprefix(head).removesuffix(tail)
    group, _, name = key.partition("/")
    if name.endswith(("_mean", "_max")):
        return name.rpartition("_")[2]
    return group if group in ("policy", "critic", "online", "train", "eval") else (name or group)


def sections(metrics: Sequence[dict]) -> list[tuple[str, list[Chart]]]:
    """Rows of metrics.jsonl -> (section, charts); metrics that never had a value are left out.

    Metrics that no section names are drawn in a last one, one chart a prefix.
    """
    keys = list(dict.fromkeys(k for row in metrics for k, v in row.items() if isinstance(v, int | float)))
    keys = [k for k in keys if k not in HIDDEN]
    phases = [_short(k, "time/*_s") for k in keys if fnmatch.fnmatchcase(k, "time/*_s")]
    taken: set[str] = set()
    found = []
    for section, specs in SECTIONS:
        charts = []
        for spec in specs:
            named = {}
            for pattern in spec.keys:
                hits = [k for k in keys if fnmatch.fnmatchcase(k, pattern) and k not in spec.without]
                named.update({k: _short(k, pattern) for k in hits if k not in named})
            if named:
                taken.update(named)
                charts.append(_chart(spec, named, metrics, phases))
        if charts:
            found.append((section, charts))
    rest: dict[str, dict[str, str]] = {}
    for key in keys:
        if key not in taken:
            prefix = key.partition("/")[0]
            rest.setdefault(prefix, {})[key] = key.partition("/")[2] or key
    if rest:
        found.append(("Other figures", [_chart(Spec(p, ()), n, metrics, phases) for p, n in rest.items()]))
    return found


def _chart(spec: Spec, named: dict[str, str], metrics: Sequence[dict], phases: Sequence[str]) -> Chart:
    curves, note = [], spec.note
    for key, name in named.items():
        # A phase that a step lacks took no time; any other metric that it lacks leaves the line unbroken.
        points = [(row["step"], row.get(key, 0.0 if spec.stacked else None)) for row in metrics if "step" in row]
        if not spec.stacked:
            points = [p for p, row in zip(points, (r for r in metrics if "step" in r), strict=True) if key in row]
        x, y, width = thin(*zip(*points, strict=True))
        colour = phases.index(name) % PALETTE if key.startswith(("time/", "rate/")) and name in phases else -1
        curves.append(Curve(name, x, y, colour=colour))
        if width > 1 and key == next(iter(named)):
            note = f"{note} Each point is the mean of {width} steps.".strip()
    return Chart(spec.title, curves, y_label=spec.y_label, note=note, stacked=spec.stacked)


def thin(x: Sequence[float], y: Sequence[float | None]) -> tuple[list[float], list[float | None], int]:
    """At most POINTS points, each the mean of `width` finite neighbours: -> (x, y, width)."""
    width = math.ceil(len(x) / POINTS)
    if width <= 1:
        return list(x), list(y), 1
    xs, ys = [], []
    for start in range(0, len(x), width):
        part = [v for v in y[start : start + width] if v is not None and math.isfinite(v)]
        xs.append(sum(x[start : start + width]) / len(x[start : start + width]))
        ys.append(sum(part) / len(part) if part else None)
    return xs, ys, width
