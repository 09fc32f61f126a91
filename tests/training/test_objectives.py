"""Next-token loss with and without chunks, against the formula in float64; what it allocates; what a run logs of it."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import finished
from test_distributed import assert_close_runs
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sparsekit.components.contracts import ForwardContext
from sparsekit.components.embeddings import TokenEmbedding
from sparsekit.data.packing import IGNORE, Batch
from sparsekit.model.accounting import activation_bytes, describe
from sparsekit.model.build import build_model
from sparsekit.model.decoder import Decoder, Unembedding
from sparsekit.model.targets import Run, load_model
from sparsekit.spec.load import validate
from sparsekit.training.objectives import Loss, NextToken, chunked_terms, terms
from sparsekit.training.run import train

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def head_of(weight_VD: Tensor, bias_V: Tensor | None, scale: float, fused: bool) -> Unembedding:
    def logits(x: Tensor) -> Tensor:
        return scale * torch.nn.functional.linear(x, weight_VD, bias_V)

    return Unembedding(logits, weight_VD, bias_V, scale) if fused else Unembedding(logits)


def by_definition(
    x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, scale: float, targets_N: Tensor
) -> tuple[Tensor, Tensor]:
    """-sum log p(target) and sum (log sum exp logits)^2, row by row and without a softmax of torch's."""
    cross_entropy, z = x_ND.new_zeros(()), x_ND.new_zeros(())
    for x_D, target in zip(x_ND, targets_N.tolist(), strict=True):
        if target == IGNORE:
            continue
        logits_V = scale * ((weight_VD * x_D).sum(-1) + (0 if bias_V is None else bias_V))
        weights_V = logits_V.exp()
        cross_entropy = cross_entropy - (weights_V[target] / weights_V.sum()).log()
        z = z + weights_V.sum().log() ** 2
    return cross_entropy, z


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_chunks_are_the_formula(data: st.DataObject) -> None:
    n, d, v = (data.draw(st.integers(1, most)) for most in (9, 5, 7))
    chunk = data.draw(st.integers(1, n + 2))
    z_loss = data.draw(st.sampled_from([0.0, 1e-4, 0.7]))
    scale = data.draw(st.sampled_from([1.0, 0.3, 4.0]))
    targets_N = torch.tensor([data.draw(st.integers(-1, v - 1)) for _ in range(n)])
    targets_N[targets_N < 0] = IGNORE
    leaves = [randn(n, d, seed=1), randn(v, d, seed=2)] + ([randn(v, seed=3)] if data.draw(st.booleans()) else [])
    leaves = [leaf.requires_grad_() for leaf in leaves]
    x_ND, weight_VD, bias_V = (*leaves, None)[:3]
    factor = data.draw(st.sampled_from([1.0, 1 / 7, -3.0]))

    cross_entropy, z = by_definition(x_ND, weight_VD, bias_V, scale, targets_N)
    if bool((targets_N != IGNORE).any()):
        wanted = torch.autograd.grad((cross_entropy + z_loss * z) * factor, leaves)
    else:
        wanted = tuple(torch.zeros_like(leaf) for leaf in leaves)
    for fused in (True, False):
        unembedding = head_of(weight_VD, bias_V, scale, fused)
        got = chunked_terms(x_ND, unembedding, targets_N, z_loss, chunk)
        torch.testing.assert_close(got[0], cross_entropy + z_loss * z, **CLOSE)
        torch.testing.assert_close(got[1], cross_entropy, **CLOSE)
        torch.testing.assert_close(torch.autograd.grad(got[0] * factor, leaves), wanted, **CLOSE)
        with torch.no_grad():
            told = chunked_terms(x_ND, unembedding, targets_N, z_loss, chunk)
        torch.testing.assert_close(told[:2], got[:2], **CLOSE)
        if z_loss:
            torch.testing.assert_close((got[2], told[2]), (z, z), **CLOSE)
    whole = terms(head_of(weight_VD, bias_V, scale, False).logits(x_ND), targets_N, z_loss)
    torch.testing.assert_close(torch.autograd.grad(whole[0] * factor, leaves), wanted, **CLOSE)
    torch.testing.assert_close(whole[1], cross_entropy, **CLOSE)
    torch.testing.assert_close(whole[2], z if z_loss else torch.zeros_like(z), **CLOSE)


