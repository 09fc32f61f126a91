"""What every entry of this package is held to: the contract, a difference from top-k, and a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparsekit import describe
from sparsekit.components.contracts import ForwardContext
from sparsekit.errors import SpecError
from sparsekit.model.targets import load_model
from sparsekit.testing import check_component

ENTRIES = [
    ("router", "blockffn", {}),
    ("router", "sparse_mixer", {}),
    ("ffn", "smear", {"n_experts": 4}),
    ("ffn", "smear", {"n_experts": 4, "segment": 4}),
    ("ffn", "stratified", {}),
    ("ffn", "monet", {}),
    ("ffn", "monet_vertical", {}),
    ("residual", "momentum_residual", {}),
]
FOLDER = Path(__file__).parents[1] / "specs"
SPECS = sorted(path.stem for path in FOLDER.glob("*.json"))
VARIANTS = {"monet_vertical", "smear_segments"}  # of an entry that is trained anyway
RUNS = [pytest.param(name, marks=pytest.mark.slow if name in VARIANTS else ()) for name in SPECS]
LEAKING = {"smear", "monet", "monet_vertical"}


@pytest.mark.parametrize(("kind", "name", "params"), ENTRIES)
def test_contract(kind, name, params):
    check_component(kind, name, params, compile_backend=None)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name", "params"), ENTRIES)
def test_contract_compiled(kind, name, params):
    check_component(kind, name, params)


@pytest.mark.slow
def test_variants():
    check_component("router", "blockffn", {"max_experts": 2})
    check_component("router", "sparse_mixer", {"k": 3, "jitter_eps": 0.5})
    check_component("ffn", "stratified", {"strata": [2, 1, 3], "norm": "rmsnorm"})


def of_top_k(component, expert):
    return component("ffn", {"type": "moe", "n_experts": 4, "router": {"type": "top_k", "k": 2}, "expert": expert})


@pytest.mark.parametrize("name", ["blockffn", "sparse_mixer", "smear", "stratified"])
def test_differs_from_top_k_at_its_defaults(component, randn, name):
    """With the weights of its experts and of its router."""
    expert, x = {"type": "swiglu", "d_ff": 5}, randn(2, 8, 6)
    ours = {
        "smear": {"type": "smear", "n_experts": 4, "expert": expert},
        "stratified": {"type": "stratified", "expert": expert},
    }.get(name, {"type": "moe", "n_experts": 4, "router": name, "expert": expert})
    made, other = component("ffn", ours).eval(), of_top_k(component, expert).eval()
    gate = made.gates[0] if name == "stratified" else getattr(made, "router", made).gate
    other.experts.load_state_dict(made.experts.state_dict())
    other.router.gate.load_state_dict(gate.state_dict())
    assert (made(x, ForwardContext()) - other(x, ForwardContext())).abs().max() > 1e-3


@pytest.mark.parametrize("name", RUNS)
def test_trains(trained, name):
    """50 steps: the loss falls, costs can be told, and what is saved computes what was trained."""
    trainer = trained(name)
    assert describe(trainer.spec).flops_per_token > 0
    losses = [row["loss"] for row in trainer.run.metrics]
    assert len(losses) == 50
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]
    tokens = torch.arange(24).view(2, 12) * 7 % 257
    with torch.no_grad():
        assert torch.equal(load_model(trainer.run.folder)(tokens), trainer.model.eval()(tokens))


@pytest.mark.parametrize("name", SPECS)
def test_what_leaks_is_refused_until_it_is_allowed(trained, name):
    if name not in LEAKING:
        assert "allow_leak" not in (FOLDER / f"{name}.json").read_text(), "it needs none"
        return
    with pytest.raises(SpecError, match=r"model.allow_leak: layers\.0\.ffn is not causal"):
        trained(name, allow_leak=False)
