"""``sparsekit new plugin``: every kind as generated passes its own tests and trains, and nothing is half-written."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sparsekit.cli import new

from sparsekit import registry as module
from sparsekit.errors import SparsekitError
from sparsekit.registry import KINDS, registry
from sparsekit.spec.facts import walk
from sparsekit.spec.load import load_spec, with_packages
from sparsekit.testing import check_component
from tests import environments

from .test_cli import refused, tell

KIND_NAMES = sorted(new.THEN)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """Makes a generated package importable and listed, as its pyproject says, without pip."""
    names: list[str] = []

    def install(folder: Path) -> None:
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        monkeypatch.syspath_prepend(str(folder))
        info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        info.mkdir()
        told = {"Metadata-Version": "2.1", "Name": project["name"], "Version": project["version"]}
        told["Summary"] = project["description"]
        (info / "METADATA").write_text("".join(f"{key}: {value}\n" for key, value in told.items()))
        points = project["entry-points"]
        lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in each.items()) for group, each in points.items()]
        (info / "entry_points.txt").write_text("\n".join(lines))
        names.append(new.module_of(folder.name))
        module._plugin_entries.cache_clear()

    yield install
    module._plugin_entries.cache_clear()
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_what_is_generated_keeps_its_contract(kind: str, tmp_path: Path, installed: Callable[[Path], None]) -> None:
    """Without compiling; below all of it, as an author would."""
    folder = new.write_plugin(f"sparsekit-my-{kind}", kind, tmp_path)
    installed(folder)
    entry = registry(kind).entry(f"my_{kind}")
    assert (entry.owner, entry.version, entry.summary) == (
        f"sparsekit-my-{kind}", "0.1.0", f"The {kind} my_{kind} for sparsekit",
    )  # fmt: skip
    assert entry.target == f"sparsekit_my_{kind}:My{kind.capitalize()}"
    check_component(kind, entry.name, compile_backend=None)
    spec = load_spec(folder / "spec.json")
    sections = (spec.data, spec.train, *spec.probes, *spec.model.per_layer)
    used = {(choice.kind, choice.type) for section in sections for _, choice in walk(section)}
    if kind != "sparsifier":  # which is no part of a run
        assert (kind, entry.name) in used
        assert with_packages(spec).packages == {entry.owner: "0.1.0"}
    built_in = {(of, name) for of, name in used if of != kind or name != entry.name}
    assert all(registry(of).entry(name).built_in for of, name in built_in)


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_nothing_of_the_template_is_left(kind: str, tmp_path: Path) -> None:
    folder = new.write_plugin("ab-cd", kind, tmp_path / "deep" / "er")
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == ["README.md", "ab_cd/__init__.py", "pyproject.toml", "spec.json", "tests/test_ab_cd.py"]
    for name in files:
        text = (folder / name).read_text()
        left = ("new_part", "new-part", "NewPart", "new_kind", "new_steps", "{entry", "{spec")
        assert not [word for word in left if word in text], name
        assert max(map(len, text.splitlines())) <= 150
    assert [path.name for path in (tmp_path / "deep" / "er").iterdir()] == ["ab-cd"]
    needs = tomllib.loads((folder / "pyproject.toml").read_text())["project"]["dependencies"]
    assert needs == [f"sparsekit>={importlib.metadata.version('sparsekit')}"]
    assert (folder / "ab_cd" / "__init__.py").stat().st_size < 3000, "small enough to be read in a minute"


def test_the_command(tmp_path: Path) -> None:
    told = tell("new", "plugin", "sharp-router", "--kind", "router", "--out", "my plugins", cwd=tmp_path)
    assert told.splitlines() == [
        "my plugins/sharp-router: the router 'sharp_router' in sharp_router/__init__.py, a test of it, "
        "a spec that uses it; next:",
        "  pip install -e 'my plugins/sharp-router'",
        "  pytest 'my plugins/sharp-router'",
        "  sparsekit train 'my plugins/sharp-router/spec.json'",
        "  sparsekit train 'my plugins/sharp-router/spec.json' --out runs/top_k "
        """--set 'model.block.ffn.router={"type": "top_k", "k": 2}'""",
    ]
    assert importlib.util.find_spec("sharp_router") is None, "nothing is installed"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["x", "--kind", "fnn"], "--kind fnn: unknown kind (did you mean 'ffn'?); kinds: ffn, attention, router, "),
        (["x", "--kind", "kernel"], "--kind kernel: there is no template of it; kinds: ffn, attention, "),
        (
            ["My-FFN", "--kind", "ffn"],
            "'My-FFN': a name is of at most 60 small letters and digits, with single - or ",
        ),
        (["a--b", "--kind", "ffn"], "'a--b': a name is of "),
        (["../a", "--kind", "ffn"], "'../a': a name is of "),
        (["9ffn", "--kind", "ffn"], "'9ffn': a name is of "),
        (["a" * 61, "--kind", "ffn"], "': a name is of "),
        (["lambda", "--kind", "ffn"], "'lambda': is a word of Python's own; choose another name"),
        (["sparsekit-import", "--kind", "ffn"], "'sparsekit-import': is a word of Python's own; choose another name"),
        (["sparsekit-2d", "--kind", "ffn"], "'sparsekit-2d': what follows sparsekit- begins with a digit"),
        (["swiglu", "--kind", "ffn"], "'swiglu': ffn 'swiglu' is already registered by sparsekit; choose another name"),
        (["sparsekit-swiglu", "--kind", "ffn"], "ffn 'swiglu' is already registered by sparsekit"),
        (
            ["typing-extensions", "--kind", "ffn"],
            "'typing-extensions': a module 'typing_extensions' is installed already; choose another name",
        ),
        (["there", "--kind", "ffn"], "sparsekit-there: is there already; choose another name, or another --out"),
        (["x", "--kind", "ffn", "--out", "file"], "file: cannot be written ("),
    ],
)
def test_what_is_refused_leaves_nothing(arguments: list[str], says: str, tmp_path: Path) -> None:
    (tmp_path / "sparsekit-there").mkdir()
    (tmp_path / "file").write_text("")
    refused("new", "plugin", *arguments, says=says, cwd=tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "sparsekit-there"]


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    real = Path.write_text

    def break_off(path: Path, *args: object, **kwargs: object) -> int:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path)
        return real(path, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "write_text", break_off)
    with pytest.raises(KeyboardInterrupt):
        new.write_plugin("mine", "ffn", tmp_path)
    assert len(written) == 3
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_is_told_before_torch_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom sparsekit.cli.new import write_plugin\nfrom pathlib import Path\n"
        "write_plugin('mine', 'ffn', Path(sys.argv[1]))\nassert 'torch' not in sys.modules"
    )
    done = environments.run(sys.executable, "-c", code, str(tmp_path))
    assert done.returncode == 0, done.stderr


def test_every_kind_that_has_a_template_is_one() -> None:
    assert set(KIND_NAMES) <= set(KINDS)
    assert {path.name for path in new.TEMPLATES.iterdir() if path.is_dir()} - {"__pycache__"} == set(KIND_NAMES)
    with pytest.raises(SparsekitError, match="unknown kind"):
        new.write_plugin("x", "nonsense", Path("nowhere"))


# ---- as an author does it


def test_the_authors_guide_has_the_commands_that_are_printed() -> None:
    guide = (Path(__file__).parents[2] / "plugins" / "README.md").read_text()
    commands = guide.partition("```\n")[2].partition("```")[0].splitlines()
    assert commands[0] == "sparsekit new plugin twin-ffn --kind ffn"
    assert commands[1:-1] == new.next_steps(Path("twin-ffn"), "ffn", "twin_ffn")
    assert len(commands) <= 10


# in one process, since each new one imports torch
ONE_AFTER_ANOTHER = """
import json, sys
from sparsekit.cli import main
for words in json.loads(sys.argv[1]):
    sys.argv = words
    try:
        main()
    except SystemExit as exit:
        if exit.code:
            sys.exit(f"{words}: {exit.code}")
