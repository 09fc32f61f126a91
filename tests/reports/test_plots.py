"""Pictures: thinning, colours, ticks; an SVG says what its data say."""

from __future__ import annotations

import base64
import io
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekit.reports.axes import tick, ticks
from sparsekit.reports.drawing import _short
from sparsekit.reports.plots import (
    DISTINCT,
    SCALE,
    Line,
    LinesPicture,
    Plot,
    lines,
    matrix,
    palette_of,
    scale_of,
    slug,
    thinned,
)  # fmt: skip

finite = st.floats(-1e6, 1e6, allow_nan=False)
SVG = "{http://www.w3.org/2000/svg}"


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1))


@given(st.lists(finite, min_size=1, max_size=900), st.integers(4, 60))
def test_thinning_keeps_the_ends_and_the_extremes(y, most):
    line = thinned(Line("a", range(len(y)), y), most)
    assert len(line.y) <= max(most, 4) or len(y) <= most
    assert min(line.y) == min(y) and max(line.y) == max(y)
    assert (line.x[0], line.x[-1]) == (0, len(y) - 1)
    assert list(line.x) == sorted(set(line.x))
    assert all(y[int(at)] == value for at, value in zip(line.x, line.y, strict=True)), "points are points of the line"


def test_thinning_keeps_each_stretchs_extremes():
    y = np.random.default_rng(0).normal(size=4000)
    line = thinned(Line("a", np.arange(4000), y), 400)
    for begin in range(0, 4000, 100):  # several stretches together
        kept = [v for x, v in zip(line.x, line.y, strict=True) if begin <= x < begin + 100]
        assert y[begin : begin + 100].max() in kept
        assert y[begin : begin + 100].min() in kept


def test_a_gap_stays_a_gap_and_bands_are_thinned_alike():
    y = [*range(500), *[None] * 300, *range(500)]
    low = [None if v is None else v - 1 for v in y]
    line = thinned(Line("a", range(len(y)), y, low, low), 100)
    broken = [x for x, v in zip(line.x, line.y, strict=True) if math.isnan(v)]
    assert any(500 <= x < 800 for x in broken)
    assert all(500 <= x < 800 for x in broken)
    assert [v - 1 for v in line.y if v == v] == [v for v in line.low if v == v]


def test_x_for_each_y():
    with pytest.raises(ValueError, match=re.escape("line 'a': 2 x for 1 y")):
        lines("n", "t", [Line("a", [1, 2], [1])], x_label="x", y_label="y")


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.booleans())
def test_ticks_lie_within_the_ends(low, width, whole):
    if low + width <= low:
        return
    found = ticks((low, low + width), whole=whole)
    assert all(low <= at <= low + width for at in found)
    if whole:
        assert all(float(at).is_integer() for at in found) or width < 2
    assert len(found) <= 8


@given(st.floats(1e-12, 1e12), st.floats(1.001, 1e12))
def test_logarithmic_axes_have_ticks(low, times):
    found = ticks((low, low * times), log=True)
    assert all(low <= at <= low * times for at in found)
    assert len(found) <= 14
    if times > 100:
        assert len(found) >= 2


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.25, "0.25"), (1500, "1500"), (25_000, "25k"), (2e6, "2M"), (1.5e9, "1.5B"), (3e15, "3e15"),
     (0.0001, "0.0001"), (2.5e-7, "2.5e-7"), (-25_000, "-25k")],
)  # fmt: skip
def test_numbers_on_axes_are_short(value, text):
    assert tick(value) == text


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours():
    assert palette_of(["a", "b"]) == {"a": DISTINCT[0], "b": DISTINCT[1]}
    assert palette_of(["a", "b"], order=["b", "a"]) == palette_of(["a", "b"]), "two need no scale"
    deep = palette_of(["16", "4", "8", "other"], order=["4", "8", "16", "32"])
    assert [deep[name] for name in ("4", "16", "other")] == [SCALE[0], SCALE[-1], DISTINCT[0]]
    names = [str(n) for n in range(12)]
    assert len(set(palette_of(names, order=names).values())) == 12
    for colour in (*DISTINCT, *palette_of(names, order=names).values()):
        # WCAG 2.1, 1.4.11: graphical objects stand out 3 to 1, here on both papers
        assert 1.05 / (luminance(colour) + 0.05) >= 3, colour
        assert (luminance(colour) + 0.05) / (luminance("#14181d") + 0.05) >= 3, colour


