"""What this package checks of itself: the contract of its kind, and its own formula."""

from __future__ import annotations

import pytest
import torch
from sparsekit import SparsekitError, build_model
from sparsekit.components.contracts import ForwardContext
from sparsekit.testing import check_component


def test_contract() -> None:
    check_component("router", "new_part")


def model(k: int) -> torch.nn.Module:
    router = {"type": "new_part", "k": k, "balance": 0.5}
    ffn = {"type": "moe", "n_experts": 4, "router": router, "expert": {"type": "swiglu", "d_ff": 6}}
    block = {"attention": {"type": "mha", "n_heads": 2}, "ffn": ffn}
    return build_model({"d_model": 8, "n_layers": 1, "vocab_size": 11, "max_seq_len": 6, "block": block})


def test_formula() -> None:
    router = model(k=2).layers[0].ffn.router.train()
    x_ND = torch.randn(5, 8)
    routing = router(x_ND, ForwardContext())
    scores = torch.stack([torch.softmax(router.gate.weight @ x, 0) for x in x_ND])
    for n in range(5):
        best = sorted(range(4), key=lambda e: -scores[n, e].item())[:2]
        assert routing.expert_M.view(5, 2)[n].tolist() == best
        torch.testing.assert_close(routing.weight_M.view(5, 2)[n], scores[n, best])
    importance = scores.sum(0)
    loss = ((importance - importance.mean()) ** 2).mean() / importance.mean() ** 2
    torch.testing.assert_close(router.balance_loss, loss.detach())

    # what the weights are used for plays no part here, so that all of the gradient is the loss's
    (got,) = torch.autograd.grad(routing.weight_M.sum() * 0, router.gate.weight, retain_graph=True)
    (wanted,) = torch.autograd.grad(0.5 * loss, router.gate.weight)
    torch.testing.assert_close(got, wanted)


def test_too_many_experts_are_refused() -> None:
    with pytest.raises(SparsekitError, match=r"k \(5\) is above n_experts \(4\)"):
        model(k=5)
