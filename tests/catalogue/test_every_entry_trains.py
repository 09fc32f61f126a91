"""Every entry of the catalogue trains from a spec, or says in a line why it cannot here and what can."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsekit.checks import MODEL_KINDS, elsewhere
from sparsekit.errors import SparsekitError, SpecError
from sparsekit.model.targets import Run, load_model
from sparsekit.registry import registry
from sparsekit.spec.load import validate
from sparsekit.training.trainer import Trainer

from .conftest import model_with

ENTRIES = [(kind, name) for kind in MODEL_KINDS for name in registry(kind).names()]
HERE = [(kind, name) for kind, name in ENTRIES if elsewhere(registry(kind).get(name)) is None]
ELSEWHERE = [entry for entry in ENTRIES if entry not in HERE]
LEAKING = [entry for entry in ENTRIES if not getattr(registry(entry[0]).get(entry[1]), "causal", True)]
STEPS = 20


def ids(entries: list[tuple[str, str]]) -> list[str]:
    return [f"{kind}-{name}" for kind, name in entries]


def learns(raw: dict[str, Any], folder: Path) -> None:
    trainer = Trainer(validate(raw), Run(folder))
    trainer.fit()
    rows = Run(folder).metrics
    losses = [row["loss"] for row in rows]
    assert len(losses) == STEPS
    assert all(math.isfinite(row["grad_norm"]) for row in rows), "a gradient is not finite"
    assert sum(losses[-3:]) / 3 < 0.95 * sum(losses[:3]) / 3
    assert rows[-1]["val_loss"] < losses[0]
    tokens = torch.arange(24).view(2, 12) * 7 % 257
    with torch.no_grad():
        assert torch.equal(load_model(folder)(tokens), trainer.model.eval()(tokens))


@pytest.mark.parametrize(("kind", "name"), HERE, ids=ids(HERE))
def test_trains(kind: str, name: str, run_of: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    learns(run_of(model_with(kind, name), max_steps=STEPS), tmp_path / "run")


@pytest.mark.parametrize(("kind", "name"), ELSEWHERE, ids=ids(ELSEWHERE))
def test_refuses_in_a_line_that_names_another(
    kind: str, name: str, run_of: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(SparsekitError) as caught:
        Trainer(validate(run_of(model_with(kind, name), max_steps=STEPS)), Run(tmp_path / "run"))
    line = str(caught.value)
    able = [other for of, other in HERE if of == kind]
    assert "\n" not in line
    assert f"{kind} {name!r}" in line
    assert str(elsewhere(registry(kind).get(name))) in line, "says why"
    named = line.partition("; use ")[2].removesuffix(".").replace(",", " or").split(" or ")
    assert named
    assert {word.strip() for word in named} <= set(able), "names what can be used here"


@pytest.mark.parametrize(("kind", "name"), LEAKING, ids=ids(LEAKING))
def test_what_leaks_is_refused_until_it_is_allowed(
    kind: str, name: str, run_of: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    raw = run_of(model_with(kind, name), max_steps=STEPS)
    assert raw["model"].pop("allow_leak")
    with pytest.raises(SpecError, match=r"^model.allow_leak: layers\.0\.\S+ is not causal, .*set it to true") as caught:
        Trainer(validate(raw), Run(tmp_path / "run"))
    assert len(caught.value.problems) == 1


def test_causal_entries_need_no_allowance() -> None:
    assert ("router", "expert_choice") in LEAKING
    for kind, name in ENTRIES:
        assert model_with(kind, name)["allow_leak"] == ((kind, name) in LEAKING)


# the same entry by other parameters, where these make it another path through the code
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mla with low-rank queries": ("attention", "mla", {"q_rank": 8, "v_head_dim": 6, "output_gate": True}),
    "window and sinks": ("attention", "gqa", {"window": 4, "sinks": 1}),
    "softcap and sink logits": ("attention", "mha", {"softcap": 5.0, "sink_logits": True, "kernel": "eager"}),
    "gate, norm and bias": ("attention", "mqa", {"output_gate": True, "qk_norm": "layernorm", "bias": True}),
    "partial rope": ("position", "rope", {"fraction": 0.5, "theta": 500.0}),
    "loop of experts": ("ffn", "moe", {"dispatch": "loop", "shared_expert": {"type": "mlp", "d_ff": 8}}),
    "experts of experts": (
        "ffn",
        "moe",
        {"expert": {"type": "moe", "n_experts": 2, "router": "switch", "expert": {"type": "drelu", "d_ff": 8}}},
    ),
    "sigmoid in groups": ("router", "top_k", {"score": "sigmoid", "renormalize": True, "n_groups": 2, "k_groups": 1}),
    "bias and jitter": ("router", "top_k", {"bias_rate": 0.01, "load_balance": 0.0, "jitter": 0.1}),
    "top_p of at most 2": ("router", "top_p", {"max_experts": 2}),
    "zero-centred": ("norm", "rmsnorm", {"zero_centered": True}),
    "not affine": ("norm", "layernorm", {"affine": False}),
    "parallel, scaled": ("residual", "parallel", {"scale": 0.5}),
    "masked everywhere": ("linear", "masked", {"roles": ["q", "k", "v", "o", "gate", "up", "down", "router", "head"]}),
    "init by role": ("init", "trunc_normal", {"roles": {"router": 0.1, "head": 0.0}}),
}


@pytest.mark.parametrize(("kind", "name", "params"), VARIANTS.values(), ids=VARIANTS)
def test_variants_train(
    kind: str, name: str, params: dict[str, Any], run_of: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    model = model_with(kind, name, **copy.deepcopy(params))
    model["allow_leak"] = True  # experts of experts: see test_random_specs.py
    learns(run_of(model, max_steps=STEPS), tmp_path / "run")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_document_masks_and_accumulation(
    precision: str, run_of: Callable[..., dict[str, Any]], tmp_path: Path, text: Path
) -> None:
    """The usual parts of a run, over a model that has most of the catalogue in its layers."""
    routers, norms, residuals = (registry(kind).names() for kind in ("router", "norm", "residual"))
    attentions = [
        {"type": "gqa", "n_heads": 4, "n_kv_heads": 2, "window": 5, "sinks": 1},
        {"type": "mla", "n_heads": 4, "kv_rank": 8, "kernel": "auto"},
        {"type": "mqa", "n_heads": 4, "kernel": "eager", "normalizer": "entmax15", "qk_norm": "rmsnorm"},
        {"type": "mha", "n_heads": 4, "position": "alibi"},
    ]
    layers = {}
    for index in range(8):
        name = routers[index % len(routers)]
        expert = {"type": "swiglu", "d_ff": 16}
        layers[str(index)] = {
            "attention": attentions[index % 4],
            "ffn": {"type": "moe", "n_experts": 4, "expert": expert,
                    "router": {"type": name, "k": 2} if name.endswith("top_k") else name},
            "norm": norms[index % len(norms)],
            "residual": residuals[index % len(residuals)],
        }  # fmt: skip
    block = {"attention": attentions[0], "ffn": {"type": "swiglu", "d_ff": 16}}
    model = {"d_model": 32, "n_layers": 8, "vocab_size": 257, "max_seq_len": 32, "block": block, "layers": layers}
    model |= {"allow_leak": True, "final_norm": "rmsnorm"}
    raw = run_of(model, max_steps=STEPS, global_batch_tokens=256, precision=precision)
    raw["data"] |= {"document_mask": True}
    separated = tmp_path / "documents.txt"
    separated.write_text((text / "train.txt").read_text().replace(" truth ", "\n---\n"))
    raw["data"]["source"] |= {"path": str(separated), "separator": "---"}
    learns(raw, tmp_path / "run")
