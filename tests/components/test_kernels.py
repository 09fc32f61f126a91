"""Kernels against a loop over heads and queries."""

from __future__ import annotations

import math

import pytest
import torch

from sparsekit.components.contracts import ForwardContext
from sparsekit.components.kernels import Extras, Rule
from sparsekit.model.generate import KVCache

KERNELS = ["sdpa", "eager"]
DOCUMENTS = [[0, 0, 0, 1, 1, 2, 2], [4, 4, 4, 4, 4, 4, 4], [0, 1, 2, 3, 3, 3, 9]]


def attend(q, k, v, scale, sees):
    """softmax(scale q k) v, one query of one head at a time, over the keys that ``sees(b, query, key)``."""
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            group = h // (q.shape[1] // k.shape[1])
            for t in range(q.shape[2]):
                keys = [s for s in range(k.shape[2]) if sees(b, t, s)]
                powers = [math.exp(scale * float(q[b, h, t] @ k[b, group, s])) for s in keys]
                for s, power in zip(keys, powers, strict=True):
                    out[b, h, t] += power / sum(powers) * v[b, group, s]
    return out


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("heads", [(4, 4), (6, 3), (4, 1)])
@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_masks_and_groups(component, randn, kernel, heads, window, documents):
    module = component("kernel", kernel)
    q, k, v = randn(3, heads[0], 7, 5), randn(3, heads[1], 7, 5), randn(3, heads[1], 7, 5)
    context = ForwardContext(documents_BT=None if documents is None else torch.tensor(documents))

    def sees(b, t, s):
        same = documents is None or documents[b][t] == documents[b][s]
        return s <= t and (window is None or t - s < window) and same

    mask = module.prepare(Rule(window), 7, q.device, context)
    torch.testing.assert_close(
        module(q, k, v, mask, Rule(window), Extras(0.37)), attend(q, k, v, 0.37, sees), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("window", [None, 3])
def test_queries_that_follow_a_cache(component, randn, kernel, window):
    module = component("kernel", kernel)
    q, k, v = randn(2, 4, 3, 6), randn(2, 2, 8, 6), randn(2, 2, 8, 6)
    context = ForwardContext(positions_BT=torch.arange(5, 8)[None], cache=KVCache(16))
    mask = module.prepare(Rule(window), 3, q.device, context)

    def sees(b, t, s):
        return s <= t + 5 and (window is None or t + 5 - s < window)

    torch.testing.assert_close(
        module(q, k, v, mask, Rule(window), Extras(0.4)), attend(q, k, v, 0.4, sees), rtol=0, atol=1e-12
    )


def test_eager_probabilities_are_a_distribution_over_what_is_seen(component, randn):
    module = component("kernel", "eager")
    q, k = randn(2, 4, 7, 5), randn(2, 2, 7, 5)
    mask = module.prepare(Rule(3), 7, q.device, ForwardContext())
    probabilities = module.probabilities(q, k, mask, Extras(1.0))
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 4, 7, dtype=torch.float64), rtol=0, atol=1e-14)
    distance = torch.arange(7)[:, None] - torch.arange(7)
    assert torch.equal(probabilities > 0, ((distance >= 0) & (distance < 3)).expand(2, 4, 7, 7))


@pytest.mark.parametrize("window", [None, 3])
def test_gradients_of_the_kernels_agree(component, randn, window):
    q, k, v = randn(2, 4, 7, 5), randn(2, 2, 7, 5), randn(2, 2, 7, 5)
    weights, gradients = randn(2, 4, 7, 5), []
    for name in KERNELS:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        module = component("kernel", name)
        mask = module.prepare(Rule(window), 7, q.device, ForwardContext())
        gradients.append(
            torch.autograd.grad((module(*leaves, mask, Rule(window), Extras(0.4)) * weights).sum(), leaves)
        )
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
