"""Names and what they stand for: one registry a kind, filled by the built-in catalogue and by entry points.

A built-in entry is a line in :mod:`sparsekit.catalogue`; a third party's is a line of its package metadata::

    [project.entry-points."sparsekit.ffn"]
    top_k_ffn = "my_package:TopKFeedForward"

Both are strings until somebody uses them: listing imports neither torch nor any plug-in, and a plug-in that fails
to import costs only its own names.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from sparsekit.catalogue import BUILT_IN
from sparsekit.errors import PluginError, UnknownNameError, did_you_mean

KINDS = (
    "attention", "kernel", "normalizer", "position", "rope_scaling", "ffn", "activation", "router", "norm",
    "residual", "linear", "embedding", "init", "objective", "optimizer", "schedule", "callback", "source",
    "tokenizer", "probe", "sparsifier",
)  # fmt: skip
OURSELVES = "sparsekit"
T = TypeVar("T", bound=type)


@dataclass(frozen=True)
class Entry:
    """One registered name, without having imported what it stands for."""

    kind: str
    name: str
    target: str  # "module:attribute"
    owner: str  # the distribution that brings it
    version: str
    summary: str
    source: str = ""  # paper and equation, for built-ins

    @property
    def built_in(self) -> bool:
        return self.owner == OURSELVES


class Registry:
    """The entries of one kind: name -> class, looked up lazily."""

    def __init__(self, kind: str):
        self.kind = kind
        self._registered: dict[str, type] = {}

    def _entries(self) -> dict[str, list[Entry]]:
        """Every claim to every name; the first of a list is the one that counts, built-ins before plug-ins."""
        claims: dict[str, list[Entry]] = {}
        for name, (target, summary, source) in BUILT_IN.get(self.kind, {}).items():
            claims[name] = [Entry(self.kind, name, target, OURSELVES, own_version(), summary, source)]
        for entry in _plugin_entries().get(self.kind, ()):
            claims.setdefault(entry.name, []).append(entry)
        for name, cls in self._registered.items():
            summary = (cls.__doc__ or "").strip().partition("\n")[0]
            claims.setdefault(name, []).append(Entry(self.kind, name, target_of(cls), cls.__module__, "", summary))
        return claims

    def entries(self) -> list[Entry]:
        """What each name stands for, sorted by name; imports nothing."""
        return [claims[0] for _, claims in sorted(self._entries().items())]

    def names(self) -> list[str]:
        return sorted(self._entries())

    def entry_of(self, cls: type) -> Entry | None:
        """What a class is registered as, if it is."""
        target = target_of(cls)
        return next((entry for entry in self.entries() if entry.target == target), None)

    def collisions(self) -> list[str]:
        """A line for each name that more than one package claims."""
        lines = []
        for name, claims in sorted(self._entries().items()):
            owners = " and ".join(f"{claim.owner} ({claim.target})" for claim in claims)
            if len(claims) > 1:
                verdict = f"the built-in {name!r} is used" if claims[0].built_in else "uninstall one to use it"
                lines.append(f"{self.kind} {name!r} is claimed by {owners}; {verdict}")
        return lines

    def entry(self, name: str) -> Entry:
        """The entry under a name.

        Raises:
            UnknownNameError: nothing is registered under it; the message names the nearest.
            PluginError: two plug-ins claim it.
        """
        claims = self._entries().get(name)
        if not claims:
            known = ", ".join(self.names()) or "none"
            raise UnknownNameError(
                f"unknown {self.kind} {name!r}{did_you_mean(name, self.names())}; registered: {known}"
            )
        if len(claims) > 1 and not claims[0].built_in:
            raise PluginError(next(line for line in self.collisions() if line.startswith(f"{self.kind} {name!r} ")))
        return claims[0]

    def get(self, name: str) -> Any:
        """The class under a name, imported now.

        Raises:
            UnknownNameError, PluginError: as :meth:`entry`, or the plug-in cannot be imported.
        """
        entry = self.entry(name)
        if name in self._registered:
            return self._registered[name]
        module, _, attribute = entry.target.partition(":")
        try:
            found: Any = importlib.import_module(module)
            for part in attribute.split("."):
                found = getattr(found, part)
        except (Exception, SystemExit) as error:
            if entry.built_in:
                raise
            raise PluginError(
                f"{self.kind} {name!r} of package {entry.owner} {entry.version} cannot be imported "
                f"({type(error).__name__}: {error}); mend or uninstall {entry.owner}"
            ) from error
        return found

    def register(self, name: str) -> Callable[[T], T]:
        """Registers a class for this process only: for notebooks and tests; a package uses an entry point.

        Raises:
            PluginError: the name is taken by another class.
        """

        def decorate(cls: T) -> T:
            here = self._registered.get(name)
            if here is not None and (here.__module__, here.__qualname__) == (cls.__module__, cls.__qualname__):
                self._registered[name] = cls  # the same cell of a notebook, run again
                return cls
            claims = self._entries().get(name)
            if claims:
                raise PluginError(
                    f"{self.kind} {name!r} of {target_of(cls)} is already registered by "
                    f"{claims[0].owner} ({claims[0].target}); choose another name"
                )
            self._registered[name] = cls
            return cls

        return decorate

    def unregister(self, name: str) -> None:
        """Takes back what :meth:`register` registered."""
        self._registered.pop(name, None)


def target_of(cls: type) -> str:
    """Where a class is found, as entry points say it."""
    return f"{cls.__module__}:{cls.__qualname__}"


_registries = {kind: Registry(kind) for kind in KINDS}


def registry(kind: str) -> Registry:
    """The registry of a kind.

    Raises:
        UnknownNameError: there is no such kind.
    """
    if kind not in _registries:
        raise UnknownNameError(f"unknown kind {kind!r}{did_you_mean(kind, KINDS)}; kinds: {', '.join(KINDS)}")
    return _registries[kind]


def register(kind: str, name: str) -> Callable[[T], T]:
    """``@register("ffn", "mine")`` above a class makes it usable by name in this process."""
    return registry(kind).register(name)


@functools.cache
def own_version() -> str:
    """The version of sparsekit itself."""
    try:
        return importlib.metadata.version(OURSELVES)
    except importlib.metadata.PackageNotFoundError:  # a source tree that is not installed
        return "unknown"


@functools.cache
def _plugin_entries() -> dict[str, list[Entry]]:
    """The entry points of all installed packages, by kind, read once from package metadata."""
    found: dict[str, list[Entry]] = {}
    seen: set[str] = set()  # a package can be on the path twice; the first is the one that imports
    for package in importlib.metadata.distributions():
        text = package.read_text("entry_points.txt")
        if not text or f"[{OURSELVES}." not in text:
            continue  # most packages are passed over without being parsed
        about = package.metadata  # parsed at each call, hence once
        owner = about["Name"]
        if owner in seen:
            continue
        seen.add(owner)
        for point in package.entry_points:
            prefix, _, kind = point.group.partition(".")
            if prefix == OURSELVES and kind in KINDS:
                summary = about["Summary"] or point.value  # where a package does not describe itself
                entry = Entry(kind, point.name, point.value, owner, about["Version"], summary)
                found.setdefault(kind, []).append(entry)
    for entries in found.values():
        entries.sort(key=lambda entry: (entry.name, entry.owner))
    return found
