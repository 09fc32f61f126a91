"""What a user can do wrong, as one line each: what, where, and the mend.

The command line prints these without a traceback and exits with 2; every other exception is a defect of ours
and exits with 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class SparsekitError(Exception):
    """A user's mistake, told in one line."""


class UnknownNameError(SparsekitError):
    """A name that nothing is registered under."""


class PluginError(SparsekitError):
    """A registered entry that cannot be used: it fails on import, or two packages claim its name."""


class SpecError(SparsekitError):
    """One or more mistakes in a spec, one line each: ``json.path: message``."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class DataError(SparsekitError):
    """Text or tokens that cannot be read or are of no use."""


class CheckpointError(SparsekitError):
    """A checkpoint that is missing, damaged, or of another spec."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'gqa'?)`` for the nearest of the known names, or nothing where none is near."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
