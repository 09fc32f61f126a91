"""Weights laid out for decoding, and the compiled step: both say what the model says."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
import torch._dynamo.testing

from sparsekit.components.contracts import ForwardContext, Linear
from sparsekit.errors import SparsekitError
from sparsekit.model import generate as generation
from sparsekit.model.build import build_model
from sparsekit.model.generate import generate_batch
from sparsekit.model.likelihood import loglikelihoods
from sparsekit.model.meanwhile import stand_in
from sparsekit.model.packed import packed
from sparsekit.model.sampling import Sampling

GREEDY = Sampling(temperature=0.0)
PROMPTS = [[3, 14, 15, 9, 2], [7], list(range(20, 31))]
IDS = torch.randint(0, 32, (3, 7), generator=torch.Generator().manual_seed(1))
ATTENTIONS = {
    "gqa": {"type": "gqa", "n_heads": 4, "n_kv_heads": 2, "bias": True},
    "window-sinks": {"type": "mha", "n_heads": 4, "window": 3, "sinks": 2},
    "eager": {"type": "gqa", "n_heads": 4, "n_kv_heads": 2, "kernel": "eager", "qk_norm": "rmsnorm", "softcap": 2.0},
    "mla": {"type": "mla", "n_heads": 4, "kv_rank": 8, "rope_head_dim": 4, "v_head_dim": 6},
}


def lively(spec, dtype=torch.float32):
    return build_model({"init": {"type": "normal", "std": 0.3}, **spec}, dtype=dtype).eval()


def laid_out(model):
    return [name for name, module in model.named_modules() if {"forward", "unembed"} & vars(module).keys()]


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_packed_weights_say_the_same(tiny, moe, rows, tied):
    spec = tiny(n_layers=2, layers={"0": {"ffn": moe()}}, attention=ATTENTIONS["gqa"], tie_embeddings=tied)
    model = lively(spec)
    dense = {name for name, module in model.named_modules() if isinstance(module, Linear) and module.weight.ndim == 2}
    with torch.no_grad():
        wanted = model(IDS)
        with packed(model, rows):
            assert set(laid_out(model)) == dense | {"embedding"}
            torch.testing.assert_close(model(IDS), wanted, rtol=1e-4, atol=1e-5)
            with packed(model, rows):  # as when two texts are written in turns
                torch.testing.assert_close(model(IDS), wanted, rtol=1e-4, atol=1e-5)
            assert laid_out(model)
        assert torch.equal(model(IDS), wanted)
    assert not laid_out(model)


def test_a_weight_that_changes_meanwhile_counts(tiny):
    model = lively(tiny())
    with torch.no_grad(), packed(model, 1):
        model.layers[0].ffn.up.weight.mul_(2.0)
        found = model(IDS)
    with torch.no_grad():
        torch.testing.assert_close(found, model(IDS), rtol=1e-4, atol=1e-5)


def test_projections_of_one_input_are_one_product(tiny):
    model = lively(tiny(attention={**ATTENTIONS["gqa"], "bias": "qkv"}))
    with torch.no_grad():
        wanted = model(IDS)
        with packed(model, 1):
            torch.testing.assert_close(model(IDS), wanted, rtol=1e-4, atol=1e-5)
            products = {name: module.forward for name, module in model.named_modules() if "beside" in vars(module)}
    alone = {name.split(".", 2)[-1] for name, product in products.items() if product.alone is not None}
    together = {name.split(".", 2)[-1] for name, product in products.items() if product.together}
    assert alone == {"attention.o", "ffn.down", "head"}
    assert together == {"attention.q", "ffn.gate"}
    assert not any({"forward", "beside"} & vars(module).keys() for module in model.modules())


@pytest.mark.parametrize("listened", ["q", "v"])
def test_who_listens_to_a_projection_hears_it(tiny, listened):
    model, heard = lively(tiny()), []
    with torch.no_grad():
        wanted = model(IDS)
        with packed(model, 1):
            model(IDS)
            handle = getattr(model.layers[0].attention, listened).register_forward_hook(lambda *_: heard.append(1))
            torch.testing.assert_close(model(IDS), wanted, rtol=1e-4, atol=1e-5)
            handle.remove()
            model(IDS)
    assert heard == [1]


def test_who_stands_in_for_a_projection_is_asked(tiny):
    model = lively(tiny())
    up = model.layers[0].ffn.up
    with torch.no_grad(), packed(model, 1):
        with ExitStack() as undo:
            stand_in(undo, up, lambda x, context=None: torch.zeros(*x.shape[:-1], up.d_out))
            assert model.layers[0].ffn(torch.ones(1, 1, model.spec.d_model), ForwardContext()).abs().max() == 0
        assert model.layers[0].ffn(torch.ones(1, 1, model.spec.d_model), ForwardContext()).abs().max() > 0


def test_masked_weights_stay_masked(tiny):
    model = lively(tiny(linear={"type": "masked", "sparsity": 0.5}))
    with torch.no_grad():
        wanted = model(IDS)
        with packed(model, 4):
            torch.testing.assert_close(model(IDS), wanted, rtol=1e-4, atol=1e-5)


def test_gradients_flow_through_packed_projections(tiny):
    model = lively(tiny())
    with packed(model, 4):
        model(IDS).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_what_is_left_alone(tiny):
    with packed(lively(tiny(), torch.float64), 1) as _:
        pass
    double, compiled = lively(tiny(), torch.float64), lively(tiny())
    compiled.layers[0].compile(backend="eager")
    for model in (double, compiled):
        with packed(model, 1):
            assert not laid_out(model)


@pytest.mark.parametrize("n_new", [generation.WORTH_PACKING - 1, generation.WORTH_PACKING])
def test_generation_packs_where_that_pays(tiny, monkeypatch, n_new):
    model, seen = lively(tiny()), set()
    found = list(generate_batch(model, PROMPTS, n_new, sampling=GREEDY, ends=lambda *_: seen.add(len(laid_out(model)))))
    assert (seen != {0}) == (n_new >= generation.WORTH_PACKING)
    monkeypatch.setattr(generation, "WORTH_PACKING", 10**9)
    assert found == list(generate_batch(model, PROMPTS, n_new, sampling=GREEDY))
    assert not laid_out(model)


def test_likelihoods_are_worked_out_on_packed_weights(tiny):
    model, seen = lively(tiny()), []
    model.norm.register_forward_hook(lambda *_: seen.append(bool(laid_out(model))))
    requests = [([1, 2, 3], [4, 5]), ([6], [7]), ([1, 2, 3], [9])]
    found = loglikelihoods(model, requests)
    assert seen
    assert all(seen)
    assert not laid_out(model)
    logits = model(torch.tensor([[1, 2, 3, 4]])).detach().log_softmax(-1)[0]
    assert found[0][0] == pytest.approx(float(logits[2, 4] + logits[3, 5]), rel=1e-4)


# --- the compiled step


def compiled(model, counter, prompts=PROMPTS, n_new=12, **options):
    return sorted(generate_batch(model, prompts, n_new, sampling=GREEDY, compile=True, backend=counter, **options))


@pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)
def test_a_compiled_step_writes_the_same(tiny, moe, attention):
    """Also past max_seq_len, where the model begins anew with half of what it has; and it is compiled once."""
    torch._dynamo.reset()
    model = lively(tiny(attention=attention, ffn=moe(), max_seq_len=16), torch.float64)
    counter = torch._dynamo.testing.CompileCounter()
    wanted = sorted(generate_batch(model, PROMPTS, 12, sampling=GREEDY))
    assert compiled(model, counter) == wanted
    assert compiled(model, counter, PROMPTS[::-1][:3]) == sorted((2 - i, token) for i, token in wanted)
    assert counter.frame_count == 1


def test_through_the_whole_of_the_compiler(tiny):
    torch._dynamo.reset()
    model = lively(tiny(attention=ATTENTIONS["gqa"]), torch.float64)
    assert compiled(model, "aot_eager") == sorted(generate_batch(model, PROMPTS, 12, sampling=GREEDY))


def test_prompts_that_end_leave_the_compiled_others_alone(tiny):
    torch._dynamo.reset()
    model = lively(tiny(max_seq_len=24), torch.float64)

    def last(index, place):
        return lambda i, _: (seen.update({i: seen.get(i, 0) + 1}) or i == index) and seen[index] > place

    for index, place in ((2, 3), (0, 0), (1, 15)):
        seen: dict[int, int] = {}
        wanted = sorted(generate_batch(model, PROMPTS, 20, sampling=GREEDY, ends=last(index, place)))
        seen = {}
        assert compiled(model, "eager", n_new=20, ends=last(index, place)) == wanted


def test_what_has_no_one_step(tiny, moe):
    alibi = lively(tiny(attention={"type": "mha", "n_heads": 4, "position": "alibi"}))
    with pytest.raises(SparsekitError, match="compile: MultiHead with ALiBi needs to know how long a sequence is"):
        compiled(alibi, "eager")
    choice = lively(tiny(ffn=moe(router="expert_choice"), allow_leak=True))
    with pytest.raises(SparsekitError, match="compile: this model keeps no cache of keys and values; leave it out"):
        compiled(choice, "eager")
