"""Names and plug-ins: found without being imported, and told apart when they are at odds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sparsekit import registry as module
from sparsekit.catalogue import BUILT_IN
from sparsekit.components.feedforward import MLP
from sparsekit.errors import PluginError, SpecError, UnknownNameError
from sparsekit.registry import KINDS, Registry, register, registry
from sparsekit.spec.load import load_spec, validate_model, with_packages

GOOD = '''
from sparsekit.components.feedforward import MLP

class Mine(MLP):
    """Ours."""

class Outer:
    class Inner(MLP):
        """Below another class."""
'''


@pytest.fixture
def install(tmp_path, monkeypatch):
    """``install("my-package", {"ffn": {"mine": "my_module:Mine"}}, my_module="...")``: a package on the path."""
    monkeypatch.syspath_prepend(str(tmp_path))
    module._plugin_entries.cache_clear()
    written = []

    def make(name: str, points: dict[str, dict[str, str]], version: str = "1.0", **modules: str) -> Path:
        info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: What {name} is.\n"
        )
        lines = []
        for kind, entries in points.items():
            lines += [
                f"[{kind if '.' in kind else 'sparsekit.' + kind}]",
                *(f"{k} = {v}" for k, v in entries.items()),
                "",
            ]
        (info / "entry_points.txt").write_text("\n".join(lines))
        for stem, source in modules.items():
            (tmp_path / f"{stem}.py").write_text(source)
            written.append(stem)
        module._plugin_entries.cache_clear()
        return info

    yield make
    module._plugin_entries.cache_clear()
    for stem in written:
        sys.modules.pop(stem, None)


# --- built-ins


def test_every_kind_of_the_catalogue_is_a_kind():
    assert set(BUILT_IN) <= set(KINDS)
    assert len(set(KINDS)) == len(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_built_ins_are_listed_and_import(kind):
    names = registry(kind)
    assert names.names() == sorted(names.names())
    assert [entry.name for entry in names.entries()] == names.names()
    assert set(BUILT_IN.get(kind, {})) <= set(names.names())
    for name, (target, summary, source) in BUILT_IN.get(kind, {}).items():
        entry = names.entry(name)
        assert (entry.target, entry.summary, entry.source) == (target, summary, source)
        assert (entry.owner, entry.built_in) == ("sparsekit", True)
        cls = names.get(name)
        assert f"{cls.__module__}:{cls.__qualname__}" == target


def test_listing_imports_neither_torch_nor_pydantic():
    code = (
        "import sys, sparsekit.registry as r\n"
        "found = [e for kind in r.KINDS for e in r.registry(kind).entries()]\n"
        "assert len(found) > 20 and all(e.summary is not None for e in found)\n"
        "print([m for m in ('torch', 'pydantic', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_unknown_names_and_kinds():
    with pytest.raises(
        UnknownNameError, match=r"^unknown ffn 'swiglo' \(did you mean 'swiglu'\?\); registered: .*swiglu"
    ):
        registry("ffn").get("swiglo")
    with pytest.raises(UnknownNameError, match=r"^unknown ffn 'zzz'; registered: "):
        registry("ffn").get("zzz")
    with pytest.raises(UnknownNameError, match=r"^unknown kind 'fnn' \(did you mean 'ffn'\?\); kinds: attention, "):
        registry("fnn")
    with pytest.raises(UnknownNameError, match=r"^unknown empty 'x'; registered: none$"):
        Registry("empty").get("x")


# --- plug-ins


def test_a_plugin_is_found_and_used(install):
    install("my-package", {"ffn": {"mine": "my_module:Mine", "inner": "my_module:Outer.Inner"}}, "2.5", my_module=GOOD)
    entry = registry("ffn").entry("mine")
    assert (entry.owner, entry.version, entry.summary) == ("my-package", "2.5", "What my-package is.")
    assert not entry.built_in
    assert registry("ffn").get("mine").__name__ == "Mine"
    assert registry("ffn").get("inner").__qualname__ == "Outer.Inner"
    assert "mine" in registry("ffn").names()
    assert registry("ffn").collisions() == []


def test_a_spec_says_which_packages_it_needs(install, tiny):
    install("my-package", {"ffn": {"mine": "my_module:Mine"}}, "2.5", my_module=GOOD)
    layers = {"1": {"ffn": {"type": "moe", "n_experts": 2, "expert": {"type": "mine", "d_ff": 4}}}}
    spec = load_spec(tiny(vocab_size=300, layers=layers))
    assert with_packages(spec).packages == {"my-package": "2.5"}
    assert with_packages(load_spec(tiny(vocab_size=300))).packages == {}


def test_listing_does_not_import_a_plugin(install):
    install("bomb", {"ffn": {"boom": "bomb_module:Boom"}}, bomb_module="raise SystemExit('imported!')")
    assert "boom" in registry("ffn").names()
    assert registry("ffn").entry("boom").owner == "bomb"
    assert "bomb_module" not in sys.modules


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("raise RuntimeError('no luck')", "RuntimeError: no luck"),
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("class Other: pass", "AttributeError: module 'bomb_module' has no attribute 'Boom'"),
        ("class Boom(:", "SyntaxError: "),
    ],
)
def test_a_plugin_that_cannot_be_imported_costs_only_its_own_names(install, tiny, source, told):
    install("bomb", {"ffn": {"boom": "bomb_module:Boom"}}, "0.3", bomb_module=source)
    with pytest.raises(PluginError) as caught:
        registry("ffn").get("boom")
    text = str(caught.value)
    assert text.startswith("ffn 'boom' of package bomb 0.3 cannot be imported (")
    assert told in text
    assert text.endswith("mend or uninstall bomb")
    assert "\n" not in text
    with pytest.raises(SpecError, match=r"^block\.ffn: ffn 'boom' of package bomb 0\.3 cannot be imported"):
        validate_model(tiny(ffn="boom"))
    load_spec(tiny(vocab_size=300))
    assert registry("ffn").get("mlp") is MLP


def test_two_plugins_that_claim_one_name(install):
    install("first", {"ffn": {"mine": "module_a:Mine", "only": "module_a:Mine"}}, module_a=GOOD)
    install("second", {"ffn": {"mine": "module_b:Mine"}}, module_b=GOOD)
    line = "ffn 'mine' is claimed by first (module_a:Mine) and second (module_b:Mine); uninstall one to use it"
    assert registry("ffn").collisions() == [line]
    for use in (registry("ffn").get, registry("ffn").entry):
        with pytest.raises(PluginError) as caught:
            use("mine")
        assert str(caught.value) == line
    assert registry("ffn").get("only").__module__ == "module_a"
    assert "module_b" not in sys.modules


def test_the_built_in_wins_over_a_plugin_of_its_name(install):
    install("shadow", {"ffn": {"mlp": "module_a:Mine"}}, module_a=GOOD)
    assert registry("ffn").get("mlp") is MLP
    assert registry("ffn").entry("mlp").built_in
    assert registry("ffn").names().count("mlp") == 1
    assert registry("ffn").collisions() == [
        "ffn 'mlp' is claimed by sparsekit (sparsekit.components.feedforward:MLP) and shadow (module_a:Mine); "
        "the built-in 'mlp' is used"
    ]


def test_one_name_in_two_kinds_is_no_collision(install):
    install("both", {"ffn": {"twin": "module_a:Mine"}, "norm": {"twin": "module_a:Mine"}}, module_a=GOOD)
    assert registry("ffn").collisions() == registry("norm").collisions() == []


def test_what_is_not_ours_is_passed_over(install):
    install(
        "tools", {"console_scripts": {"x": "a:b"}, "other.ffn": {"mine": "a:b"}, "sparsekit.nonsense": {"mine": "a:b"}}
    )
    assert "mine" not in registry("ffn").names()


def test_a_package_that_is_on_the_path_twice_is_one(install, tmp_path, monkeypatch):
    install("my-package", {"ffn": {"mine": "my_module:Mine"}}, "1.0", my_module=GOOD)
    install("my-package", {"ffn": {"mine": "my_module:Mine"}}, "2.0")
    assert len([e for e in registry("ffn").entries() if e.name == "mine"]) == 1
    assert registry("ffn").collisions() == []
    registry("ffn").get("mine")


# --- the decorator


@pytest.fixture
def names():
    """The registry of feed-forwards, with nothing left behind."""
    made = registry("ffn")
    yield made
    for name in ("note", "mlp", "mine"):
        made.unregister(name)


def test_register(names):
    @register("ffn", "note")
    class Note(MLP):
        """First line.

        Second.
        """

    assert names.get("note") is Note
    entry = names.entry("note")
    assert (entry.summary, entry.owner, entry.built_in) == ("First line.", __name__, False)
    names.unregister("note")
    with pytest.raises(UnknownNameError):
        names.get("note")


def test_a_cell_that_runs_again_replaces_its_class(names):
    def cell():
        @register("ffn", "note")
        class Note(MLP):
            """A cell of a notebook."""

        return Note

    first, second = cell(), cell()
    assert first is not second
    assert names.get("note") is second
    assert names.collisions() == []


def test_a_taken_name_names_both_owners(names, install):
    class Other(MLP):
        """Another."""

    with pytest.raises(PluginError) as caught:
        names.register("mlp")(Other)
    assert str(caught.value) == (
        f"ffn 'mlp' of {__name__}:{Other.__qualname__} is already registered by sparsekit "
        "(sparsekit.components.feedforward:MLP); choose another name"
    )
    install("my-package", {"ffn": {"mine": "my_module:Mine"}}, my_module=GOOD)
    with pytest.raises(PluginError, match=r"is already registered by my-package \(my_module:Mine\)"):
        names.register("mine")(Other)
    names.register("note")(Other)
    with pytest.raises(PluginError, match="ffn 'note' of .* is already registered by"):
        names.register("note")(type("Third", (MLP,), {}))
    assert names.get("note") is Other


def test_a_registered_name_that_a_plugin_claims_too_is_a_collision(names, install):
    @register("ffn", "mine")
    class Mine(MLP):
        """Ours."""

    install("my-package", {"ffn": {"mine": "my_module:Mine"}}, my_module=GOOD)
    with pytest.raises(PluginError, match="is claimed by my-package .* and .*; uninstall one"):
        names.get("mine")
