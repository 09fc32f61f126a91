"""Files that are written whole or not at all, and folders that one process has to itself or that were not changed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsekit.errors import CheckpointError, SparsekitError

MANIFEST, LOCK = "manifest.json", ".lock"
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
UNWRITABLE = FULL | {
    errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EIO, errno.ENAMETOOLONG, errno.ELOOP,
}  # fmt: skip
_locks: set[int] = set()  # descriptors


def _let_go() -> None:
    """In a child, which shares its parent's locks and may outlive it: workers notice a kill only seconds later."""
    while _locks:
        os.close(_locks.pop())


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def sole(folder: Path) -> Iterator[None]:
    """Keeps every other process that asks for the same out of a folder, until the block or this process ends.

    The operating system holds the lock, so that a killed process leaves none behind. Its file stays: were it removed,
    one who opened it just before and one who makes it anew would both hold a lock.

    Raises:
        SparsekitError: another process is there.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    _locks.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = os.read(descriptor, 1000).decode(errors="replace") or "another process"
            raise SparsekitError(
                f"{folder}: {who} is training into it; wait for its end, or give another --out"
            ) from None
        except OSError as error:
            told = f"{folder}: cannot be locked ({error.strerror}); see that no other process trains into it"
            print(f"warning: {told}", file=sys.stderr)
        else:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        if descriptor in _locks:
            _locks.remove(descriptor)
            os.close(descriptor)


@contextmanager
def writable(folder: Path, keeps: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Tells in a line where the disk takes nothing into a folder that a user named as ``--out``.

    Args:
        keeps: whether the folder holds what an earlier moment saved.

    Raises:
        SparsekitError: it does not.
    """
    try:
        yield
    except OSError as error:
        itself = isinstance(error.filename, str) and Path(error.filename) in (folder, *folder.parents)
        if error.errno not in UNWRITABLE and not itself:
            raise
        reason = f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
        mend = "make room and run the same command again, or give" if error.errno in FULL else "give"
        kept = "; what was saved is whole" if keeps() else ""
        raise SparsekitError(f"{folder}: cannot be written ({reason}); {mend} another --out{kept}") from None


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to; it takes the real name when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """JSON with an indent, written whole."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def seal(temporary: Path, path: Path) -> None:
    """Adds a manifest to a folder, forces all to the disk, and gives the folder its real name."""
    files = sorted(p for p in temporary.rglob("*") if p.is_file())
    manifest = {str(p.relative_to(temporary)): {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in files}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for p in (temporary, *temporary.rglob("*")):
        _sync(p)
    if path.exists():
        shutil.rmtree(path)
    os.replace(temporary, path)
    _sync(path.parent)


def verify(folder: Path) -> None:
    """Holds a folder against its manifest.

    Raises:
        CheckpointError: a file is missing, cut short, or changed, or tensors were added.
    """
    manifest, mend = read_object(folder / MANIFEST), "use an earlier checkpoint"
    for path in folder.rglob("*.safetensors"):
        if str(path.relative_to(folder)) not in manifest:
            raise CheckpointError(f"{path}: was not written with the checkpoint; remove it")
    for name, wanted in manifest.items():
        path = folder / name
        if not isinstance(wanted, dict) or wanted.keys() != {"bytes", "sha256"}:
            raise CheckpointError(f"{folder / MANIFEST}: is damaged; {mend}")
        if not path.is_file():
            raise CheckpointError(f"{path}: is missing from the checkpoint; {mend}")
        if path.stat().st_size != wanted["bytes"]:
            size = path.stat().st_size
            raise CheckpointError(f"{path}: has {size} bytes where {wanted['bytes']} were written; {mend}")
        if _sha256(path) != wanted["sha256"]:
            raise CheckpointError(f"{path}: is not what was written (its hash differs); {mend}")


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object that we wrote ourselves.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        value: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return dict(value)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing; {path.parent} is not a whole checkpoint") from None
    except (ValueError, TypeError, OSError) as error:
        raise CheckpointError(f"{path}: is damaged ({error})") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Forces a file or folder to the disk, so that a rename never gets ahead of the content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
