"""Building: what a weight depends on, and what it does not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sparsekit.errors import SpecError
from sparsekit.model.build import build_model, initialise
from sparsekit.spec.load import load_spec, validate_model


def state(spec, **options):
    return build_model(spec, **options).state_dict()


def test_any_form_of_a_spec_builds_the_same_model(tiny):
    spec = tiny(vocab_size=300)
    wanted = state(spec)
    for form in (validate_model(spec), load_spec(spec), {"model": spec}, {"model": spec, "name": "x"}):
        got = state(form)
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_what_comes_out(tiny):
    model = build_model(tiny())
    assert all(p.dtype == torch.float32 and p.device.type == "cpu" for p in model.parameters())
    assert model(torch.zeros(2, 5, dtype=torch.int64)).shape == (2, 5, 64)
    assert all(p.dtype == torch.bfloat16 for p in build_model(tiny(), dtype=torch.bfloat16).parameters())


def test_meta_allocates_nothing(tiny):
    spec = tiny(d_model=8192, vocab_size=10**6, n_layers=200)
    assert all(p.is_meta for p in build_model(spec, device="meta").parameters())


def test_seeds(tiny, moe):
    spec = tiny(ffn=moe())
    one, same, other = state(spec), state(spec), state(spec, seed=1)
    for name, weight in one.items():
        assert torch.equal(weight, same[name])
        assert torch.equal(weight, other[name]) == ("norm" in name)


def test_a_weight_depends_on_its_name_alone_and_not_on_the_rest_of_the_model(tiny):
    short, long = state(tiny(n_layers=2)), state(tiny(n_layers=5))
    assert all(torch.equal(weight, long[name]) for name, weight in short.items())
    other_ffn = state(tiny(ffn={"type": "mlp", "d_ff": 100}))
    kept = [name for name in short if "ffn" not in name]
    assert kept
    assert all(torch.equal(short[name], other_ffn[name]) for name in kept)


def test_no_two_weights_are_drawn_alike(tiny):
    matrices = [w for w in state(tiny(vocab_size=32)).values() if w.shape == (32, 32)]
    assert len(matrices) > 4
    for i, one in enumerate(matrices):
        assert not any(torch.equal(one, other) for other in matrices[:i])


def test_depth_scaled(tiny):
    plain = state(tiny(n_layers=3, init={"type": "normal", "std": 0.1}))
    scaled = state(tiny(n_layers=3, init={"type": "depth_scaled", "std": 0.1}))
    for name, weight in plain.items():
        factor = 1 / math.sqrt(6) if name.endswith(("o.weight", "down.weight")) else 1.0
        torch.testing.assert_close(scaled[name], weight * factor, rtol=1e-5, atol=0)


def test_the_global_generator_neither_matters_nor_moves(tiny):
    wanted = state(tiny())
    torch.manual_seed(123)
    before = torch.get_rng_state()
    got = state(tiny())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_a_module_that_nothing_fills_is_named():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.empty(3))

    with pytest.raises(TypeError, match=r"0 \(Bare\) owns scale but has no reset_parameters\(\)"):
        initialise(nn.Sequential(Bare()), 0)


def test_a_mistake_in_the_spec_is_told_as_one(tiny):
    with pytest.raises(SpecError, match=r"^d_model: expected greater than 0, got -1$"):
        build_model(tiny(d_model=-1))


@pytest.mark.parametrize(
    ("slot", "value"),
    [("linear", {"type": "masked", "roles": ["upp"]}), ("init", {"type": "normal", "roles": {"upp": 0.1}})],
)
def test_a_role_that_reaches_nothing_is_refused(tiny, slot, value):
    with pytest.raises(SpecError, match=rf"^model\.{slot}\.roles: unknown role 'upp' \(did you mean 'up'\?\); roles: "):
        build_model(tiny(**{slot: value}))