def test_a_frozen_head_or_a_frozen_model_gets_no_gradient() -> None:
    targets_N = torch.tensor([0, 3, 1])
    for trained in (0, 1):
        leaves = [randn(3, 2, seed=1), randn(4, 2, seed=2)]
        leaves[trained].requires_grad_()
        total, *_ = chunked_terms(leaves[0], head_of(leaves[1], None, 1.0, True), targets_N, 0.1, 2)
        total.backward()
        cross_entropy, z = by_definition(leaves[0], leaves[1], None, 1.0, targets_N)
        wanted = torch.autograd.grad(cross_entropy + 0.1 * z, leaves[trained])[0]
        torch.testing.assert_close(leaves[trained].grad, wanted, **CLOSE)
        assert leaves[1 - trained].grad is None


def test_the_backward_can_be_run_again() -> None:
    x_ND, weight_VD = randn(5, 3).requires_grad_(), randn(6, 3, seed=1).requires_grad_()
    total, *_ = chunked_terms(x_ND, head_of(weight_VD, None, 1.0, True), torch.arange(5), 0.0, 2)
    once = torch.autograd.grad(total, (x_ND, weight_VD), retain_graph=True)
    twice = torch.autograd.grad(2 * total, (x_ND, weight_VD))
    torch.testing.assert_close([2 * g for g in once], list(twice), rtol=0, atol=0)


# ---- models ----


class Tabled(TokenEmbedding):
    """An embedding that unembeds in its own way."""

    def unembed(self, x_BTD: Tensor) -> Tensor:
        return super().unembed(x_BTD).tanh()


HEADS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_embeddings": True},
    "scaled": {"logit_scale": 0.125},
    "tied and scaled": {"tie_embeddings": True, "logit_scale": 3.0},
    "masked": {"linear": {"type": "masked", "roles": ["head"]}, "logit_scale": 2.0},
    "its own": {"tie_embeddings": True},
}


def model_with(tiny: Any, head: str, dtype: torch.dtype = torch.float64) -> Decoder:
    model = build_model({"init": {"type": "normal", "std": 0.3}, **tiny(**HEADS[head])}, seed=1, dtype=dtype)
    if head == "its own":
        model.embedding.__class__ = Tabled
    return model


def some_batch(n_batch: int = 3, length: int = 7, vocabulary: int = 64, seed: int = 0) -> Batch:
    ids = torch.randint(vocabulary, (n_batch, length + 1), generator=torch.Generator().manual_seed(seed))
    targets_BT = ids[:, 1:].clone()
    targets_BT[0, :3] = targets_BT[-1, -1] = IGNORE
    return Batch(ids[:, :-1], targets_BT, None, int((targets_BT != IGNORE).sum()))


def objective(**params: Any) -> NextToken:
    return NextToken(NextToken.Params(**params))


def gradients(model: Decoder, loss: Loss, n_targets: int) -> dict[str, Tensor]:
    model.zero_grad()
    (loss.total / n_targets).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("chunk_tokens", [1, 4, 21, 100])
def test_any_head_in_chunks_is_the_head(tiny: Any, head: str, chunk_tokens: int) -> None:
    model, batch, context = model_with(tiny, head), some_batch(), ForwardContext()
    assert (model.unembedding(context).weight is None) == (head == "its own")
    plain = objective(z_loss=0.01)(model, batch, context)
    wanted = gradients(model, plain, batch.n_targets)
    chunked = objective(z_loss=0.01, chunk_tokens=chunk_tokens)(model, batch, context)
    found = gradients(model, chunked, batch.n_targets)
    assert found.keys() == wanted.keys() == dict(model.named_parameters()).keys()
    torch.testing.assert_close(found, wanted, **CLOSE)
    torch.testing.assert_close(chunked.reported, plain.reported, **CLOSE)
    torch.testing.assert_close(chunked.further, plain.further, **CLOSE)
    logits_BTV = model(batch.ids_BT).detach()
    p_BTV = logits_BTV.exp() / logits_BTV.exp().sum(-1, keepdim=True)
    counted = (batch.targets_BT != IGNORE).nonzero().tolist()
    by_hand = -sum(math.log(p_BTV[i, j, batch.targets_BT[i, j]].item()) for i, j in counted)
    assert float(chunked.reported) == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("chunk_tokens", [None, 4])
