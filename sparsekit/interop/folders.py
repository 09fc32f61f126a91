"""A Hugging Face folder: where it is, its tensors one at a time, its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsekit.errors import CheckpointError
from sparsekit.interop.config import transformers
from sparsekit.spec.load import HUGGING_FACE

WANTED = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja", "config.yaml", "model.pt"]
TOKENIZER, TOKENIZER_CONFIG, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
BESIDE = (TOKENIZER_CONFIG, GENERATION, "special_tokens_map.json", "chat_template.jinja")  # kept for the way back
VOCABULARIES = (TOKENIZER, "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
SHARD_BYTES = 5_000_000_000


def locate(name: str) -> Path:
    """The folder of ``hf:FOLDER_OR_NAME``, fetched from the hub where it is the name of a repository there.

    Raises:
        CheckpointError: there is no such folder, and the hub has no such repository or cannot be reached.
    """
    name = name.removeprefix(HUGGING_FACE)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    told = f"{HUGGING_FACE}{name}: no such folder"
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise CheckpointError(told)
    transformers()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=WANTED))
    except Exception as error:  # of a dozen kinds: no such repository, no network, no permission
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{told}, and the hub does not give a model of that name ({reason[:200]})") from None


class Tensors:
    """The tensors of a folder by name, each read when it is asked for; nothing but tensors is ever unpickled.

    Args:
        folder: with .safetensors files, or else pytorch_model*.bin, or else a model.pt.

    Raises:
        CheckpointError: it has neither, or one is damaged.
    """

    def __init__(self, folder: Path, prefix: str = ""):
        self.folder = folder
        self._open = ExitStack()
        self._places: dict[str, Any] = {}
        files = sorted(folder.glob("*.safetensors"))
        pickles = sorted(folder.glob("pytorch_model*.bin")) or sorted(folder.glob("model.pt"))
        for path in files or pickles:
            try:
                self._places |= self._safe(path) if files else self._pickled(path)
            except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError, ImportError) as error:
                raise CheckpointError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None
            except Exception as error:  # pickle's own; it says at length how to read what is not safe
                raise CheckpointError(f"{path}: holds more than tensors ({type(error).__name__}); not read") from None
        if not self._places:
            raise CheckpointError(f"{folder}: holds no weights (.safetensors, pytorch_model*.bin or model.pt)")
        self._prefix = "" if any(name.startswith(prefix) for name in self._places) else prefix

    def _safe(self, path: Path) -> dict[str, Any]:
        reader = self._open.enter_context(safe_open(path, framework="pt"))
        return dict.fromkeys(reader.keys(), reader)

    def _pickled(self, path: Path) -> dict[str, Any]:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}

    @property
    def names(self) -> list[str]:
        """As a model with a head has them."""
        return [self._prefix + name for name in self._places]

    def __call__(self, name: str) -> Tensor:
        name = name.removeprefix(self._prefix)
        place = self._places[name]
        found: Tensor = place if isinstance(place, Tensor) else place.get_tensor(name)
        return found

    def close(self) -> None:
        self._open.close()


def save_sharded(tensors: Iterable[tuple[str, Tensor]], folder: Path, stem: str = "model") -> dict[str, int]:
    """Writes tensors as safetensors, in several files where they are large, with the index that readers expect.

    Returns:
        Parameters by dtype.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}
    where: dict[str, int] = {}
    n_files = total = 0
    for batch in _batches(tensors):
        n_files += 1
        save_file(batch, folder / f"{stem}-{n_files:05d}.safetensors", metadata={"format": "pt"})
        for name, tensor in batch.items():
            kind = str(tensor.dtype).removeprefix("torch.")
            counts[kind] = counts.get(kind, 0) + tensor.numel()
            where[name] = n_files
            total += tensor.numel() * tensor.element_size()
    names = {n: f"{stem}-{n:05d}-of-{n_files:05d}.safetensors" for n in range(1, n_files + 1)}
    if n_files == 1:
        names = {1: f"{stem}.safetensors"}
    for n, name in names.items():
        (folder / f"{stem}-{n:05d}.safetensors").rename(folder / name)
    if n_files > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {name: names[n] for name, n in where.items()}}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return counts


def _batches(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    batch: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        n_bytes = tensor.numel() * tensor.element_size()
        if batch and size + n_bytes > SHARD_BYTES:
            yield batch
            batch, size = {}, 0
        batch[name] = tensor
        size += n_bytes
    if batch:
        yield batch


# --- tokenizers


def tokenizer_state(folder: Path, vocab_size: int, raw: Mapping[str, Any]) -> tuple[dict[str, Any], str, list[str]]:
    """What ``tokenizer.json`` is to say, the token that ends a text, and remarks.

    Tokens that the model has no embedding for are left out, and the one that ends a text is marked as special.

    Raises:
        CheckpointError: the folder has no tokenizer that the library tokenizers can read, or no end of text.
    """
    path = folder / TOKENIZER
    if not any((folder / name).exists() for name in VOCABULARIES):
        raise CheckpointError(f"{folder}: holds no {TOKENIZER}")
    state = _read(path) if path.exists() else _converted(folder)
    remarks = []
    added = state.get("added_tokens") or []
    over = [token["content"] for token in added if token["id"] >= vocab_size]
    if over:
        state["added_tokens"] = added = [token for token in added if token["id"] < vocab_size]
        remarks.append(f"tokens left out, as the model has no embedding for them: {', '.join(over)}")
    by_id = {token["id"]: token["content"] for token in added}
    eos = _end(folder, raw, by_id)
    for token in added:
        if token["content"] == eos:
            token["special"] = True
    return state, eos, remarks


def _end(folder: Path, raw: Mapping[str, Any], by_id: Mapping[int, str]) -> str:
    given: list[Any] = []
    for source in (raw, _read(folder / GENERATION)):
        ids = source.get("eos_token_id")
        given += [by_id.get(i) for i in (ids if isinstance(ids, list) else [ids]) if i is not None]
    for key in ("eos_token", "bos_token"):
        token = _read(folder / TOKENIZER_CONFIG).get(key)
        given.append(token.get("content") if isinstance(token, dict) else token)
    found = next((token for token in given if token in by_id.values()), None)
    if found is None:
        raise CheckpointError(f"{folder}: neither {TOKENIZER_CONFIG} nor config.json says which token ends a text")
    return str(found)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return dict(found)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: is damaged ({error})") from None


def _converted(folder: Path) -> dict[str, Any]:
    """Of a folder with another kind of tokenizer file, what transformers makes of it."""
    try:
        backend = transformers().AutoTokenizer.from_pretrained(folder).backend_tokenizer
        return dict(json.loads(backend.to_str()))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder}: has no tokenizer that can be read ({reason})") from None
