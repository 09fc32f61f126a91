"""The Jacobian probe: its definition, its methods against each other, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from sparsekit.errors import SpecError
from sparsekit.model.build import build_model
from sparsekit.probes.base import Tokens
from sparsekit.probes.jacobian import METRICS, Jacobian, jackknife_error, metrics, spectral_norm
from sparsekit.probes.jacobian_estimates import direction_metrics
from sparsekit.probes.jacobian_products import Copies, exact_sum, push_sums
from sparsekit.probes.layered import layered

MIXTURE = {"type": "moe", "n_experts": 4, "router": {"type": "top_k", "k": 2}, "expert": {"type": "swiglu", "d_ff": 8}}


def noisy(spec, dtype=torch.float64, std=0.25):
    model = build_model(spec)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return layered(model.to(dtype).eval())


def some(view, sequences, length, batch_size=2):
    generator = torch.Generator().manual_seed(2)
    return Tokens.of(torch.randint(view.vocab_size, (sequences, length), generator=generator), batch_size)


def probe(view, tokens, seed=0, **params):
    made = Jacobian(Jacobian.Params(**params))
    made.seed = seed
    return made.run(view, tokens)


def by_definition(view, tokens):
    """(mean Jacobian [L, D, D], the deviation of every token [L, S, T]), by one backward pass an output."""
    sequences, length = tokens.ids_ST.shape
    d_model = view.d_model
    means = torch.zeros(view.n_layers, d_model, d_model, dtype=torch.float64)
    deviations = torch.zeros(view.n_layers, sequences, length, dtype=torch.float64)
    for s in range(sequences):
        batch = view.start(tokens.ids_ST[s : s + 1])
        h = batch.h_0.detach()
        for layer in range(view.n_layers):
            read = h.clone().requires_grad_()
            out = batch.layer(layer, read)
            for t in range(length):
                own = torch.zeros(d_model, d_model, dtype=torch.float64)
                for i in range(d_model):
                    (gradient,) = torch.autograd.grad(out[0, t, i], read, retain_graph=True)
                    means[layer, i] += gradient[0, : t + 1].sum(0).double() / (sequences * length)
                    own[i] = gradient[0, t]
                deviations[layer, s, t] = (own - torch.eye(d_model)).norm() / d_model
            h = out.detach()
    return means.numpy(), deviations.numpy()


@pytest.mark.parametrize("method", ["exact", "structured"])
def test_every_number_is_the_definitions(tiny, method):
    view = noisy(tiny(d_model=8, attention={"type": "gqa", "n_heads": 2, "n_kv_heads": 1}))
    tokens = some(view, 3, 5)
    means, deviations = by_definition(view, tokens)
    found = probe(
        view, tokens, method=method, mean_jacobian=True, token_positions=None, token_directions=None, memory_gb=1e-4
    )
    np.testing.assert_allclose(found.matrices["mean_jacobian"], means, rtol=1e-12, atol=1e-12)
    eye, off = np.eye(8), ~np.eye(8, dtype=bool)
    diagonals = means[:, ~off]
    wanted = {
        "identity_deviation": [np.linalg.norm(j - eye) / 8 for j in means],
        "off_diagonal": [np.linalg.norm(j[off]) / np.sqrt(64 - 8) for j in means],
        "diagonal_mean": diagonals.mean(1),
        "diagonal_std": diagonals.std(1, ddof=1),
        "frobenius": [np.linalg.norm(j) for j in means],
        "spectral": [np.linalg.svd(j)[1][0] for j in means],
        "token_deviation": deviations.mean((1, 2)),
    }
    for name, value in wanted.items():
        np.testing.assert_allclose(found.per_layer[name], value, rtol=1e-11, err_msg=name)
        assert found.scalars[name] == pytest.approx(np.mean(value), rel=1e-11)
    assert found.meta["methods"] == [method] * 2
    np.testing.assert_allclose(
        found.per_layer["token_deviation_se"], deviations.mean(2).std(1, ddof=1) / 3**0.5, rtol=1e-9
    )


def test_structured_and_exact_agree_over_several_batches(tiny):
    view = noisy(tiny(residual={"type": "pre_norm", "scale": 0.7}, norm="layernorm"))
    tokens = some(view, 7, 9, batch_size=3)
    exact, structured, auto = (
        probe(view, tokens, method=m, mean_jacobian=True, token_directions=None)
        for m in ("exact", "structured", "auto")
    )
    assert auto.meta["methods"] == ["structured"] * 2
    for found in (structured, auto):
        np.testing.assert_allclose(found.matrices["mean_jacobian"], exact.matrices["mean_jacobian"], atol=1e-12)
        for name in exact.scalars:
            assert found.scalars[name] == pytest.approx(exact.scalars[name], rel=1e-10)


def test_single_and_half_precision_come_close(tiny):
    spec = tiny()
    tokens = some(noisy(spec), 4, 8)
    exact = probe(noisy(spec, std=0.1), tokens, method="exact")
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        for method in ("exact", "auto"):
            found = probe(noisy(spec, dtype, std=0.1), tokens, method=method)
            assert set(found.meta["methods"]) == {"exact" if method == "exact" else "structured"}
            for name in METRICS:
                assert found.scalars[name] == pytest.approx(exact.scalars[name], rel=tolerance), name


def test_layers_without_branches_are_the_identity(tiny):
    model = build_model(tiny())
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.o.weight.zero_()
            layer.ffn.down.weight.zero_()
    view = layered(model)
    for method in ("exact", "structured", "estimate"):
        found = probe(view, some(view, 4, 6), method=method)
        for name in ("identity_deviation", "off_diagonal", "diagonal_std", "token_deviation"):
            assert found.scalars[name] == pytest.approx(0, abs=1e-7), (method, name)
        for name in ("diagonal_mean", "spectral"):
            assert found.scalars[name] == pytest.approx(1, rel=1e-6)
        assert found.scalars["frobenius"] == pytest.approx(32**0.5, rel=1e-6)


def test_token_deviation_is_estimated_within_its_error(tiny):
    view = noisy(tiny())
    tokens = some(view, 32, 6, batch_size=16)
    all_tokens = probe(view, tokens, token_positions=None, token_directions=None)
    for method in ("exact", "structured"):
        found = probe(view, tokens, method=method, seed=3)
        error = found.per_layer["token_deviation_se"]
        off = np.abs(found.per_layer["token_deviation"] - all_tokens.per_layer["token_deviation"])
        assert (off < 4 * error).all() and (error < 0.1 * found.per_layer["token_deviation"]).all()
        low, high = found.intervals["token_deviation"]
        assert low < found.scalars["token_deviation"] < high
    again = probe(view, tokens, seed=3, method="exact", memory_gb=1e-5)
    other = probe(view, tokens, seed=4, method="exact")
    assert again.scalars["token_deviation"] != other.scalars["token_deviation"]
    found = probe(view, Tokens.of(tokens.ids_ST, 5), seed=3, method="exact")
    np.testing.assert_allclose(found.per_layer["token_deviation"], again.per_layer["token_deviation"], rtol=1e-12)


def test_jackknife_groups_are_left_out_one_by_one(tiny):
    view = noisy(tiny())
    tokens = some(view, 11, 4)
    groups = [range(0, 2), range(2, 4), range(4, 6), range(6, 8), range(8, 10), range(10, 11)]
    plain = probe(view, tokens, method="exact")
    found = probe(view, tokens, jackknife=6)
    rest = [Tokens.of(tokens.ids_ST[[s for s in range(11) if s not in group]], 2) for group in groups]
    without = [probe(view, part, method="exact") for part in rest]
    for name in METRICS:
        assert found.scalars[name] == pytest.approx(plain.scalars[name], rel=1e-10)
        values = np.array([one.per_layer[name] for one in without])
        error = np.sqrt(5 / 6 * ((values - values.mean(0)) ** 2).sum(0))
        np.testing.assert_allclose(found.per_layer[f"{name}_se"], error, rtol=1e-6, atol=1e-12)
        low, high = found.intervals[name]
        scalars = np.array([one.scalars[name] for one in without])
        error = np.sqrt(5 / 6 * ((scalars - scalars.mean()) ** 2).sum())
        assert (high - low) / 2 == pytest.approx(2.5706 * error, rel=2e-3), "Student's t with 5 degrees of freedom"
        assert plain.intervals[name] is None
    # of a mean the jackknife's is the usual standard error
    samples = np.arange(5.0) ** 2
    left_out = (samples.sum() - samples) / 4
    assert jackknife_error(left_out) == pytest.approx(samples.std(ddof=1) / 5**0.5)


# --- estimates


def test_estimates_lie_within_their_errors(tiny):
    view = noisy(tiny(), std=0.2)
    tokens = some(view, 6, 8, batch_size=3)
    exact = probe(view, tokens, method="exact")
    found = probe(view, tokens, method="estimate", directions=48, iterations=6, seed=1)
    for name in METRICS:
        error = found.per_layer[f"{name}_se"]
        if name != "spectral":
            off = np.abs(found.per_layer[name] - exact.per_layer[name])
            assert (off < 4 * error).all(), name
            assert (error > 0).all()
        assert found.intervals[name] is None
    np.testing.assert_allclose(found.per_layer["spectral"], exact.per_layer["spectral"], rtol=1e-3)
    assert (found.per_layer["spectral"] <= exact.per_layer["spectral"] * (1 + 1e-6)).all(), "it comes from below"
    assert found.meta["methods"] == ["estimate"] * 2


def test_estimates_are_right_on_average_and_errors_are_their_spread():
    generator = torch.Generator().manual_seed(0)
    j = torch.randn(16, 16, generator=generator, dtype=torch.float64) * 0.3 + torch.diag(torch.linspace(0.5, 2, 16))
    wanted = metrics(j)
    draws = []
    for _ in range(300):
        v = (torch.randint(2, (24, 16), generator=generator) * 2 - 1).double()
        draws.append(direction_metrics(v, v @ j))
    for name in wanted.keys() - {"spectral"}:
        values = torch.stack([draw[name][0] for draw in draws])
        errors = torch.stack([draw[name][1] for draw in draws])
        assert abs(values.mean() - wanted[name]) < 4 * values.std() / 300**0.5 + 0.01 * wanted[name], name
        assert 0.6 < errors.mean() / values.std() < 1.6, name


def test_what_cannot_be_differentiated_forward_has_no_spectral_norm(tiny, monkeypatch):
    view = noisy(tiny())

    def refuses(*args):
        raise NotImplementedError("no forward rule\nat all")

    monkeypatch.setattr("sparsekit.probes.jacobian_estimates.push_sums", refuses)
    found = probe(view, some(view, 2, 4), method="estimate")
    assert np.isnan(found.per_layer["spectral"]).all() and np.isfinite(found.per_layer["frobenius"]).all()
    assert "spectral: a layer has no products J d (no forward rule)" in found.meta["remarks"]


# --- products


@pytest.mark.parametrize("copies", [1, 3, 32])
def test_copies_take_a_cotangent_each(tiny, copies):
    view = noisy(tiny(ffn=MIXTURE))
    batch = view.start(some(view, 2, 5).ids_ST)
    h = batch.h_0.detach()
    read = h.clone().requires_grad_()
    out = batch.layer(0, read).sum((0, 1))
    wanted = torch.stack([torch.autograd.grad(x, read, retain_graph=True)[0].sum((0, 1)) for x in out])
    graph = Copies(batch, 0, h, copies)
    torch.testing.assert_close(graph.pull_sums(torch.eye(32, dtype=torch.float64)), wanted, rtol=1e-12, atol=1e-12)
    assert all(p.requires_grad and p.grad is None for p in view.model.parameters())


def test_copies_stay_within_memory(tiny):
    view = noisy(tiny())
    batch = view.start(some(view, 2, 8).ids_ST)
    h = batch.h_0.detach()
    many, few = (Copies.within(batch, 0, h, room, 32).copies for room in (1 << 30, 1 << 18))
    assert many == 32 and 1 <= few < many, (many, few)
    assert Copies.within(batch, 0, h, 1, 32).copies == 1
    torch.testing.assert_close(exact_sum(batch, 0, h, 1), exact_sum(batch, 0, h, 1 << 30))


@pytest.mark.parametrize("ffn", [{"type": "swiglu", "d_ff": 24}, MIXTURE], ids=["forward", "backward twice"])
def test_pushed_forward_is_the_transpose_of_pulled_back(tiny, ffn):
    view = noisy(tiny(ffn=ffn))
    batch = view.start(some(view, 2, 6).ids_ST)
    h = batch.h_0.detach()
    j = exact_sum(batch, 0, h, 1 << 30)
    directions = torch.randn(3, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(push_sums(batch, 0, h, directions), directions @ j.T, rtol=1e-11, atol=1e-11)


# --- which method


def test_what_has_no_structured_form_is_exact_and_says_why(tiny):
    pattern = {"type": "gqa", "n_heads": 4, "n_kv_heads": 2, "window": 3}
    view = noisy({**tiny(), "layers": {"1": {"attention": pattern}}})
    tokens = some(view, 3, 6)
    found, exact = (probe(view, tokens, method=m, mean_jacobian=True) for m in ("auto", "exact"))
    assert found.meta["methods"] == ["structured", "exact"]
    assert "layer 1: exact and not structured, as its attention has window" in found.meta["remarks"]
    np.testing.assert_allclose(found.matrices["mean_jacobian"], exact.matrices["mean_jacobian"], atol=1e-12)
    told = "jacobian.method: layer 1 has no structured form: its attention has window; take auto or exact"
    with pytest.raises(SpecError) as raised:
        probe(view, tokens, method="structured")
    assert str(raised.value) == told


def test_what_merely_looks_alike_is_found_out(tiny):
    view = noisy(tiny())
    # one part in twenty more, where no anatomy would look
    view.blocks[0].attention.register_forward_hook(lambda module, inputs, output: output * 1.05)
    tokens = some(view, 5, 6)
    found, exact = (probe(view, tokens, method=m, mean_jacobian=True) for m in ("auto", "exact"))
    assert found.meta["methods"] == ["exact", "structured"]
    (remark,) = [remark for remark in found.meta["remarks"] if remark.startswith("layer 0")]
    assert remark.startswith("layer 0: exact and not structured, as on the first batch the two differ by ")
    np.testing.assert_allclose(found.matrices["mean_jacobian"], exact.matrices["mean_jacobian"], atol=1e-12)
    with pytest.raises(SpecError, match="layer 0 has no structured form: on the first batch the two differ by"):
        probe(view, tokens, method="structured")


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"jackknife": 1}, "jacobian.jackknife: 1 groups of 4 sequences; take 2 to 4"),
        ({"jackknife": 5}, "jacobian.jackknife: 5 groups of 4 sequences; take 2 to 4"),
        ({"method": "estimate", "jackknife": 2}, "jacobian.jackknife: an estimate has none; take method exact or auto"),
        (
            {"method": "estimate", "mean_jacobian": True},
            "jacobian.mean_jacobian: an estimate has none; take method exact or auto",
        ),
        ({"method": "estimate", "directions": 2}, "jacobian.directions: 2 give no standard error; take 3 or more"),
    ],
)
def test_what_cannot_be_is_refused(tiny, params, told):
    view = noisy(tiny())
    with pytest.raises(SpecError) as raised:
        probe(view, some(view, 4, 4), **params)
    assert str(raised.value) == told


def test_precision_is_put_back(tiny):
    view = noisy(tiny(), torch.float32)
    before = torch.get_float32_matmul_precision()
    coarse = probe(view, some(view, 4, 6), precision="bf16")
    assert torch.get_float32_matmul_precision() == before
    fine = probe(view, some(view, 4, 6), precision="float32")
    assert coarse.scalars["identity_deviation"] != fine.scalars["identity_deviation"]
    assert coarse.scalars["identity_deviation"] == pytest.approx(fine.scalars["identity_deviation"], rel=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_too(tiny, dtype):
    spec = tiny(d_model=128, max_seq_len=128, attention={"type": "gqa", "n_heads": 4, "n_kv_heads": 2})
    view = noisy(spec, dtype, std=0.05)
    tokens = some(view, 6, 100)
    wanted = probe(view, tokens, method="exact")
    on_gpu = layered(view.model.cuda())
    for params in ({"method": "exact"}, {"method": "structured"}, {"precision": "tf32"}, {"precision": "bf16"}):
        found = probe(on_gpu, tokens, **params)
        for name in METRICS:
            assert found.scalars[name] == pytest.approx(wanted.scalars[name], rel=1e-2), (params, name)


# --- Hugging Face


def small(name, **changes):
    transformers = pytest.importorskip("transformers")
    shape = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 32,
        "intermediate_size": 24, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**shape, **changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return layered(model.double().eval())


@pytest.mark.parametrize(
    ("name", "changes"), [("Llama", {}), ("Qwen2", {}), ("Qwen3", {"head_dim": 6}), ("Starcoder2", {})]
)
def test_hugging_face_models_have_the_structured_form(name, changes):
    view = small(name, **changes)
    tokens = some(view, 3, 9)
    found, exact = (probe(view, tokens, method=m, mean_jacobian=True) for m in ("auto", "exact"))
    assert found.meta["methods"] == ["structured"] * 2, found.meta["remarks"]
    # Llama's and Qwen's norms compute in float32
    np.testing.assert_allclose(found.matrices["mean_jacobian"], exact.matrices["mean_jacobian"], rtol=1e-5, atol=1e-6)


def test_a_hugging_face_window_is_not_taken_for_plain_attention():
    view = small("Mistral", sliding_window=7)
    tokens = some(view, 3, 12)
    found, exact = (probe(view, tokens, method=m, mean_jacobian=True) for m in ("auto", "exact"))
    assert found.meta["methods"] == ["exact"] * 2
    np.testing.assert_allclose(found.matrices["mean_jacobian"], exact.matrices["mean_jacobian"], atol=1e-10)


def matrices() -> Iterator[tuple[str, torch.Tensor]]:
    for d in (1, 2, 17, 40, 300):
        noise, u, v = (torch.randn(*size, dtype=torch.float64) for size in ((d, d), (d,), (d,)))
        yield f"noise {d}", noise
        yield f"identity {d}", torch.eye(d, dtype=torch.float64)
        yield f"nothing {d}", torch.zeros(d, d, dtype=torch.float64)
        yield f"rank one {d}", torch.outer(u, v)
        yield f"one direction beside the identity {d}", torch.eye(d) + 20 * torch.outer(u, v) / d
        yield f"nearly equal {d}", torch.linspace(1, 1.0001, d, dtype=torch.float64).diag()


def test_the_spectral_norm_is_the_largest_singular_value():
    torch.manual_seed(0)
    for name, j in matrices():
        wanted = torch.linalg.svdvals(j)[0]
        torch.testing.assert_close(spectral_norm(j), wanted, rtol=1e-13, atol=1e-15, msg=name)
        torch.testing.assert_close(spectral_norm(j, most=3), wanted, rtol=1e-13, atol=1e-15, msg=f"{name}, cut short")
    assert spectral_norm(torch.full((5, 5), torch.nan, dtype=torch.float64)).isnan()
