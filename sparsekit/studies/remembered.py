"""What was counted of a study, kept so that it is counted once: importing torch alone takes longer than all the rest.

A plan is remembered by everything that it is a function of: every file it was read from, what was set on the command
line, and the code of sparsekit and of every plug-in, by the size and time of each file. It is kept in the user's cache
folder; where nothing can be written there, it is counted again.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsekit.files import written_whole
from sparsekit.registry import KINDS, OURSELVES, registry
from sparsekit.studies.spec import Study

DAYS = 30  # after which what nobody asked for is removed
CODE = Path(__file__).parents[1]


def recall(study: Study, device: str) -> dict[str, Any] | None:
    """What was kept of a study; None where that is nothing, or something has changed since, such as the device."""
    path = _path(study, device)
    if path is None:
        return None
    try:
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        os.utime(path)
    except (OSError, ValueError):
        return None
    return kept


def keep(study: Study, device: str, counted: dict[str, Any]) -> None:
    """Keeps it, and removes what is old."""
    path = _path(study, device)
    if path is None:
        return
    with contextlib.suppress(OSError):
        with written_whole(path) as temporary:
            temporary.write_text(json.dumps(counted), encoding="utf-8")
        for other in path.parent.glob("*.json"):
            if other.stat().st_mtime < time.time() - DAYS * 86400:
                other.unlink()


def _path(study: Study, device: str) -> Path | None:
    """None where an entry was registered in this process: its code is in no file."""
    stamp = _code_stamp()
    if stamp is None:
        return None
    # what only shows or judges may change
    content = study.spec.model_dump(mode="json", include={"base", "axes", "zip", "probes", "launch"})
    read = {path: text for path, text in study.read.items() if Path(path) != study.path.resolve()}
    whole = json.dumps([content, study.base_overrides, read, str(study.path.resolve().parent), stamp, device])
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / OURSELVES / "plans" / f"{hashlib.sha256(whole.encode()).hexdigest()}.json"


def _code_stamp() -> list[Any] | None:
    owners: dict[str, tuple[str, str]] = {}
    for kind in KINDS:
        for entry in registry(kind).entries():
            if not entry.built_in:
                owners[entry.target.partition(".")[0].partition(":")[0]] = entry.owner, entry.version
    if any(not version for _, version in owners.values()):
        return None
    versions = [importlib.metadata.version("torch"), sys.version]
    stamps = [sorted(_stamps(CODE)), *(sorted(_stamps(*_folders(module))) for module in sorted(owners))]
    return [versions, sorted(owners.items()), hashlib.sha256(json.dumps(stamps).encode()).hexdigest()]


def _folders(module: str) -> list[Path]:
    """Where a package's code lies; nothing is imported."""
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return []
    if found is None:
        return []
    return [Path(place) for place in found.submodule_search_locations or filter(None, [found.origin])]


def _stamps(*places: Path) -> Iterator[tuple[str, int, int]]:
    for place in places:
        for path in [place] if place.is_file() else place.rglob("*.py"):
            about = path.stat()
            yield str(path), about.st_mtime_ns, about.st_size
