"""The page in a real browser: no error, no request, switches, hovering, files; wide and narrow, light and dark."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparsekit import report

webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium: pip install 'sparsekit[browser]'")
MISSING = [program for program in ("chromium", "chromedriver") if shutil.which(program) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING), reason=f"no {' and no '.join(MISSING)} on the path; the system's packages have it"
    ),
]
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
WIDE, NARROW = (1280, 900), (375, 800)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    downloads = {"behavior": "allow", "downloadPath": str(tmp_path / "saved")}
    driver.execute_cdp_cmd("Browser.setDownloadBehavior", downloads)
    yield driver
    driver.quit()


@pytest.fixture
def page(make_run, tmp_path) -> Path:
    runs = [make_run("flat"), make_run("deep", layers=6), make_run("other", seed=3)]
    return report(runs, out=tmp_path / "page.html")


def emulate(browser: Any, size: tuple[int, int], scheme: str = "light", script: bool = True) -> None:
    width, height = size
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not script})


def visible(browser: Any, selector: str) -> list[Any]:
    return [e for e in browser.find_elements("css selector", selector) if e.is_displayed()]


def press(browser: Any, selector: str) -> None:
    browser.execute_script("document.querySelector(arguments[0]).click()", selector)


@pytest.mark.parametrize("size", [WIDE, NARROW])
def test_no_error_no_request_and_nothing_sticks_out(browser, page, size):
    emulate(browser, size)
    browser.get(page.as_uri())
    for details in browser.find_elements("css selector", "details"):
        browser.execute_script("arguments[0].open = true", details)
    wide = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert wide[0] <= wide[1], "what is wider than the screen scrolls in a box of its own"
    letters = "return [...document.querySelectorAll('svg.plot')].filter(s => s.checkVisibility())"
    sizes = browser.execute_script(
        f"{letters}.map(s => 10 * s.getBoundingClientRect().width / s.viewBox.baseVal.width)"
    )
    assert sizes and min(sizes) >= 8, "pixels of the smallest letters"
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert {url for url in sent if not url.startswith(("data:", "chrome:"))} == {page.as_uri()}


@pytest.mark.parametrize(("scheme", "chosen"), [("light", ""), ("dark", ""), ("light", "dark"), ("dark", "light")])
def test_text_stands_out_in_every_theme(browser, page, scheme, chosen):
    emulate(browser, WIDE, scheme)
    browser.get(page.as_uri())
    if chosen:
        press(browser, f"[data-theme-choice={chosen}]")
    colours = browser.execute_script(
        """
        const one = (selector) => getComputedStyle(document.querySelector(selector)).color;
        return [getComputedStyle(document.body).backgroundColor,
                ...['p.lead', '.remark', 'td', 'summary', 'svg.plot text'].map(one),
                getComputedStyle(document.querySelector('svg.plot text')).fill];
        """
    )
    paper, *inks = [luminance(colour) for colour in colours]
    dark = (chosen or scheme) == "dark"
    assert (paper < 0.1) == dark
    for ink in inks:
        assert (max(paper, ink) + 0.05) / (min(paper, ink) + 0.05) >= 4.5, (colours, "WCAG 2.1, 1.4.3")


def luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_runs_axes_and_hovering(browser, page):
    emulate(browser, WIDE)
    browser.get(page.as_uri())
    shown = len(visible(browser, "g.series[data-group=deep]"))
    assert shown > 3 and visible(browser, "td[data-group=deep]")
    press(browser, "[data-switch=deep]")
    assert not visible(browser, "[data-group=deep]") and visible(browser, "g.series[data-group=flat]")
    assert browser.find_element("css selector", "[data-switch=deep]").get_attribute("aria-pressed") == "false"
    press(browser, "[data-all=true]")
    assert len(visible(browser, "g.series[data-group=deep]")) == shown

    assert not visible(browser, ".variant[data-axis=flops]") and visible(browser, ".variant[data-axis=tokens]")
    press(browser, "[data-value=flops]")
    assert visible(browser, ".variant[data-axis=flops]") and not visible(browser, ".variant[data-axis=tokens]")
    press(browser, "[data-value=depth]")
    assert visible(browser, ".variant[data-axis=depth]") and not visible(browser, ".variant[data-axis=layer]")

    hover = """
        const svg = [...document.querySelectorAll(arguments[0])].find((s) => s.checkVisibility());
        svg.scrollIntoView({block: 'center'});
        const box = svg.getBoundingClientRect();
        const at = {clientX: box.left + arguments[1] * box.width, clientY: box.top + 0.4 * box.height, bubbles: true};
        svg.dispatchEvent(new PointerEvent('pointermove', at));
        return document.getElementById('tip').innerText;
    """
    told = browser.execute_script(hover, "[data-name=train-loss-flops] svg", 0.97)
    data = json.loads(browser.execute_script(
        "return document.querySelector('[data-name=train-loss-tokens] script').textContent"
    ))  # fmt: skip
    assert told.startswith("training FLOPs ")
    for series in data["series"]:
        if series["label"] != "flat":  # the deepest goes further than the others
            assert f"{series['y'][-1]:.5g}" in told, "the last value, of a picture that has the values of another's"
    told = browser.execute_script(hover, "[data-name^=causal-effect-flat] svg", 0.5)
    assert told.splitlines()[0].startswith("skipped 1, measured 1")


def test_pictures_are_saved_as_files(browser, page, tmp_path):
    emulate(browser, WIDE)
    browser.get(page.as_uri())
    press(browser, "[data-switch=deep]")
    for number in (1, 2):
        press(browser, f"[data-name=variance-resid-layer] .save button:nth-of-type({number})")
    saved = [tmp_path / "saved" / f"variance-resid-layer.{kind}" for kind in ("svg", "png")]
    for _ in range(100):
        if all(path.exists() and path.stat().st_size for path in saved):
            break
        time.sleep(0.1)
    svg = saved[0].read_text()
    assert "xmlns" in svg and ">Stream<" in svg and 'data-group="flat"' in svg
    assert 'data-group="deep"' not in svg, "what is switched off is not in the file"
    assert saved[1].read_bytes().startswith(b"\x89PNG")
    from PIL import Image

    with Image.open(saved[1]) as image:
        assert image.width > 1000
        assert len(image.convert("RGB").getcolors(1 << 24)) > 10, "it is not blank"
    assert browser.get_log("browser") == []


def test_without_script_all_is_there(browser, page):
    emulate(browser, NARROW, script=False)
    browser.get(page.as_uri())
    assert visible(browser, ".variant[data-axis=tokens]") and visible(browser, ".variant[data-axis=flops]")
    assert visible(browser, ".chip") and not visible(browser, ".choices")
    assert len(visible(browser, "section")) == len(browser.find_elements("css selector", "section"))