def places(path: str) -> list[tuple[float, float]]:
    found = [float(n) for n in re.findall(r"-?\d+(?:\.\d+)?", path)]
    return list(zip(found[::2], found[1::2], strict=True))


def value_at(place: float, low: float, high: float, axis: list[float]) -> float:
    begin, end, log = axis
    share = (place - low) / (high - low)
    return begin * (end / begin) ** share if log else begin + share * (end - begin)


@pytest.mark.parametrize("log", [False, True])
def test_what_is_drawn_is_what_hovering_tells(log):
    y = [1.0, 30.0, 7.0, 400.0]
    plot = lines("n", "t", [Line("a", [1, 2, 3, 5], y, group="g")], x_label="x", y_label="y", log_y=log)
    svg, told = plot.drawn()
    left, top, right, bottom = told["box"]
    group = next(g for g in parsed(svg).iter(f"{SVG}g") if g.get("data-group") == "g")
    drawn = places(next(p for p in group.iter(f"{SVG}path") if "fill: none" in p.get("style", "")).get("d"))
    assert [value_at(x, left, right, told["x"]) for x, _ in drawn] == pytest.approx([1, 2, 3, 5], rel=1e-3)
    assert [value_at(v, bottom, top, told["y"]) for _, v in drawn] == pytest.approx(y, rel=5e-3, abs=0.05)
    assert told["series"] == [{"label": "a", "group": "g", "y": [1, 30, 7, 400]}]
    assert (told["xs"], told["at"]) == ([(1, 2, 3, 5)], [0])


def test_an_svg_is_of_the_page_around_it():
    made = [Line(f"run {i}", [0, 1, 2], [i, None, 2], [i - 1, 0, 1], [i + 1, 2, 3], group=f"<g {i}>") for i in range(3)]
    svg = lines("some name", 'a "title"', made, x_label="layer", y_label="<y>").svg()
    tree = parsed(svg)
    assert tree.get("aria-label") == 'a "title"'
    assert [g.get("data-group") for g in tree.iter(f"{SVG}g") if g.get("class") == "series"].count("<g 1>") == 2
    ids = re.findall(r' id="([^"]+)"', svg)
    assert len(ids) == len(set(ids)) and all(name.startswith("some-name.") for name in ids)
    used = set(re.findall(r"url\(#([^)]+)\)", svg)) | set(re.findall(r'href="#([^"]+)"', svg))
    assert used == set(ids)
    assert "currentColor" in svg
    assert not re.search(r"#010203|#000000|font-family|<style|<metadata|DOCTYPE", svg)
    assert {t.text for t in tree.iter(f"{SVG}text")} >= {"layer", "<y>", "0", "1", "2"}


def test_the_same_picture_is_the_same_bytes(tmp_path):
    def make() -> Plot:
        return lines("n", "t", [Line("a", [0, 1], [1, 2], marks=[(0, 1.5)])], x_label="x", y_label="y")

    assert make().svg() == make().svg()
    first = {path.suffix: path.read_bytes() for path in make().save(tmp_path / "a")}
    again = {path.suffix: path.read_bytes() for path in make().save(tmp_path / "b")}
    assert first == again and set(first) == {".svg", ".png"}
    assert first[".png"].startswith(b"\x89PNG")
    saved = ElementTree.fromstring(first[".svg"])
    assert "t" in {text.text for text in saved.iter(f"{SVG}text")}, "the title is in the file"


