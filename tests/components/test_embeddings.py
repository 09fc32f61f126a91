"""Embeddings against table look-ups."""

from __future__ import annotations

import pytest
import torch

from sparsekit.components.contracts import ForwardContext


@pytest.mark.parametrize("scale", [1.0, 12.0])
def test_embedding(component, randn, scale):
    embedding = component("embedding", {"type": "token", "scale": scale}, d_model=5, facts={"vocab_size": 7})
    ids = torch.tensor([[0, 6, 3], [3, 3, 1]])
    x = embedding(ids, ForwardContext())
    for b in range(2):
        for t in range(3):
            torch.testing.assert_close(x[b, t], scale * embedding.weight[ids[b, t]], rtol=0, atol=1e-15)
    h = randn(2, 3, 5)
    torch.testing.assert_close(embedding.unembed(h), h @ embedding.weight.T, rtol=0, atol=1e-14)


IDS = torch.tensor([[0, 6, 3], [3, 3, 1]])


@pytest.mark.parametrize("scale", [1.0, 12.0])
@pytest.mark.parametrize("positions", [None, [[0, 1, 2], [0, 1, 0]], [[7, 3, 3], [4, 0, 6]]])
def test_token_and_position(component, randn, scale, positions):
    slot = {"type": "token_and_position", "scale": scale}
    embedding = component("embedding", slot, d_model=5, max_seq_len=8, facts={"vocab_size": 7})
    context = ForwardContext(positions_BT=None if positions is None else torch.tensor(positions))
    x = embedding(IDS, context)
    for b in range(2):
        for t in range(3):
            place = t if positions is None else positions[b][t]
            wanted = scale * embedding.weight[IDS[b, t]] + embedding.positions_SD[place]
            torch.testing.assert_close(x[b, t], wanted, rtol=0, atol=1e-15)
    h = randn(2, 3, 5)
    torch.testing.assert_close(embedding.unembed(h), h @ embedding.weight.T, rtol=0, atol=1e-14)


def test_token_and_position_has_a_vector_for_every_position(component):
    embedding = component("embedding", "token_and_position", d_model=5, max_seq_len=8, facts={"vocab_size": 7})
    assert {n: tuple(p.shape) for n, p in embedding.named_parameters()} == {"weight": (7, 5), "positions_SD": (8, 5)}


def test_without_positions_it_is_a_token_embedding(component):
    facts = {"vocab_size": 7}
    both, token = (component("embedding", name, d_model=5, facts=facts) for name in ("token_and_position", "token"))
    with torch.no_grad():
        both.positions_SD.zero_()
    token.weight = both.weight
    assert torch.equal(both(IDS, ForwardContext()), token(IDS, ForwardContext()))
