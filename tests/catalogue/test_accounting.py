"""What each entry costs, as accounting tells it, against what torch counts and what is really kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sparsekit.checks import MODEL_KINDS, elsewhere
from sparsekit.model.accounting import activation_bytes, describe
from sparsekit.model.build import build_model
from sparsekit.model.cache import KVCache
from sparsekit.model.decoder import Decoder
from sparsekit.registry import registry

from .conftest import model_with

ENTRIES = [(kind, name) for kind in MODEL_KINDS for name in registry(kind).names()]
MODELS = [(kind, name) for kind, name in ENTRIES if kind != "kernel"]
BATCH, LENGTH, VOCABULARY = 3, 12, 257


def ids(entries: list[tuple[str, str]]) -> list[str]:
    return [f"{kind}-{name}" for kind, name in entries]


def tokens(n_batch: int = BATCH, length: int = LENGTH) -> Tensor:
    return torch.randint(VOCABULARY, (n_batch, length), generator=torch.Generator().manual_seed(0))


def countable(kind: str, name: str, **params: Any) -> dict[str, Any]:
    """A model whose every product torch counts: the eager kernel, experts one by one."""
    model = model_with(kind, name, **params)
    attention, ffn = model["block"]["attention"], model["block"]["ffn"]
    attention.setdefault("kernel", "eager")
    if ffn["type"] == "moe":
        ffn["dispatch"] = "loop"
    return model


@pytest.mark.parametrize(("kind", "name"), ENTRIES, ids=ids(ENTRIES))
def test_parameters_are_those_allocated(kind: str, name: str) -> None:
    for tied in (False, True):
        spec = {**model_with(kind, name), "tie_embeddings": tied}
        description, model = describe(spec), build_model(spec)
        held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
        assert description.parameters * 4 == sum(held.values()) == description.weight_bytes
        if kind != "router" and name != "moe":
            assert description.active_parameters == description.parameters


D, E, D_FF, LAYERS = 32, 4, 24, 2
# of each router: its parameters, and how many experts a token visits (of top_p, where all are equally likely)
ROUTERS = {
    "top_k": (D * E, 2),
    "noisy_top_k": (2 * D * E, 2),
    "switch": (D * E, 1),
    "expert_choice": (D * E, 2.0),
    "top_p": (D * E, 2),  # 0.4 of 4 equal shares takes two
    "hash": (0, 1),
}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("router", registry("router").names())
def test_active_parameters_by_hand(router: str, shared: bool) -> None:
    own, visits = ROUTERS[router]
    spec = model_with("router", router)
    if shared:
        spec["block"]["ffn"]["shared_expert"] = {"type": "mlp", "d_ff": 10}
    attention = 2 * D * D + 2 * D * D // 2
    around = 2 * VOCABULARY * D + D + LAYERS * (attention + 2 * D + own + (2 * D * 10 if shared else 0))
    expert = 3 * D * D_FF
    description = describe(spec)
    assert description.parameters == around + LAYERS * E * expert
    assert description.active_parameters == around + LAYERS * visits * expert


def counted_flops(spec: dict[str, Any], backward: bool = False) -> tuple[float, float]:
    """(what accounting says, what torch counts) of a batch, in training mode."""
    model = build_model(spec).train()
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        logits = model(tokens())
        if backward:
            logits.sum().backward()
    return model.flops_per_token(LENGTH) * BATCH * LENGTH * (3 if backward else 1), counter.get_total_flops()


FLOPS: dict[str, tuple[str, str, dict[str, Any]]] = {
    f"{kind}-{name}": (kind, name, {}) for kind, name in MODELS if kind != "router"
} | {
    "gated output": ("attention", "gqa", {"output_gate": True, "qk_norm": "rmsnorm", "head_dim": 6}),
    "sink logits": ("attention", "mha", {"sink_logits": True, "softcap": 5.0}),
    "mla, all ranks": ("attention", "mla", {"q_rank": 6, "v_head_dim": 5, "output_gate": True, "rope_head_dim": 4}),
    "shared expert": ("ffn", "moe", {"shared_expert": {"type": "mlp", "d_ff": 10, "bias": True}}),
    "router-top_k": ("router", "top_k", {"k": 3, "n_groups": 2, "k_groups": 2}),
    "router-noisy_top_k": ("router", "noisy_top_k", {}),
    # where no token is dropped, where all experts are equally likely, and where the tokens divide by the experts
    "router-switch": ("router", "switch", {"capacity_factor": 4.0}),
    "router-top_p": ("router", "top_p", {"p": 0.6}),
    "router-expert_choice": ("router", "expert_choice", {"capacity_factor": 1.0}),
    "router-hash": ("router", "hash", {"k": 2}),
}


@pytest.mark.parametrize(("kind", "name", "params"), FLOPS.values(), ids=FLOPS)
def test_flops_are_what_torch_counts(kind: str, name: str, params: dict[str, Any]) -> None:
    spec = countable(kind, name, **params)
    if name == "top_p":
        spec["init"] = {"type": "normal", "roles": {"router": 0.0}}
    told, counted = counted_flops(spec)
    assert told == counted
    told, counted = counted_flops(spec, backward=True)
    assert told == counted, "the backward takes twice the products of the forward"


def test_every_router_is_among_them() -> None:
    assert {f"router-{name}" for name in registry("router").names()} <= FLOPS.keys()


@pytest.mark.parametrize("name", ["mha", "gqa", "mqa", "mla"])
def test_a_window_costs_what_it_reaches(name: str) -> None:
    """The eager kernel computes what the window hides, so these are counted by hand."""
    heads = 4 * (8 + 16 + 8) if name == "mla" else 4 * (8 + 8)  # a query's channels with one key, and a value's
    whole = describe(model_with("attention", name)).flops_per_token
    for reach, params in ((5, {"window": 5}), (8, {"window": 6, "sinks": 2}), (32, {"window": 100})):
        windowed = describe(model_with("attention", name, **params)).flops_per_token
        assert whole - windowed == LAYERS * 2 * heads * (32 - reach)


@pytest.mark.parametrize("position", registry("position").names())
@pytest.mark.parametrize("name", registry("attention").names())
def test_cache_bytes_are_those_that_a_cache_holds(name: str, position: str) -> None:
    for params in ({}, {"window": 3, "head_dim": 6}, {"v_head_dim": 5} if name == "mla" else {"qk_norm": "layernorm"}):
        spec = model_with("attention", name, position=position, **params)
        model, cache = build_model(spec), KVCache(10)
        model(torch.zeros(1, 10, dtype=torch.int64), cache.context(10, torch.device("cpu")))
        held = sum(t.numel() * t.element_size() for pair in cache.layers.values() for t in pair)
        assert describe(spec).cache_bytes_per_token * 10 == held


def kept_bytes(model: Decoder, n_batch: int, length: int) -> int:
    """Memory that autograd really holds on to between a forward and its backward, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept.setdefault(storage.data_ptr(), storage)
        return tensor

    ids = tokens(n_batch, length)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
    total = sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in own)
    loss.backward()
    return total


