"""The report's HTML and SVG without a browser: well-formed, escaped, self-contained, rebuilt from a run's files."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from loop_helpers import ROOT

from rto_fast.logs.run_logger import RunLogger
from rto_fast.report.__main__ import main
from rto_fast.report.charts import Chart, Curve, draw, figure_text
from rto_fast.report.page import Table, colour_scale, end_figures, pick_samples, report_run, write_report
from rto_fast.report.samples import ReportSample, append_samples
from rto_fast.report.sections import POINTS, sections, thin

VOID = {"meta", "br", "input", "wbr", "link", "img", "hr"}
HOSTILE = '"><script>alert(1)</script><img src=https://evil.example/x onerror=alert(2)>'


class Page(HTMLParser):
    """Checks that tags nest, and collects tags, ids and text."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.ids, self.title = [], [], [], ""
        self.feed(Path(path).read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [v for k, v in attrs if k == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["title"]:
            self.title += data

    def all(self, tag, **attrs):
        return [a for t, a in self.tags if t == tag and all(a.get(k) == v for k, v in attrs.items())]


def rows(n=6):
    return [
        {
            "step": s, "samples": 64 * s, "reward/score": 0.1 * s, "reward/rm": 0.08 * s, "reward/dpo": 0.02 * s,
            "kl/response": 1.5 * s, "policy/lr": 5e-7, "time/rollout_s": 2.0, "rate/rollout_tokens_s": 1500.0,
            "custom/one": 1.0 * s, "custom/two": 2.0 * s, "run/elapsed_s": 3.0 * s,
        }
        for s in range(1, n + 1)
    ]  # fmt: skip


def sample(tokens=("One", " day", ",\n", "</s>"), step=1, **changes):
    n = len(tokens)
    fields = {
        "prompt": "Tell me.\n", "tokens": list(tokens), "token_reward": [0.1 * (-1) ** i for i in range(n)],
        "advantage": [0.5] * n, "dpo_reward": [-0.01] * n, "kl": [0.2] * n, "value": [0.0] * n, "score": 1.25,
        "truncated": False, "step": step, "extra": {"rm": 1.0},
    }  # fmt: skip
    return ReportSample(**{**fields, **changes})


def write(tmp_path, **content):
    path = write_report(tmp_path / "deep" / "report.html", **{"title": "A run", **content})
    return Page(path), path.read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_names_are_unique(tmp_path):
    page, text = write(tmp_path, metrics=rows(2), samples=[sample(), sample()], subtitle="runs/x")
    assert page.title == "A run"
    assert len(page.ids) == len(set(page.ids))
    used = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text))
    assert {a or b for a, b in used} <= set(page.ids)
    names = [a["href"] for a in page.all("a")]
    assert "#reward" in names
    assert "#sampled-responses" in names
    assert "#other-figures" in names


def test_the_page_fetches_nothing_and_its_policy_forbids_it(tmp_path):
    page, text = write(tmp_path, metrics=rows(2), samples=[sample()])
    assert "http://" not in text
    assert "https://" not in text
    assert not [a for _, a in page.tags if "src" in a]
    assert not page.all("link")
    (policy,) = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")


def test_text_from_outside_is_escaped_everywhere(tmp_path):
    hostile = sample([HOSTILE, "&amp;"], prompt=HOSTILE, label=HOSTILE, extra={HOSTILE: 1.0})
    page, text = write(
        tmp_path, title=HOSTILE, subtitle=HOSTILE, summary={HOSTILE: HOSTILE}, settings={HOSTILE: HOSTILE},
        samples=[hostile], metrics=[{"step": 1, f"reward/{HOSTILE}": 1.0, HOSTILE: 2.0}],
        comparison=[Chart(HOSTILE, [Curve(HOSTILE, [0, 1], [0, 1])], HOSTILE, HOSTILE, HOSTILE)],
        tables=[Table(HOSTILE, [HOSTILE], [[HOSTILE]], HOSTILE)],
    )  # fmt: skip
    assert page.title == HOSTILE
    assert len(page.all("script")) == 1
    assert not page.all("img")
    assert "&amp;amp;" in text


def test_special_characters_of_tokens_are_shown(tmp_path):
    tokens = [" the", "a\nb", "\t", "", "</s>", "<|eot_id|>", "\x00\x1b\x7f", "\ud83d", "é"]
    page, text = write(tmp_path, samples=[sample(tokens)])
    for shown in ("<u>·</u>the", "a<u>↵</u>\nb", "<u>⇥\t</u>", "<u>∅</u>", "␀␛␡", "é"):
        assert shown in text
    special = [a for a in page.all("span") if a.get("class", "").endswith(" s")]
    assert len(special) == 2
    assert "\x00" not in text


