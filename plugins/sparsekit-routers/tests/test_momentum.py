"""momentum_residual against its recurrence over depth."""

from __future__ import annotations

import torch

from sparsekit.components.contracts import ForwardContext
from sparsekit.model.build import build_model

LAYERS = 3


def model(residual):
    ffn = {"type": "moe", "n_experts": 4, "router": {"type": "top_k", "k": 2}, "expert": {"type": "swiglu", "d_ff": 6}}
    block = {"attention": {"type": "mha", "n_heads": 2}, "ffn": ffn, "residual": residual}
    made = build_model(
        {
            "d_model": 8, "n_layers": LAYERS, "vocab_size": 11, "max_seq_len": 8, "block": block,
            "init": {"type": "normal", "std": 0.4},
        }
    )  # fmt: skip
    return made.double().eval()


IDS = torch.tensor([[1, 2, 3, 4, 5], [9, 8, 7, 6, 5]])


def test_the_recurrence():
    mu, gamma, scale = 0.6, 1.3, 0.5
    made = model({"type": "momentum_residual", "mu": mu, "gamma": gamma, "scale": scale})
    context = made.prepare(IDS, ForwardContext())
    x = made.embedding(IDS, context)
    steps = []
    for layer in made.layers:
        x = x + scale * layer.attention(layer.residual.attention_norm(x), context)
        steps.append(layer.ffn(layer.residual.ffn_norm(x), context))
        # unrolled: a layer's momentum is every step so far, each fainter by mu a layer
        x = x + scale * gamma * sum(mu ** (len(steps) - 1 - i) * step for i, step in enumerate(steps))
    assert (made.hidden(IDS, ForwardContext()) - x).abs().max() < 1e-9


def test_without_momentum_it_is_pre_norm():
    plain, heavy = model("pre_norm"), model({"type": "momentum_residual", "mu": 0.0})
    assert torch.equal(plain(IDS), heavy(IDS))


def test_every_forward_begins_at_rest():
    made = model("momentum_residual")
    first = made(IDS)
    made(IDS.flip(0))
    assert torch.equal(made(IDS), first)


def test_differs_from_pre_norm_at_its_defaults():
    plain, heavy = model("pre_norm"), model("momentum_residual")
    assert (plain(IDS) - heavy(IDS)).abs().max() > 1e-3
