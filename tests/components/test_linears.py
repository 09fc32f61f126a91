"""The grouped matrix multiply behind experts, against a loop over rows; and masked weights."""

from __future__ import annotations

import pytest
import torch

from sparsekit.components.contracts import ExpertGroups, ForwardContext
from sparsekit.components.linears import _Grouped, grouped_mm, grouped_outer, project
from sparsekit.model.build import build_model
from tests.conftest import ATTENTION

# (rows, d_in, d_out, ends of the experts' rows): aligned and not, experts without rows, rows without an expert
CASES = [
    (12, 16, 8, [3, 3, 9, 12]),
    (12, 16, 8, [0, 0, 0, 12]),
    (11, 5, 7, [2, 6, 6, 11]),
    (13, 8, 16, [4, 4, 7, 10]),
    (13, 3, 8, [0, 0, 1, 1]),
    (6, 8, 8, [0, 0, 0, 0]),
    (0, 8, 8, [0, 0, 0, 0]),
    (0, 3, 5, [0, 0, 0, 0]),
]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.15}


def owner(row, ends):
    """The expert of a row, or None past the last."""
    return next((expert for expert, end in enumerate(ends) if row < end), None)


def by_row(x, weight, ends):
    rows = [
        weight[owner(m, ends)] @ x[m] if owner(m, ends) is not None else 0 * (weight[0] @ x[m]) for m in range(len(x))
    ]
    return torch.stack(rows) if rows else x.new_zeros(0, weight.shape[1])


def inputs(randn, case, dtype):
    n_rows, d_in, d_out, ends = case
    x, weight, dy = randn(n_rows, d_in), randn(4, d_out, d_in), randn(n_rows, d_out)
    return x.to(dtype), weight.to(dtype), dy.to(dtype), torch.tensor(ends, dtype=torch.int32)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients(randn, case, dtype):
    x, weight, dy, offsets = inputs(randn, case, dtype)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    got = grouped_mm(x, weight, offsets)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    wanted = by_row(*wide, case[3])
    close = {"rtol": 0, "atol": TOLERANCE[dtype], "check_dtype": False}
    assert got.dtype == dtype
    torch.testing.assert_close(got, wanted, **close)
    if len(x):
        gradients = torch.autograd.grad(wanted, wide, dy.double())
        for one, other in zip(torch.autograd.grad(got, (x, weight), dy), gradients, strict=True):
            assert one.dtype == dtype
            torch.testing.assert_close(one, other, **close)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_gradients_that_are_not_contiguous(randn, case, dtype):
    x, weight, _, offsets = inputs(randn, case, dtype)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    ones = torch.ones(case[0], case[2], dtype=dtype)
    wanted = torch.autograd.grad(grouped_mm(x, weight, offsets), (x, weight), ones)
    expanded = torch.autograd.grad(grouped_mm(x, weight, offsets).sum(), (x, weight))
    transposed = torch.autograd.grad(grouped_mm(x, weight, offsets), (x, weight), ones.T.contiguous().T)
    for gradients in (expanded, transposed):
        for one, other in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE[dtype])


def test_inputs_that_are_not_contiguous(randn):
    x, weight, _, offsets = inputs(randn, CASES[0], torch.float32)
    wanted = grouped_mm(x, weight, offsets)
    torch.testing.assert_close(grouped_mm(x.T.contiguous().T, weight, offsets), wanted)
    torch.testing.assert_close(grouped_mm(x, weight.mT.contiguous().mT, offsets), wanted)


@pytest.mark.parametrize("case", [(5, 3, 2, [2, 2, 4, 5]), (5, 2, 3, [1, 1, 1, 3])], ids=str)
def test_first_and_second_derivatives(randn, case):
    x, weight, dy, offsets = inputs(randn, case, torch.float64)
    x, weight, dy = x.requires_grad_(), weight.requires_grad_(), dy.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: grouped_mm(a, b, offsets), (x, weight))
    assert torch.autograd.gradgradcheck(lambda a, b: grouped_mm(a, b, offsets), (x, weight))
    assert torch.autograd.gradcheck(lambda a, b: grouped_outer(a, b, offsets), (dy, x))
    assert torch.autograd.gradgradcheck(lambda a, b: grouped_outer(a, b, offsets), (dy, x))


