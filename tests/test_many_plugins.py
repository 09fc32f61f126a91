"""A hundred plug-ins, some of them bad neighbours: each costs only itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.startup import RAISES, WORKS, seconds, write_plugin, write_plugins
from sparsekit import registry
from sparsekit.probes.runner import choose
from sparsekit.testing import check_component

from .cli.test_cli import refused, run, tell

MARKS = "import pathlib\n\npathlib.Path(__file__).with_suffix('.imported').touch()\n"
HANGS = MARKS + "import time\n\ntime.sleep(5)\n" + WORKS
KILLED = "import os, signal\n\nos.kill(os.getpid(), signal.SIGKILL)\n"
TARDY = "import time\n\nprint('look at me')\ntime.sleep(1)\n" + WORKS
MODEL = {
    "d_model": 16, "n_layers": 1, "vocab_size": 257, "max_seq_len": 16,
    "block": {"attention": {"type": "mha", "n_heads": 2}, "ffn": {"type": "swiglu", "d_ff": 16}},
}  # fmt: skip

TAKEN = (
    "ffn 'swiglu' is claimed by sparsekit (sparsekit.components.feedforward:SwiGLU) and shadows (shadows:Part); "
    "the built-in 'swiglu' is used"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five packages: one works, one raises, one hangs, one claims what is built in, one is slow."""
    folder = tmp_path_factory.mktemp("neighbours")
    write_plugin(folder, "good", {"ffn": ["fine", "fine_too"]}, WORKS)
    write_plugin(folder, "raises", {"ffn": ["broken"], "probe": ["blind"]}, RAISES)
    write_plugin(folder, "hangs", {"ffn": ["slow", "slow_too"], "router": ["slow"]}, HANGS)
    write_plugin(folder, "shadows", {"ffn": ["swiglu"]}, WORKS)
    write_plugin(folder, "tardy", {"ffn": ["late", "late_too"]}, TARDY)
    (folder / "text.txt").write_text("What is it that you would tell me, and why not before now?\n" * 200)
    spec = {"model": MODEL, "data": {"source": {"type": "text", "path": "text.txt"}}}
    spec["train"] = {"max_steps": 2, "eval_tokens": 64, "callbacks": [], "device": "cpu"}
    (folder / "spec.json").write_text(json.dumps(spec))
    return folder


@pytest.fixture
def neighbours(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The same, installed here meanwhile."""
    monkeypatch.syspath_prepend(str(folder))
    registry._plugin_entries.cache_clear()
    yield folder
    registry._plugin_entries.cache_clear()
    for path in folder.glob("*.py"):
        sys.modules.pop(path.stem, None)


def imported(folder: Path) -> bool:
    return (folder / "hangs.imported").exists()


def test_a_list_of_a_hundred_packages_costs_little(tmp_path: Path) -> None:
    """Processor time, as others use the machine too; benchmarks/startup.py has the clock's."""
    write_plugins(tmp_path)
    costs = [seconds(["-m", "sparsekit.cli", "list"], str(tmp_path))[1] for _ in range(3)]
    assert min(costs) <= 0.6, costs


def test_a_hundred_packages_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_plugins(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    registry._plugin_entries.cache_clear()
    try:
        entries = json.loads(tell("list", "ffn", "--json"))
    finally:
        registry._plugin_entries.cache_clear()
    owners = [entry["owner"] for entry in entries]
    assert len(set(owners)) == 100, "99 of the dummies and our own; of one the only name is a built-in's"
    assert owners.count("dummy7") == 10


def test_what_does_not_name_them_does_not_notice(neighbours: Path) -> None:
    for arguments in (["validate", "spec.json"], ["train", "spec.json"], ["show", "ffn", "swiglu"], ["show", "train"]):
        tell(*arguments, cwd=neighbours)
    assert json.loads((neighbours / "runs" / "spec" / "spec.json").read_text())["packages"] == {}
    assert json.loads(tell("show", "ffn", "swiglu", "--json"))["owner"] == "sparsekit"
    check_component("ffn", "fine", {"d_ff": 8}, compile_backend=None)
    assert not imported(neighbours)


def test_a_name_of_a_package_that_raises_says_so(neighbours: Path) -> None:
    told = "ffn 'broken' of package raises 1.0 cannot be imported (RuntimeError: no luck); mend or uninstall raises"
    refused("show", "ffn", "broken", says=f"error: {told}\n")
    wanted = f"error: model.block.ffn: {told}\n"
    refused("validate", "spec.json", "--set", "model.block.ffn=broken", says=wanted, cwd=neighbours)


def test_every_probe_means_those_that_can_be_imported(neighbours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = choose(None)
    assert "blind" not in found
    assert len(found) > 5
    told = "probe 'blind' of package raises 1.0 cannot be imported (RuntimeError: no luck); mend or uninstall raises"
    assert capsys.readouterr().err == f"{told}; left out\n"
    refused("probe", "spec.json", "--probes", "blind", says=told, cwd=neighbours)


def test_a_name_that_is_taken_is_told_and_the_built_in_used(neighbours: Path) -> None:
    done = run("list", "ffn")
    assert (done.returncode, done.stderr) == (0, f"problem: {TAKEN}\n")
    assert "[good 1.0] What good is." in done.stdout
    assert not imported(neighbours)


def test_check_says_which_fail_and_what_is_slow(folder: Path, tmp_path: Path) -> None:
    """In a process of its own, which forks."""
    write_plugin(tmp_path, "dies", {"ffn": ["dead", "dead_too"]}, KILLED)
    write_plugin(tmp_path, "odd", {"ffn": ["odd"]}, "class Part:\n    pass\n")
    limits = "catalogue.CHECK_SECONDS, catalogue.SLOW_SECONDS = 3.0, 0.9"
    code = f"from sparsekit.cli import catalogue, main\n{limits}\nmain()"
    environment = os.environ | {"PYTHONPATH": f"{folder}:{tmp_path}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, "list", "--check"], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    lines = done.stderr.splitlines()
    slow = [line for line in lines if line.startswith("slow: ")]
    assert any(line.startswith("slow: ffn 'late' of package tardy 1.0 takes ") for line in slow)
    assert not any("'late_too'" in line for line in slow), "a module is imported once"
    mend = "cannot be imported (RuntimeError: no luck); mend or uninstall raises"
    dead = "ffn 'dead' of package dies 1.0 ends the process that imports it (exit code -9)"
    assert sorted(line.removeprefix("problem: ") for line in lines if line not in slow) == sorted([
        f"{dead}; not tried: its 1 other entries",
        "ffn 'odd' of package odd (odd:Part) has no Params that derive from sparsekit.Params",
        f"ffn 'broken' of package raises 1.0 {mend}",
        f"probe 'blind' of package raises 1.0 {mend}",
        "ffn 'slow' of package hangs 1.0 does not import within 3 s; not tried: its 2 other entries",
        TAKEN,
    ])  # fmt: skip
    assert imported(folder)