"""


@pytest.mark.slow
def test_installed_by_pip_every_kind_passes_its_tests_trains_and_is_compared(tmp_path: Path) -> None:
    """``pip install -e``, ``pytest`` and all commands that ``new plugin`` prints, from an empty folder."""
    python = environments.make(tmp_path / "venv")
    names = [f"my-{kind}" for kind in KIND_NAMES]
    for kind, name in zip(KIND_NAMES, names, strict=True):
        done = environments.sparsekit(python, "new", "plugin", name, "--kind", kind, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    environments.install(python, *(part for name in names for part in ("-e", tmp_path / name)))

    done = environments.run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *names, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "warning" not in done.stdout
    done = environments.sparsekit(python, "list", "--check")
    assert (done.returncode, done.stdout) == (0, f"all {len(names)} entries of {len(names)} packages work\n"), done

    short = ["--set", "train.max_steps=6", "--set", "train.eval_tokens=512", "--set", "train.log_every=2"]
    commands = []
    for kind, name in zip(KIND_NAMES, names, strict=True):
        steps = new.next_steps(Path(name), kind, new.entry_of(name))
        assert steps[:2] == [f"pip install -e ./{name}", f"pytest {name}"]
        words = [shlex.split(step) for step in steps[2:]]
        assert [each[0] for each in words] == ["sparsekit", "cat" if kind == "callback" else "sparsekit"]
        commands += [each + short * (each[1] == "train") for each in words if each[0] == "sparsekit"]
    done = environments.run(python, "-c", ONE_AFTER_ANOTHER, json.dumps(commands), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for kind, name in zip(KIND_NAMES, names, strict=True):
        run = tmp_path / "runs" / new.entry_of(name)
        packages = json.loads((run / "spec.json").read_text())["packages"]
        assert packages == ({name: "0.1.0"} if kind != "sparsifier" else {})
    rows = (tmp_path / "runs" / "my_router" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["balance_loss"] > 0, "a loss of its own is logged"
    assert (tmp_path / "runs" / "my_probe" / "probes" / "my_probe-step-00000006.json").exists()
