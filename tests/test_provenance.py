"""A run says which packages its entries came from, and whoever loads it without them is told what to install."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.startup import write_plugin
from sparsekit import build_model, registry
from sparsekit.errors import SpecError
from sparsekit.examples import example_slot, fragment
from sparsekit.probes.base import Tokens
from sparsekit.probes.layered import layered
from sparsekit.probes.runner import choose, run_probes
from sparsekit.registry import KINDS
from sparsekit.sparsifiers.calibration import Calibration
from sparsekit.sparsifiers.choose import make
from sparsekit.spec.load import dump, load_spec, with_packages

from .cli.test_catalogue import BASE, laid

# a built-in of each kind that a run's spec names, of which the plug-in's entry is another by name
LIKE = {
    "attention": "mha", "kernel": "sdpa", "normalizer": "softmax", "position": "rope", "rope_scaling": "linear",
    "ffn": "swiglu", "activation": "silu", "router": "top_k", "norm": "rmsnorm", "residual": "pre_norm",
    "linear": "plain", "embedding": "token", "init": "normal", "objective": "next_token", "optimizer": "adamw",
    "schedule": "constant", "callback": "progress", "source": "text", "tokenizer": "byte", "probe": "variance",
}  # fmt: skip

TEAL = "from sparsekit.sparsifiers.inputs import Teal\n\n\nclass Part(Teal):\n    '''Another by name.'''\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where packages are installed."""
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    registry._plugin_entries.cache_clear()
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


def install(folder: Path, kind: str, version: str) -> None:
    module, _, name = registry.registry(kind).entry(LIKE[kind]).target.partition(":")
    source = f"from {module} import {name}\n\n\nclass Part({name}):\n    '''Another by name.'''\n"
    write_plugin(folder, f"own_{kind}", {kind: ["own"]}, source, version)
    registry._plugin_entries.cache_clear()


def uninstall(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]
    registry._plugin_entries.cache_clear()


def test_every_kind_of_a_spec_is_tried() -> None:
    assert set(LIKE) == set(KINDS) - {"sparsifier"}


@pytest.mark.parametrize("kind", LIKE)
def test_a_package_is_recorded_and_asked_for(kind: str, folder: Path) -> None:
    install(folder, kind, "1.5")
    part = fragment(kind, {**example_slot(kind, LIKE[kind]), "type": "own"})
    spec = with_packages(load_spec(laid(BASE, part)))
    assert spec.packages == {f"own_{kind}": "1.5"}
    saved: Any = dump(spec)
    assert load_spec(saved) == spec

    uninstall(folder)
    with pytest.raises(SpecError) as caught:
        load_spec(saved)
    assert caught.value.problems == [
        f"packages: made with own_{kind} 1.5, which is not installed; install that package"
    ]

    install(folder, kind, "2.0")  # which takes the spec just as well
    assert with_packages(load_spec(saved)).packages == {f"own_{kind}": "2.0"}
    points = next(folder.glob("*.dist-info")) / "entry_points.txt"
    points.write_text(points.read_text().replace("own =", "own_2 ="))  # and one that does not
    registry._plugin_entries.cache_clear()
    with pytest.raises(SpecError) as caught:
        load_spec(saved)
    first, second = caught.value.problems
    assert first == f"packages: made with own_{kind} 1.5, and 2.0 is installed; install that version"
    assert f"unknown {kind} 'own' (did you mean 'own_2'?)" in second


def test_a_calibration_is_of_a_package_too(folder: Path) -> None:
    write_plugin(folder, "own_sparsifier", {"sparsifier": ["own"]}, TEAL, "1.5")
    registry._plugin_entries.cache_clear()
    tokens, view = Tokens.of(torch.arange(32).view(2, 16)), layered(build_model({**BASE["model"], "vocab_size": 64}))
    make("own").calibrate(view, tokens).save(folder / "own")
    make("teal").calibrate(view, tokens).save(folder / "teal")
    for name, packages in (("own", {"own_sparsifier": "1.5"}), ("teal", {})):
        calibration = Calibration.load(folder / name)
        assert calibration.meta["packages"] == packages
        with calibration.install(view):
            pass
    saved = Calibration.load(folder / "own")
    uninstall(folder)
    with pytest.raises(SpecError) as caught:
        saved.install(view)
    assert caught.value.problems == [
        "packages: made with own_sparsifier 1.5, which is not installed; install that package"
    ]


def test_a_probe_says_which_package_it_is_of(folder: Path) -> None:
    install(folder, "probe", "1.5")
    tokens = Tokens.of(torch.arange(32).view(2, 16))
    model = build_model({**BASE["model"], "vocab_size": 64})
    for name, wanted in (("own", "1.5"), ("variance", None)):
        result = run_probes(model, choose([name]), tokens)[name]
        assert result.meta["versions"].get("own_probe") == wanted
