"""Which tensor of a Hugging Face model is which of ours, as a table that is read in both directions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from sparsekit.errors import CheckpointError
from sparsekit.spec.model import ModelSpec

Shape = Sequence[int]


class Way(Protocol):
    """How a few tensors of theirs become a few of ours, and back; nothing is rounded."""

    def ours(self, theirs: list[Tensor], shapes: list[Shape], spec: ModelSpec) -> list[Tensor]: ...

    def theirs(self, ours: list[Tensor], spec: ModelSpec) -> list[Tensor]: ...


class Same:
    """One tensor for one tensor."""

    def ours(self, theirs: list[Tensor], shapes: list[Shape], spec: ModelSpec) -> list[Tensor]:
        return theirs

    def theirs(self, ours: list[Tensor], spec: ModelSpec) -> list[Tensor]:
        return ours


SAME = Same()


class Fused:
    """Several projections whose outputs lie one after the other in one tensor of theirs.

    Args:
        transposed: matrices are [d_in, d_out].
        interleaved: the outputs go head by head, each head's q, k and v together.
    """

    def __init__(self, *, transposed: bool = False, interleaved: bool = False):
        self.transposed, self.interleaved = transposed, interleaved

    def ours(self, theirs: list[Tensor], shapes: list[Shape], spec: ModelSpec) -> list[Tensor]:
        (whole,) = theirs
        whole = whole.t() if self.transposed else whole
        if self.interleaved:
            parts = whole.unflatten(0, (_n_heads(spec), len(shapes), -1)).unbind(1)
            return [part.flatten(0, 1) for part in parts]
        dim = len(shapes[0]) - (1 if len(shapes[0]) == 1 else 2)  # outputs; experts stand before them
        return list(whole.split([shape[dim] for shape in shapes], dim))

    def theirs(self, ours: list[Tensor], spec: ModelSpec) -> list[Tensor]:
        if self.interleaved:
            heads = [part.unflatten(0, (_n_heads(spec), -1)) for part in ours]
            return [torch.stack(heads, 1).flatten(0, 2)]
        whole = torch.cat(ours, dim=ours[0].ndim - (1 if ours[0].ndim == 1 else 2))
        return [whole.t() if self.transposed else whole]


class Stacked:
    """A matrix for each expert, which we keep as one tensor [experts, d_out, d_in]."""

    def ours(self, theirs: list[Tensor], shapes: list[Shape], spec: ModelSpec) -> list[Tensor]:
        return [torch.stack(theirs)]

    def theirs(self, ours: list[Tensor], spec: ModelSpec) -> list[Tensor]:
        return list(ours[0].unbind(0))


def _n_heads(spec: ModelSpec) -> int:
    return int(getattr(spec.per_layer[0].attention.params, "n_heads"))  # noqa: B009 (a plug-in's may have none)


EXPERT = "{expert}"


@dataclass(frozen=True)
class Rule:
    """Some modules of ours and some of theirs; ``.weight`` and ``.bias`` of both go the same way.

    Attributes:
        exact: the names are those of tensors.
    """

    ours: tuple[str, ...]
    theirs: str
    way: Way = SAME
    exact: bool = False

    def bound(self, kind: str, experts: int) -> tuple[list[str], list[str]]:
        """The tensors of one kind, "weight" or "bias"."""
        end = "" if self.exact else f".{kind}"
        name = f"{self.theirs}{end}"
        theirs = [name.replace(EXPERT, str(e)) for e in range(experts)] if EXPERT in name else [name]
        return [f"{module}{end}" for module in self.ours], theirs


def rules(pairs: Mapping[str, str]) -> list[Rule]:
    """One module for one module."""
    return [Rule((ours,), theirs) for ours, theirs in pairs.items()]


@dataclass(frozen=True)
class Table:
    """The rules of a family; where two of them give the same tensor, the first that finds its tensors counts.

    Attributes:
        prefix: which files that were saved without the head leave out.
        layers: what their layers' names begin with.
        ignored: ends of names of tensors that can be worked out anew.
    """

    prefix: str
    layers: str
    top: Sequence[Rule]
    layer: Sequence[Rule]
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias",
                                ".attention.masked_bias")  # fmt: skip

    def all(self, n_layers: int) -> Iterator[Rule]:
        """Every rule, those of a layer for each layer."""
        yield from self.top
        for index in range(n_layers):
            for rule in self.layer:
                ours = tuple(f"layers.{index}.{module}" for module in rule.ours)
                yield Rule(ours, f"{self.layers}{index}.{rule.theirs}", rule.way, rule.exact)


OWN = Table("model.", "", (), ())  # a folder of ours in their format: the names are our own


@dataclass
class Plan:
    """What makes which tensors: (ours, theirs, way) in the order of the layers."""

    steps: list[tuple[list[str], list[str], Way]] = field(default_factory=list)


def plan(table: Table, spec: ModelSpec, shapes: Mapping[str, Shape], theirs: Sequence[str] | None = None) -> Plan:
    """The rules that give a model's tensors.

    Args:
        shapes: of every tensor of ours.
        theirs: the names that there are; None to export, where the first rule for a tensor counts.

    Raises:
        CheckpointError: a tensor of ours has no source, or one of theirs no use.
    """
    made, left = Plan(), dict.fromkeys(shapes)
    unused = dict.fromkeys(theirs or ())
    own = [Rule((name,), f"{OWN.prefix}{name}", exact=True) for name in shapes] if table is OWN else ()
    for rule in (*own, *table.all(spec.n_layers)):
        for kind in ("weight",) if rule.exact else ("weight", "bias"):
            first = rule.bound(kind, 0)[0][0]
            ours, needed = rule.bound(kind, shapes[first][0] if first in shapes else 0)
            if any(name not in left for name in ours):
                continue  # the model has none, or an earlier rule gave it
            if theirs is not None and any(name not in unused for name in needed):
                continue
            made.steps.append((ours, needed, rule.way))
            for name in ours:
                del left[name]
            for name in needed:
                unused.pop(name, None)
    if left:
        raise CheckpointError(f"tensor {min(left)} of the model has no counterpart in the weights")
    useless = [name for name in unused if not name.endswith(table.ignored)]
    if useless:
        raise CheckpointError(f"tensor {useless[0]} has no counterpart in the model that its config describes")
    return made


def to_ours(
    steps: Plan, get: Callable[[str], Tensor], shapes: Mapping[str, Shape], spec: ModelSpec
) -> Iterator[tuple[str, Tensor]]:
    """Our tensors by name, a few at a time in memory.

    Raises:
        CheckpointError: one has another shape than the config says.
    """
    for ours, theirs, way in steps.steps:
        wanted = [shapes[name] for name in ours]
        try:
            found = way.ours([get(name) for name in theirs], wanted, spec)
        except RuntimeError as error:
            raise CheckpointError(f"tensor {theirs[0]}: {str(error).splitlines()[0]}") from None
        for name, shape, tensor in zip(ours, wanted, found, strict=True):
            if list(tensor.shape) != list(shape):
                told = f"is {list(tensor.shape)}, but its config says {list(shape)}"
                raise CheckpointError(f"tensor {theirs[0]} {told}")
            yield name, tensor.contiguous()


def to_theirs(steps: Plan, get: Callable[[str], Tensor], spec: ModelSpec) -> Iterator[tuple[str, Tensor]]:
    """Their tensors by name."""
    for ours, theirs, way in steps.steps:
        found = way.theirs([get(name) for name in ours], spec)
        for name, tensor in zip(theirs, found, strict=True):
            yield name, tensor.contiguous()
