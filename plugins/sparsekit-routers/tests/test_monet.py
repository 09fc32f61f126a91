"""monet, both decompositions, against every one of its n^2 experts."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch

from sparsekit.components.contracts import ForwardContext
from sparsekit.errors import SpecError
from sparsekit.model.build import build_model

D, n, m, H, K = 6, 5, 4, 2, 2


@pytest.fixture
def monet(component):
    def make(kind="monet", **params):
        slot = {"type": kind, "n": n, "d_expert": m, "n_heads": H, "k": K, "activation": "relu2", **params}
        return component("ffn", slot, d_model=D)

    return make


def gates_of(made, x, side):
    """[tokens][heads][n] as lists, from the definition; the statistics are the batch's in training."""
    z = [[[float(made.gates[side].weight[h * n + i].detach() @ row) for i in range(n)] for h in range(H)] for row in x]
    threshold, gates = NormalDist().inv_cdf(1 - made.params.k / n), []
    for h in range(H):
        values = [v for row in z for v in row[h]]
        mean = sum(values) / len(values)
        var = sum((v - mean) ** 2 for v in values) / len(values)
        if not made.training:
            mean, var = float(made.running_mean[side, h]), float(made.running_var[side, h])
        for t, row in enumerate(z):
            normal = [(v - mean) / math.sqrt(var + 1e-5) for v in row[h]]
            least = min(max(normal), threshold)
            kept = [math.exp(v) if w >= least else 0.0 for v, w in zip(row[h], normal, strict=True)]
            if h == 0:
                gates.append([])
            gates[t].append([v / sum(kept) for v in kept])
    return gates


def relu2(v):
    return v.clamp(min=0) ** 2


def horizontal(made, i, j, x):
    u, b = (made.up.weight.view(n, m, D)[i], made.up.bias.view(n, m)[i])
    v = made.down.weight.view(D, n, m)[:, j]
    return v @ relu2(u @ x + b) + made.c[j]


def vertical(made, i, j, x):
    half = m // 2
    u = torch.cat((made.up1.weight.view(n, half, D)[i], made.up2.weight.view(n, half, D)[j]))
    b = torch.cat((made.up1.bias.view(n, half)[i], made.up2.bias.view(n, half)[j]))
    v = {name: getattr(made, f"down{name}").weight.view(D // 2, n, half) for name in ("11", "12", "21", "22")}
    upper = torch.cat((v["11"][:, i], v["12"][:, i]), 1)
    lower = torch.cat((v["21"][:, j], v["22"][:, j]), 1)
    return torch.cat((upper, lower)) @ relu2(u @ x + b) + torch.cat((made.c1[i], made.c2[j]))


@pytest.mark.parametrize(("kind", "expert"), [("monet", horizontal), ("monet_vertical", vertical)])
@pytest.mark.parametrize("training", [True, False])
def test_factored_is_the_sum_over_all_experts(monet, randn, kind, expert, training):
    made, x = monet(kind).train(training), randn(2, 4, D)
    with torch.no_grad():
        made.running_mean.copy_(0.1 * randn(2, H))
        made.running_var.copy_(1 + 0.1 * randn(2, H))
    rows = x.flatten(0, 1)
    g1, g2 = gates_of(made, rows, 0), gates_of(made, rows, 1)
    got = made(x, ForwardContext()).flatten(0, 1)
    for t, row in enumerate(rows):
        y = sum(
            g1[t][h][i] * g2[t][h][j] * expert(made, i, j, row) for h in range(H) for i in range(n) for j in range(n)
        )
        assert (got[t] - y).abs().max() < 1e-9
    assert any(v == 0 for token in g1 for head in token for v in head), "some experts are not kept"


def test_losses(monet, randn):
    made, x = monet().train(), randn(9, D)
    made(x, ForwardContext())
    gates = [gates_of(made, x, side) for side in range(2)]
    uniformity = ambiguity = 0.0
    for g in gates:
        for h in range(H):
            for i in range(n):
                share = sum(token[h][i] for token in g) / 9
                uniformity -= math.log(max(share, 1e-9)) / (2 * H * n)
            ambiguity += sum(1 - max(token[h]) for token in g) / (9 * 2 * H)
    assert float(made.uniformity_loss) == pytest.approx(uniformity, rel=1e-9)
    assert float(made.ambiguity_loss) == pytest.approx(ambiguity, rel=1e-9)


def test_statistics_move_after_a_step_and_not_in_a_forward(monet, randn):
    made, x = monet(momentum=0.25).train(), randn(9, D)
    made.running_mean.zero_()
    made.running_var.fill_(1.0)
    made(x, ForwardContext())
    made(x, ForwardContext())  # as recomputation does
    assert not made.running_mean.any()
    made.after_step({name: getattr(made, name) for name in made.counters})
    z = torch.stack([gate(x).view(9, H, n) for gate in made.gates])
    torch.testing.assert_close(made.running_mean, 0.25 * z.mean((1, 3)), rtol=0, atol=1e-12)
    torch.testing.assert_close(made.running_var, 0.75 + 0.25 * z.var((1, 3), correction=0), rtol=0, atol=1e-12)


def test_a_run_moves_them(trained):
    """From what its layer counted, a step at a time; what they are is the model's, and saved with it."""
    for layer in trained("monet", steps=3).model.layers:
        assert layer.ffn.running_mean.any()
        assert (layer.ffn.running_var != 1).all()


def test_about_k_of_n_are_kept(component, randn):
    """Of normal scores, once their statistics are known."""
    made = component("ffn", {"type": "monet", "n": 64, "d_expert": 2, "n_heads": H, "k": 8}, d_model=32).train()
    g = made.route(randn(400, 32), ForwardContext())
    assert float((g > 0).sum(-1).double().mean()) == pytest.approx(8, rel=0.1)


@pytest.mark.parametrize("kind", ["monet", "monet_vertical"])
def test_weights_grow_as_the_root_of_the_experts(kind):
    def size(n):
        block = {"attention": {"type": "mha", "n_heads": 2}, "ffn": {"type": kind, "n": n, "d_expert": 4}}
        model = build_model(
            {"d_model": 8, "n_layers": 1, "vocab_size": 11, "max_seq_len": 8, "block": block}, device="meta"
        )
        return sum(p.numel() for p in model.layers[0].ffn.parameters())

    assert size(64) == pytest.approx(4 * size(16)), "16 times the experts, 4 times the weights"


def test_it_leaks_in_training_and_not_in_eval(monet, randn):
    x = randn(1, 6, D)
    other = x.clone()
    other[0, 5] *= 30
    for training in (True, False):
        made = monet().train(training)
        moved = (made(x, ForwardContext()) - made(other, ForwardContext()))[0, :5].abs().max()
        assert bool(moved > 1e-6) is training
    assert made.causal is False
    assert made.batch_coupled


def test_no_tokens_and_mistakes(monet):
    made = monet().train()
    assert made(torch.empty(0, D, dtype=torch.float64), ForwardContext()).shape == (0, D)
    for ffn, told in (
        ({"type": "monet", "n": 4, "d_expert": 4}, r"block\.ffn: k \(8\) is above n \(4\)"),
        ({"type": "monet_vertical", "n": 9, "d_expert": 3}, r"block\.ffn: d_expert \(3\) must be even"),
    ):
        block = {"attention": {"type": "mha", "n_heads": 2}, "ffn": ffn}
        with pytest.raises(SpecError, match=told):
            build_model({"d_model": 8, "n_layers": 1, "vocab_size": 11, "max_seq_len": 8, "block": block})