def test_turned_writing_and_huge_texts(tmp_path):
    """Marks that turn the writing are named wherever they stand; a token and a prompt of megabytes are cut."""
    turned = "safe\u202eexe.txt\u2066\u200f\x9b"
    hostile = sample([turned, "a" * 2_000_000], prompt=turned + "b" * 2_000_000, label=turned, extra={turned: 1.0})
    page, text = write(
        tmp_path, title=turned, subtitle=turned, summary={turned: turned}, settings={turned: "c" * 2_000_000},
        samples=[hostile], tables=[Table(turned, [turned], [[turned]], turned)],
        comparison=[Chart(turned, [Curve(turned, [0, 1], [0, 1])], turned, turned, turned)],
    )  # fmt: skip
    assert not re.search("[\x80-\x9f\u200f\u202e\u2066]", text)
    assert text.count("[U+202E]") >= 10
    data = [json.loads(a["data-points"]) for a in page.all("figure")]  # what the pointer shows
    shown = "safe[U+202E]exe.txt[U+2066][U+200F][U+009B]"
    assert [(chart["label"], chart["curves"][0]["n"]) for chart in data if chart["label"] != "step"] == [(shown, shown)]
    assert "(1,999,000 characters more)" in text
    assert len(text) < 300_000


def test_tokens_carry_their_figures_sign_and_title(tmp_path):
    page, _ = write(tmp_path, samples=[sample(["a", "b", "c"], token_reward=[0.05, -0.1, math.nan])])
    tokens = [a for a in page.all("span") if a.get("data-v")]
    assert [t["class"].split()[-1] for t in tokens] == ["p", "n", "x"]
    assert tokens[1]["data-v"] == "-0.1 0.5 -0.01 0.2 0"
    assert tokens[1]["style"] == "--a:0.780"
    assert tokens[1]["title"] == ('2/3 "b": token reward −0.1, advantage +0.5, DPO reward −0.01, KL +0.2, value +0')
    assert "not finite" in tokens[2]["title"]
    assert [t["tabindex"] for t in tokens] == ["0", "-1", "-1"]  # one tab stop a response


def test_responses_that_are_empty_or_cut_say_so(tmp_path):
    _, text = write(tmp_path, samples=[sample([], score=math.nan), sample(truncated=True)])
    assert "an empty response" in text
    assert text.count("cut at the length limit") == 1
    assert "score <b>not finite</b>" in text


def test_a_run_without_rows_still_gets_a_page(tmp_path):
    _, text = write(tmp_path)
    assert "Nothing has been logged yet." in text


def test_metrics_are_grouped_and_unknown_ones_shown_too():
    found = dict(sections(rows()))
    assert [c.title for c in found["Reward"]] == ["Score by source", "DPO token reward"]
    assert [c.name for c in found["Reward"][0].curves] == ["score", "rm"]
    assert [c.name for c in found["Other figures"][0].curves] == ["one", "two"]
    assert [c.name for c in found["Speed and memory"][1].curves] == ["rollout"]
    assert "Training" not in found


def test_a_metric_that_is_never_finite_has_no_chart_and_gaps_stay_gaps():
    found = dict(sections([{"step": 1, "train/loss": None, "train/lr": None}, {"step": 2, "train/loss": 1.0}]))
    assert [c.title for c in found["Training"]] == ["Loss"]
    assert found["Training"][0].curves[0].y == [None, 1.0]


def test_an_evaluation_now_and_then_is_an_unbroken_line_and_a_missing_phase_took_no_time():
    rows = [{"step": s, "train/loss": 1.0, "time/train_s": 1.0} for s in (1, 2, 3)]
    rows[1] |= {"eval/loss": 0.5, "time/checkpoint_s": 4.0}
    found = dict(sections(rows))
    loss = {c.name: c for c in found["Training"][0].curves}
    assert (loss["eval"].x, loss["eval"].y) == ([2], [0.5])
    seconds = {c.name: c for c in found["Speed and memory"][0].curves}
    assert seconds["checkpoint"].y == [0.0, 4.0, 0.0]