@pytest.mark.parametrize("head", ["untied", "tied", "masked"])
def test_a_batch_without_targets_moves_nothing(tiny: Any, head: str, chunk_tokens: int | None) -> None:
    model, batch = model_with(tiny, head), some_batch()
    batch.targets_BT.fill_(IGNORE)
    loss = objective(z_loss=0.5, chunk_tokens=chunk_tokens)(model, batch, ForwardContext())
    found = gradients(model, loss, 1)
    assert loss.total.item() == loss.reported.item() == loss.further["z_loss_logits"].item() == 0
    assert found and all(not gradient.any() for gradient in found.values())


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("head", ["untied", "tied", "masked"])
def test_the_logits_never_exist_whole(tiny: Any, head: str, autocast: bool) -> None:
    """At 112 tokens of 512 possible ones the logits are by far the largest tensor; in chunks of 8 the table is."""
    spec = tiny(**HEADS[head], vocab_size=512)
    model, batch = build_model(spec), some_batch(16, 7, 512)
    n_logits, table = 16 * 7 * 512, 512 * 32

    def largest(chunk_tokens: int | None, backward: bool) -> int:
        with Largest() as seen, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            with torch.set_grad_enabled(backward):
                loss = objective(z_loss=0.1, chunk_tokens=chunk_tokens)(model, batch, ForwardContext())
            if backward:
                loss.total.backward()
        return seen.elements

    for backward in (True, False):
        assert largest(None, backward) == n_logits
        assert largest(8, backward) <= table < n_logits / 3