def test_cells_are_coloured_by_their_values():
    from PIL import Image

    values = np.array([[0.0, 1.0, 2.0], [np.nan, 0.5, 4.0]])
    svg, told = matrix("m", "t", values, x_label="l", y_label="s").drawn()
    assert told["rows"] == [[0, 1, 2], [None, 0.5, 4]]
    assert (told["shape"], told["names"]) == ([2, 3], ["l", "s"])
    encoded = re.search(r'class="cells"[^>]*base64,([^"]+)"', svg)[1]
    image = Image.open(io.BytesIO(base64.b64decode(encoded)))
    cells = np.asarray(image)
    assert image.size == (3, 2)
    assert cells[1, 0] == 0 and image.info["transparency"] == 0, "what is not there is left blank"
    assert cells[0].tolist() == [1, 1 + round(254 / 4), 1 + round(254 / 2)] and cells[1, 2] == 255
    colours = np.asarray(image.convert("RGB"))
    from matplotlib import colormaps

    assert colours[1, 2].tolist() == list(colormaps["viridis"](1.0, bytes=True)[:3])


def test_signed_values_have_a_scale_about_zero_and_maps_can_share_one():
    from matplotlib import colormaps
    from PIL import Image

    svg = matrix("m", "t", [[-1.0, 0.0], [3.0, 1.0]], x_label="l", y_label="s").svg()
    image = Image.open(io.BytesIO(base64.b64decode(re.search(r'class="cells"[^>]*base64,([^"]+)"', svg)[1])))
    middle, most = np.asarray(image.convert("RGB"))[0, 1], np.asarray(image.convert("RGB"))[1, 0]
    assert middle.tolist() == list(colormaps["RdBu_r"](0.5, bytes=True)[:3])
    assert most.tolist() == list(colormaps["RdBu_r"](1.0, bytes=True)[:3])
    assert scale_of([np.array([1.0, np.nan]), np.array([[7.0]])]) == (1.0, 7.0)
    assert scale_of([np.array([np.nan])]) == (0.0, 1.0)


@settings(max_examples=12)
@given(
    st.lists(st.tuples(st.lists(st.none() | finite, max_size=6), st.booleans()), max_size=3),
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_any_lines_can_be_drawn(made, log_x, log_y):
    told = [
        Line(f"l{i}", range(len(y)), y, y if band else None, y if band else None) for i, (y, band) in enumerate(made)
    ]
    plot = lines("n", "t", told, x_label="x", y_label="y", log_x=log_x, log_y=log_y)
    svg, data = plot.drawn()
    assert parsed(svg).tag == f"{SVG}svg"
    assert all(math.isfinite(v) for v in [*data["box"], *data["x"], *data["y"]])


@settings(max_examples=10)
@given(st.lists(st.lists(st.none() | finite, min_size=3, max_size=3), min_size=1, max_size=4), st.booleans())
def test_any_matrix_can_be_drawn(rows, log):
    svg, data = matrix("n", "t", np.array(rows, dtype=float), x_label="x", y_label="y", log=log).drawn()
    assert parsed(svg).tag == f"{SVG}svg"
    assert data["shape"] == [len(rows), 3]


def test_names_are_fit_for_files_and_ids():
    assert slug("1-val loss[-1]/x by <script>") == "1-val-loss-1-x-by-script"
    assert slug("///") == "plot"
    picture = lines("a", "t", [Line("a", [1], [1])], x_label="x", y_label="y").picture
    assert isinstance(picture, LinesPicture) and picture.lines[0].group == "a", "a line is of its own group"


@given(st.lists(st.none() | st.floats(allow_subnormal=False), max_size=20))
def test_values_keep_five_digits(values):
    for value, told in zip(values, _short(values), strict=True):
        if value is None or not math.isfinite(value):
            assert told is None
        else:
            assert told == pytest.approx(value, rel=6e-5, abs=1e-290)
            if 1e-15 < abs(value) < 1e5:
                assert len(f"{told!r}".partition("e")[0].strip("-0.").replace(".", "")) <= 6