def test_long_runs_are_thinned_to_means():
    n = 2 * POINTS + 1
    x, y, width = thin(range(n), [1.0, None, 3.0] * (n // 3) + [3.0] * (n % 3))
    assert width == 3
    assert len(x) == math.ceil(n / 3)
    assert (x[0], y[0]) == (1.0, 2.0)
    rows = [{"step": s, "train/loss": 1.0} for s in range(n)]
    chart = dict(sections(rows))["Training"][0]
    assert chart.note == "Each point is the mean of 3 steps."


def test_a_chart_describes_itself_and_follows_the_page_colours():
    chart = Chart("KL", [Curve("RTO", [0, 1], [0.0, 2.5]), Curve("DPO", [], [1.0])], "samples")
    text = draw(chart, "k7")
    assert 'aria-label="KL against samples: RTO from 0 to 2.5; DPO from 1 to 1"' in text
    assert "var(--c0)" in text
    assert "var(--c1)" in text
    assert "var(--muted)" in text
    assert "#fe0" not in text
    assert "xmlns" not in text
    assert "DOCTYPE" not in text
    assert draw(chart, "k7") == text  # the same run gives the same file


@pytest.mark.parametrize("y", [[1.0], [None], [2.0, 2.0], [math.nan, math.inf, -1.0], [0.0, None, 1.0, None]])
def test_odd_curves_are_drawn(y):
    assert "<svg" in draw(Chart("t", [Curve("c", range(len(y)), y)]), "k")
    assert "<svg" in draw(Chart("t", [Curve("c", range(len(y)), y)], stacked=True), "k")


def test_curves_and_tables_of_wrong_shape_are_refused():
    with pytest.raises(ValueError, match="Curve 'a': 2 x for 1 y"):
        Curve("a", [1, 2], [1.0])
    with pytest.raises(ValueError, match="low and high need 2 values"):
        Curve("a", [1, 2], [1.0, 2.0], low=[1.0], high=[1.0])
    with pytest.raises(ValueError, match="Table 't': 1 cells for 2 columns"):
        Table("t", ["a", "b"], [["x"]])


def test_curves_of_one_name_share_a_colour_over_all_comparison_charts(tmp_path):
    first = Chart("one", [Curve("RTO", [0, 1], [0, 1]), Curve("PPO", [0, 1], [1, 0])])
    second = Chart("two", [Curve("PPO", [0, 1], [1, 0]), Curve("SFT", [], [0.5])])
    page, _ = write(tmp_path, comparison=[first, second])
    assert [a["style"] for a in page.all("i") if "style" in a] == [
        "background:var(--c0)", "background:var(--c1)", "background:var(--c1)", "background:var(--c2)",
    ]  # fmt: skip


def test_the_best_row_of_a_table_is_set_off(tmp_path):
    page, _ = write(tmp_path, tables=[Table("t", ["m", "x"], [["SFT", "1"], ["RTO", "2"]], best=1)])
    assert len(page.all("tr")) == 3
    assert len(page.all("tr", **{"class": "best"})) == 1


def test_colour_scale_is_robust_and_never_zero():
    assert colour_scale([0.01] * 99 + [-5.0]) == 0.01
    assert colour_scale([0.0] * 99 + [-5.0]) == 5.0
    assert colour_scale([0.0, math.nan]) == 1.0
    assert colour_scale([]) == 1.0
    assert colour_scale([0.05123]) == 0.051


def test_end_figures_show_the_last_value_and_the_first():
    figures = end_figures([*rows(), {"step": 7, "run/elapsed_s": 187.0, "reward/score": None}])
    assert figures["steps"] == "7\nin 3m 07s"
    assert figures["responses drawn"] == "384"
    assert figures["score"] == "0.6\nat first 0.1"
    assert end_figures([]) == {}


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (-1.25, "−1.25"), (5e-7, "5e−7"), (12345.6, "12,346"), (2.5e6, "2.5M"), (3e9, "3G"),
     (math.nan, "not finite"), (0.123456, "0.1235")],
)  # fmt: skip
def test_figure_text(value, text):
    assert figure_text(value) == text


def test_samples_are_picked_from_the_first_and_the_last_iterations():
    samples = [sample(step=s) for s in (1, 1, 1, 2, 2, 3, 3, 3)]
    assert [s.step for s in pick_samples(samples, 4)] == [3, 3, 3, 1]
    assert [s.step for s in pick_samples(samples, 100)] == [3, 3, 3, 2, 2, 1, 1, 1]
    assert pick_samples(samples, 0) == []


@pytest.mark.slow
def test_the_command_rebuilds_a_run_that_was_killed(tmp_path):
    with RunLogger(tmp_path, stage="RTO", total_steps=2, rank=0, config={"beta1": 0.05}) as log:
        log.log(1, {"reward/score": 0.5})
    append_samples(tmp_path / "samples.jsonl", [sample()])
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (tmp_path / name).open("a") as f:
            f.write('{"step": 2, "torn')
    done = subprocess.run(
        [sys.executable, "-m", "rto_fast.report", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == str(tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert page.title == f"RTO: {tmp_path.name}"
    assert "beta1" in (tmp_path / "report.html").read_text()
    assert len(page.all("article")) == 1


def test_a_run_without_samples_or_settings_is_rebuilt_too(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.5}\n')
    assert Page(report_run(tmp_path, title="T")).title == "T"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "no such folder"),
        ({}, "holds no run (no metrics.jsonl)"),
        ({"metrics.jsonl": "{}\nx\n{}\n"}, "metrics.jsonl, line 2: not JSON"),
        ({"metrics.jsonl": "", "samples.jsonl": '{"tokens": 1}\n'}, "samples.jsonl, row 1: not a sampled response"),
        ({"metrics.jsonl": "", "run.json": "["}, "run.json: not a JSON object"),
        ({"metrics.jsonl": "", "run.json": "3"}, "run.json: not a JSON object"),
    ],
)
def test_a_folder_without_a_readable_run_exits_2_and_writes_nothing(tmp_path, capsys, files, message):
    folder = tmp_path / "run"
    if files is not None:
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_text(content)
    assert main([str(folder)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert str(folder) in err
    assert message in err
    assert not (folder / "report.html").exists()


def test_a_negative_number_of_samples_is_refused(tmp_path, capsys):
    assert main([str(tmp_path), "--samples", "-1"]) == 2
    assert "--samples" in capsys.readouterr().err