def test_what_is_kept_for_the_backward(tiny: Any) -> None:
    """Of head and loss only the gradients: of the norm's output, once a token, and of the table."""
    model, batch = build_model(tiny(vocab_size=512)), some_batch(16, 7, 512)
    kept: dict[int | None, int] = {}
    for chunk_tokens in (None, 8):
        storages: dict[int, Tensor] = {}

        def pack(tensor: Tensor, storages: dict[int, Tensor] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = objective(chunk_tokens=chunk_tokens)(model, batch, ForwardContext())
        kept[chunk_tokens] = sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
        del loss
    logits, table, stream = (4 * n for n in (16 * 7 * 512, 512 * 32, 16 * 7 * 32))
    assert kept[None] - kept[8] >= logits - 2 * table - stream


def test_describe_counts_what_the_objective_keeps(tiny: Any) -> None:
    """Whole logits are kept as their log-softmax, with z-loss twice; chunks keep two gradients in their place."""
    model, batch, length, logits = tiny(vocab_size=512), 16, 32, 4 * 16 * 32 * 512
    told = {}
    for params in ({}, {"z_loss": 0.1}, {"chunk_tokens": 8, "z_loss": 0.1}):
        train = {"micro_batch_size": batch, "objective": {"type": "next_token", **params}}
        told[len(params)] = describe(validate({"model": model, "train": train})).activation_bytes
    bare = activation_bytes(build_model(model, device="meta"), batch, length)
    assert told[0] == bare
    assert 0.9 * logits < told[1] - told[0] < 1.1 * logits
    assert told[0] - told[2] > logits - 4 * 512 * 32 - 4 * batch * length * 32


def test_the_heads_product_is_taken_three_times_and_no_more(tiny: Any) -> None:
    counts = []
    for chunk_tokens in (None, 5):
        model, batch = model_with(tiny, "untied", torch.float32), some_batch()
        with FlopCounterMode(display=False) as counter:
            objective(chunk_tokens=chunk_tokens)(model, batch, ForwardContext()).total.backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


def test_under_autocast_chunks_are_as_near_the_truth_as_the_whole(tiny: Any) -> None:
    """Gradients in bfloat16 are off by its rounding either way; the softmax is float32, so the loss is much closer."""
    batch, context = some_batch(8, 31), ForwardContext()
    spec = {"init": {"type": "normal", "std": 0.3}, **tiny(tie_embeddings=True, logit_scale=0.5)}
    model = build_model(spec)
    exact = copy.deepcopy(model).double()
    x_ND = randn(8 * 31, 32)
    wide = exact.unembedding(context)
    leaves = (x_ND.requires_grad_(), wide.weight)
    total, *_ = chunked_terms(x_ND, wide, batch.targets_BT.flatten(), 0.01, 64)
    truth = torch.autograd.grad(total, leaves)
    errors: dict[str, list[float]] = {}
    for name in ("whole", "chunked"):
        narrow, unembedding = x_ND.detach().float().requires_grad_(), model.unembedding(context)
        with torch.autocast("cpu", torch.bfloat16):
            if name == "whole":
                got = terms(unembedding.logits(narrow), batch.targets_BT.flatten(), 0.01)
            else:
                got = chunked_terms(narrow, unembedding, batch.targets_BT.flatten(), 0.01, 64)
        assert got[0].dtype == torch.float32
        assert got[0].item() == pytest.approx(total.item(), rel=1e-3)
        found = torch.autograd.grad(got[0], (narrow, unembedding.weight))
        assert [g.dtype for g in found] == [torch.float32] * 2
        errors[name] = [float((a - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)]
    assert all(error < 0.01 for error in errors["whole"])
    for whole, chunked in zip(errors["whole"], errors["chunked"], strict=True):
        assert chunked < 1.1 * whole


def test_a_model_compiled_whole_takes_the_head_in_chunks(tiny: Any) -> None:
    """In one graph, which is not compiled again for the next batch."""
    compiled = CompileCounterWithBackend("aot_eager")
    model, chunked = build_model(tiny(), seed=1), objective(z_loss=0.1, chunk_tokens=8)
    batches = [some_batch(seed=seed) for seed in range(3)]
    wanted = [gradients(model, chunked(model, batch, ForwardContext()), batch.n_targets) for batch in batches]
    torch._dynamo.reset()  # it gives up on code that many tests before this one had compiled
    model.compile(backend=compiled)
    found = [gradients(model, chunked(model, batch, ForwardContext()), batch.n_targets) for batch in batches]
    torch.testing.assert_close(found, wanted)
    assert compiled.frame_count == 1


# ---- runs ----


def with_objective(raw: dict[str, Any], **params: Any) -> dict[str, Any]:
    raw = copy.deepcopy(raw)
    raw["train"]["objective"] = {"type": "next_token", **params}
    return raw


def test_a_run_in_chunks_is_the_run(raw: dict[str, Any], tmp_path: Path) -> None:
    """With z-loss, several micro-batches a step, a mixture of experts, and chunks that do not divide a micro-batch."""
    raw["data"]["document_mask"] = True
    runs = [
        train(validate(with_objective(raw, z_loss=0.1, chunk_tokens=chunk_tokens)), out=tmp_path / str(chunk_tokens))
        for chunk_tokens in (None, 11)
    ]
    assert_close_runs(*runs)


def test_a_run_logs_cross_entropy_and_z_apart(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["train"] |= {"max_steps": 1, "callbacks": []}
    without, with_z = (
        train(validate(with_objective(raw, z_loss=z_loss)), out=tmp_path / str(z_loss)).metrics[-1]
        for z_loss in (0.0, 0.5)
    )
    assert "z_loss_logits" not in without
    assert with_z["loss"] == pytest.approx(without["loss"], rel=1e-6)
    assert with_z["grad_norm"] > 1.01 * without["grad_norm"]
    assert with_z["z_loss_logits"] == pytest.approx(math.log(257) ** 2, rel=0.01), "logits are near 0 in the beginning"
    assert with_z["val_loss"] == pytest.approx(math.log(257), rel=0.05), "to which z would add 15"


def test_z_loss_draws_logits_towards_a_sum_of_one(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["train"]["max_steps"] = 30
    ends = {}
    for z_loss in (0.0, 1e-2, 1.0):
        run = train(validate(with_objective(raw, z_loss=z_loss)), out=tmp_path / str(z_loss))
        logits = load_model(run)(torch.arange(16)[None])
        ends[z_loss] = logits.logsumexp(-1).square().mean().item()
    assert ends[1.0] < ends[1e-2] < ends[0.0]
    assert ends[1.0] < 0.8 * ends[0.0]


@pytest.mark.parametrize("head", ["tied", "masked"])
def test_two_processes_in_chunks_are_one(raw: dict[str, Any], tmp_path: Path, head: str) -> None:
    """A tied table's gradient comes from the embedding and from the chunks; a masked head's goes through its mask.

    Either is sharded, and whole only while the model's own forward and backward run.
    """
    raw["model"] |= {**HEADS[head], "logit_scale": 0.5}
    raw["train"] |= {"max_steps": 6, "schedule": "constant"}
    plain = train(validate(with_objective(raw, z_loss=0.1)), out=tmp_path / "one")
    two = Run(tmp_path / "two")
    finished(with_objective(raw, z_loss=0.1, chunk_tokens=11), two.folder, 2)
    assert all("z_loss_logits" in row for row in two.metrics)
    assert_close_runs(plain, two)