@pytest.mark.parametrize("operator", [grouped_mm, grouped_outer])
def test_what_the_compiler_is_told_is_true(randn, operator):
    x, weight, dy, offsets = inputs(randn, CASES[0], torch.float32)
    arguments = (x, weight, offsets) if operator is grouped_mm else (dy, x, offsets)
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("bias", [False, True])
def test_one_expert_or_a_group_of_them(component, randn, bias):
    x, weight, offsets = randn(7, 5), randn(3, 4, 5), torch.tensor([2, 2, 6], dtype=torch.int32)
    shift = randn(3, 4) if bias else None
    grouped = project(x, weight, shift, ForwardContext(groups=ExpertGroups(offsets)))
    for m in range(6):
        e = owner(m, [2, 2, 6])
        wanted = weight[e] @ x[m] + (shift[e] if bias else 0)
        torch.testing.assert_close(grouped[m], wanted, rtol=0, atol=1e-13)
        alone = project(x[m : m + 1], weight, shift, ForwardContext(groups=ExpertGroups(expert=e)))[0]
        torch.testing.assert_close(alone, wanted, rtol=0, atol=1e-13)


def test_without_its_context_an_expert_cannot_project(randn):
    with pytest.raises(TypeError, match=r"call linear\(x, context\)"):
        project(randn(2, 5), randn(3, 4, 5), None, None)
    with pytest.raises(TypeError, match="grouped = False"):
        project(randn(2, 5), randn(3, 4, 5), None, ForwardContext())


def test_autocast_reaches_grouped_products(randn):
    x, weight, _, offsets = inputs(randn, CASES[0], torch.float32)
    context = ForwardContext(groups=ExpertGroups(offsets))
    with torch.autocast("cpu", torch.bfloat16):
        y = project(x.requires_grad_(), weight.requires_grad_(), None, context)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), project(x, weight, None, context), rtol=0, atol=0.15)


# --- masked weights


def masked(sparsity=0.5, roles=("gate", "up", "down")):
    return {"type": "masked", "sparsity": sparsity, "roles": list(roles)}


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9, 0.99])
def test_every_matrix_keeps_its_exact_share(component, sparsity):
    mlp = component("ffn", {"type": "mlp", "d_ff": 11}, linear=masked(sparsity))
    for linear in (mlp.up, mlp.down):
        assert int(linear.mask.sum()) == round((1 - sparsity) * 11 * 16)
    expert = {"type": "mlp", "d_ff": 11}
    moe = component("ffn", {"type": "moe", "n_experts": 5, "expert": expert}, linear=masked(sparsity))
    for linear in (moe.experts.up, moe.experts.down):
        assert linear.mask.sum((1, 2)).tolist() == [round((1 - sparsity) * 11 * 16)] * 5, (
            "each expert's matrix by itself"
        )
        assert len({tuple(mask.flatten().tolist()) for mask in linear.mask}) > 1, "each with a mask of its own"


def test_masks_are_spread_evenly(component):
    """Each weight is kept alike: of 200 masks that keep a half, 5 standard deviations are 0.18."""
    slot = {"type": "moe", "n_experts": 200, "router": {"type": "top_k", "k": 1}, "expert": {"type": "mlp", "d_ff": 8}}
    share = component("ffn", slot, linear=masked(0.5)).experts.up.mask.double().mean(0)
    assert 0.5 - 0.18 < float(share.min()) < float(share.max()) < 0.5 + 0.18


ROLES = [(), ("q", "o"), ("gate", "up", "down"), ("router",), ("k", "down", "head")]


@pytest.mark.parametrize("roles", ROLES, ids=str)
def test_the_roles_named_are_masked_wherever_they_are(tiny, moe, roles):
    attention = {**ATTENTION, "output_gate": True}
    shared = {"type": "swiglu", "d_ff": 24}
    model = build_model(tiny(attention=attention, ffn=moe(shared_expert=shared), linear=masked(0.5, roles)))
    named = {name: m for name, m in model.named_modules() if hasattr(m, "role")}
    assert {m.role for m in named.values()} == {"q", "k", "v", "o", "gate", "up", "down", "router", "head"}
    for name, linear in named.items():
        assert linear.masked == hasattr(linear, "mask") == (linear.role in roles), name
        zeros = float((linear.effective_weight() == 0).float().mean())
        assert zeros == (0.5 if linear.role in roles else 0), name


@pytest.mark.parametrize("bias", [False, True])
def test_what_is_masked_takes_no_part_and_learns_nothing(component, randn, bias):
    mlp, x = component("ffn", {"type": "mlp", "d_ff": 11, "bias": bias}, linear=masked(0.7)), randn(5, 16)
    weights = {n: getattr(mlp, n).weight.detach() * getattr(mlp, n).mask for n in ("up", "down")}
    shift = {n: getattr(mlp, n).bias if bias else 0 for n in ("up", "down")}
    y = mlp(x, ForwardContext())
    wanted = mlp.activation(x @ weights["up"].T + shift["up"]) @ weights["down"].T + shift["down"]
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-12)
    y.square().sum().backward()
    for linear in (mlp.up, mlp.down):
        assert not linear.weight.grad[~linear.mask].any()
        assert linear.weight.grad[linear.mask].all()


