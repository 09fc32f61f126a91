"""Fused experts against the loop over experts: on a GPU, in Triton's interpreter, and what backward does, on a CPU."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsekit.components import fused_experts
from sparsekit.components.contracts import ForwardContext, Routing
from sparsekit.components.feedforward import SwiGLU
from sparsekit.components.fused_experts import fused, weights_of
from sparsekit.components.linears import PlainLinear
from sparsekit.components.moe import Mixture
from sparsekit.model.build import build_model
from tests.triton_tools import code_for_an_h100, demand_gpu, interpreted, resources

MIXTURE = {
    "type": "moe",
    "n_experts": 6,
    "router": {"type": "top_k", "k": 2},
    "expert": {"type": "swiglu", "d_ff": 192},
}

ROUTING = Routing.per_token(torch.zeros(4, 2, dtype=torch.int64), torch.ones(4, 2))


def mixture(ffn: dict, device: str, dtype: torch.dtype, d_model: int = 128) -> nn.Module:
    block = {"attention": {"type": "mha", "n_heads": 1}, "ffn": ffn}
    spec = {"d_model": d_model, "n_layers": 1, "vocab_size": 16, "max_seq_len": 16, "block": block}
    torch.manual_seed(0)
    return build_model(spec, device=torch.device(device), dtype=dtype).layers[0].ffn.train()


def skewed(layer: nn.Module) -> None:
    """Most tokens to one expert, none to another: the first channel is 1 in every token."""
    layer.router.gate.weight.data[:, 0] = torch.tensor([4.0, 0, 0, 1, 0, -60])


def ran(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    layer.zero_grad(set_to_none=True)
    y = layer(x, ForwardContext(loss_scale=torch.ones((), device=x.device)))
    y.backward(dy)
    return {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}


def near(found: dict[str, Tensor], wanted: dict[str, Tensor], bound: float) -> None:
    for name, value in wanted.items():
        error = float((found[name].double() - value.double()).norm() / value.double().norm())
        assert error <= bound, (name, error)


# --- on a CPU: what backward puts together, of products written from their formulas


@pytest.fixture
def products(monkeypatch) -> None:
    """The operators as triton's kernels define them where there is triton, in plain torch."""

    def experts_sort(expert, n_experts):
        order = expert.argsort(stable=True)
        return order, order.argsort(), expert.bincount(minlength=n_experts).cumsum(0).int(), expert[order]

    def experts_up(x, weight, order, e, gate, up):  # each row a tile: the table is that of their experts
        token = order // weight.shape[1]
        g, u = (torch.einsum("md,mfd->mf", x[token], w[e]) for w in (gate, up))
        return g, u, (F.silu(g) * u * weight.flatten()[order][:, None]).to(x.dtype)

    def experts_down(h, e, down):
        return torch.einsum("mf,mdf->md", h, down[e])

    def experts_up_back(dg, du, e, gate, up):
        return torch.einsum("mf,mfd->md", dg, gate[e]) + torch.einsum("mf,mfd->md", du, up[e])

    def experts_act_back(dh, weight, order, g, u):
        sigma, w = g.sigmoid(), weight.flatten()[order][:, None]
        dweight = torch.zeros(order.shape[0]).scatter(0, order, (dh * F.silu(g) * u).float().sum(-1))
        slope = sigma + g * sigma * (1 - sigma)
        return (dh * w * u * slope).to(g.dtype), (dh * w * F.silu(g)).to(g.dtype), dweight.view_as(weight)

    def experts_spread(x, row):
        return x[row.flatten().argsort() // row.shape[1]]

    plain = SimpleNamespace(
        experts_sort=experts_sort, experts_up=experts_up, experts_down=experts_down, experts_up_back=experts_up_back,
        experts_act_back=experts_act_back, experts_spread=experts_spread,
    )  # fmt: skip
    monkeypatch.setattr(torch.ops, "sparsekit", plain)


@given(
    n_tokens=st.integers(1, 40), n_experts=st.integers(1, 7), k=st.integers(1, 3), alone=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_gradients_are_those_of_the_formula(products, n_tokens, n_experts, k, alone, seed):
    """Against autograd through sum_s w W_down(silu(W_gate x) W_up x), experts without a token among them."""
    torch.manual_seed(seed)
    k = min(k, n_experts)
    d_model, d_ff = 8, 16
    scores_NE = torch.rand(n_tokens, n_experts) + (torch.arange(n_experts) < k) * 9.0 * alone
    expert_NK = scores_NE.topk(k).indices
    drawn = [(n_tokens, d_model), (n_tokens, k), *[(n_experts, d_ff, d_model)] * 2, (n_experts, d_model, d_ff)]
    x, weight, gate, up, down = leaves = [torch.randn(sides).requires_grad_() for sides in drawn]
    found, offsets_E = fused(x, Routing.per_token(expert_NK, weight), [gate, up, down])
    assert offsets_E.tolist() == expert_NK.flatten().bincount(minlength=n_experts).cumsum(0).tolist()
    own = [w[expert_NK] for w in (gate, up, down)]  # [N, K, ...]
    g, u = (torch.einsum("nd,nkfd->nkf", x, w) for w in own[:2])
    wanted = torch.einsum("nkf,nkdf,nk->nd", F.silu(g) * u, own[2], weight)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    dy = torch.randn(n_tokens, d_model)
    for ours, theirs in zip(
        torch.autograd.grad(found, leaves, dy), torch.autograd.grad(wanted, leaves, dy), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_cpu_has_no_use_for_them():
    layer = mixture(MIXTURE, "cpu", torch.bfloat16)
    assert weights_of(layer.experts, torch.zeros(4, 128, dtype=torch.bfloat16), ROUTING) is None


@pytest.fixture
def as_on_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(fused_experts, "able", lambda x: True)


@pytest.mark.parametrize(
    ("expert", "fits"),
    [
        ({"type": "swiglu", "d_ff": 192}, True),
        ({"type": "swiglu", "d_ff": 100}, False),
        ({"type": "swiglu", "d_ff": 192, "bias": True}, False),
        ({"type": "gated", "d_ff": 192, "activation": "silu"}, True),
        ({"type": "gated", "d_ff": 192, "activation": "relu"}, False),
        ({"type": "geglu", "d_ff": 192}, False),
        ({"type": "drelu", "d_ff": 192}, False),
        ({"type": "mlp", "d_ff": 192}, False),
    ],
)
def test_which_experts_they_are_for(as_on_a_gpu, expert, fits):
    layer = mixture({**MIXTURE, "expert": expert}, "cpu", torch.bfloat16)
    assert (weights_of(layer.experts, torch.zeros(4, 128, dtype=torch.bfloat16), ROUTING) is not None) == fits
    single = torch.zeros(4, 128)
    assert weights_of(layer.experts, single, ROUTING) is None  # float32 is not what the kernels are for
    with torch.autocast("cpu", torch.bfloat16):
        assert (weights_of(layer.experts, single, ROUTING) is not None) == fits


def test_who_listens_is_told(as_on_a_gpu):
    """A hook on any part, or another forward, sees what it did before."""
    x = torch.zeros(4, 128, dtype=torch.bfloat16)
    layer = mixture(MIXTURE, "cpu", torch.bfloat16)
    for part in (layer.experts, layer.experts.down, layer.experts.activation):
        handle = part.register_forward_hook(lambda *_: None)
        assert weights_of(layer.experts, x, ROUTING) is None
        handle.remove()
        handle = part.register_forward_pre_hook(lambda *_: None)
        assert weights_of(layer.experts, x, ROUTING) is None
        handle.remove()
    assert weights_of(layer.experts, x, ROUTING) is not None
    layer.experts.forward = lambda x, context: x
    assert weights_of(layer.experts, x, ROUTING) is None


def test_a_class_of_ones_own_is_asked_for_its_forward(as_on_a_gpu):
    x, layer = torch.zeros(4, 128, dtype=torch.bfloat16), mixture(MIXTURE, "cpu", torch.bfloat16)

    class Mine(SwiGLU):
        def forward(self, x_BTD, context):
            return 2 * super().forward(x_BTD, context)

    class Sparse(PlainLinear):
        def forward(self, x, context=None):
            return super().forward(x.relu(), context)

    layer.experts.__class__ = Mine
    assert weights_of(layer.experts, x, ROUTING) is None
    layer.experts.__class__ = SwiGLU
    layer.experts.up.__class__ = Sparse
    assert weights_of(layer.experts, x, ROUTING) is None


def test_routings_with_unused_or_unequal_entries_go_the_other_way(as_on_a_gpu):
    layer, x = mixture(MIXTURE, "cpu", torch.bfloat16), torch.zeros(4, 128, dtype=torch.bfloat16)
    assert weights_of(layer.experts, x, ROUTING._replace(complete=False)) is None
    assert weights_of(layer.experts, x, ROUTING._replace(token_M=torch.zeros(8, dtype=torch.int64))) is None


def test_a_mixture_takes_them_where_it_can_compiled_in_one_graph(as_on_a_gpu, products, monkeypatch):
    """The whole layer with plain products in place of the kernels, against its loop: outputs, gradients, counters."""
    layer = mixture(MIXTURE, "cpu", torch.bfloat16)
    skewed(layer)
    exact = mixture({**MIXTURE, "dispatch": "loop"}, "cpu", torch.float32)
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(3, 50, 128).bfloat16()
    x[..., 0] = 1
    dy = torch.randn_like(x)
    wanted = ran(exact, x.float(), dy.float())
    monkeypatch.delattr(Mixture, "_by_rows")
    layer.compile(backend="aot_eager", fullgraph=True)
    near(ran(layer, x, dy), wanted, 0.02)
    assert torch.equal(layer.load.float(), exact.load)


# --- in Triton's interpreter, and as machine code for an H100

INTERPRETED = """
import torch
import torch.nn.functional as F

from sparsekit.components import expert_kernels as kernels
from sparsekit.components.expert_kernels import Plan

def near(found, wanted):
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)

def table(offsets):
    rows, first = [], 0
    for expert, end in enumerate(offsets.tolist()):
        rows += [(expert, begin, end) for begin in range(first, end, kernels.ROWS)]
        first = end
    return torch.tensor([(*row, len(rows)) for row in rows], dtype=torch.int32).T

torch.manual_seed(0)
kernels.ROWS = 16
for n_experts, d_model, d_ff, n, k in ((3, 64, 48, 20, 2), (5, 32, 32, 7, 1), (4, 32, 96, 30, 3), (1, 32, 16, 3, 1)):
    expert = torch.randint(0, n_experts, (n * k,))
    if k == 3:
        expert[:] = 2  # all but one to one, some without a row
        expert[5] = 0
    order, row, offsets, tiles = kernels.sort(expert, n_experts)
    expert, wanted = expert.sort(stable=True)
    assert order.equal(wanted) and row.equal(order.argsort())
    assert offsets.equal(torch.searchsorted(expert, torch.arange(n_experts), right=True).int())
    token = order // k
    x, weight = torch.randn(n, d_model), torch.rand(n, k)
    gate, up = (torch.randn(n_experts, d_ff, d_model) / 8 for _ in range(2))
    plan = Plan(32, 16)
    near(kernels.spread(x, row.view(n, k)), x[token])
    g, u, h = kernels.up(x, weight, order, tiles, gate, up, plan)
    near(g, torch.einsum("md,mfd->mf", x[token], gate[expert]))
    near(u, torch.einsum("md,mfd->mf", x[token], up[expert]))
    leaves = [one.clone().requires_grad_() for one in (g, u, weight)]
    wanted = F.silu(leaves[0]) * leaves[1] * leaves[2].flatten()[order][:, None]
    near(h, wanted.detach())
    dh = torch.randn_like(h)
    back = kernels.act_back(dh, weight, order, g, u)
    for ours, theirs in zip(back, torch.autograd.grad(wanted, leaves, dh)):
        near(ours, theirs)
    down = torch.randn(n_experts, d_model, d_ff)
    near(kernels.down(h, tiles, down, plan), torch.einsum("mf,mdf->md", h, down[expert]))
    dx = kernels.up_back(*back[:2], tiles, gate, up, plan)
    near(dx, torch.einsum("mf,mfd->md", back[0], gate[expert]) + torch.einsum("mf,mfd->md", back[1], up[expert]))
for n_experts, n in ((1, 1), (3, 500), (40, 900), (64, 70), (200, 300)):  # several shares, many chunks
    for kernels.SHARES, kernels.CHUNK in ((256, 8192), (3, 128), (1, 1)):
        expert = torch.randint(0, n_experts, (n,)) if n != 70 else torch.full((n,), 7)
        order, row, offsets, tiles = kernels.sort(expert, n_experts)
        assert tiles[:, : int(tiles[3, 0])].equal(table(offsets))
        assert order.equal(expert.argsort(stable=True)) and row.equal(order.argsort())
        assert offsets.equal(expert.bincount(minlength=n_experts).cumsum(0).int())
print("all agree")
"""


@pytest.mark.slow
def test_kernels_agree_in_the_interpreter():
    interpreted(INTERPRETED)


@pytest.mark.slow
def test_kernels_compile_for_an_h100(tmp_path):
    """Products run on its tensor cores and are fed 16 bytes at a time, copied past the registers; nothing spills."""
    pytest.importorskip("triton", reason="triton is not installed")
    from sparsekit.components import expert_kernels as kernels

    named = {"weight_ptr": "*fp32", "order_ptr": "*i64", "tiles_ptr": "*i32"}
    named |= dict.fromkeys(("x_ptr", "gate_ptr", "up_ptr", "g_ptr", "u_ptr", "h_ptr", "y_ptr", "dx_ptr"), "*bf16")
    n_tiles = {"n_tiles": 2112, "programs": 132}
    for d_model, d_ff, slots in ((1536, 576, 8), (768, 512, 4), (1536, 2304, 2), (128, 128, 1)):
        for kernel, plan, copied in (
            (kernels._up, kernels.up_plan(d_model, d_ff), "cp.async.cg.shared.global"),
            (kernels._down, kernels.DOWN, "cp.async.bulk.tensor"),
            (kernels._up_back, kernels.UP_BACK, "cp.async.bulk.tensor"),
        ):
            rows, weights, turned = (
                f"tensordesc<bf16[{height},{width}]>"
                for height, width in ((kernels.ROWS, plan.depth), (plan.depth, plan.width), (plan.width, plan.depth))
            )
            blocks = {"h": rows, "dg": rows, "du": rows, "gate": weights, "up": weights, "down": turned}
            sizes = {"ROWS": kernels.ROWS, "WIDTH": plan.width, "DEPTH": plan.depth, "F": d_ff, "D": d_model}
            if kernel is kernels._up:
                sizes["SLOTS"] = slots
            code = code_for_an_h100(kernel, named | blocks, n_tiles, plan, **sizes)
            used, ptx = resources(code, tmp_path), code.asm["ptx"]
            assert used["STACK"] == used["LOCAL"] == 0, (d_model, d_ff, used)
            assert "wgmma.mma_async" in ptx and copied in ptx and "cp.async.ca" not in ptx
            assert code.metadata.shared <= fused_experts.SHARED_MEMORY


# --- on a GPU


@pytest.fixture
def gpu() -> None:
    demand_gpu()


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("d_ff", [192, 64])
def test_fused_experts_agree_with_the_loop_on_a_gpu(gpu, compiled, d_ff):
    """Of bfloat16 weights and tokens, against the loop in float32; no worse than grouped_mm's way, and repeatable."""
    ffn = {**MIXTURE, "expert": {"type": "swiglu", "d_ff": d_ff}}
    layer = mixture(ffn, "cuda", torch.bfloat16)
    skewed(layer)
    x = torch.randn(3, 100, 128, device="cuda", dtype=torch.bfloat16)
    x[..., 0] = 1
    dy = torch.randn_like(x)
    assert weights_of(layer.experts, x[0], ROUTING) is not None
    exact = mixture({**ffn, "dispatch": "loop"}, "cuda", torch.float32)
    exact.load_state_dict(layer.state_dict())
    wanted = ran(exact, x.float(), dy.float())
    unfused = copy.deepcopy(layer)
    unfused.experts.down.register_forward_hook(lambda *_: None)
    assert weights_of(unfused.experts, x[0], ROUTING) is None
    others = ran(unfused, x, dy)
    if compiled:
        layer.compile(fullgraph=True)
    found = ran(layer, x, dy)
    assert int((layer.load == 0).sum()) >= 1  # an expert without a token is among them
    near(found, wanted, 0.02)
    for name, value in wanted.items():
        ours, theirs = (float((one[name].float() - value).norm()) for one in (found, others))
        assert ours <= 1.2 * theirs + 1e-6, name
    again = ran(layer, x, dy)
    assert all(found[name].equal(again[name]) for name in found)


@pytest.mark.gpu
def test_fused_experts_under_autocast_on_a_gpu(gpu):
    """float32 weights and tokens, bfloat16 products, as training with master weights has them."""
    layer = mixture(MIXTURE, "cuda", torch.float32)
    exact = mixture({**MIXTURE, "dispatch": "loop"}, "cuda", torch.float32)
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(2, 64, 128, device="cuda")
    dy = torch.randn_like(x)
    wanted = ran(exact, x, dy)
    layer.compile(fullgraph=True)
    with torch.autocast("cuda", torch.bfloat16):
        assert weights_of(layer.experts, x[0], ROUTING) is not None
        found = ran(layer, x, dy)
    assert all(value.dtype == torch.float32 for value in found.values())
    near(found, wanted, 0.03)
