"""The page: whole, offline, escaped, the same bytes each time, and with the numbers that the folders hold."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from typer import Typer
from typer.testing import CliRunner

from sparsekit import report
from sparsekit.errors import DataError, SparsekitError
from sparsekit.model.targets import Run
from sparsekit.reports.blocks import number, short
from sparsekit.reports.costs import costs_of
from sparsekit.reports.curves import _after_a_tenth, _smooth
from sparsekit.reports.folder import read
from sparsekit.reports.plots import DISTINCT, Line, lines
from sparsekit.reports.study_summary import ClaimVerdict, StudySummary
from sparsekit.studies.stages import TRAIN, Stage, note_done

ALONE = "cannot be told (one seed)"
VOID = {"meta", "br", "wbr", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """A page's tags with their attributes, its text, and its tables as rows of (text, exact value)."""

    def __init__(self, path: Path):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.data: list[str] = []
        self.tables: dict[str, dict[str, list[tuple[str, float | None]]]] = {}
        self._rows: list[list[list[str | None]]] = []
        self._caption = ""
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("th", "td"):
            self._rows[-1].append(["", None])
        elif tag == "data":
            self._rows[-1][-1][1] = attributes["value"]

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "table":
            told = {r[0][0]: [(text, None if v is None else float(v)) for text, v in r[1:]] for r in self._rows}
            self.tables[self._caption] = told

    def handle_data(self, text):
        if "caption" in self.open:
            self._caption += text
        elif "small" not in self.open and ("td" in self.open or "th" in self.open):
            self._rows[-1][-1][0] += text
        if "script" in self.open:
            self.data.append(text)
        elif "style" not in self.open:
            self.texts.append(text)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.texts))

    def plots(self) -> Iterator[dict]:
        return (json.loads(text) for text in self.data if text.startswith("{"))


def test_nothing_is_fetched_and_ids_are_unique(make_run):
    page = Page(report([make_run("a"), make_run("b", layers=5)], out=make_run("c").parent / "page.html"))
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,")), (tag, name)
        assert not [name for name in attributes if name.startswith("on")], "no handler stands in the HTML"
        assert tag not in ("link", "iframe", "object", "embed", "base")
    style = page.html[page.html.index("<style>") : page.html.index("</style>")]
    assert "@import" not in style and "url(" not in style
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    anchors = {a["href"][1:] for tag, a in page.tags if tag == "a"}
    assert anchors and anchors <= set(ids)
    assert set(re.findall(r"url\(#([^)]+)\)", page.html)) <= set(ids)
    assert all(a.get("aria-label") for tag, a in page.tags if a.get("class") == "plot")


def test_two_reports_of_the_same_folders_are_the_same_bytes(make_run, tmp_path):
    runs = [make_run("a"), make_run("b", seed=1)]
    first, second = (report(runs, out=tmp_path / name).read_bytes() for name in ("one.html", "two.html"))
    assert first == second
    assert b"2025-10-09" in first, "the day on which the runs ended"


def test_tables_hold_the_folders_numbers(make_run):
    runs = [make_run("a"), make_run("b", layers=4, probes=("variance",))]
    page = Page(report(runs, out=runs[0].parent / "page.html"))
    folders = [read(run) for run in runs]
    result = page.tables["Size and result"]
    assert [value for _, value in result["validation loss"]] == [folder.last("val_loss") for folder in folders]
    assert [v for _, v in result["validation perplexity"]] == [math.exp(folder.last("val_loss")) for folder in folders]
    assert [value for _, value in result["tokens"]] == [6400, 6400]
    assert [value for _, value in result["layers"]] == [3, 4]
    costs = [costs_of(folder.spec) for folder in folders]
    assert [value for _, value in result["parameters"]] == [cost.parameters for cost in costs]
    assert [v for _, v in result["training FLOPs"]] == [6400 * cost.training_flops_per_token for cost in costs]
    told = page.tables["variance: scalars with 95% intervals"]
    wanted = [folder.probes["variance"][50].scalars["resid_last"] for folder in folders]
    assert [value for _, value in told["resid_last"]] == wanted
    assert [text for text, _ in told["resid_last"]] == [short(value) for value in wanted]
    low, high = folders[0].probes["variance"][50].intervals["resid_last"]
    assert f"[{short(low)}, {short(high)}]" in page.text
    assert page.tables["causal: scalars with 95% intervals"][""] == [("a", None)], "b was not measured, and it is said"
    assert "Not measured, or not applicable: b." in page.text
    assert "Measured on 4 x 32 tokens; float32; at step 50." in page.text
    assert "usefulness" in page.text.partition("in none of these runs")[0], "what no run has is named"
    assert page.tables["In what the specs differ (name and seed apart)"]["model.n_layers"] == [("3", None), ("4", None)]


