"""Kernels against a loop over heads and queries."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from sparsekit.components.contracts import ForwardContext
from sparsekit.components.kernels import Extras, Kernel, Rule
from sparsekit.errors import SparsekitError
from sparsekit.model.build import build_model
from sparsekit.model.cache import KVCache
from sparsekit.model.generate import generate
from sparsekit.registry import registry
from tests.components.test_normalizers import by_bisection, sparsemax_by_sorting
from tests.components.test_positions import PAPER

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # on the CPU, as meant
KERNELS = ["sdpa", "eager"]
DOCUMENTS = [[0, 0, 0, 1, 1, 2, 2], [4, 4, 4, 4, 4, 4, 4], [0, 1, 2, 3, 3, 3, 9]]


def softmax(scores):
    powers = [math.exp(z - max(scores)) for z in scores]
    return [power / sum(powers) for power in powers]


def attend(q, k, v, scale, sees, change=lambda h, t, s, z: z, sinks=None, normalise=softmax):
    """softmax(scale q k) v, one query of one head at a time, over the keys that ``sees(b, query, key)``.

    ``change`` makes another score of a score; ``sinks`` are logits a head that join the softmax and hold no value.
    """
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            group = h // (q.shape[1] // k.shape[1])
            for t in range(q.shape[2]):
                keys = [s for s in range(k.shape[2]) if sees(b, t, s)]
                scores = [change(h, t, s, scale * float(q[b, h, t] @ k[b, group, s])) for s in keys]
                weights = normalise(scores + ([] if sinks is None else [float(sinks[h])]))
                for s, weight in zip(keys, weights, strict=False):
                    out[b, h, t] += weight * v[b, group, s]
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


def after(length: int) -> KVCache:
    cache = KVCache(16)
    cache.length = length
    return cache


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("window", [None, 3])
def test_queries_that_follow_a_cache(component, randn, kernel, window):
    module = component("kernel", kernel)
    q, k, v = randn(2, 4, 3, 6), randn(2, 2, 8, 6), randn(2, 2, 8, 6)
    mask = module.prepare(Rule(window), 3, q.device, after(5).context(3, q.device))

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


# --- what joins the scores


def streaming(documents, window, n_sinks):
    """StreamingLLM: of its document a query sees the first n_sinks tokens and the last ``window``, itself included."""

    def sees(b, t, s):
        mine = [u for u in range(t + 1) if documents is None or documents[b][u] == documents[b][t]]
        return s in mine[:n_sinks] or s in mine[-window:]

    return sees


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("window", "n_sinks"), [(2, 1), (3, 2), (1, 4), (50, 2)])
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_sinks(component, randn, kernel, window, n_sinks, documents):
    module, rule = component("kernel", kernel), Rule(window, n_sinks)
    q, k, v = randn(3, 4, 7, 5), randn(3, 2, 7, 5), randn(3, 2, 7, 5)
    mask = module.prepare(
        rule, 7, q.device, ForwardContext(documents_BT=None if documents is None else torch.tensor(documents))
    )
    wanted = attend(q, k, v, 0.4, streaming(documents, window, n_sinks))
    torch.testing.assert_close(module(q, k, v, mask, rule, Extras(0.4)), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_sinks_stay_in_sight_of_a_cache(component, randn, kernel):
    module, rule = component("kernel", kernel), Rule(2, 1)
    q, k, v = randn(2, 4, 3, 6), randn(2, 2, 8, 6), randn(2, 2, 8, 6)
    mask = module.prepare(rule, 3, q.device, after(5).context(3, q.device))
    wanted = attend(q, k, v, 0.4, lambda b, t, s: s == 0 or 0 <= t + 5 - s < 2)
    torch.testing.assert_close(module(q, k, v, mask, rule, Extras(0.4)), wanted, rtol=0, atol=1e-12)


def causal(b, t, s):
    return s <= t


def capped(cap):
    return lambda h, t, s, z: cap * math.tanh(z / cap)


def biased(h, t, s, z):
    return z - PAPER[8][h] * (t - s)


# id: (Extras, what the reference is told)
SINKS = [-1.0, 0.0, 0.5, 3.0, 0.1, -0.2, 1.0, 2.0]
CHANGES = {
    "softcap": (lambda made: {"softcap": 1.5}, {"change": capped(1.5)}),
    "alibi": (lambda made: {"slopes_H": made("position", "alibi", facts={"n_heads": 8}).slopes_H}, {"change": biased}),
    "sink_logits": (lambda made: {"sink_H": torch.tensor(SINKS, dtype=torch.float64)}, {"sinks": SINKS}),
    "sparsemax": (lambda made: {"normalizer": made("normalizer", "sparsemax")}, {"normalise": sparsemax_by_sorting}),
    "entmax15": (
        lambda made: {"normalizer": made("normalizer", "entmax15")},
        {"normalise": lambda row: by_bisection(row, 2, 0.5)},
    ),
    "sparsemax-sink_logits": (
        lambda made: {
            "normalizer": made("normalizer", "sparsemax"),
            "sink_H": torch.tensor(SINKS, dtype=torch.float64),
        },
        {"normalise": sparsemax_by_sorting, "sinks": SINKS},
    ),
    "all": (
        lambda made: {
            "softcap": 1.5,
            "slopes_H": made("position", "alibi", facts={"n_heads": 8}).slopes_H,
            "sink_H": torch.tensor(SINKS, dtype=torch.float64),
        },
        {"change": lambda h, t, s, z: biased(h, t, s, capped(1.5)(h, t, s, z)), "sinks": SINKS},
    ),
}
CASES = [("eager", name) for name in CHANGES] + [("sdpa", "alibi")]


@pytest.mark.parametrize(("kernel", "name"), CASES)
@pytest.mark.parametrize("n_kv", [8, 2])
@pytest.mark.parametrize("window", [None, 3])
def test_what_joins_the_scores(component, randn, kernel, name, n_kv, window):
    module, rule, (extras, told) = component("kernel", kernel), Rule(window), CHANGES[name]
    q, k, v = 2 * randn(2, 8, 7, 5), randn(2, n_kv, 7, 5), randn(2, n_kv, 7, 5)
    mask = module.prepare(rule, 7, q.device, ForwardContext())
    wanted = attend(q, k, v, 0.5, lambda b, t, s: 0 <= t - s < (window or 7), **told)
    got = module(q, k, v, mask, rule, Extras(0.5, **extras(component)))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_a_sink_logit_takes_its_share_and_gives_nothing(component, randn):
    """Probabilities sum to 1 less exp(sink) / (exp(sink) + sum exp(score))."""
    module, sink = component("kernel", "eager"), torch.tensor([2.0, -40.0], dtype=torch.float64)
    q, k = randn(1, 2, 5, 4), randn(1, 2, 5, 4)
    rows = module.probabilities(q, k, None, Extras(0.5, sink_H=sink)).sum(-1)
    for h in range(2):
        for t in range(5):
            powers = sum(math.exp(0.5 * float(q[0, h, t] @ k[0, h, s])) for s in range(t + 1))
            assert float(rows[0, h, t]) == pytest.approx(powers / (powers + math.exp(sink[h])), abs=1e-14)


FLEX = {"nothing": lambda made: {}} | {name: extras for name, (extras, _) in CHANGES.items() if "max" not in name}
SHAPES = {
    "causal": (None, 0, False),
    "window": (3, 0, False),
    "sinks": (4, 2, False),
    "documents": (None, 0, True),
    "all": (4, 2, True),
}


@pytest.mark.parametrize(("length", "n_kv"), [(7, 2), (130, 2), (1, 8), (33, 8)])
@pytest.mark.parametrize(
    ("name", "shape"), [(n, s) for n in FLEX for s in SHAPES if "all" in (n, s) or "nothing" in n or s == "causal"]
)
def test_flex_is_eager(component, randn, name, length, n_kv, shape):
    """Forward, in float32: it has no gradients on the CPU."""
    window, n_sinks, packed = SHAPES[shape]
    documents = (torch.arange(length) * 3 // max(length, 2)).expand(2, -1) if packed else None
    q, k, v = (randn(2, n, length, 16).float() for n in (8, n_kv, n_kv))
    extras = FLEX[name](component)
    extras = {key: x.float() if isinstance(x, torch.Tensor) else x for key, x in extras.items()}
    outcomes, rule = [], Rule(window, n_sinks)
    for kernel in ("flex", "eager"):
        module = component("kernel", kernel)
        mask = module.prepare(rule, length, q.device, ForwardContext(documents_BT=documents))
        outcomes.append(module(q, k, v, mask, rule, Extras(0.25, **extras)))
    torch.testing.assert_close(*outcomes, rtol=0, atol=3e-6)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("heads", [(4, 4), (4, 1)])
@pytest.mark.parametrize("packed", [False, True])
def test_sdpa_in_bfloat16(component, randn, window, heads, packed):
    """Against eager in float32 on the same rounded inputs, errors are of the size of one rounding, 2^-9."""
    leaves = [randn(2, n, 33, 16).bfloat16() for n in (heads[0], heads[1], heads[1])]
    direction = randn(2, heads[0], 33, 16).bfloat16()
    documents = (torch.arange(33) // 12).expand(2, -1) if packed else None
    outcomes = []
    for kernel, dtype in (("sdpa", torch.bfloat16), ("eager", torch.float32)):
        module, rule = component("kernel", kernel), Rule(window)
        inputs = [x.to(dtype).requires_grad_() for x in leaves]
        mask = module.prepare(rule, 33, direction.device, ForwardContext(documents_BT=documents))
        out = module(*inputs, mask, rule, Extras(0.25))
        outcomes.append([out.detach(), *torch.autograd.grad(out, inputs, direction.to(dtype))])
    for rounded, wanted in zip(*outcomes, strict=True):
        assert rounded.dtype == torch.bfloat16
        error = float((rounded.float() - wanted).norm() / wanted.norm())
        assert error < 4 * 2**-9, f"{error * 2**9:.2f} roundings"


# --- who can do what


def chosen(rule=None, documents=False, dtype=torch.float32):
    context = ForwardContext(documents_BT=torch.zeros(1, 4, dtype=torch.long) if documents else None, dtype=dtype)
    auto = registry("kernel").get("auto")(Kernel.Params(), None)
    return auto.prepare(rule or Rule(), 4, torch.device("cpu"), context)[0]


def asks(*features):
    return Rule(features=frozenset(features))


def test_auto_on_the_cpu():
    assert chosen() == chosen(asks("window", "sinks")) == chosen(asks("alibi")) == chosen(asks("value_dim")) == "sdpa"
    assert chosen(documents=True) == "sdpa", "varlen does not run there"
    assert chosen(asks("softcap")) == chosen(asks("sink_logits")) == "eager", "flex has no gradients there"
    assert chosen(asks("normalizer")) == "eager"
    with torch.no_grad():
        assert chosen() == "sdpa"
        assert chosen(asks("softcap")) == chosen(asks("sink_logits"), documents=True) == "flex"
        assert chosen(asks("softcap"), dtype=torch.float64) == "eager", "flex knows no float64"
        assert chosen(asks("softcap", "normalizer")) == "eager"


@pytest.mark.parametrize("name", ["sdpa", "eager", "auto"])
def test_a_mask_of_the_attentions_own_making(randn, name):
    """Of each head another, as a choice of keys by the data is; a query at a time."""
    kernel, rule = registry("kernel").get(name)(Kernel.Params(), None), Rule(features=frozenset({"own_mask"}))
    q, k, v = randn(2, 4, 5, 3), randn(2, 2, 6, 3), randn(2, 2, 6, 3)
    seen = randn(2, 4, 5, 6) > 0
    seen[..., 2] = True
    got = kernel(q, k, v, kernel.own_mask(seen, rule), rule, Extras(0.5))
    for b, h, t in product(range(2), range(4), range(5)):
        keys = seen[b, h, t].nonzero()[:, 0]
        p = (k[b, h // 2, keys] @ q[b, h, t] * 0.5).softmax(0)
        torch.testing.assert_close(got[b, h, t], p @ v[b, h // 2, keys], rtol=0, atol=1e-12)


ASKED = [
    {},
    {"window": 3, "sinks": 1},
    {"softcap": 2.0},
    {"position": "alibi", "sink_logits": True},
    {"normalizer": "sparsemax"},
]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("asked", ASKED, ids=lambda a: "-".join(a) or "nothing")
def test_auto_is_eager(component, randn, asked, gradients, packed):
    x, outs = randn(2, 7, 16).float(), []
    context = ForwardContext(documents_BT=torch.tensor(DOCUMENTS[::2]) if packed else None)
    for kernel in ("auto", "eager"):
        slot = {"type": "gqa", "n_heads": 4, "n_kv_heads": 2, "kernel": kernel, **asked}
        attention = component("attention", slot, dtype=torch.float32)
        with torch.set_grad_enabled(gradients):
            outs.append(attention(x, context))
    torch.testing.assert_close(*outs, rtol=0, atol=2e-6)


def test_layers_that_ask_for_different_things_do_not_share_a_choice(tiny):
    """Of two layers with the kernel auto and the same mask only one has a softcap."""
    ids, logits = torch.arange(20)[None], []
    for kernel in ("auto", "eager"):
        attention = {"type": "mha", "n_heads": 4, "kernel": kernel}
        layers = {"1": {"attention": {"softcap": 0.05}}}
        spec = tiny(attention=attention, layers=layers, init={"type": "normal", "std": 0.3})
        logits.append(build_model(spec)(ids))
    torch.testing.assert_close(*logits, rtol=0, atol=1e-3)
    uncapped = build_model(tiny(attention=attention, init={"type": "normal", "std": 0.3}))(ids)
    assert (uncapped - logits[0]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ({"kernel": "sdpa", "softcap": 2.0}, r"attention\.kernel: .*cannot do softcap; auto or eager or flex can"),
        ({"kernel": "flex", "normalizer": "entmax15"}, r"cannot do normalizer; auto or eager can"),
        ({"kernel": "sdpa", "softcap": 2.0, "sink_logits": True}, r"cannot do sink_logits and softcap; .*eager"),
        ({"kernel": "varlen", "window": 4}, r"cannot do window; auto or eager or .*sdpa"),
    ],
)
def test_what_a_kernel_cannot_do_is_said_before_building(tiny, attention, message):
    with pytest.raises(SparsekitError, match=message) as error:
        build_model(tiny(attention={"type": "mha", "n_heads": 4, **attention}), device="meta")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ({"kernel": "varlen"}, "kernel 'varlen' does not run on cpu; use auto or eager or sdpa"),
        ({"kernel": "flex"}, "kernel 'flex' has no gradients on cpu; use auto or eager or sdpa"),
        ({"kernel": "flex", "softcap": 2.0}, "kernel 'flex' has no gradients on cpu; use auto or eager"),
    ],
)
def test_where_a_kernel_cannot_run_is_said_when_it_is_to(tiny, attention, message):
    model = build_model(tiny(attention={"type": "mha", "n_heads": 4, **attention}))
    with pytest.raises(SparsekitError) as error:
        model(torch.arange(5)[None])
    assert str(error.value) == message


def test_a_kernel_without_a_cache_is_run_without_one(tiny):
    """Generation runs the whole sequence again; whoever gives it a cache is told."""
    models = [build_model(tiny(attention={"type": "mha", "n_heads": 4, "kernel": k})) for k in ("flex", "eager")]
    told = [list(generate(model.eval(), [3, 1, 4], 6, temperature=0)) for model in models]
    assert told[0] == told[1]
    with torch.no_grad(), pytest.raises(SparsekitError, match="'flex' cannot use a key-value cache; use auto, eager"):
        models[0](torch.arange(3)[None], KVCache(8).context(3, torch.device("cpu")))


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_are_given_one_dtype(component, randn, kernel):
    """Under autocast a norm may give float32 where values are bfloat16; varlen and flash could not take that."""
    slot, seen = {"type": "mha", "n_heads": 2, "qk_norm": "dynamic_tanh", "kernel": kernel}, []
    attention = component("attention", slot, dtype=torch.float32)
    attention.kernel.register_forward_pre_hook(lambda module, args: seen.extend(x.dtype for x in args[:3]))
    with torch.autocast("cpu", torch.bfloat16):
        attention(randn(2, 7, 16).float(), ForwardContext())
    assert seen == [torch.bfloat16] * 3
