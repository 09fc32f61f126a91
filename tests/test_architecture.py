"""The direction of imports, and the catalogue's agreement with the docstrings."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from sparsekit.catalogue import BUILT_IN
from sparsekit.registry import KINDS, registry

ROOT = Path(__file__).parents[1] / "sparsekit"

BELOW_TRAINING = {"errors", "spec", "components", "model", "data"}

# each layer may import itself and those named; what stands in no layer is at the top and may import anything
LAYERS = {
    "errors": set(),
    "catalogue": set(),
    "registry": {"errors", "catalogue"},
    "spec": {"errors", "registry"},
    "files": {"errors"},
    "components": {"errors", "registry", "spec"},
    "model": {"errors", "registry", "files", "spec", "components"},
    "data": {"errors", "registry", "files", "spec"},
    "reports": {"errors", "catalogue", "registry", "files", "spec", "model"},
    "studies": {"errors", "registry", "files", "spec", "model", "data", "training", "probes", "interop", "reports"},
    "training": {"errors", "registry", "files", "spec", "components", "model", "data", "probes"},
    "probes": {"errors", "registry", "files", "spec", "components", "model", "data", "interop"},
    "sparsifiers": {"errors", "registry", "files", "spec", "components", "model", "data", "probes"},
    "interop": {"errors", "registry", "files", "spec", "components", "model", "data"},
    "examples": {"registry"},
    "checks": {"registry", "spec", "components", "model", "examples"},
    "checks_beside": BELOW_TRAINING | {"training", "probes", "sparsifiers", "checks", "examples"},
    "testing": {"errors", "checks", "checks_beside", "examples", "registry", "spec", "components", "model", "training"},
    "__init__": set(),
}
# a mixture and an attention are made of parts that slots fill; these share code and not choices
WITHIN_COMPONENTS = {
    "fused_kernels": {"contracts", "kernels"},
    "attention": {"contracts", "kernels"},  # the mask rule, which is the kernels' contract
    "moe": {"contracts", "sorted_rows", "fused_experts"},  # the way to experts and back, plain and in kernels
    "fused_experts": {"contracts", "sorted_rows"},
    "feedforward": {"contracts", "activations"},  # swiglu, geglu and reglu are each defined by one activation
}
ALWAYS = {"contracts"}


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """The modules of ours that a file imports when it runs, wherever in it; not those for type checking only."""
    tree = ast.parse(path.read_text())
    package = ["sparsekit", *path.relative_to(ROOT).parts[:-1]]
    skipped = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for statement in branch.body
        for node in ast.walk(statement)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found.update(f"{name}.{alias.name}" for alias in node.names)
    return {name for name in found if name.split(".")[0] == "sparsekit"}


def part(name: str, index: int) -> str:
    """The part of a dotted name or of a file's path at an index below ``sparsekit``."""
    parts = name.split(".")
    return parts[index] if len(parts) > index else ""


def layer(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


IDS = [str(path.relative_to(ROOT)) for path in modules()]


def test_there_is_something_to_look_at():
    assert len(modules()) > 25
    assert "sparsekit.components.contracts.Build" in imports(ROOT / "components" / "norms.py")
    assert imports(ROOT / "__init__.py") == set(), "what is imported for type checking only does not count"


@pytest.mark.parametrize("path", modules(), ids=IDS)
def test_imports_point_one_way(path):
    assert layer(path) in LAYERS, f"{layer(path)} is new: say in LAYERS what it may import"
    allowed = LAYERS[layer(path)] | {layer(path)}
    for name in imports(path):
        target = part(name, 1)
        if target not in LAYERS:  # "from sparsekit import X": a layer, or a name that the package exports
            pytest.fail(f"{path} imports {name}, which stands in no layer")
        assert target in allowed, f"{layer(path)} must not import {target} ({name})"


@pytest.mark.parametrize("path", modules(), ids=IDS)
def test_nothing_imports_the_command_line(path):
    assert not [name for name in imports(path) if name.startswith("sparsekit.cli")]


COMPONENTS = sorted((ROOT / "components").glob("*.py"))


@pytest.mark.parametrize("path", COMPONENTS, ids=[path.stem for path in COMPONENTS])
def test_components_do_not_import_each_other_across_kinds(path):
    allowed = WITHIN_COMPONENTS.get(path.stem, ALWAYS)
    found = {part(name, 2) for name in imports(path) if part(name, 1) == "components"}
    assert found <= allowed, f"{path.stem} imports {found - allowed}"


def test_the_lowest_layers_need_neither_torch_nor_pydantic():
    for name in ("errors", "catalogue", "registry", "__init__"):
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {n.split(".")[0] for n in names} & {"torch", "pydantic", "numpy"}


# --- the catalogue

LINES = [(kind, name) for kind in KINDS for name in BUILT_IN.get(kind, {})]


@pytest.mark.parametrize(("kind", "name"), LINES, ids=[f"{kind}-{name}" for kind, name in LINES])
def test_the_catalogue_says_what_the_docstring_says(kind, name):
    _, summary, source = BUILT_IN[kind][name]
    cls = registry(kind).get(name)
    paragraphs = inspect.cleandoc(cls.__dict__["__doc__"]).split("\n\n")
    assert summary == " ".join(paragraphs[0].split())
    sources = [" ".join(p.split()) for p in paragraphs if p.startswith("Source: ")]
    assert len(sources) <= 1
    assert source == (sources[0].removeprefix("Source: ") if sources else "")


@pytest.mark.parametrize("kind", KINDS)
def test_catalogue_names_are_sorted_out(kind):
    for name, (target, summary, _) in BUILT_IN.get(kind, {}).items():
        assert name.isidentifier()
        assert name == name.lower()
        assert target.startswith("sparsekit.")
        assert summary, f"{kind} {name} has no summary"
        assert "\n" not in summary
