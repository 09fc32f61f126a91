"""Blocks compile whole and compute what they compute eagerly, for every pair of entries that can stand in one block."""

from __future__ import annotations

import copy
import functools
import random
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekit.checks import elsewhere
from sparsekit.components.contracts import ForwardContext
from sparsekit.errors import SpecError
from sparsekit.model.build import build_model
from sparsekit.registry import registry
from sparsekit.spec.load import validate_model

from .conftest import example

Row = dict[str, str]
Pair = frozenset[tuple[str, str]]
LENGTH, VOCABULARY = 8, 32
PARTS, SLOW_PARTS = 14, 60


def names(kind: str) -> list[str]:
    """The entries of a kind that train on the CPU."""
    return [name for name in registry(kind).names() if elsewhere(registry(kind).get(name)) is None]


def mixture(router: Any, expert: Any = None, **params: Any) -> dict[str, Any]:
    return {"type": "moe", "n_experts": 4, "router": router, "expert": expert or {"type": "gated", "d_ff": 8}, **params}


# What may stand in a block: factor -> value -> its part of the spec. A factor's first value goes with all others'.
DENSE = {name: {**example("ffn", name), "d_ff": 12} for name in ["mlp", *names("ffn")] if name != "moe"}
ROUTED = {f"moe, {name}": mixture(example("router", name)) for name in names("router")}
ENTRIES: dict[str, dict[str, Any]] = {
    "attention": {name: {"attention": example("attention", name)} for name in names("attention")},
    "kernel": {name: {"attention": {"kernel": name}} for name in ["auto", *names("kernel")]},
    "position": {name: {"attention": {"position": name}} for name in names("position")}
    | {f"rope, {n}": {"attention": {"position": {"type": "rope", "scaling": n}}} for n in names("rope_scaling")},
    "normalizer": {name: {"attention": {"normalizer": name}} for name in ["softmax", *names("normalizer")]},
    "ffn": {name: {"ffn": slot} for name, slot in (DENSE | ROUTED).items()},
    "activation": {name: {"activation": name} for name in names("activation")},
    "norm": {name: {"norm": name} for name in names("norm")},
    "residual": {name: {"residual": name} for name in names("residual")},
    "linear": {name: {"linear": name} for name in names("linear")},
}
# and the same entries by other parameters
PARAMETERS: dict[str, dict[str, Any]] = {
    **ENTRIES,
    "options": {
        "none": {},
        "window": {"attention": {"window": 3}},
        "sinks": {"attention": {"window": 3, "sinks": 1}},
        "softcap": {"attention": {"softcap": 4.0}},
        "sink_logits": {"attention": {"sink_logits": True}},
        "output_gate": {"attention": {"output_gate": True}},
        "qk_norm": {"attention": {"qk_norm": "rmsnorm", "bias": True}},
        "partial rope": {"attention": {"position": {"type": "rope", "fraction": 0.5}}},
    },
    "ffn": {
        **ENTRIES["ffn"],
        "biased mlp": {"ffn": {"type": "mlp", "d_ff": 12, "bias": True}},
        "top_k, sigmoid": {"ffn": mixture({"type": "top_k", "k": 2, "score": "sigmoid", "renormalize": True})},
        "top_k, groups": {"ffn": mixture({"type": "top_k", "k": 2, "n_groups": 2, "bias_rate": 0.1, "jitter": 0.1})},
        "top_p, at most 2": {"ffn": mixture({"type": "top_p", "p": 0.3, "max_experts": 2})},
        "switch, tight": {"ffn": mixture({"type": "switch", "capacity_factor": 0.5})},
        "shared": {"ffn": mixture("switch", shared_expert={"type": "mlp", "d_ff": 8}, shared_combine="mean")},
        "biased experts": {"ffn": mixture("hash", {"type": "mlp", "d_ff": 8, "bias": True})},
        "sparse experts": {"ffn": mixture("top_p", {"type": "top_k_ffn", "d_ff": 8, "k": 2})},
        "loop": {"ffn": mixture("top_p", dispatch="loop")},
    },
    "norm": {
        **ENTRIES["norm"],
        "zero-centred": {"norm": {"type": "rmsnorm", "zero_centered": True}},
        "not affine": {"norm": {"type": "layernorm", "affine": False}},
        "tanh alone": {"norm": {"type": "dynamic_tanh", "affine": False}},
    },
    "residual": {**ENTRIES["residual"], "scaled": {"residual": {"type": "parallel", "scale": 0.5}}},
}