def test_plots_hold_the_folders_numbers(make_run):
    runs = [make_run("a"), make_run("b", layers=5)]
    page = Page(report(runs, out=runs[0].parent / "page.html"))
    plots = [plot for plot in page.plots() if plot["kind"] == "lines"]
    over_layers = [p for p in plots if p["names"][0] == "layer" and len(p["series"]) == 2 and "depth" not in p["names"]]
    found = {tuple(p["series"][1]["y"]) for p in over_layers}
    wanted = read(runs[1]).probes["variance"][50].per_layer["resid"]
    assert tuple(float(f"{v:.5g}") for v in wanted) in found
    depth = next(p for p in plots if p["names"][0] == "relative depth")
    assert depth["xs"][depth["at"][0]] == [0, 0.5, 1]
    assert "series" not in depth, "the values stand once, with the same figure over layers"
    maps = [plot for plot in page.plots() if plot["kind"] == "map"]
    effect = read(runs[0]).probes["causal"][50].matrices["effect"]
    told = [[math.nan if v is None else v for v in row] for m in maps if m["shape"] == [3, 3] for row in m["rows"]]
    np.testing.assert_allclose(told, effect, rtol=1e-3)
    variances = next(m for m in maps if m["names"] == ["tokens", "layer"] and m["shape"] == [3, 10])
    assert variances["rows"][2] == [5 * 4 * n for n in range(1, 11)]
    loss = next(p for p in plots if p["names"] == ["tokens", "nats a token"])
    assert loss["xs"][0] == [128 * step for step in range(1, 51)]
    assert loss["series"][0]["y"] == [float(f"{row['loss']:.5g}") for row in read(runs[0]).rows]
    flops = next(p for p in plots if p["names"][0] == "training FLOPs")
    assert len(flops["xs"]) == 2, "deeper costs more"
    assert flops["xs"][1][0] > flops["xs"][0][0]


def test_names_are_text(make_run, tmp_path):
    evil = "<script>alert(\"x\")</script>&'quoted'"
    run = make_run("evil", overrides=[])
    odd = run.rename(run.with_name('<img src=x onerror=alert(1)>"&'))
    (odd / "samples.jsonl").write_text(json.dumps({"step": 50, "prompt": evil, "text": evil + "</pre>"}) + "\n")
    spec = json.loads((odd / "spec.json").read_text())
    (odd / "spec.json").write_text(json.dumps({**spec, "name": evil}))
    page = Page(report([odd, make_run("b")], out=tmp_path / "page.html"))
    assert [a for tag, a in page.tags if tag == "img"] == []
    assert sum(tag == "script" and not a for tag, a in page.tags) == 1, "the page's own"
    assert odd.name in page.text and evil + "</pre>" in page.text
    assert {a["data-switch"] for _, a in page.tags if "data-switch" in a} == {odd.name, "b"}


