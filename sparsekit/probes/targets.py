"""What probes can be pointed at, and the tokens they look at where none are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from sparsekit.data.dataset import load_tokenizer
from sparsekit.data.mixing import join
from sparsekit.data.sources import Source
from sparsekit.data.token_set import TokenSet
from sparsekit.data.tokenizers import Ids, Tokenizer
from sparsekit.errors import CheckpointError, DataError, SparsekitError, SpecError
from sparsekit.model.targets import CHECKPOINTS, Run, Target, load_model, resolve
from sparsekit.probes.base import Tokens
from sparsekit.spec.inline import explained
from sparsekit.spec.load import HUGGING_FACE, read_json, validate
from sparsekit.spec.run import DataSpec, RunSpec

STEP = "step-"


@dataclass
class Subject:
    """A model to look at.

    Attributes:
        model: on its device, in evaluation mode.
        name: of the target, for tables and pictures.
        step: how many steps it was trained for, where that is known.
        folder: where results go by default, or None.
        target: the resolved spec and checkpoint, of sparsekit's own.
        path: of a Hugging Face folder, or its name.
        most: tokens a sequence may have, or None.
    """

    model: nn.Module
    name: str
    step: int | None = None
    folder: Path | None = None
    target: Target | None = None
    path: str | None = None
    most: int | None = None
    remarks: list[str] = field(default_factory=list)

    @property
    def vocab_size(self) -> int | None:
        if self.target is not None:
            return self.target.spec.model.vocab_size
        config = getattr(self.model, "config", None) or getattr(self.model, "spec", None)
        return getattr(config, "vocab_size", None)


def open_subject(target: Any, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Subject:
    """The model of a target: a spec (fresh weights), a run folder, a checkpoint, ``hf:PATH_OR_NAME``, or a model.

    A model in memory stays where it is. ``dtype`` None is float32; on a GPU a Hugging Face model keeps its own.

    Raises:
        SparsekitError: nothing is there, or it is no model.
    """
    if isinstance(target, nn.Module):
        config = getattr(target, "config", None) or getattr(target, "spec", None)
        most = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
        return Subject(target, type(target).__name__, most=most)
    if isinstance(target, str) and target.startswith(HUGGING_FACE):
        return _hugging_face(target.removeprefix(HUGGING_FACE), device, dtype)
    if isinstance(target, (RunSpec, Mapping)):
        resolved = Target(target if isinstance(target, RunSpec) else validate(_run_of(target)))
        name = resolved.spec.name
    else:
        resolved = target if isinstance(target, Target) else resolve(target, weights=True)
        name = str(target.folder if isinstance(target, Run) else target)
    model = load_model(resolved, device=device, dtype=dtype or torch.float32)
    folder, step = None, None
    if resolved.checkpoint is not None:
        step = _step(resolved.checkpoint)
        here = resolved.checkpoint
        folder = (here.parent.parent if here.parent.name == CHECKPOINTS else here) / "probes"
    return Subject(model, name, step, folder, resolved, most=resolved.spec.model.max_seq_len)


def _run_of(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    return raw if "model" in raw else {"model": raw}


def _step(checkpoint: Path) -> int | None:
    digits = checkpoint.name.removeprefix(STEP)
    return int(digits) if digits.isdigit() else None


def _hugging_face(path: str, device: str | torch.device, dtype: torch.dtype | None) -> Subject:
    try:
        from transformers import AutoModelForCausalLM

        import sparsekit.interop.huggingface  # noqa: F401 (registers what we export ourselves)
    except ImportError:
        raise SparsekitError(f"{HUGGING_FACE}{path}: needs transformers: pip install 'sparsekit[hf]'") from None
    from sparsekit.interop.config import quiet

    wanted: Any = dtype or ("auto" if torch.device(device).type == "cuda" else torch.float32)
    try:
        with quiet():
            model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=wanted)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{HUGGING_FACE}{path}: cannot be loaded ({str(error).splitlines()[0]})") from None
    config = model.config
    most = getattr(config, "max_position_embeddings", None)
    name = Path(path).name or path
    subject = Subject(model.to(device).eval(), f"{HUGGING_FACE}{path}", None, Path("probes") / name, None, path, most)
    return subject


# --- tokens


def tokens_of(subject: Subject, data: Any, sequences: int, seq_len: int | None, seed: int, batch_size: int) -> Tokens:
    """The tokens to measure on.

    Args:
        data: token ids [sequences, tokens]; or a data spec, a dict of one, the path of one (.json) or of a text, or a
            source's name; None for what a run validates on, and for other models the embedded novels' held-out one.
        sequences, seq_len: how many windows of how many tokens; windows are chosen by ``seed``, each of them once.

    Raises:
        DataError, SpecError: there is no such text, or it is of no use for this model.
    """
    if isinstance(data, Tokens):
        return data
    if isinstance(data, (Tensor, np.ndarray)):
        ids = torch.as_tensor(data)
        if ids.ndim != 2 or ids.is_floating_point() or not ids.numel() or ids.shape[1] < 2:
            raise DataError(f"data: expected ids of shape [sequences, tokens >= 2], got {tuple(ids.shape)} {ids.dtype}")
        _demand_known(ids, subject)
        return Tokens.of(ids, batch_size)
    length = seq_len or min(subject.most or 512, 512)
    if subject.most is not None and length > subject.most:
        raise DataError(f"seq_len: {length} is longer than the model's longest sequence, {subject.most}")
    stream = _stream(subject, data)
    if stream is None:
        generator = torch.Generator().manual_seed(seed)
        subject.remarks.append("the folder has no tokenizer: measured on uniformly random token ids")
        return Tokens.of(
            torch.randint(0, subject.vocab_size or 2, (sequences, length), generator=generator), batch_size
        )
    ids, remark = windows_of(stream, sequences, length, seed)
    subject.remarks += [remark] if remark else []
    _demand_known(ids, subject)
    return Tokens.of(ids, batch_size)


def windows_of(stream: Any, sequences: int, length: int, seed: int) -> tuple[Tensor, str]:
    """Windows of a token stream that do not overlap, chosen by the seed, [S, T]; and a remark if there are too few.

    Raises:
        DataError: there is not one.
    """
    n = len(stream) // length
    if not n:
        raise DataError(
            f"data: {len(stream)} tokens are fewer than one sequence of {length}; give more text or seq_len"
        )
    chosen = np.sort(np.random.default_rng(seed).choice(n, min(n, sequences), replace=False)) * length
    ids = torch.from_numpy(np.asarray(stream.rows(chosen, length)).astype(np.int64))
    return ids, "" if n >= sequences else f"the text has {n} sequences of {length} tokens; {sequences} were asked for"


def _demand_known(ids: Tensor, subject: Subject) -> None:
    vocabulary = subject.vocab_size
    if vocabulary is not None and (int(ids.max()) >= vocabulary or int(ids.min()) < 0):
        raise DataError(f"data: token ids up to {int(ids.max())} do not fit the model's vocabulary of {vocabulary}")


def _stream(subject: Subject, data: Any) -> Any:
    """The text as tokens; None where there is no tokenizer to make any."""
    spec, whole = data_spec(data)
    if subject.target is None and subject.path is None:
        raise DataError("data: a model in memory needs token ids [sequences, tokens] to be measured on")
    if spec is None:
        spec = subject.target.spec.data if subject.target is not None else data_spec("embedded")[0]
        assert spec is not None
    source: Source = spec.source.cls(spec.source.params)
    tokenizer: Tokenizer | None
    if subject.target is None:
        assert subject.path is not None
        tokenizer = folder_tokenizer(subject.path)
    elif subject.target.tokenizer_file is not None:
        tokenizer = subject.target.tokenizer()
    else:
        tokenizer = load_tokenizer(subject.target.spec.data.tokenizer, source)
    if tokenizer is None:
        return None
    if whole:
        return TokenSet.from_documents((d.text for d in cast(Any, source).read_split("train")), tokenizer)
    return join(source.streams("validation", tokenizer))


def data_spec(data: Any) -> tuple[DataSpec | None, bool]:
    """What was given as data, as a data spec; and whether all of it is meant and not what it holds out."""
    if data is None or isinstance(data, DataSpec):
        return data, False
    whole = False
    if isinstance(data, (str, Path)):
        path = Path(data)
        if path.suffix == ".json" and path.is_file():
            raw: Any = read_json(path)
            raw = raw.get("data", raw)
        elif path.exists():
            raw, whole = {"source": {"type": "text", "path": str(path)}}, True
        elif "/" in str(data) or path.suffix:
            raise DataError(f"{path}: no such text; give a text file, a data spec (.json) or the name of a source")
        else:
            raw = {"source": str(data)}
    else:
        raw = dict(data)
    try:
        return DataSpec.model_validate(raw), whole
    except ValidationError as error:
        raise SpecError(explained(error, "data")) from None


class FolderTokenizer(Tokenizer):
    """A Hugging Face folder's own tokenizer."""

    name = "huggingface"

    def __init__(self, tokenizer: Any):
        super().__init__(self.Params())
        self._own = tokenizer

    @property
    def vocab_size(self) -> int:
        return len(self._own)

    @property
    def eos_id(self) -> int:
        ids = (self._own.eos_token_id, self._own.bos_token_id, self._own.pad_token_id, 0)
        return int(next(i for i in ids if i is not None))

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        ids = self._own(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [np.asarray(each, dtype=self.dtype) for each in ids]

    def decode(self, ids: Any) -> str:
        return str(self._own.decode(list(map(int, ids)), skip_special_tokens=True))


def folder_tokenizer(path: str) -> FolderTokenizer | None:
    """Of a Hugging Face folder, or None where it has none."""
    from transformers import AutoTokenizer

    try:
        return FolderTokenizer(AutoTokenizer.from_pretrained(path))
    except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError):
        return None