def block_of(row: Row, factors: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The block of a row; each missing factor at its first value. Raises KeyError where a value finds no place."""
    block: dict[str, Any] = {"attention": {}, "ffn": {}}
    activation = None
    for factor, values in factors.items():
        for field, value in copy.deepcopy(values[row.get(factor, next(iter(values)))]).items():
            if field == "activation":
                activation = value if factor in row else None
            elif field == "attention":
                clash = block["attention"].keys() & value.keys() if factor in row else set()
                if clash & {key for f in row if f != factor for key in factors[f][row[f]].get("attention", {})}:
                    raise KeyError(f"two say what {clash} is")
                block["attention"] |= value
            elif field != "linear":
                block[field] = value
    if activation is not None:
        ffn = block["ffn"]["expert"] if block["ffn"]["type"] == "moe" else block["ffn"]
        if "activation" not in registry("ffn").get(ffn["type"]).Params.model_fields:
            raise KeyError("this feed-forward has an activation of its own")
        ffn["activation"] = activation
    return block


def model_of(blocks: list[dict[str, Any]], linear: str = "plain") -> dict[str, Any]:
    model = {"d_model": 32, "n_layers": len(blocks), "vocab_size": VOCABULARY, "max_seq_len": LENGTH}
    named = {f"b{index}": block for index, block in enumerate(blocks)}
    return {**model, "blocks": named, "pattern": list(named), "linear": linear, "allow_leak": True}


def possible(row: Row, factors: dict[str, dict[str, Any]]) -> bool:
    """Whether the spec allows it: what is left out never stands in the way."""
    try:
        validate_model(model_of([block_of(row, factors)]))
    except (KeyError, SpecError):
        return False
    return True


@functools.cache
def covering(name: str) -> list[Row]:
    """Rows in which every possible pair of values of two factors occurs at least once, built greedily."""
    factors = {"entries": ENTRIES, "parameters": PARAMETERS}[name]
    chance = random.Random(0)
    pairs = [{a: x, b: y} for a, b in combinations(factors, 2) for x in factors[a] for y in factors[b]]
    allowed = {frozenset(pair.items()) for pair in pairs if possible(pair, factors)}
    wanted, rows = dict.fromkeys(frozenset(pair.items()) for pair in pairs), []
    wanted = {pair: None for pair in wanted if pair in allowed}  # in a fixed order
    while wanted:
        best: tuple[int, Row] = (0, {})
        for _ in range(4):
            row = dict(sorted(next(iter(wanted))))
            order = [factor for factor in factors if factor not in row]
            chance.shuffle(order)
            for factor in order:
                gains: list[tuple[int, float, str]] = []
                for value in factors[factor]:
                    new = [frozenset(((factor, value), other)) for other in row.items()]
                    if all(pair in allowed for pair in new):
                        gains.append((sum(pair in wanted for pair in new), chance.random(), value))
                if gains:
                    row[factor] = max(gains)[2]
            best = max(best, (len(pairs_of(row) & wanted.keys()), row), key=lambda found: found[0])
        rows.append(best[1])
        for pair in pairs_of(best[1]):
            wanted.pop(pair, None)
    return rows


def pairs_of(row: Row) -> set[Pair]:
    return {frozenset(pair) for pair in combinations(row.items(), 2)}


def step(model: torch.nn.Module, documents: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of a training step."""
    ids = torch.randint(VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    ends = (torch.arange(LENGTH) >= 3).long().expand(3, -1) if documents else None
    context = ForwardContext(documents_BT=ends, loss_scale=torch.tensor(1.0), progress=torch.tensor(0.5))
    torch.manual_seed(1)
    logits = model.train()(ids, context)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compiles(rows: list[Row], factors: dict[str, dict[str, Any]], documents: bool, backend: str = "aot_eager") -> None:
    """One model with a layer for each row, its blocks compiled one by one as training does."""
    for linear in factors["linear"]:
        blocks = [block_of(row, factors) for row in rows if row["linear"] == linear]
        if not blocks:
            continue
        eager, compiled = (build_model(model_of(blocks, linear), seed=3) for _ in range(2))
        torch._dynamo.reset()
        for layer in compiled.layers:
            layer.compile(backend=backend, fullgraph=True)
        (logits, wanted), (got_logits, got) = step(eager, documents), step(compiled, documents)
        assert torch.allclose(logits, got_logits, rtol=1e-5, atol=1e-5)
        assert wanted.keys() == got.keys()
        for name, gradient in wanted.items():
            index = int(name.split(".")[1]) if name.startswith("layers.") else 0
            assert torch.allclose(gradient, got[name], rtol=1e-5, atol=1e-5), f"{name} of {blocks[index]}"


def test_every_pair_occurs() -> None:
    for name, factors in (("entries", ENTRIES), ("parameters", PARAMETERS)):
        rows = covering(name)
        covered = set().union(*map(pairs_of, rows))
        for a, b in combinations(factors, 2):
            for x in factors[a]:
                for y in factors[b]:
                    assert (frozenset(((a, x), (b, y))) in covered) == possible({a: x, b: y}, factors)
        for row in rows:
            assert possible(row, factors), row
        print(f"{name}: {len(covered)} pairs in {len(rows)} blocks")


@pytest.mark.parametrize("part", range(PARTS))
def test_every_pair_of_entries_compiles(part: int) -> None:
    """Traced whole, and every third part through autograd's own tracing too; the slow test below takes all that way."""
    backend = "eager" if part % 3 else "aot_eager"
    compiles(covering("entries")[part::PARTS], ENTRIES, documents=bool(part % 2), backend=backend)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(SLOW_PARTS))
def test_every_pair_of_parameters_compiles(part: int) -> None:
    compiles(covering("parameters")[part::SLOW_PARTS], PARAMETERS, documents=bool(part % 2))


def test_a_mixture_inside_a_mixture_compiles_in_pieces() -> None:
    """Its inner routers see as many rows as the data says, so that its graph cannot be whole."""
    ffn = mixture({"type": "top_k", "k": 1}, mixture("top_p"))
    block = {"attention": example("attention", "mha"), "ffn": ffn}
    eager, compiled = (build_model(model_of([block])) for _ in range(2))
    torch._dynamo.reset()
    for layer in compiled.layers:
        layer.compile(backend="aot_eager")
    (logits, wanted), (got_logits, got) = step(eager, False), step(compiled, False)
    assert torch.allclose(logits, got_logits, rtol=1e-5, atol=1e-5)
    assert all(torch.allclose(wanted[name], got[name], rtol=1e-5, atol=1e-5) for name in wanted)


MIXTURE = mixture({"type": "top_k", "k": 2}, {"type": "swiglu", "d_ff": 128})


@pytest.mark.gpu
@pytest.mark.parametrize("ffn", [{"type": "swiglu", "d_ff": 128}, MIXTURE], ids=["dense", "mixture"])
@pytest.mark.parametrize("frozen", ["nothing", "attention and embedding", "experts"])
def test_a_model_compiles_whole_as_it_trains(ffn: dict[str, Any], frozen: str) -> None:
    block = {"attention": {"type": "gqa", "n_heads": 4, "n_kv_heads": 2}, "ffn": ffn}
    spec = {"d_model": 128, "n_layers": 2, "vocab_size": 64, "max_seq_len": 64, "block": block}
    ids = torch.randint(0, 64, (2, 64), device="cuda", generator=torch.Generator("cuda").manual_seed(0))

    def gradients(compiled: bool) -> dict[str, Tensor]:
        model = build_model(spec, seed=0, device="cuda").train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(word in name for word in frozen.split(" and ")))
        torch._dynamo.reset()
        run = torch.compile(model, fullgraph=True) if compiled else model
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(run(ids).flatten(0, 1).float(), ids.flatten())
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    eager, compiled = gradients(False), gradients(True)
    assert eager.keys() == compiled.keys()
    for name, gradient in eager.items():  # in bfloat16, rounded elsewhere, a token may go to another expert
        assert (compiled[name] - gradient).norm() <= 0.2 * gradient.norm(), name
