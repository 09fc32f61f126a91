"""matplotlib's SVG made fit to stand in a page: its colour and font are the page's, its ids the picture's own."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

INK = "#010203"  # stands for the colour of the page


def for_page(svg: str, groups: Sequence[str]) -> str:
    """matplotlib's SVG without what a page has itself; each series' group by name."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"| xmlns(?::xlink)?="[^"]*"| version="1.1"', "", svg, count=5)

    def series(found: re.Match[str]) -> str:
        return f'<g class="series" data-group="{html.escape(groups[int(found[1])])}">'

    svg = re.sub(r'<g id="series-(\d+)[^"]*">', series, svg)
    svg = re.sub(r"font-family: [^;]*; ?", "", svg)
    svg = svg.replace(INK, "currentColor").replace("xlink:href", "href").replace("; stroke-linecap: square", "")
    svg = re.sub(r' transform="rotate\(-0 [^"]*\)"', "", svg)
    svg = re.sub(r'\b(d|x|y)="([^"]*)"', lambda found: f'{found[1]}="{_fewer_digits(found[2])}"', svg)
    return re.sub(r">\s+<", "><", svg).strip()


def _fewer_digits(path: str) -> str:
    """Coordinates to a hundredth of a unit; "L" goes without saying."""
    path = re.sub(r"-?\d+\.\d+", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), path)
    path = re.sub(r"\s+", " ", path).strip()
    return re.sub(r"(?<=[\d.]) L ", " ", path) if path.startswith("M") else path


def own_ids(svg: str, name: str) -> str:
    """Ids that are used, made the picture's own; the others go."""
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: f' id="{name}.{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r"<g>(<(?:path|text|use)[^>]*>(?:[^<]*</text>)?)</g>", r"\1", svg)
    return re.sub(r'(url\(#|href="#)([^")]+)', lambda found: f"{found[1]}{name}.{found[2]}", svg)
