"""A Hugging Face config.json, of which every key that changes the function must be understood."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsekit.errors import CheckpointError, SparsekitError

CONFIG = "config.json"
# what does not change the logits of a model that is not being trained
HARMLESS = {
    "architectures", "auto_map", "bos_token_id", "cache_implementation", "chunk_size_feed_forward",
    "classifier_dropout", "decoder_start_token_id", "dtype", "eos_token_id", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "gradient_checkpointing", "id2label", "initializer_range", "is_decoder",
    "is_encoder_decoder", "label2id", "model_type", "name_or_path", "num_labels", "output_attentions",
    "output_hidden_states", "output_router_logits", "pad_token_id", "pretraining_tp", "problem_type",
    "reorder_and_upcast_attn", "return_dict", "router_aux_loss_coef", "sep_token_id", "task_specific_params",
    "tokenizer_class", "torch_dtype", "transformers_version", "unk_token_id", "use_cache",
}  # fmt: skip
HARMLESS_PARTS = ("dropout", "_pdrop", "summary_")
READ_BEFORE = {"quantization_config", "rope_scaling", "rope_parameters", "rope_theta", "partial_rotary_factor"}


class Config(Mapping[str, Any]):
    """The values of a config, which remembers what was read of them.

    Args:
        values: every field, defaults filled in.
        defaults: the same of a config in which nothing is given.
    """

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any]):
        self._values, self._defaults = dict(values), dict(defaults)
        self._read: set[str] = set(READ_BEFORE)

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return self._values[key]

    def __iter__(self) -> Any:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def demand_understood(self) -> None:
        """Refuses what has another value than the usual one and was never looked at.

        Raises:
            CheckpointError: naming the key.
        """
        for key, value in self._values.items():
            known = key in self._read or key in HARMLESS or any(part in key for part in HARMLESS_PARTS)
            if not known and key in self._defaults and value != self._defaults[key]:
                raise CheckpointError(f"config key {key!r} ({json.dumps(value)}) is not understood")

    def unknown(self) -> list[str]:
        """Keys that are not the family's: transformers leaves them out, and so do we."""
        return [
            key
            for key, value in self._values.items()
            if key not in self._read | HARMLESS
            and key not in self._defaults
            and not key.startswith("_")
            and value not in (None, False, {}, [])
        ]


def read_raw(folder: Path) -> dict[str, Any]:
    """The JSON of a folder's config.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = folder / CONFIG
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: holds no {CONFIG}; give a Hugging Face folder, or the name of one") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: is damaged ({error})") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise CheckpointError(f"{path}: names no model_type")
    return raw


def transformers() -> Any:
    """The library, imported when it is needed.

    Raises:
        SparsekitError: it is not installed.
    """
    try:
        import transformers as library
    except ImportError:
        raise SparsekitError("Hugging Face folders need transformers: pip install 'sparsekit[hf]'") from None
    return library


@contextmanager
def quiet() -> Iterator[None]:
    """Without the bars and the warnings of transformers; how much it told before, it tells after."""
    logging: Any = transformers().utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def resolved(raw: Mapping[str, Any], model_type: str) -> Any:
    """A config of transformers, in which older names are replaced by today's and every default is filled in.

    Raises:
        CheckpointError: transformers refuses it.
    """
    if model_type == "sparsekit":
        import sparsekit.interop.huggingface  # noqa: F401 (which registers it)
    values = {key: value for key, value in raw.items() if key not in ("model_type", "auto_map")}
    try:
        with quiet():
            return transformers().AutoConfig.for_model(model_type, **values)
    except Exception as error:  # its validation raises several kinds
        raise CheckpointError(f"{CONFIG}: {' '.join(str(error).split())}") from None


def as_config(found: Any) -> Config:
    """What a config of transformers says."""
    return Config(found.to_dict(), type(found)().to_dict())
