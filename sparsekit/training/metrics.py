"""metrics.jsonl: what a run logged, a row a line, there the moment it is logged."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any

from sparsekit.files import written_whole
from sparsekit.model.targets import METRICS, Run


class MetricsLog:
    """Appends rows to a run's metrics.jsonl and flushes each.

    Args:
        folder: the run's.
        after_step: rows past it are dropped first, since a resumed run logs those steps again.
    """

    def __init__(self, folder: Path, after_step: int):
        path = folder / METRICS
        kept = [row for row in Run(folder).metrics if row["step"] <= after_step]
        with written_whole(path) as temporary:
            temporary.write_text("".join(_line(row) for row in kept), encoding="utf-8")
        self._stream = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        self._stream.write(_line(row))
        self._stream.flush()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()


def _line(row: dict[str, Any]) -> str:
    known = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
    }
    return json.dumps(known) + "\n"  # JSON has no NaN
