"""Documents from tables: Parquet files, and whatever the library datasets reads, streamed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from sparsekit.data.paths import open_bytes
from sparsekit.data.sources import LocalFiles, SplitSource
from sparsekit.data.splitting import Document
from sparsekit.errors import DataError, did_you_mean

ROWS = 256  # read at a time; a row may be a book


def import_pyarrow(needed_by: Path) -> Any:
    """The library pyarrow, or an error that says how to get it."""
    try:
        import pyarrow
    except ImportError:
        raise DataError(f"{needed_by}: needs pyarrow; pip install 'sparsekit[data]'") from None
    return pyarrow


class Parquet(LocalFiles):
    """Parquet files: one document a row, whose text is in one column.

    ``path`` names files, globs, or folders (their *.parquet). A row without text (blank or null) is an error, or with
    ``skip_blank`` skipped and counted. See :class:`SplitSource` for the split.
    """

    class Params(LocalFiles.Params):
        field: str = "text"
        skip_blank: bool = False

    suffix = ".parquet"

    def read(self, path: Path) -> Iterator[Document]:
        arrow = import_pyarrow(path)
        import pyarrow.parquet

        field = self.params.field
        with open_bytes(path) as file:
            try:
                table = pyarrow.parquet.ParquetFile(file)
                schema = table.schema_arrow
                if field not in schema.names:
                    raise _no_field(str(path), field, schema.names)
                kind = schema.field(field).type
                if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind)):
                    raise DataError(f"{path}: field {field!r} is {kind}, not a string; set data.source.field")
                number = 0
                for batch in table.iter_batches(batch_size=ROWS, columns=[field]):
                    for text in batch.column(0).to_pylist():
                        where = f"{path}: row {number}"
                        number += 1
                        if self.keeps(text or "", f"{where}: field {field!r}"):
                            yield Document(text, where)
            except (arrow.ArrowException, UnicodeDecodeError) as error:
                reason = " ".join(str(error).split())
                raise DataError(f"{path}: cannot be read as Parquet: {reason}; mend it, or leave it out") from None


class Datasets(SplitSource):
    """A data set of the library datasets, from the hub or a local folder, streamed: one document a row.

    ``path`` and ``config`` are what ``datasets.load_dataset`` takes. Validation is ``validation_split`` where given;
    else see :class:`SplitSource`. A row without text (blank or null) is an error, or with ``skip_blank`` skipped and
    counted. Every pass over it streams the rows anew, so tokenize a large one once (``sparsekit tokenize``).
    """

    class Params(SplitSource.Params):
        path: Annotated[str, Field(min_length=1)]
        config: str | None = None
        split: str = "train"
        validation_split: str | None = None
        field: str = "text"
        skip_blank: bool = False

    mend = "validation_split"

    @property
    def origin(self) -> str:
        return " ".join(["hf:" + self.params.path, *([self.params.config] if self.params.config else [])])

    def read_split(self, split: str) -> Iterator[Document]:
        name, field = self.params.split if split == "train" else self.params.validation_split, self.params.field
        for number, row in enumerate(self._rows(name)):
            where = f"{self.origin} {name}: row {number}"
            if field not in row:
                raise _no_field(where, field, list(row))
            text = row[field]
            if text is not None and not isinstance(text, str):
                raise DataError(f"{where}: field {field!r} is no string; set data.source.field")
            if self.keeps(text or "", f"{where}: field {field!r}"):
                yield Document(str(text), where)

    def _rows(self, split: str) -> Iterator[dict[str, Any]]:
        try:
            import datasets
        except ImportError:
            raise DataError(f"{self.origin}: needs datasets; pip install 'sparsekit[data]'") from None
        try:
            rows = datasets.load_dataset(self.params.path, name=self.params.config, split=split, streaming=True)
            yield from rows
        except Exception as error:  # what a hub, a network and scripts of others raise has no common base
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"{self.origin}: datasets cannot read split {split!r}: {reason}; mend path, config or split"
            ) from None


def _no_field(where: str, field: str, fields: list[str]) -> DataError:
    return DataError(
        f"{where}: no field {field!r}{did_you_mean(field, fields)}; fields: {', '.join(map(repr, fields)) or 'none'}; "
        "set data.source.field"
    )
