"""Fused experts against the loop over experts: on a GPU, in Triton's interpreter, and what backward does, on a CPU."""

from __future__ import annotations

import copy
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

from sparsekit.components.contracts import ForwardContext
from sparsekit.components.fused_experts import weights_of
from sparsekit.model.build import build_model

MIXTURE = {
    "type": "moe",
    "n_experts": 6,
    "router": {"type": "top_k", "k": 2},
    "expert": {"type": "swiglu", "d_ff": 192},
}


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


# --- on a GPU


@pytest.fixture
def gpu() -> None:
    if not torch.cuda.is_available() or find_spec("triton") is None:
        pytest.skip("needs a CUDA device and triton")


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
    assert weights_of(layer.experts, x[0]) is not None
    exact = mixture({**ffn, "dispatch": "loop"}, "cuda", torch.float32)
    exact.load_state_dict(layer.state_dict())
    wanted = ran(exact, x.float(), dy.float())
    unfused = copy.deepcopy(layer)
    unfused.experts.down.register_forward_hook(lambda *_: None)
    assert weights_of(unfused.experts, x[0]) is None
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
        assert weights_of(layer.experts, x[0]) is not None
        found = ran(layer, x, dy)
    assert all(value.dtype == torch.float32 for value in found.values())
    near(found, wanted, 0.03)
