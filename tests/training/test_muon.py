"""Muon: which matrices are its own, that it makes them orthogonal, and that it is torch's where torch has one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_optimizers import MODEL, give_gradients, is_hidden, naive_newton_schulz, optimizer_of, told

from sparsekit.model.build import build_model
from sparsekit.training.muon import QUINTIC, batches, newton_schulz


def test_muon_takes_hidden_matrices_only() -> None:
    model = build_model(MODEL)
    optimizer = optimizer_of("muon", model, lr=0.02, adamw_lr=0.004, groups={"embed": {"lr_scale": 0.5}})
    method, lr = told(model, optimizer, "method"), told(model, optimizer, "lr")
    assert {name for name, value in method.items() if value == "muon"} == {n for n in method if is_hidden(n)}
    assert len({n for n in method if is_hidden(n)}) == 12
    expected = {n: 0.02 if m == "muon" else 0.002 if n == "embedding.weight" else 0.004 for n, m in method.items()}
    assert lr == pytest.approx(expected, rel=1e-12)
    assert optimizer.defaults["lr"] == 0.02


def test_muon_is_torchs_on_matrices() -> None:
    """torch's works in bfloat16 wherever it is, which leaves two digits of an update."""
    ours, theirs = (build_model(MODEL) for _ in range(2))
    hidden = [p for name, p in theirs.named_parameters() if is_hidden(name) and p.ndim == 2]
    options = {"lr": 0.01, "weight_decay": 0.3, "momentum": 0.9}
    pair = (optimizer_of("muon", ours, **options),
            torch.optim.Muon(hidden, adjust_lr_fn="match_rms_adamw", **options))  # fmt: skip
    start = {name: p.detach().clone() for name, p in ours.named_parameters()}
    for step in range(3):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        for optimizer in pair:
            optimizer.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if is_hidden(name) and a.ndim == 2:
            moved = b.detach() - start[name]
            assert float((a.detach() - b.detach()).norm() / moved.norm()) < 0.02, name


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 3), d_out=st.integers(1, 40), d_in=st.integers(1, 40), seed=st.integers(0, 99),
    size=st.floats(1e-4, 1e4),
)  # fmt: skip
def test_singular_values_become_one(n: int, d_out: int, d_in: int, seed: int, size: float) -> None:
    """U S V^T, S within a factor of 20, becomes near U V^T, whatever the matrix's size and shape."""
    generator = torch.Generator().manual_seed(seed)
    u, _, vt = torch.linalg.svd(torch.randn(n, d_out, d_in, generator=generator), full_matrices=False)
    s = torch.empty(n, min(d_out, d_in)).uniform_(0.05, 1, generator=generator)
    matrices = size * u @ s.diag_embed() @ vt
    result = newton_schulz(matrices, 5)
    assert result.dtype == torch.float32
    inner = u.mT @ result @ vt.mT
    values = inner.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.68 and values.max() < 1.21, (values.min(), values.max())
    assert torch.allclose(inner, values.diag_embed(), atol=1e-4)
    exact = torch.stack([naive_newton_schulz(x) for x in matrices.double()])
    torch.testing.assert_close(newton_schulz(matrices.double(), 5), exact, rtol=1e-9, atol=1e-11)
    assert not newton_schulz(torch.zeros(2, d_out, d_in), 5).any()


def test_where_the_polynomial_takes_singular_values() -> None:
    values = torch.linspace(0.002, 1, 100_000, dtype=torch.float64)
    a, b, c = QUINTIC
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    assert values.min() > 0.68 and values.max() < 1.21


def test_batches_are_alike_and_not_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsekit.training.muon.AT_ONCE", 100)
    shapes = [(4, 8), (4, 8), (8, 4), (4, 8), (3, 4, 8), (4, 8), (9, 4, 8), (8, 4), (4, 8)]
    parameters = [torch.nn.Parameter(torch.empty(shape)) for shape in shapes]
    found = list(batches(parameters))
    assert sorted(id(p) for batch in found for p in batch) == sorted(map(id, parameters))
    for batch in found:
        assert len({p.shape[-2:] for p in batch}) == 1
        assert len(batch) == 1 or sum(p.numel() for p in batch) <= 100
    assert [len(batch) for batch in found] == [3, 1, 1, 1, 1, 2]
