"""The decoder whole: scales, ties, shared masks, and the auxiliary losses of its layers."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from sparsekit.components.contracts import ForwardContext
from sparsekit.model.build import build_model

EXACT = {"rtol": 0, "atol": 1e-12}


def tokens(*shape, vocabulary=64):
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))


def double(spec, **changes):
    return build_model({"init": {"type": "normal", "std": 0.3}, **spec, **changes}, dtype=torch.float64)


def test_layer_by_layer(tiny):
    """Embedding, then h = x + attention(norm(x)), y = h + ffn(norm(h)) in each layer, then norm and head."""
    model, ids, context = double(tiny(n_layers=3)), tokens(2, 7), ForwardContext()
    x = model.embedding.weight[ids]
    for layer in model.layers:
        norms = layer.residual
        x = x + layer.attention(norms.attention_norm(x), context)
        x = x + layer.ffn(norms.ffn_norm(x), context)
    torch.testing.assert_close(model.hidden(ids, context), x, **EXACT)
    torch.testing.assert_close(model(ids), model.norm(x) @ model.head.weight.T, **EXACT)


def test_tied_embeddings(tiny):
    model, ids = double(tiny(tie_embeddings=True)), tokens(2, 7)
    assert model.head is None
    assert "head.weight" not in dict(model.named_parameters())
    hidden = model.hidden(ids, ForwardContext())
    torch.testing.assert_close(model(ids), model.norm(hidden) @ model.embedding.weight.T, **EXACT)


@pytest.mark.parametrize("tied", [False, True])
def test_scales(tiny, tied):
    """Embedding, residual branch and logit scales, as MiniCPM has them, against the plain model's own parts."""
    scales = {"embedding": {"type": "token", "scale": 12.0}, "residual": {"type": "pre_norm", "scale": 0.35}}
    model = double(tiny(**scales, logit_scale=0.125, tie_embeddings=tied))
    ids, context = tokens(2, 7), ForwardContext()
    x = 12.0 * model.embedding.weight[ids]
    for layer in model.layers:
        x = x + 0.35 * layer.attention(layer.residual.attention_norm(x), context)
        x = x + 0.35 * layer.ffn(layer.residual.ffn_norm(x), context)
    table = model.embedding.weight if tied else model.head.weight
    torch.testing.assert_close(model(ids), 0.125 * (model.norm(x) @ table.T), **EXACT)


@pytest.mark.parametrize("tied", [False, True])
def test_a_soft_cap_on_logits(tiny, tied):
    """c tanh(x / c), after the scale; a head that takes the logits in pieces gets no bare matrix then."""
    plain, model = (double(tiny(logit_scale=3.0, tie_embeddings=tied, **more)) for more in ({}, {"logit_softcap": 0.5}))
    ids = tokens(2, 7)
    wanted = 0.5 * torch.tanh(plain(ids) / 0.5)
    assert (wanted - plain(ids)).abs().max() > 0.01
    torch.testing.assert_close(model(ids), wanted, **EXACT)
    found = model(ids, head=lambda x, unembedding: (unembedding.weight, unembedding.logits(x)))
    assert found[0] is None
    torch.testing.assert_close(found[1], wanted, **EXACT)


def test_the_final_norm_is_the_last_layers_unless_given(tiny):
    layers = {"-1": {"norm": {"type": "layernorm"}}}
    assert type(double(tiny(layers=layers)).norm).__name__ == "LayerNorm"
    assert type(double(tiny(layers=layers, final_norm="none")).norm).__name__ == "NoNorm"


def test_masks_are_shared_only_between_layers_of_one_rule(tiny):
    """What the decoder prepares once changes nothing: each layer alone, unprepared, computes the same."""
    attention = {"type": "gqa", "n_heads": 4, "n_kv_heads": 2}
    layers = {
        "0": {"attention": {"window": 2}},
        "2": {"attention": {"kernel": "eager"}},
        "3": {"attention": {"window": 3}},
    }
    model, ids = double(tiny(n_layers=4, attention=attention, layers=layers)), tokens(2, 9)
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1], [5, 5, 5, 5, 5, 5, 5, 5, 6]])
    for context in (ForwardContext(), ForwardContext(documents_BT=documents)):
        prepared = model.prepare(ids, context).prepared
        assert len(prepared) == 4
        x = model.embedding(ids, context)
        for layer in model.layers:
            x, _ = layer(x, {}, context)
        torch.testing.assert_close(model.hidden(ids, context), x, **EXACT)


def test_documents_do_not_see_each_other(tiny):
    model, ids = double(tiny()), tokens(1, 9)
    packed = model(ids, ForwardContext(documents_BT=torch.tensor([[0, 0, 0, 0, 7, 7, 7, 7, 7]])))
    torch.testing.assert_close(packed, torch.cat([model(ids[:, :4]), model(ids[:, 4:])], 1), **EXACT)


# --- Auxiliary losses: whatever the partition and the recomputation, the gradient is that of one explicit total.

BALANCE, Z = 0.3, 0.2


def mixture(tiny, moe):
    router = {"type": "top_k", "k": 2, "load_balance": BALANCE, "z_loss": Z}
    return double(tiny(n_layers=2, ffn=moe(router=router))).train()


def cross_entropy(logits, ids):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def explicit_total(model, batches):
    """sum over the micro-batches of scale (cross-entropy + the auxiliary losses of every layer, by their formulas)."""
    inputs = []
    handles = [
        layer.ffn.router.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for layer in model.layers
    ]
    total = 0
    for ids, scale in batches:
        inputs.clear()
        # the model's own losses are switched off by the scale and written out below
        loss = cross_entropy(model(ids, ForwardContext(loss_scale=0.0)), ids)
        for layer, x in zip(model.layers, inputs, strict=True):
            logits = x @ layer.ffn.router.gate.weight.T
            scores = logits.softmax(-1)
            share = F.one_hot(scores.topk(2).indices, 4).sum(1).double().mean(0)
            loss = loss + BALANCE * 4 / 2 * (share * scores.mean(0)).sum() + Z * logits.logsumexp(-1).square().mean()
        total = total + scale * loss
    for handle in handles:
        handle.remove()
    return total


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_equal_gradients(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **EXACT, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("shares", [(1.0,), (0.5, 0.5), (0.25, 0.75)])
def test_auxiliary_losses_under_accumulation(tiny, moe, shares):
    model = mixture(tiny, moe)
    rows = tokens(4, 9)
    ends = [round(4 * sum(shares[:i])) for i in range(len(shares) + 1)]
    batches = [(rows[a:b], share) for (a, b), share in zip(pairwise(ends), shares, strict=True)]
    explicit_total(model, batches).backward()
    wanted = gradients(model)
    model.zero_grad()
    for ids, share in batches:
        (share * cross_entropy(model(ids, ForwardContext(loss_scale=share)), ids)).backward()
    assert_equal_gradients(gradients(model), wanted)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_auxiliary_losses_under_recomputation(tiny, moe, scale):
    model, ids = mixture(tiny, moe), tokens(2, 9)
    explicit_total(model, [(ids, scale)]).backward()
    wanted = gradients(model)
    model.zero_grad()
    context = ForwardContext(loss_scale=scale)
    x = model.embedding(ids, context)
    for layer in model.layers:
        x, _ = checkpoint(layer, x, {}, context, use_reentrant=False)
    (scale * cross_entropy(model.logits(x, context), ids)).backward()
    assert_equal_gradients(gradients(model), wanted)


def test_auxiliary_losses_move_no_logit(tiny, moe):
    model, ids = mixture(tiny, moe), tokens(2, 9)
    assert torch.equal(model(ids), model.eval()(ids))