def test_evaluations_and_environment(make_run):
    run = make_run("a")
    record = {
        "results": {"arc": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,strict": 0.25}},
        "higher_is_better": {"arc": {"acc": True}}, "limit": 20, "n_shot": {"arc": 3}, "dtype": "float32",
        "device": "cpu", "seed": 1234, "bos": "none", "versions": {"lm_eval": "0.4.13"},
    }  # fmt: skip
    (run / "eval").mkdir()
    (run / "eval" / "step-00000050.arc.json").write_text(json.dumps(record))
    page = Page(report(run))
    told = page.tables["lm-eval's tasks, ± one standard error; ↑ more is better"]
    assert told["arc acc ↑"] == [("0.5", 0.5)] and told["arc f1 (strict)"] == [("0.25", 0.25)]
    assert "± 0.1" in page.text and "limit 20; none; float32 on cpu; seed 1234; shots 3" in page.text
    environment = page.tables["Where and with what"]
    assert environment["torch"] == [("2.13.0", None)] and environment["lm_eval"] == [("0.4.13", None)]
    assert environment["tokens a second (median)"][0][1] == 1025.5
    assert environment["training time"] == [("0:00:06", None)], "50 steps of 128 tokens, at 1001 to 1050 a second"


def test_a_run_without_statistics_or_probes_says_so(make_run):
    page = Page(report(make_run("plain", statistics=False, probes=())))
    assert 'No statistics of layers were logged by plain; "statistics": {"every": 100} in train logs them.' in page.text
    assert "in none of these runs; sparsekit probe RUN measures all that apply." in page.text
    assert "In what the specs differ (name and seed apart)" not in page.tables, "there is one"


def test_a_model_that_was_only_probed(make_run, tmp_path):
    shutil.copytree(make_run("a") / "probes", tmp_path / "theirs")
    page = Page(report(tmp_path / "theirs"))
    assert page.tables["Size and result"]["layers"] == [("3", 3)]
    assert "causal: scalars with 95% intervals" in page.tables
    assert "curves" not in {a.get("id") for _, a in page.tags}


def test_where_it_is_written(make_run, tmp_path):
    first, second = make_run("a"), make_run("b")
    assert report(first) == first / "report.html"
    assert report(Run(first)) == first / "report.html"
    assert report([first], out=tmp_path) == tmp_path / "report.html"
    written = report([first, second], out=tmp_path / "new" / "page.html", figures=True)
    figures = {path.name for path in (written.parent / "figures").iterdir()}
    assert {"train-loss-tokens.svg", "train-loss-tokens.png", "causal-effect-a.png"} <= figures
    assert len({name.rpartition(".")[0] for name in figures}) * 2 == len(figures)
    assert not list(tmp_path.rglob("*.tmp"))


def test_mistakes_are_told_in_a_line(make_run, tmp_path, monkeypatch):
    first, second = make_run("a"), make_run("b")

    def message(*arguments, **more) -> str:
        with pytest.raises(SparsekitError) as error:
            report(*arguments, **more)
        return str(error.value)

    assert message([]) == "report: no runs; give the folder of one, such as runs/tiny"
    assert message([first, second]) == "report: several runs; say where their report goes with --out FILE.html"
    assert message([first, first / "."], out=tmp_path / "x.html") == "report: a run is named twice; name each once"
    (tmp_path / "file").write_text("")
    assert "file: cannot be written" in message(first, out=tmp_path / "file" / "page.html")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert message(first) == "report needs the package jinja2: pip install 'sparsekit[report]'"
    assert not (first / "report.html").exists()


def test_without_matplotlib(make_run, monkeypatch):
    run = make_run("a")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SparsekitError) as error:
        report(run)
    assert str(error.value) == "report needs the package matplotlib: pip install 'sparsekit[report]'"


def test_runs_of_one_name_are_told_apart(make_run, tmp_path):
    first = make_run("a")
    other = tmp_path / "elsewhere" / "a"
    shutil.copytree(first, other)
    page = Page(report([first, other], out=tmp_path / "page.html"))
    assert {a["data-switch"] for _, a in page.tags if "data-switch" in a} == {"runs/a", "elsewhere/a"}
    assert "The specs are the same, name and seed apart." in page.text


def test_the_depths_of_three_runs_are_a_scale_of_colours(make_run, tmp_path):
    depths = {"deep": 6, "flat": 2, "mid": 4}
    page = Page(report([make_run(name, layers=n) for name, n in depths.items()], out=tmp_path / "page.html"))
    strokes = re.findall(r'data-switch="(\w+)".*?stroke="(#\w+)"', page.html, re.S)
    assert [name for name, _ in strokes] == ["deep", "flat", "mid"]
    assert not {colour for _, colour in strokes} & set(DISTINCT)
    red = {name: int(colour[1:3], 16) for name, colour in strokes}
    assert red["flat"] < red["mid"] < red["deep"]


