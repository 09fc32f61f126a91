"""What every entry of this package is held to: the contract, a difference from full attention, and a run."""

from __future__ import annotations

import pytest
import torch

from sparsekit import describe
from sparsekit.components.contracts import ForwardContext
from sparsekit.errors import SpecError
from sparsekit.model.targets import load_model
from sparsekit.testing import check_component

# at its defaults nsa sums up blocks of 32 tokens, and the kit's sequences have 16
SMALL = {"block": 4, "stride": 2, "select_block": 4, "n_select": 3, "window": 4}
DENSE = {"type": "mha", "n_heads": 2}
ENTRIES = [("nsa", SMALL), ("mosa", {}), ("mosa", {"sparsity": 2, "include_first": True, "dense": DENSE})]


@pytest.mark.parametrize(("name", "params"), ENTRIES, ids=str)
def test_contract(name, params):
    check_component("attention", name, params, compile_backend=None)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "params"), ENTRIES, ids=str)
def test_contract_compiled(name, params):
    check_component("attention", name, params)


def test_nsa_at_its_defaults_says_why_the_kit_cannot_try_it():
    with pytest.raises(AssertionError) as caught:
        check_component("attention", "nsa", compile_backend=None)
    lines = str(caught.value).splitlines()
    assert len(lines) == 6
    assert all("sum_" in line and "receives no gradient" in line for line in lines)


@pytest.mark.parametrize("name", ["nsa", "mosa"])
@torch.no_grad()
def test_differs_from_full_attention_at_its_defaults(component, randn, name):
    """With its weights, of nsa those of its chosen blocks, whose gate is open as at the start: a half."""
    heads, x = {"n_heads": 4, "head_dim": 4}, randn(2, 300, 8)
    slot = {"type": name, **heads, **({"n_kv_heads": 2} if name == "nsa" else {})}
    build = {"max_seq_len": 512}
    made = component("attention", slot, d_model=8, **build)
    full = component("attention", {"type": "gqa", "n_kv_heads": 2, **heads}, d_model=8, **build)
    if name == "mosa":
        full = component("attention", {"type": "mha", **heads}, d_model=8, **build)
        for part in "qkv":
            full.get_submodule(part).weight.copy_(made.get_submodule(part).weight.flatten(0, 1))
        full.o.weight.copy_(made.o.weight.permute(1, 0, 2).flatten(1))
    else:
        full.q.load_state_dict(made.q.state_dict())
        full.o.load_state_dict(made.o.state_dict())
        for part in "kv":
            full.get_submodule(part).weight.copy_(made.get_submodule(part).weight.view(3, 8, 8)[1])
    assert (made(x, ForwardContext()) - full(x, ForwardContext())).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["nsa", "mosa"])
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


def test_what_leaks_is_refused_until_it_is_allowed(trained):
    with pytest.raises(SpecError, match=r"model.allow_leak: layers\.0\.attention is not causal"):
        trained("mosa", allow_leak=False)
