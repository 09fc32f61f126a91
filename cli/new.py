"""``new plugin``: a package with one component that works, to be changed into one's own."""

from __future__ import annotations

import importlib.util
import keyword
import os
import re
import shlex
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from sparsekit.errors import SparsekitError, did_you_mean
from sparsekit.files import writable
from sparsekit.registry import KINDS, OURSELVES, own_version, registry

TEMPLATES = Path(__file__).parent / "templates"
NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")
LONGEST = 60
SHARED = {"plugin.toml": "pyproject.toml", "README.md": "README.md"}  # of every kind: from, to
OWN = {"part.py": "{module}/__init__.py", "test_part.py": "tests/test_{module}.py", "spec.json": "spec.json"}

# What to do once the spec has trained: the same run with a built-in in the component's place, or what the component
# itself is for.
AGAIN = "sparsekit train {spec} --out runs/"
THEN = {
    "ffn": AGAIN + """swiglu --set 'model.block.ffn={{"type": "swiglu", "d_ff": 128}}'""",
    "attention": AGAIN + """mha --set 'model.block.attention={{"type": "mha", "n_heads": 4}}'""",
    "router": AGAIN + """top_k --set 'model.block.ffn.router={{"type": "top_k", "k": 2}}'""",
    "norm": AGAIN + "rmsnorm --set model.block.norm=rmsnorm",
    "residual": AGAIN + "pre_norm --set model.block.residual=pre_norm",
    "probe": "sparsekit probe runs/{entry} --probes {entry} --sequences 16",
    "sparsifier": "sparsekit sparsify runs/{entry} --sparsifier {entry}:factor=0.5 --sequences 16",
    "callback": "cat runs/{entry}/{entry}.json",
    "source": "sparsekit generate runs/{entry} --prompt '17+5=' --max-new-tokens 4 --temperature 0",
}

new = typer.Typer(help="Begins something of your own: a plug-in.", no_args_is_help=True, rich_markup_mode=None)


@new.callback()
def _new() -> None:
    """Begins something of your own: a plug-in."""


@new.command()
def plugin(
    name: Annotated[
        str, typer.Argument(help="Of the package, such as sharp-router; x is sparsekit-x.", show_default=False)
    ],
    kind: Annotated[str, typer.Option(help=f"What it adds: {', '.join(THEN)}.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Where its folder goes.")] = Path("."),
) -> None:
    """Writes an installable package: a component that works, its test, a spec that uses it."""
    folder = write_plugin(name, kind, out)
    entry = entry_of(name)
    print(f"{folder}: the {kind} {entry!r} in {module_of(name)}/__init__.py, a test of it, a spec that uses it; next:")
    for line in next_steps(folder, kind, entry):
        print(f"  {line}")


def write_plugin(name: str, kind: str, out: Path) -> Path:
    """The new package's folder; it appears whole or not at all.

    Raises:
        SparsekitError: the name or the kind cannot be used, or the folder is there already.
    """
    if kind not in THEN:
        kinds = f"; kinds: {', '.join(THEN)}"
        if kind in KINDS:
            raise SparsekitError(f"--kind {kind}: there is no template of it{kinds}; begin with the nearest")
        raise SparsekitError(f"--kind {kind}: unknown kind{did_you_mean(kind, THEN)}{kinds}")
    demand_free(name, kind)
    name = package_of(name)
    folder = out / name
    if os.path.lexists(folder):
        raise SparsekitError(f"{folder}: is there already; choose another name, or another --out")
    entry, version = entry_of(name), own_version()
    requirement = f"{OURSELVES}>={version}" if version[:1].isdigit() else OURSELVES
    words = {
        # longer ones first, as some begin with others
        "new_part_package": module_of(name), "new_part_requirement": requirement, "new_part": entry, "new-part": name,
        "NewPart": "".join(word.capitalize() for word in entry.split("_")), "new_kind": kind,
        "new_steps": "\n".join(next_steps(Path(name), kind, entry)),
    }  # fmt: skip
    with writable(out):
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out, prefix=f".{name}.") as unfinished:
            made = Path(unfinished) / name
            for source, target in [*SHARED.items(), *((f"{kind}/{of}", to) for of, to in OWN.items())]:
                text = (TEMPLATES / source).read_text(encoding="utf-8")
                for word, meant in words.items():
                    text = text.replace(word, meant)
                path = made / target.format(module=module_of(name))
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
            made.rename(folder)
    return folder


def package_of(name: str) -> str:
    """What is installed, and the folder that it lies in.

    A folder that is called as the module inside it would be imported in its place by ``python -m`` beside it, so that
    a single word x becomes ``sparsekit-x``.
    """
    return name if "-" in name else f"{OURSELVES}-{name}"


def module_of(name: str) -> str:
    """What is imported."""
    return package_of(name).replace("-", "_")


def entry_of(name: str) -> str:
    """What a spec says: a package ``sparsekit-x`` brings x."""
    return module_of(name).removeprefix(f"{OURSELVES}_")


def demand_free(name: str, kind: str) -> None:
    """Refuses what no package can be called, and what something else is called already.

    Raises:
        SparsekitError: the name cannot be used.
    """
    if not NAME.fullmatch(name) or len(name) > LONGEST:
        rule = f"a name is of at most {LONGEST} small letters and digits, with single - or _ between words"
        raise SparsekitError(f"{name!r}: {rule}, such as sharp-router")
    module, entry = module_of(name), entry_of(name)
    if keyword.iskeyword(module) or keyword.iskeyword(entry):
        raise SparsekitError(f"{name!r}: is a word of Python's own; choose another name")
    if not entry.isidentifier():
        raise SparsekitError(f"{name!r}: what follows {OURSELVES}- begins with a digit; choose another name")
    taken = next((each for each in registry(kind).entries() if each.name == entry), None)
    if taken is not None:
        raise SparsekitError(f"{name!r}: {kind} {entry!r} is already registered by {taken.owner}; choose another name")
    if importlib.util.find_spec(module) is not None:
        raise SparsekitError(f"{name!r}: a module {module!r} is installed already; choose another name")


def next_steps(folder: Path, kind: str, entry: str) -> list[str]:
    """The commands from a new package to a trained comparison, in the folder that it lies in."""
    place, spec = shlex.quote(str(folder)), shlex.quote(str(folder / "spec.json"))
    # a word without a slash is to pip the name of somebody else's package
    return [
        f"pip install -e {place if os.sep in place else f'./{place}'}",
        f"pytest {place}",
        f"sparsekit train {spec}",
        THEN[kind].format(spec=spec, entry=entry),
    ]