@pytest.mark.parametrize("dispatch", ["grouped", "loop"])
def test_masks_inside_experts(component, randn, dispatch):
    expert, x = {"type": "mlp", "d_ff": 7, "activation": "relu"}, randn(9, 16)
    slot = {"type": "moe", "n_experts": 3, "expert": expert, "dispatch": dispatch, "router": {"type": "top_k", "k": 3}}
    moe = component("ffn", slot, linear=masked(0.6))
    up, down = (m.weight * m.mask for m in (moe.experts.up, moe.experts.down))
    p = (x @ moe.router.gate.weight.T).softmax(-1)
    wanted = sum(p[:, e : e + 1] * (torch.relu(x @ up[e].T) @ down[e].T) for e in range(3))
    torch.testing.assert_close(moe(x[None], ForwardContext())[0], wanted, rtol=0, atol=1e-12)
    moe(x[None], ForwardContext()).sum().backward()
    assert not moe.experts.up.weight.grad[~moe.experts.up.mask].any()


def test_masks_are_saved_and_restored(tiny):
    ids, models = torch.arange(20)[None], [build_model(tiny(linear=masked()), seed=seed) for seed in (0, 0, 1)]
    mask = "layers.0.ffn.up.mask"
    states = [model.state_dict() for model in models]
    assert states[0][mask].dtype == torch.bool
    assert torch.equal(states[0][mask], states[1][mask]), "the seed gives the mask"
    assert not torch.equal(states[0][mask], states[2][mask])
    models[2].load_state_dict(states[0])
    assert torch.equal(models[2](ids), models[0](ids))


def test_no_sparsity_is_plain(tiny):
    ids = torch.arange(20)[None]
    spec = tiny(linear=masked(0.0, ("q", "up", "head")))
    sparse, plain = build_model(spec), build_model(tiny())
    assert sparse.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(sparse(ids), plain(ids))


def test_masking_leaves_the_weights_as_they_were_drawn(tiny):
    """So a masked and a dense run of one seed start from the same weights."""
    sparse, plain = build_model(tiny(linear=masked(0.9))), build_model(tiny())
    for name, weight in plain.state_dict().items():
        assert torch.equal(sparse.state_dict()[name], weight), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [(12, 16, 8, [0, 0, 5, 12]), (13, 8, 16, [4, 4, 7, 10])], ids=str)
def test_what_runs_on_tensor_cores_equals_the_portable_operator(randn, case, dtype):
    x, weight, dy, offsets = inputs(randn, case, dtype)
    leaves = [t.requires_grad_() for t in (x, weight)]
    got = _Grouped.apply(x, weight, offsets, case[3][-1] == case[0])
    wanted = grouped_mm(x, weight, offsets)
    torch.testing.assert_close(got, wanted)
    gradients = (torch.autograd.grad(y, leaves, dy.mT.contiguous().mT) for y in (got, wanted))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("linear", ["plain", masked(0.6)], ids=["plain", "masked"])
def test_blended_experts(component, randn, bias, linear):
    """A group of rows is multiplied by sum_e blend_e W_e, and the gradients are those of that."""
    slot = {"type": "mlp", "d_ff": 7, "activation": "relu", "bias": bias}
    build = component("ffn", {"type": "moe", "n_experts": 3, "expert": slot}, linear=linear)
    made, x, blend = build.experts, randn(4, 5, 16), randn(4, 3).softmax(-1).requires_grad_()
    got = made(x, ForwardContext(groups=ExpertGroups(blend_GE=blend)))
    up, down = (m.effective_weight() for m in (made.up, made.down))
    wanted = torch.zeros_like(got)
    for g in range(4):
        hidden = x[g] @ sum(blend[g, e] * up[e] for e in range(3)).T
        hidden = torch.relu(hidden + (sum(blend[g, e] * made.up.bias[e] for e in range(3)) if bias else 0))
        wanted[g] = hidden @ sum(blend[g, e] * down[e] for e in range(3)).T
        wanted[g] = wanted[g] + (sum(blend[g, e] * made.down.bias[e] for e in range(3)) if bias else 0)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    direction, leaves = randn(4, 5, 16), [blend, *made.parameters()]
    for one, other in zip(*(torch.autograd.grad(y, leaves, direction) for y in (got, wanted)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)
