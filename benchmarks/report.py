"""A report over many deep runs: its size, the time to build it, and the time until it is of use in a browser.

    python benchmarks/report.py [--runs 16] [--layers 32] [--rows 1000] [--keep FOLDER]

Runs are made up: folders as training and probing leave them, with statistics of every layer at every tenth logged row.
The browser is a headless chromium driven by selenium; without them that part is left out, and said to be.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from sparsekit.files import write_json

MOST_MEGABYTES, MOST_BUILD, MOST_BROWSER = 5.0, 10.0, 2.0
MODEL = {
    "d_model": 512, "vocab_size": 50304, "max_seq_len": 1024,
    "block": {"residual": "pre_norm", "norm": "rmsnorm", "attention": {"type": "mha", "n_heads": 8},
              "ffn": {"type": "swiglu", "d_ff": 1536}},
}  # fmt: skip
SITES = ("resid", "attn_out", "ffn_out")
STATISTICS = ("variance", "rms", "frobenius", "skewness", "kurtosis", "cv", "token_skewness", "token_kurtosis")
PROBES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # tables by layer, matrices
    "variance": (("resid", "resid_rms", "attn_out", "ffn_out"), ()),
    "moments": (("resid_kurtosis", "resid_skewness", "attn_out_kurtosis", "ffn_out_kurtosis", "resid_cv"), ()),
    "similarity": (("block_influence", "lens_kl", "lens_overlap"), ("cosine", "angular", "cka")),
    "contributions": (("attn_ratio", "ffn_ratio", "attn_cosine", "ffn_cosine"), ()),
    "effective_rank": (("effective_rank", "stable_rank", "participation"), ()),
    "jacobian": (("identity_deviation", "off_diagonal", "diagonal_mean", "diagonal_std", "spectral"), ()),
    "usefulness": (("loss_ratio",), ()),
    "causal": (("effect",), ("effect",)),
    "permutation": (("score",), ("score",)),
    "weight_sparsity": (("gini", "hoyer", "l1_over_l2", "kurtosis", "q/gini", "k/gini", "v/gini"), ()),
    "attention_sparsity": (("entropy", "support", "top_8", "first_token"), ("entropy", "first_token")),
    "activation_sparsity": (("activation_ratio", "union_density", "threshold"), ()),
}


def make_run(folder: Path, seed: int, layers: int, rows: int) -> None:
    """A folder as a run of ``layers`` layers leaves it, of plausible numbers."""
    from sparsekit.spec.load import dump, load_spec

    random = np.random.default_rng(seed)
    optimizer = {"type": "adamw", "lr": 1e-3 / (1 + seed)}
    spec = load_spec({
        "name": folder.name, "model": {**MODEL, "n_layers": layers},
        "data": {"source": "embedded", "tokenizer": "byte"},
        "train": {"max_steps": rows * 10, "global_batch_tokens": 65536, "seed": seed, "optimizer": optimizer},
    })  # fmt: skip
    write_json(folder / "spec.json", dump(spec))
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as log:
        for index in range(rows):
            log.write(json.dumps(row_of(random, index, rows, seed, layers)) + "\n")
    for name, (tables, matrices) in PROBES.items():
        width = 8 if name == "attention_sparsity" else layers
        scalars = {table: random.uniform(0.5, 2) for table in tables}
        write_json(folder / "probes" / f"{name}-step-{rows * 10:08d}.json", {
            "scalars": scalars,
            "intervals": {table: [0.9 * value, 1.1 * value] for table, value in scalars.items()},
            "per_layer": {table: random.lognormal(0, 1, layers).tolist() for table in tables},
            "matrices": {name: random.lognormal(0, 1, (layers, width)).tolist() for name in matrices},
            "arrays": {},
            "meta": {"probe": name, "sequences": 100, "seq_len": 512, "layers": layers, "dtype": "float32"},
        })  # fmt: skip


def row_of(random: np.random.Generator, index: int, rows: int, seed: int, layers: int) -> dict[str, float]:
    step, loss = 10 * (index + 1), 3 + 0.02 * seed + 5 * math.exp(-index / 80) + random.normal(0, 0.05)
    row: dict[str, float] = {
        "step": step, "tokens": step * 65536, "loss": loss, "lr": 1e-3 * (1 - index / rows),
        "grad_norm": random.lognormal(0, 0.3), "param_norm": 40 + index / 50,
        "tokens_per_second": 1e5 + random.normal(0, 2e3),
    }  # fmt: skip
    if index % 10 == 9:
        for site in SITES:
            grown = np.exp(np.linspace(0, 4, layers) * (index / rows)) * random.uniform(0.8, 1.2, layers)
            for name in STATISTICS:
                row |= {f"{name}/{site}/layer_{layer}": value for layer, value in enumerate(grown.tolist())}
        row |= {f"density/layer_{layer}": random.uniform(0.2, 0.6) for layer in range(layers)}
        row["val_loss"] = loss + 0.05
    return row


def browse(page: Path) -> dict[str, float] | None:
    """Seconds until the document is there, and what the first and the next toggle of a run take; None without one."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        return None
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        return None
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    with tempfile.TemporaryDirectory() as profile:
        for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                     "--disable-background-networking", "--disable-component-update", "--disable-sync",
                     f"--user-data-dir={profile}"):  # fmt: skip
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        try:
            driver.get(page.resolve().as_uri())
            timing = "const t = performance.getEntriesByType('navigation')[0]; return t.domContentLoadedEventEnd / 1000"
            toggle = """
                const done = arguments[0], began = performance.now();
                document.querySelector('[data-switch]').click();
                requestAnimationFrame(() => requestAnimationFrame(() => done((performance.now() - began) / 1000)));
            """
            there = float(driver.execute_script(timing))
            return {
                "there": there,
                "first": driver.execute_async_script(toggle),
                "next": driver.execute_async_script(toggle),
            }
        finally:
            driver.quit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("runs", 16), ("layers", 32), ("rows", 1000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--keep", type=Path, help="a folder for the runs and the page")
    given = parser.parse_args()
    began = time.perf_counter()
    from sparsekit import report

    with tempfile.TemporaryDirectory() as scratch:
        folder = given.keep or Path(scratch)
        paths = [folder / f"run-{n:02d}" for n in range(given.runs)]
        for seed, path in enumerate(paths):
            if not path.exists():
                make_run(path, seed, given.layers, given.rows)
        began = time.perf_counter()
        page = report(paths, out=folder / "report.html")
        built, size = time.perf_counter() - began, page.stat().st_size / 1e6
        print(f"{given.runs} runs of {given.layers} layers, {given.rows} logged rows")
        print(f"size        {size:8.2f} MB   (at most {MOST_MEGABYTES})")
        print(f"build       {built:8.2f} s    (at most {MOST_BUILD}; with the imports)")
        found = browse(page)
        if found is None:
            print("browser     left out: needs chromium, chromedriver and selenium")
        else:
            usable = found["there"] + found["first"]
            print(f"browser     {found['there']:8.2f} s    until the document is there")
            print(f"            {found['first']:8.2f} s    for the first toggle of a run, {found['next']:.2f} s later")
            print(f"            {usable:8.2f} s    in all   (at most {MOST_BROWSER})")


if __name__ == "__main__":
    main()