def test_a_study_begins_with_its_claims(make_run, tmp_path):
    runs = [
        make_run(f"h{h}-s{s}", seed=s, overrides=[f"model.block.attention.n_heads={h}"]) for h in (1, 2) for s in (0, 1)
    ]
    labels = {run.name: {"n_heads": run.name[1], "seed": run.name[-1]} for run in runs}
    own = lines("1-loss", "loss by heads", [Line("mean", [1, 2], [3.0, 2.5])], x_label="n_heads", y_label="loss")
    by_variant = lines(
        "2-loss", "by variant", [Line("n_heads 2", [1, 2], [3.0, 2.5])], x_label="n_heads", y_label="loss"
    )
    summary = StudySummary(
        name="heads", question="Do more heads lower the loss?", source="arXiv 0000.00000",
        plan=[{"run": run.name, "seed": 0, "status": "done"} for run in runs], labels=labels,
        comparisons=[{"measure": "val_loss", "difference": -0.125, "verdict": "holds"}],
        claims=[
            ClaimVerdict(
                "They do", "val_loss", "n_heads", "falls", "holds", -0.125, -0.2, -0.05, 2, {"1": 3.0, "2": 2.875},
                {"8": 2.5}, "table 3", [("1", "2", "holds")],
            ),
            ClaimVerdict("Variance rises", "variance", "n_heads", "rises", ALONE, None, None, None, 1, {}),
        ],
        figures=[own, by_variant], remarks=["One run was left out."],
    )  # fmt: skip
    page = Page(report(runs, out=tmp_path / "page.html", study=summary))
    sections = [a["id"] for tag, a in page.tags if tag == "section"]
    assert sections[:4] == ["claims", "figures", "comparisons", "what"]
    claims = page.tables["Claims and what the runs say to them"]
    verdict, difference, found, published, steps = claims["They do"]
    assert (verdict[0], difference, found[0]) == ("holds", ("-0.125", -0.125), "1: 3, 2: 2.875")
    assert (published[0], steps[0]) == ("8: 2.5", "1 to 2: holds")
    assert claims["Variance rises"][0][0] == ALONE and claims["Variance rises"][1] == ("–", None)
    assert page.tables["Each pair of values, seeds paired, with 95% intervals"]["val_loss"][0] == ("-0.125", -0.125)
    assert {a.get("class") for tag, a in page.tags if tag == "td"} >= {"holds", "open"}
    assert [a["data-switch"] for _, a in page.tags if "data-switch" in a] == ["n_heads 1", "n_heads 2"], (
        "seeds share one"
    )
    assert page.tables["In what the specs differ (name and seed apart)"][""] == [
        ("n_heads 1", None),
        ("n_heads 2", None),
    ]
    assert "One run was left out." in page.text and "n_heads 2, seed 1" in page.text
    colours = dict(re.findall(r'data-switch="([^"]+)".*?stroke="(#\w+)"', page.html, re.S))
    drawn = re.search(r'data-name="2-loss".*?data-group="n_heads 2".*?stroke: (#\w+)', page.html, re.S)
    assert drawn[1] == colours["n_heads 2"], "a variant has one colour in the whole page"


def test_the_command(make_run):
    from sparsekit.cli.report import report as command

    app = Typer()
    app.command()(command)
    run = make_run("a")
    told = CliRunner().invoke(app, [str(run)])
    assert (told.exit_code, told.output) == (0, f"{run / 'report.html'}\n")
    failed = CliRunner().invoke(app, [str(run / "nowhere")])
    assert isinstance(failed.exception, DataError), "which main() tells in a line, and exits with 2"


def test_the_command_on_a_study(make_run, tmp_path):
    from sparsekit.cli.report import report as command

    app = Typer()
    app.command()(command)
    base = json.loads((make_run("a") / "spec.json").read_text())
    folder = tmp_path / "heads"
    folder.mkdir()
    study = {"name": "heads", "base": base, "axes": {"model.block.attention.n_heads": [1, 2]}, "seeds": [0]}
    (folder / "study.json").write_text(json.dumps(study))
    failed = CliRunner().invoke(app, [str(folder)])
    assert str(failed.exception) == f"{folder}: none of its runs is trained yet"
    run = make_run(folder / "n_heads=1,seed=0", overrides=["model.block.attention.n_heads=1"])
    note_done(run, Stage(TRAIN, {}), run / "metrics.jsonl", step=50, tokens=6400)
    page = tmp_path / "elsewhere" / "page.html"
    told = CliRunner().invoke(app, [str(folder), "--out", str(page)])
    assert (told.exit_code, told.output) == (0, f"{page}\n")
    assert "1 of 2 runs are not done" in page.read_text()
    assert not (folder / "report.html").exists()


def test_smoothing_is_a_mean_around_each_row():
    values = np.arange(1000.0)
    np.testing.assert_allclose(_smooth(values), values, err_msg="a line stays a line, to its ends")
    noise = np.random.default_rng(0).normal(size=1000)
    noise[500] = np.nan
    for at, reach in ((300, 5), (2, 2), (997, 2), (500, 5)):
        assert _smooth(noise)[at] == pytest.approx(np.nanmean(noise[at - reach : at + reach + 1]))
    assert _smooth(noise[:50]) is not None and np.array_equal(_smooth(noise[:50]), noise[:50]), "few are left alone"


def test_what_is_cut_off_of_a_curve():
    loss = np.concatenate([np.linspace(8, 3, 10), np.linspace(3, 2, 90)])
    assert _after_a_tenth([loss]) == pytest.approx(3.05)
    assert _after_a_tenth([np.linspace(3, 2.9, 100)]) is None, "nothing stands out"
    assert _after_a_tenth([loss[:20]]) is None, "of few rows all are shown"


def test_numbers_in_words():
    assert [short(v) for v in (3, 1234567, 0.123456789, 12345.6, 6.6e17, 1e-7, -2.5)] == [
        "3", "1,234,567", "0.12346", "12,346", "6.6e17", "1e-7", "-2.5",
    ]  # fmt: skip
    assert number(None).text == number(math.nan).text == "–"
    assert number(0.5, (0.25, 0.75)).below == "[0.25, 0.75]"