@pytest.mark.parametrize(("kind", "name"), MODELS, ids=ids(MODELS))
def test_activation_bytes_are_those_kept(kind: str, name: str) -> None:
    """Of the eager kernel, to what masks hold beside the batch, which is T² bytes of every kind of them."""
    spec = model_with(kind, name)
    spec["block"]["attention"] = {**spec["block"]["attention"], "kernel": "eager"}
    meta, real = build_model(spec, device="meta"), build_model(spec)
    told = [activation_bytes(meta, n_batch, 32) for n_batch in (2, 4, 6)]
    kept = [kept_bytes(real, n_batch, 32) for n_batch in (2, 4, 6)]
    for said, held in zip(told, kept, strict=True):
        assert abs(held - said) <= 0.001 * held + LAYERS * 32 * 32
    assert told[2] - told[1] == pytest.approx(told[1] - told[0], rel=1e-3), "linear in the batch"


KERNELS = [n for n in registry("kernel").names() if elsewhere(registry("kernel").get(n)) is None]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("attention", registry("attention").names())
def test_activation_bytes_of_kernels(attention: str, kernel: str) -> None:
    """Those kept, to grouped keys and values that a kernel lays out for each head, and to masks; never too few."""
    spec = model_with("attention", attention, kernel=kernel)
    told = activation_bytes(build_model(spec, device="meta"), 2, 32)
    kept = kept_bytes(build_model(spec), 2, 32)
    heads = 4
    repeated = LAYERS * 2 * 2 * heads * 8 * 32 * 4  # grouped keys and values, laid out for each head
    assert kept - LAYERS * 32 * 32 <= told <= kept + repeated


def test_describe_allocates_nothing_for_any_entry() -> None:
    """A model of billions of parameters is described, whatever its parts."""
    for kind, name in ENTRIES:
        spec = {**model_with(kind, name), "d_model": 8192, "n_layers": 3, "max_seq_len": 4096}
        ffn = spec["block"]["ffn"]
        (ffn["expert"] if ffn["type"] == "moe" else ffn)["d_ff"] = 8 * 8192
        description = describe(spec)
        assert description.parameters > 3e9
        assert description.activation_bytes > 4096 * 8192 * 4 * 3
