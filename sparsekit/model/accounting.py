"""What a model costs, counted from the model itself, built on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekit.model.build import SpecLike, as_model_spec, build_model
from sparsekit.model.decoder import Decoder
from sparsekit.spec.run import RunSpec

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
        weight_bytes, gradient_bytes, optimizer_bytes: as the run's precision keeps them.
        training_bytes: the three together; activations come on top.
        activation_bytes: what a micro-batch keeps for its backward, in float32, eagerly and without recomputation.
        cache_bytes_per_token: keys and values of all layers, when generating.
        tokens: what the run trains on, or None where that depends on the data.
    """

    d_model: int
    n_layers: int
    seq_len: int
    parameters: int
    active_parameters: int
    flops_per_token: float
    training_flops_per_token: float
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    training_bytes: int
    activation_bytes: int
    cache_bytes_per_token: int
    tokens: int | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def describe(spec: SpecLike) -> Description:
    """Parameters, active parameters, FLOPs, memory and tokens of a run or model spec; allocates nothing."""
    run = spec if isinstance(spec, RunSpec) else None
    model_spec = as_model_spec(spec)
    model = build_model(model_spec, device="meta")
    parameters = sum(p.numel() for p in model.parameters())
    seq_len = run.seq_len if run else model_spec.max_seq_len
    flops = model.flops_per_token(seq_len)
    precision = run.train.precision if run else "fp32"
    weight_bytes = STORED_BYTES[precision] * parameters
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
        weight_bytes=weight_bytes,
        gradient_bytes=weight_bytes,
        optimizer_bytes=optimizer_bytes,
        training_bytes=2 * weight_bytes + optimizer_bytes,
        activation_bytes=activation_bytes(model, run.train.micro_batch_size if run else 1, seq_len, _loss(run)),
        cache_bytes_per_token=sum(layer.attention.cache_bytes_per_token(cache_element) for layer in model.layers),
        tokens=_tokens(run),
    )


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


def _tokens(run: RunSpec | None) -> int | None:
    if run is None or (run.train.batch_ramp is not None and run.train.max_tokens is None):
        return None  # how long a ramp is in steps depends on the number of processes
    if run.train.max_steps is not None:
        return run.train.max_steps * run.global_batch_tokens
    return run.train.max_tokens
