"""Putting masks in and taking them out: what is left behind, forwards that skip, calibrations on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import Field
from torch import Tensor

from sparsekit.components.contracts import ForwardContext
from sparsekit.errors import CheckpointError, DataError
from sparsekit.model.generate import generate
from sparsekit.probes.base import Tokens
from sparsekit.probes.layered import layered
from sparsekit.registry import register, registry
from sparsekit.sparsifiers.base import Sparsifier
from sparsekit.sparsifiers.calibration import Calibration
from sparsekit.sparsifiers.choose import make, saved
from sparsekit.sparsifiers.installed import SparseFeedForward, SparseLinear, Target
from sparsekit.sparsifiers.neurons import NeuronSparsifier
from sparsekit.sparsifiers.rules import Limit, Rule

from .models import TOKENS, ids, logits, ours, same, state, theirs

WAYS = [
    "cett:cett=0.3", "fat_eps:eps=0.1", "top_k:k=0.25", "teal:sparsity=0.5", "wina:sparsity=0.5",
    "wina:sparsity=0.5,transform=column_orthogonal", "cats:sparsity=0.5", "chess:sparsity=0.5,attention=q_and_o",
]  # fmt: skip


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize(("way", "make_model"), [*((way, ours) for way in WAYS), ("chess", theirs), (WAYS[5], theirs)])
def test_what_is_taken_out_leaves_nothing(way: str, kernels: bool, make_model: Any) -> None:
    model = make_model()
    model.train()
    handle = next(model.modules()).register_forward_hook(lambda *_: None)
    outputs, before = logits(model), state(model)
    calibration = make(way).calibrate(layered(model), TOKENS)
    assert same(before, state(model)), "calibration leaves the model alone too"
    installed = calibration.install(model, kernels=kernels)
    assert not same(before, state(model))
    with torch.no_grad():
        assert not torch.equal(logits(model), outputs)
        logits(model, ids(1, 1))
    installed.remove()
    installed.remove()
    assert same(before, state(model))
    assert torch.equal(logits(model), outputs)
    handle.remove()
    with pytest.raises(KeyError, match="inside"), calibration.install(model, kernels=kernels):
        raise KeyError("inside")
    assert torch.equal(logits(model), outputs)


def test_compiled_modules_run_eagerly_meanwhile() -> None:
    model = ours()
    calls: list[str] = []

    def compiled(*args: Any, **options: Any) -> Any:
        calls.append("compiled")
        return model.layers[0].forward(*args, **options)

    calibration = make("teal").calibrate(layered(model), TOKENS)
    model.layers[0]._compiled_call_impl = compiled
    dense = logits(model)
    assert calls == ["compiled"]
    view = layered(model)
    calls.clear()
    with calibration.install(view):
        assert not torch.equal(logits(model), dense)
        assert not calls
    assert torch.equal(logits(model), dense)
    assert calls == ["compiled"]


def test_an_installation_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last layer's feed-forward adds something that its parts do not say."""
    model = ours()
    calibration = make("cats").calibrate(layered(model), TOKENS)
    handle = model.layers[2].ffn.up.register_forward_hook(lambda m, args, y: y + 1)
    before = state(model)
    with pytest.raises(DataError) as caught:
        calibration.install(model, kernels=True)
    assert str(caught.value) == ("layer 2: SwiGLU does more than its projections say; install without kernels")
    assert same(before, state(model))
    handle.remove()


# --- forwards that skip


SKIPPING = [
    *((way, "ours") for way in WAYS), *((way, "llama") for way in WAYS[3:]), ("cats", "gemma2"), ("cats", "phi3"),
    ("teal", "phi3"), ("teal", "gpt2"), ("cats", "opt"),
]  # fmt: skip


