"""A whole run as data: the model, what it reads, and how it is trained."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, Literal, cast

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_serializer,
    model_validator,
)

from sparsekit.registry import registry
from sparsekit.spec.facts import Facts, check_choice
from sparsekit.spec.model import ModelSpec, raise_problems
from sparsekit.spec.slot import Choice, Params, Slot, pick


class StreamingSpec(Params):
    """Documents read and encoded while training, for text too large to be encoded before.

    ``buffer`` is how many windows each reader shuffles among, ``workers`` how many processes a rank reads with (0:
    none beside its own). Of a validation text only documents up to ``validation_tokens`` are read; null for all.
    """

    buffer: PositiveInt = 2048
    workers: NonNegativeInt = 0
    validation_tokens: PositiveInt | None = 1_000_000


class DataSpec(Params):
    """Where text comes from, how it becomes tokens, and how tokens become sequences.

    ``seq_len`` defaults to the model's ``max_seq_len``. With ``document_mask`` no token attends to another document
    in its sequence, and none is predicted across a boundary. ``validation`` names further texts to validate on: of
    each source what it holds out, as of the main one, so that a source may be trained and validated on.
    """

    source: Annotated[Choice, Slot("source")] = pick("embedded")
    tokenizer: Annotated[Choice, Slot("tokenizer")] = pick("byte")
    seq_len: PositiveInt | None = None
    document_mask: bool = False
    validation: dict[str, Annotated[Choice, Slot("source")]] = Field(default_factory=dict)
    streaming: StreamingSpec | None = None

    @field_validator("validation")
    @classmethod
    def _names_are_free(cls, validation: dict[str, Choice]) -> dict[str, Choice]:
        for name in validation:
            if not re.fullmatch("[a-z][a-z0-9_]*", name) or name == "val":
                rule = "a name is of small letters, digits and _, and not 'val', the source's own"
                raise ValueError(f"{name!r}: {rule}")
        return validation

    def slots(self) -> Iterator[tuple[str, Choice]]:
        yield from super().slots()
        yield from ((f"validation.{name}", choice) for name, choice in self.validation.items())


class KeepSpec(Params):
    """Which checkpoints stay: the ``last`` n, each ``every`` steps, and the ``best`` by validation loss."""

    last: PositiveInt = 2
    every: PositiveInt | None = None
    best: bool = True


class BatchRampSpec(Params):
    """Batches that grow: from ``start_tokens`` to the full batch by ``increments`` equal steps over ``ramp_tokens``.

    Source: Brown et al. 2020, arXiv 2005.14165, app. B
    """

    start_tokens: PositiveInt
    ramp_tokens: PositiveInt
    increments: PositiveInt = 8


class StatisticsSpec(Params):
    """What every layer does, collected while training: each ``every`` steps, with moments of the activations or not."""

    every: PositiveInt = 100
    moments: bool = True


class TrainSpec(Params):
    """How a model is trained.

    Its length is ``max_steps``, ``max_tokens`` or ``max_epochs`` (one epoch where none is given). A step takes
    ``global_batch_tokens`` tokens in micro-batches of ``micro_batch_size`` sequences. The ``*_every`` fields count
    steps; null means only at the end. ``checkpoint_every`` "auto" saves ten times, so that a kill costs a tenth of the
    run at most.

    ``precision`` "bf16" keeps weights, gradients and optimizer state in float32 and multiplies matrices in bfloat16
    (autocast); "pure_bf16" keeps all of these in bfloat16, which takes half the memory and loses updates below some
    1/256 of a weight. Under either, softmax, loss, the statistics of norms, counters and routers' biases are float32.

    ``compile`` compiles each layer by itself (true, or "layers"), which is quicker to begin, or the "model" whole.

    An update that is not finite is left out: ``on_nonfinite`` says whether training then stops or goes on and counts
    it. On a GPU two runs are equal bit for bit only if ``deterministic``, which is slower. ``statistics`` logs what
    every layer does. ``peak_flops`` (FLOP/s of one device) stands for the table by which MFU is told.
    """

    max_steps: PositiveInt | None = None
    max_tokens: PositiveInt | None = None
    max_epochs: PositiveFloat | None = None
    global_batch_tokens: PositiveInt | None = None
    micro_batch_size: PositiveInt = 8
    batch_ramp: BatchRampSpec | None = None
    objective: Annotated[Choice, Slot("objective")] = pick("next_token")
    optimizer: Annotated[Choice, Slot("optimizer")] = pick("adamw")
    schedule: Annotated[Choice, Slot("schedule")] = pick("cosine")
    max_grad_norm: PositiveFloat | None = 1.0
    on_nonfinite: Literal["stop", "skip"] = "stop"
    precision: Literal["fp32", "bf16", "pure_bf16"] = "fp32"
    compile: bool | Literal["layers", "model"] = False
    deterministic: bool = False
    seed: NonNegativeInt = 0
    device: str = "auto"
    log_every: PositiveInt = 10
    statistics: StatisticsSpec | None = None
    peak_flops: PositiveFloat | None = None
    eval_every: PositiveInt | None = None
    eval_tokens: PositiveInt | None = None
    checkpoint_every: PositiveInt | Literal["auto"] | None = "auto"
    keep: KeepSpec = KeepSpec()
    callbacks: list[Annotated[Choice, Slot("callback")]] = Field(
        default_factory=lambda: [pick("progress"), pick("tensorboard"), pick("sample")]
    )

    @field_validator("compile", mode="before")
    @classmethod
    def _compiles(cls, value: object) -> object:
        """In one line, where pydantic has one for each member of the union."""
        if isinstance(value, bool) or value in ("layers", "model"):
            return value
        raise ValueError(f"expected true, false, 'layers' or 'model', got {value!r}")

    @field_validator("checkpoint_every", mode="before")
    @classmethod
    def _saves(cls, value: object) -> object:
        """In one line, where pydantic has one for each member of the union."""
        if value in ("auto", None) or (type(value) is int and value > 0):
            return value
        raise ValueError(f"expected a number of steps, 'auto' or null, got {value!r}")

    @model_validator(mode="after")
    def _one_length(self) -> TrainSpec:
        lengths = ("max_steps", "max_tokens", "max_epochs")
        given = [name for name in lengths if getattr(self, name) is not None]
        if len(given) > 1:
            raise_problems([((given[1],), f"give one of {', '.join(lengths)}, not {' and '.join(given)}")])
        return self


class ParallelSpec(Params):
    """How a model is laid out over the processes that train it; of one process only ``activation_checkpoint`` counts.

    ``data`` "fsdp" shards every weight, its gradient and its optimizer state over all processes, and gathers a layer's
    weights while it runs, in the backward once more if ``reshard_after_forward``; "ddp" keeps them whole on each.
    ``activation_checkpoint`` recomputes in the backward what a layer works out in the forward: of all layers ("full"),
    of every n-th (a number n), of all but for matrix products and attention ("selective").

    ``tensor`` processes share each batch, and each holds a part of every attention and feed-forward. ``expert``
    processes, each with batches of its own, divide the experts of every mixture, and send each other tokens.
    """

    data: Literal["fsdp", "ddp"] = "fsdp"
    reshard_after_forward: bool = True
    activation_checkpoint: Literal["none", "full", "selective"] | PositiveInt = "none"
    tensor: PositiveInt = 1
    expert: PositiveInt = 1

    @field_validator("activation_checkpoint", mode="before")
    @classmethod
    def _known(cls, value: object) -> object:
        """In one line, where pydantic has one for each member of the union."""
        if value in ("none", "full", "selective") or (type(value) is int and value > 0):
            return value
        raise ValueError(f"expected 'none', 'full', 'selective', or n for every n-th layer, got {value!r}")


class ScheduledProbe(Params):
    """A probe in training: a probe's own fields, and beside them when and on how much of the validation text it looks.

    ``every`` n steps, or at the "end"; ``sequences`` are the same ones each time.
    """

    probe: Annotated[Choice, Slot("probe")]
    every: PositiveInt | Literal["end"] = "end"
    sequences: PositiveInt = 16

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, data: Any) -> Any:
        """From ``{"type": "variance", "every": 50}``, or a name alone."""
        if isinstance(data, str):
            return {"probe": data}
        if not isinstance(data, dict) or "probe" in data:
            return data
        own = {name: data[name] for name in ("every", "sequences") if name in data}
        return {"probe": {name: value for name, value in data.items() if name not in own}, **own}

    @field_validator("every", mode="before")
    @classmethod
    def _when(cls, value: object) -> object:
        """In one line, where pydantic has one for each member of the union."""
        if value == "end" or (type(value) is int and value > 0):
            return value
        raise ValueError(f"expected a number of steps or 'end', got {value!r}")

    @model_serializer
    def _as_given(self) -> dict[str, Any]:
        return {**self.probe.dump(), "every": self.every, "sequences": self.sequences}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> dict[str, Any]:
        names = {"enum": registry("probe").names()}
        positive = {"type": "integer", "exclusiveMinimum": 0}
        fields = {"type": names, "every": {"anyOf": [positive, {"const": "end"}]}, "sequences": positive}
        return {"anyOf": [names, {"type": "object", "required": ["type"], "properties": fields}]}


class RunSpec(Params):
    """Everything about a run: ``sparsekit train`` needs nothing else.

    ``init_from`` is the folder of a run, of a checkpoint or of an imported model, with whose weights training begins;
    of that folder are also the model and the tokenizer, where the spec gives none.

    ``packages`` is written with a run, not by hand: the version of every package whose entries the spec names.
    """

    name: str = "run"
    init_from: str | None = None
    model: ModelSpec
    data: DataSpec = Field(default_factory=lambda: cast(DataSpec, {}))  # validated, hence imported, only when used
    train: TrainSpec = Field(default_factory=lambda: cast(TrainSpec, {}))
    parallel: ParallelSpec = ParallelSpec()
    probes: list[ScheduledProbe] = Field(default_factory=list)
    packages: dict[str, str] = Field(default_factory=dict)

    @property
    def seq_len(self) -> int:
        return self.data.seq_len or self.model.max_seq_len

    @property
    def micro_batch_tokens(self) -> int:
        return self.train.micro_batch_size * self.seq_len

    @property
    def global_batch_tokens(self) -> int:
        return self.train.global_batch_tokens or self.micro_batch_tokens

    @model_validator(mode="after")
    def _fits_together(self) -> RunSpec:
        problems: list[tuple[tuple[str, ...], str]] = []
        if self.seq_len > self.model.max_seq_len:
            text = f"{self.seq_len} is longer than model.max_seq_len, {self.model.max_seq_len}"
            problems.append((("data", "seq_len"), text))
        if self.global_batch_tokens % self.micro_batch_tokens:
            text = (
                f"{self.global_batch_tokens} is not a multiple of a micro-batch's {self.micro_batch_tokens} tokens "
                f"(train.micro_batch_size {self.train.micro_batch_size} x seq_len {self.seq_len})"
            )
            problems.append((("train", "global_batch_tokens"), text))
        sizes = {"vocab_size": self.model.vocab_size}
        facts = Facts(self.model.d_model, self.model.max_seq_len, 0, self.model.n_layers, extra=sizes)
        for section in ("data", "train"):
            for name, choice in getattr(self, section).slots():
                check_choice(choice, replace(facts, path=f"{section}.{name}"))
        problems += [(tuple(path.split(".")), message) for path, message in facts.problems]
        raise_problems(problems)
        return self
