"""What a model costs, counted from the model itself, built on the meta device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparsekit.components.contracts import FeedForward, Linear
from sparsekit.errors import SpecError
from sparsekit.model.build import SpecLike, as_model_spec, build_model
from sparsekit.model.decoder import Decoder
from sparsekit.spec.model import ModelSpec
from sparsekit.spec.run import ParallelSpec, RunSpec
from sparsekit.spec.slot import Choice, slot_of

STORED_BYTES = {"fp32": 4, "bf16": 4, "pure_bf16": 2}  # of a weight, of its gradient, of an optimizer state
CACHE_BYTES = {"fp32": 4, "bf16": 2, "pure_bf16": 2}


@dataclass(frozen=True)
class Description:
    """The cost of a model, and of a run of it.

    Attributes:
        parameters: all of them, tied ones once.
        active_parameters: those one token passes through; the embedding table counts whole.
        flops_per_token: forward, at ``seq_len`` (attention over the whole sequence, a multiply-add as 2).
        training_flops_per_token: forward and backward, three times as many.
        processes: how many the memory below is told for, of each of them: the fewest that the run's layout takes,
            tensor times expert. How many there will be is known only when they are started; "fsdp" divides among all.
        weight_bytes, gradient_bytes, optimizer_bytes: as the run's precision keeps them; of a process that holds most.
        training_bytes: the three together; activations, and weights that fsdp gathers for a moment, come on top.
        activation_bytes: what a micro-batch keeps for its backward, in float32 and eagerly, with the recomputation of
            whole layers that the run asks for. Selective recomputation and tensor parallelism, not counted, keep less.
        cache_bytes_per_token: keys and values of all layers, when generating.
        tokens: what the run trains on, or None where that depends on the data.
        layers: for each distinct block, where it stands and what it is of: (place, part and its parameters in words).
        fsdp: more processes hold less each.
    """

    d_model: int
    n_layers: int
    seq_len: int
    parameters: int
    active_parameters: int
    flops_per_token: float
    training_flops_per_token: float
    processes: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    training_bytes: int
    activation_bytes: int
    cache_bytes_per_token: int
    tokens: int | None
    layers: list[dict[str, str]]
    fsdp: bool = False

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        """A table, as the command line prints it."""
        each = f", on each of {self.processes} processes" if self.processes > 1 else ""
        rows = [
            ("layers x d_model", f"{self.n_layers} x {self.d_model}"),
            ("parameters", f"{self.parameters:,}"),
            ("active parameters", f"{self.active_parameters:,} a token"),
            ("forward FLOPs", f"{self.flops_per_token:.4g} a token at length {self.seq_len}"),
            ("training FLOPs", f"{self.training_flops_per_token:.4g} a token"),
            ("weights", _size(self.weight_bytes) + each),
            ("training memory", _size(self.training_bytes) + f" for weights, gradients and optimizer{each}"),
            ("activations", _size(self.activation_bytes) + f" a micro-batch in float32, on top{each}"),
            ("cache", _size(self.cache_bytes_per_token) + " a token when generating"),
        ]
        if self.fsdp:
            least = f"counted for {self.processes}, the fewest" if self.processes > 1 else "counted for one"
            more = "more of them hold less of weights, gradients and optimizer each (fsdp)"
            rows.append(("processes", f"{least}; {more}"))
        if self.tokens is not None:
            total = self.tokens * self.training_flops_per_token
            rows.append(("training", f"{self.tokens:,} tokens, {total:.3g} FLOPs"))
        lines = [f"{name:18}{text}" for name, text in rows]
        names = list(self.layers[0])
        widths = {name: max(len(name), *(len(row[name]) for row in self.layers)) for name in names}
        table = [dict(zip(names, names, strict=True)), *self.layers]
        lines += ["", *("  ".join(f"{row[name]:{widths[name]}}" for name in names).rstrip() for row in table)]
        return "\n".join(lines)


def describe(spec: SpecLike) -> Description:
    """Parameters, active parameters, FLOPs, memory and tokens of a run or model spec; allocates nothing."""
    run = spec if isinstance(spec, RunSpec) else None
    model_spec = as_model_spec(spec)
    model = build_model(model_spec, device="meta")
    parameters = sum(p.numel() for p in model.parameters())
    seq_len = run.seq_len if run else model_spec.max_seq_len
    flops = model.flops_per_token(seq_len)
    precision = run.train.precision if run else "fp32"
    parallel = run.parallel if run else ParallelSpec()
    weight_bytes = STORED_BYTES[precision] * parameters_of_a_process(model, parallel)
    _recompute_layers(model, parallel.activation_checkpoint)
    optimizer_bytes = weight_bytes * _optimizer_states(run)
    cache_element = CACHE_BYTES[precision]
    return Description(
        d_model=model_spec.d_model,
        n_layers=model_spec.n_layers,
        seq_len=seq_len,
        parameters=parameters,
        active_parameters=model.active_parameters(),
        flops_per_token=flops,
        training_flops_per_token=3 * flops,
        processes=parallel.tensor * parallel.expert,
        weight_bytes=weight_bytes,
        gradient_bytes=weight_bytes,
        optimizer_bytes=optimizer_bytes,
        training_bytes=2 * weight_bytes + optimizer_bytes,
        activation_bytes=activation_bytes(model, run.train.micro_batch_size if run else 1, seq_len, _loss(run)),
        cache_bytes_per_token=sum(layer.attention.cache_bytes_per_token(cache_element) for layer in model.layers),
        tokens=training_tokens(run),
        layers=_distinct_layers(model_spec),
        fsdp=run is not None and parallel.data == "fsdp",
    )


def _distinct_layers(spec: ModelSpec) -> list[dict[str, str]]:
    """A row for each distinct block: the layers that have it, and its parts in words."""
    places: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for index, block in enumerate(spec.per_layer):
        parts = tuple((name, _in_words(getattr(block, name))) for name in ("attention", "norm", "residual", "ffn"))
        places.setdefault(parts, []).append(index)
    return [{"layers": _ranges(indices), **dict(parts)} for parts, indices in places.items()]


def _in_words(choice: Choice) -> str:
    """``gqa(n_heads=8, n_kv_heads=2)``: a slot with what it must be told and what is not as by default."""
    told = []
    for name, field in type(choice.params).model_fields.items():
        value, slot = getattr(choice.params, name), slot_of(field)
        if not field.is_required():
            default = field.get_default(call_default_factory=True)
            if value == (slot.validate(default) if slot is not None and default is not None else default):
                continue
        told.append(f"{name}={_in_words(value) if isinstance(value, Choice) else value}")
    return choice.type + (f"({', '.join(told)})" if told else "")


def _ranges(indices: list[int]) -> str:
    """``0-2, 5``; or, of more than two as far apart as each other, the slice that a spec would name them by."""
    step = indices[1] - indices[0] if len(indices) > 2 else 1
    if step > 1 and indices == list(range(indices[0], indices[-1] + 1, step)):
        return f"{indices[0]}:{indices[-1] + 1}:{step}"
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _size(n_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.4g} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.4g} TiB"


def parameters_of_a_process(model: Decoder, parallel: ParallelSpec) -> int:
    """How many a process holds, the one with most of them, of the fewest processes that a layout takes.

    Raises:
        SpecError: so many cannot share the model.
    """
    shapes = {parameter: list(parameter.shape) for parameter in model.parameters()}
    n_data = parallel.expert if parallel.data == "fsdp" else 1
    sharded = set(shapes)
    if parallel.expert > 1:
        stacks = _stacks_of_experts(model, parallel.expert)
        for parameter in stacks:
            shapes[parameter][0] //= parallel.expert
        sharded -= stacks  # over other processes alone, of which the fewest are none
    if parallel.tensor > 1:
        for parameter, dim in _divided_in_layers(model, parallel.tensor):
            shapes[parameter][dim] //= parallel.tensor
    for parameter in sharded:
        shapes[parameter][0] = -(-shapes[parameter][0] // n_data)
    return sum(math.prod(shape) for shape in shapes.values())


def _stacks_of_experts(model: Decoder, n: int) -> set[nn.Parameter]:
    found: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        try:
            experts = module.stacked_experts() if isinstance(module, FeedForward) else None
            for linear in () if experts is None else experts.modules():
                if isinstance(linear, Linear) and linear.n_experts is not None:
                    if linear.n_experts % n:
                        raise ValueError(f"n_experts ({linear.n_experts}) cannot be divided by {n}")
                    found.update(p for p in linear.parameters(recurse=False) if p.shape[0] == linear.n_experts)
        except ValueError as error:
            raise SpecError([f"parallel.expert: {n} processes cannot share {name}: {error}"]) from None
    if not found:
        raise SpecError(["parallel.expert: the model has no experts to divide; leave it at 1"])
    return found


def _divided_in_layers(model: Decoder, n: int) -> Iterator[tuple[nn.Parameter, int]]:
    """Every parameter that n processes share by tensor parallelism, and along which dimension."""
    for index, layer in enumerate(model.layers):
        for place in ("attention", "ffn"):
            component = getattr(layer, place)
            try:
                if component.stateful:
                    raise ValueError("what it hands on to the next layer cannot be divided")
                parts = component.split(n)
            except ValueError as error:
                told = f"parallel.tensor: {n} processes cannot share layers.{index}.{place}: {error}"
                raise SpecError([told]) from None
            modules, parameters = dict(component.named_modules()), dict(component.named_parameters())
            for path, dim in parts.items():
                linear = modules.get(path)
                if isinstance(linear, Linear):
                    yield linear.get_parameter("weight"), linear.weight.ndim - 2 + dim
                    if linear.bias is not None and dim == 0:
                        yield linear.get_parameter("bias"), linear.bias.ndim - 1
                elif path in parameters:
                    yield parameters[path], dim


def _recompute_layers(model: Decoder, which: str | int) -> None:
    """As training does, but for what is selective."""
    if which in ("none", "selective"):
        return
    for index, layer in enumerate(model.layers):
        if which == "full" or (index + 1) % int(which) == 0:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)  # type: ignore[method-assign]


def whole_loss(model: Decoder, ids_BT: Tensor) -> Tensor:
    """The cross-entropy of all logits at once, each token its own target."""
    return F.cross_entropy(model(ids_BT).flatten(0, 1), ids_BT.flatten())


def activation_bytes(
    model: Decoder, n_batch: int, seq_len: int, loss: Callable[[Decoder, Tensor], Tensor] = whole_loss
) -> int:
    """Bytes that the forward of a [n_batch, seq_len] batch and its loss keep for the backward.

    Counted by running them and adding up the storages that autograd saves, parameters and buffers left out; on the
    meta device nothing is allocated. Attention is counted as the kernel that runs there.
    """
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    ids_BT = torch.zeros(n_batch, seq_len, dtype=torch.long, device=next(model.parameters()).device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        total = loss(model, ids_BT)
    del total  # alive until here, so that no storage is freed and counted under another's address
    return sum(storage.nbytes() for storage in kept.values())


def _loss(run: RunSpec | None) -> Callable[[Decoder, Tensor], Tensor]:
    if run is None:
        return whole_loss
    objective: Callable[[Decoder, Tensor], Tensor] = run.train.objective.cls(run.train.objective.params).of_ids
    return objective


def _optimizer_states(run: RunSpec | None) -> int:
    return int(run.train.optimizer.cls.states_per_parameter) if run else 2


def training_tokens(run: RunSpec | None) -> int | None:
    """What a run trains on; None where that depends on the data or on the number of processes."""
    if run is None or (run.train.batch_ramp is not None and run.train.max_tokens is None):
        return None  # how long a ramp is in steps depends on the number of processes
    if run.train.max_steps is not None:
        return run.train.max_steps * run.global_batch_tokens
    return run.train.max_tokens