@pytest.mark.parametrize(("way", "family"), SKIPPING)
def test_skipping_is_masking(way: str, family: str) -> None:
    """Of 1 to 8 tokens; with more tokens, or with gradients, it is the masked dense forward itself."""
    model = ours(dtype=torch.float64) if family == "ours" else theirs(family, torch.float64)
    view = layered(model)
    calibration = make(way).calibrate(view, Tokens.of(ids() // 2, 4))
    # other tokens: what layer 0 reads of one that sets a threshold is on either side of it by rounding alone
    one, eight, many = (32 + ids(*shape, seed=3) // 2 for shape in ((1, 1), (2, 4), (3, 5)))
    with calibration.install(view):
        masked = [logits(model, batch).detach() for batch in (one, eight, many)]
    with calibration.install(view, kernels=True):
        with torch.no_grad():
            skipped = [logits(model, batch) for batch in (one, eight, many)]
        assert logits(model, one).requires_grad
    for a, b in zip(masked, skipped, strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-9)


def test_only_active_rows_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are not read may be nan: the kernels get what is 0 as 0, and say which outputs are wanted."""
    from sparsekit.sparsifiers import kernels

    seen: dict[str, Tensor] = {}

    def rows(x_BI: Tensor, weight_IO: Tensor, sparsity: float | None = None) -> Tensor:
        seen["down"], seen["told"] = x_BI, torch.tensor(sparsity)
        return x_BI @ weight_IO

    def columns(x_BI: Tensor, weight_OI: Tensor, keep_BO: Tensor, sparsity: float | None = None) -> Tensor:
        seen["keep"] = keep_BO
        return (x_BI @ weight_OI.T).masked_fill(~keep_BO, 0)

    model = ours({"type": "swiglu", "d_ff": 48, "bias": True})
    with torch.no_grad():
        for block in model.layers:
            for name in ("gate", "up", "down"):
                getattr(block.ffn, name).bias.fill_(0.3)
    calibration = make("chess:sparsity=0.75").calibrate(layered(model), TOKENS)
    monkeypatch.setattr(kernels, "rows_matvec", rows)
    monkeypatch.setattr(kernels, "columns_matvec", columns)
    x = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with calibration.install(model, kernels=True):
            assert isinstance(model.layers[0].ffn.forward, SparseFeedForward)
            got = model.layers[0].ffn(x, ForwardContext())
        with calibration.install(model):
            wanted = model.layers[0].ffn(x, ForwardContext())
    assert torch.allclose(got, wanted, atol=1e-6)
    assert torch.equal(seen["down"] != 0, seen["keep"])
    assert 0.4 < 1 - float(seen["keep"].double().mean()) < 0.95
    assert float(seen["told"]) == pytest.approx(calibration.realised[0, "down"])


def test_a_model_writes_the_same_with_and_without_kernels() -> None:
    model = ours()
    calibration = make("cats:sparsity=0.6").calibrate(layered(model), TOKENS)
    texts = []
    for kernels in (False, True):
        with calibration.install(model, kernels=kernels):
            texts.append(list(generate(model, [1, 2, 3], 12, temperature=0)))
    dense = list(generate(model, [1, 2, 3], 12, temperature=0))
    assert texts[0] == texts[1] != dense


def test_weights_of_another_type_go_the_dense_way() -> None:
    model = ours()
    calibration = make("teal").calibrate(layered(model), TOKENS)
    with torch.no_grad(), calibration.install(model, kernels=True):
        assert isinstance(model.layers[0].ffn.down.forward, SparseLinear)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert logits(model, ids(1, 1)).isfinite().all()


# --- on disk


@pytest.mark.parametrize("way", ["teal:sparsity=0.4", "wina:sparsity=0.4", "chess:sparsity=0.4", "cett:cett=0.3"])
def test_a_saved_calibration_does_the_same(way: str, tmp_path: Path) -> None:
    model = ours()
    calibration = make(way).calibrate(layered(model), TOKENS)
    written = calibration.save(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in written)
    for path in (tmp_path / "out", tmp_path / "out" / "calibration.json"):
        again = Calibration.load(path)
        assert (again.sparsifier, again.params, again.realised, again.weights, again.meta) == (
            calibration.sparsifier, calibration.params, calibration.realised, calibration.weights, calibration.meta,
        )  # fmt: skip
        outputs = []
        for each in (calibration, again):
            with each.install(model):
                outputs.append(logits(model))
        assert torch.equal(*outputs)
    assert saved(str(tmp_path / "out")) == tmp_path / "out"
    assert saved("teal") is None and saved("teal:sparsity=0.5") is None


def test_a_damaged_calibration_is_refused(tmp_path: Path) -> None:
    calibration = make("chess:sparsity=0.4").calibrate(layered(ours()), TOKENS)
    calibration.save(tmp_path)
    tensors = tmp_path / "calibration.safetensors"
    data = tensors.read_bytes()
    tensors.write_bytes(data[:-1] + b"x")
    path = tmp_path / "calibration.json"
    mend = "; calibrate again"
    for damage, says in [
        (None, f"{path}: is no calibration, or is damaged (calibration.safetensors is not what was written with it)"),
        (lambda told: told.pop("sites"), f"{path}: is no calibration, or is damaged ('sites')"),
        (lambda told: told["sites"][0].pop("k"), f"{path}: is no calibration, or is damaged ('k')"),
    ]:
        told = json.loads(path.read_text())
        if damage is not None:
            tensors.write_bytes(data)
            damage(told)
            path.write_text(json.dumps(told))
        with pytest.raises(CheckpointError) as caught:
            Calibration.load(tmp_path)
        assert str(caught.value) == says + mend
        if damage is not None:
            calibration.save(tmp_path)
    with pytest.raises(CheckpointError, match="none: no such calibration; sparsekit sparsify writes one"):
        Calibration.load(tmp_path / "none")


def test_a_calibration_of_another_model_is_refused() -> None:
    deep = make("chess").calibrate(layered(ours(n_layers=4)), TOKENS)
    mend = "the calibration is of another model; calibrate on this one"
    with pytest.raises(DataError) as caught:
        deep.install(ours())
    assert str(caught.value) == f"layer 3 has no down that chess could mask: {mend}"
    wide = make("chess").calibrate(layered(ours({"type": "swiglu", "d_ff": 64})), TOKENS)
    with pytest.raises(DataError) as caught:
        wide.install(ours())
    assert str(caught.value) == f"layer 0, down: 64 thresholds for 48 inputs: {mend}"


# --- somebody else's


class Everywhere(NeuronSparsifier):
    """Drops neurons up to a fixed size."""

    class Params(NeuronSparsifier.Params):
        size: float = Field(default=0.5, ge=0)

    def target(self, view: Any, where: Any, weight: Any, parts: Any, limit: Limit) -> Target:
        return Target(weight, Rule(limit), parts)

    def fit(self, view: Any, tokens: Tokens, meta: dict[str, Any]) -> dict[Any, Limit]:
        return {(layer, "down"): Limit(torch.tensor(self.params.size)) for layer in self.parts(view)}


def test_a_sparsifier_of_ones_own(tmp_path: Path) -> None:
    register("sparsifier", "everywhere")(Everywhere)
    try:
        model = ours()
        calibration = make("everywhere:size=0.7").calibrate(layered(model), TOKENS)
        assert calibration.sparsifier == "everywhere"
        calibration.save(tmp_path)
        batch = layered(model).start(TOKENS.ids_ST)
        _, seen = batch.observe(0, batch.h_0, ["ffn_act"])
        share = float((seen["ffn_act"].abs() <= 0.7).double().mean())
        assert Calibration.load(tmp_path).realised[0, "down"] == pytest.approx(share)
    finally:
        registry("sparsifier").unregister("everywhere")
    for entry in registry("sparsifier").entries():
        assert issubclass(registry("sparsifier").get(entry.name), Sparsifier)
