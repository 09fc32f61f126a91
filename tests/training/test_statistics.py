"""Per-layer statistics against the formulas over whole tensors, however a step is cut up and run."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

from sparsekit.components.contracts import ForwardContext
from sparsekit.model.build import build_model
from sparsekit.model.decoder import Decoder
from sparsekit.training.statistics import SITES, LayerStatistics, _shard, site_means

RESIDUALS = ["pre_norm", "post_norm", "output_norm", "peri_norm", "layernorm_scaling", "deep_norm", "parallel"]
Make = Callable[..., dict[str, Any]]


def model_of(spec: dict[str, Any]) -> Decoder:
    model = build_model(spec, seed=1).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():  # norms too, and of some size
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def batches_of(n: int, rows: int = 2, length: int = 12) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 64, (rows, length), generator=generator) for _ in range(n)]


def loss_of(model: Decoder, ids_BT: Tensor) -> Tensor:
    return F.cross_entropy(model(ids_BT).flatten(0, 1).float(), ids_BT.flatten())


def collected(model: Decoder, batches: list[Tensor], moments: bool = True, **how: Any) -> dict[str, float]:
    return statistics_of(model, batches, moments, **how).rows()


def statistics_of(
    model: Decoder, batches: list[Tensor], moments: bool = True, total: int | None = None
) -> LayerStatistics:
    statistics = LayerStatistics(model, moments)
    model.zero_grad()
    for ids_BT in batches:
        with statistics.collecting(ids_BT.shape[0] / (total or sum(len(b) for b in batches))):
            loss_of(model, ids_BT).backward()
    statistics.norms()
    return statistics


def outputs(model: Decoder, batches: list[Tensor]) -> dict[tuple[str, int], Tensor]:
    """[N, D] of every site and layer over all batches, by methods put in the modules' place."""
    kept: dict[tuple[str, int], list[Tensor]] = {}
    model = copy.deepcopy(model)

    def tap(key: tuple[str, int], module: nn.Module) -> None:
        forward = module.forward

        def tapped(*args: Any, **options: Any) -> Any:
            y = forward(*args, **options)
            kept.setdefault(key, []).append((y[0] if isinstance(y, tuple) else y).detach().flatten(0, -2))
            return y

        module.forward = tapped  # type: ignore[method-assign]

    for index, layer in enumerate(model.layers):
        for site, module in zip(SITES, (layer.residual, layer.attention, layer.ffn), strict=True):
            tap((site, index), module)
    with torch.no_grad():
        for ids_BT in batches:
            model(ids_BT)
    return {key: torch.cat(values) for key, values in kept.items()}


def by_formula(x_ND: Tensor) -> dict[str, float]:
    """Every statistic of a site, number by number."""
    x = x_ND.flatten()
    m2, m3, m4 = (((x - x.mean()) ** power).mean() for power in (2, 3, 4))
    told = {
        "variance": torch.stack([row.var() for row in x_ND]).mean(),
        "rms": (x**2).mean().sqrt(),
        "frobenius": torch.linalg.matrix_norm(x_ND),
        "skewness": m3 / m2.sqrt() ** 3,
        "kurtosis": m4 / m2**2,
        "cv": x.std() / x.mean().abs(),
    }
    for name, power in (("skewness", 3), ("kurtosis", 4)):
        rows = [((row - row.mean()) ** power).mean() / row.std(correction=0) ** power for row in x_ND]
        told[f"token_{name}"], told[f"token_{name}_std"] = torch.stack(rows).mean(), torch.stack(rows).std()
    return {name: value.item() for name, value in told.items()}


@pytest.mark.parametrize("residual", RESIDUALS)
def test_sites_against_the_formulas(tiny: Make, residual: str) -> None:
    model, batches = model_of(tiny(residual=residual)), batches_of(3)
    told = collected(model, batches)
    for (site, index), x_ND in outputs(model, batches).items():
        for name, value in by_formula(x_ND).items():
            assert told[f"{name}/{site}/layer_{index}"] == pytest.approx(value, rel=1e-9), (name, site, index)


def test_pre_norm_adds_up(tiny: Make) -> None:
    """The sites are what the scheme says: h_{l+1} = h_l + attn_out + ffn_out."""
    model, (ids_BT,) = model_of(tiny(n_layers=1)), batches_of(1)
    layer = model.layers[0]
    context = model.prepare(ids_BT, ForwardContext())
    with torch.no_grad():
        x = model.embedding(ids_BT, context)
        attn_out = layer.attention(layer.residual.attention_norm(x), context)  # type: ignore[operator]
        ffn_out = layer.ffn(layer.residual.ffn_norm(x + attn_out), context)  # type: ignore[operator]
    told = collected(model, [ids_BT])
    for site, y in zip(SITES, (x + attn_out + ffn_out, attn_out, ffn_out), strict=True):
        assert told[f"variance/{site}/layer_0"] == pytest.approx(y.var(-1).mean().item(), rel=1e-10)


def test_without_moments_there_are_the_second_ones_only(tiny: Make) -> None:
    model, batches = model_of(tiny()), batches_of(2)
    few, all_of_them = collected(model, batches, moments=False), collected(model, batches)
    assert {name.split("/")[0] for name in few} == {
        "variance", "rms", "frobenius", "density", "param_norm", "grad_norm",
    }  # fmt: skip
    assert few == {name: pytest.approx(all_of_them[name], rel=1e-12) for name in few}


def test_weights_weigh(tiny: Make) -> None:
    model, batches = model_of(tiny()), batches_of(2)
    statistics = LayerStatistics(model)
    for ids_BT, weight in zip(batches, (0.2, 0.6), strict=True):  # their sum, 0.8, is divided out
        with statistics.collecting(torch.tensor(weight)):
            model(ids_BT)
    told = statistics.rows()
    assert "param_norm/layer_0" not in told, "norms() was not called"
    values = [by_formula(outputs(model, [ids_BT])["attn_out", 1])["variance"] for ids_BT in batches]
    assert told["variance/attn_out/layer_1"] == pytest.approx(0.25 * values[0] + 0.75 * values[1], rel=1e-7)


DISTRIBUTIONS: dict[str, tuple[Callable[[torch.Generator], Tensor], float, float]] = {
    # how numbers of it are drawn, its skewness, its kurtosis
    "normal": (lambda g: torch.randn(4000, 256, generator=g), 0.0, 3.0),
    "uniform": (lambda g: torch.rand(4000, 256, generator=g), 0.0, 1.8),
    "exponential": (lambda g: torch.empty(4000, 256).exponential_(generator=g), 2.0, 9.0),
    "normal about 1000": (lambda g: torch.randn(4000, 256, generator=g) + 1000, 0.0, 3.0),
    "tiny": (lambda g: torch.randn(4000, 256, generator=g) * 1e-15, 0.0, 3.0),
    "huge": (lambda g: torch.randn(4000, 256, generator=g) * 1e15, 0.0, 3.0),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_moments_of_known_distributions_in_float32(tiny: Make, name: str) -> None:
    draw, skewness, kurtosis = DISTRIBUTIONS[name]
    x_ND = draw(torch.Generator().manual_seed(0))
    statistics = LayerStatistics(model_of(tiny(d_model=256)))
    for part in x_ND.split(1000):
        statistics._sums["sites"] += site_means(part, True, torch.float64)[:, None, None] / 4
    statistics._sums["weight"] += 1
    statistics._sums["tokens"] += 4000
    told = statistics.rows()
    assert told["skewness/resid/layer_0"] == pytest.approx(skewness, abs=0.03)
    assert told["kurtosis/resid/layer_0"] == pytest.approx(kurtosis, abs=0.15)
    expected = by_formula(x_ND.double())
    for measure, value in expected.items():
        if abs(value) > 0.1 or measure in ("variance", "rms"):
            assert told[f"{measure}/resid/layer_0"] == pytest.approx(value, rel=2e-3), measure


def test_what_is_constant_has_moments_0(tiny: Make) -> None:
    """A fresh model whose branches start at nought: 0/0 is 0."""
    told = collected(build_model(tiny(init="zero_out"), seed=0), batches_of(1))
    assert told["rms/ffn_out/layer_0"] == 0
    for name in ("skewness", "kurtosis", "cv", "token_skewness", "token_kurtosis_std"):
        assert told[f"{name}/ffn_out/layer_0"] == 0
    assert all(map(math.isfinite, told.values()))


def test_bfloat16_is_widened_first(tiny: Make) -> None:
    model, batches = build_model(tiny(), seed=0), batches_of(2)
    statistics = LayerStatistics(model)
    kept = []
    handle = model.layers[1].attention.register_forward_hook(lambda module, inputs, y: kept.append(y.detach()))
    for ids_BT in batches:
        with statistics.collecting(0.5), torch.autocast("cpu", torch.bfloat16):
            model(ids_BT)
    handle.remove()
    assert kept[0].dtype == torch.bfloat16
    expected = by_formula(torch.cat([y.flatten(0, 1) for y in kept]).double())
    told = statistics.rows()
    for name in ("variance", "kurtosis", "token_kurtosis_std"):
        assert told[f"{name}/attn_out/layer_1"] == pytest.approx(expected[name], rel=1e-5)


# --- feed-forwards and experts


def test_density_of_a_dense_layer(tiny: Make) -> None:
    model, batches = model_of(tiny(ffn={"type": "top_k_ffn", "d_ff": 48, "k": 6})), batches_of(2)
    assert collected(model, batches)["density/layer_0"] == pytest.approx(6 / 48, abs=0.01)  # relu takes some of the 6
    model = model_of(tiny(ffn={"type": "swiglu", "d_ff": 48}))
    assert collected(model, batches)["density/layer_1"] == 1.0


@pytest.mark.parametrize("dispatch", ["grouped", "loop"])
@pytest.mark.parametrize("router", [{"type": "top_k", "k": 2}, {"type": "switch", "capacity_factor": 0.6}])
def test_experts_against_a_walk_over_assignments(tiny: Make, moe: Make, dispatch: str, router: dict[str, Any]) -> None:
    # with a bias, rows that belong to no expert have hidden units too
    expert, shared = {"type": "reglu", "d_ff": 16, "bias": True}, {"type": "reglu", "d_ff": 24}
    ffn = moe(expert=expert, shared_expert=shared, dispatch=dispatch, router=router)
    model, batches = model_of(tiny(ffn=ffn, allow_leak=True)), batches_of(2)
    told = collected(model, batches)
    mixture: Any = model.layers[1].ffn
    reads: list[Tensor] = []
    handle = mixture.register_forward_pre_hook(lambda module, inputs: reads.append(inputs[0]))
    with torch.no_grad():
        for ids_BT in batches:
            model(ids_BT)
        handle.remove()
        n_active, n_units, load, n_dropped = 0, 0, [0] * 4, 0
        for x_BTD in reads:
            x_ND = x_BTD.flatten(0, 1)
            routing = mixture.router(x_ND, ForwardContext())
            slots = len(routing.expert_M) // len(x_ND)
            for m, e in enumerate(routing.expert_M.tolist()):
                if e == 4:
                    n_dropped += 1
                    continue
                load[e] += 1
                x_D = x_ND[m // slots]
                gate, up = (
                    linear.weight[e] @ x_D + linear.bias[e] for linear in (mixture.experts.gate, mixture.experts.up)
                )
                hidden = gate.relu() * up
                n_active, n_units = n_active + int((hidden != 0).sum()), n_units + 16
            for x_D in x_ND:
                hidden = (mixture.shared_expert.gate.weight @ x_D).relu() * (mixture.shared_expert.up.weight @ x_D)
                n_active, n_units = n_active + int((hidden != 0).sum()), n_units + 24
    assert 0.1 < n_active / n_units < 0.9
    assert told["density/layer_1"] == pytest.approx(n_active / n_units, rel=1e-12)
    shares = [count / sum(load) for count in load]
    assert told["load_max/layer_1"] == pytest.approx(
        4 * max(shares), rel=1e-6
    )  # counters are float32 in float32 models
    entropy = -sum(share * math.log(share) for share in shares if share) / math.log(4)
    assert told["load_entropy/layer_1"] == pytest.approx(entropy, rel=1e-6)
    if router["type"] == "switch":
        assert n_dropped > 0
        assert told["dropped/layer_1"] == pytest.approx(
            n_dropped / sum(map(len, map(torch.flatten, batches))), rel=1e-6
        )
    else:
        assert "dropped/layer_1" not in told


def test_dense_layers_among_mixtures_have_no_load(tiny: Make, moe: Make) -> None:
    model = model_of({**tiny(), "layers": {"1": {"ffn": moe(n_experts=8)}}})
    told = collected(model, batches_of(1))
    assert "load_max/layer_1" in told
    assert "load_max/layer_0" not in told


def test_norms(tiny: Make) -> None:
    model, batches = model_of(tiny()), batches_of(3)
    told = collected(model, batches)
    model.zero_grad()
    for ids_BT in batches:
        loss_of(model, ids_BT).backward()
    for index, layer in enumerate(model.layers):
        for key, tensors in (
            ("param_norm", [p.detach().flatten() for p in layer.parameters()]),
            ("grad_norm", [p.grad.flatten() for p in layer.parameters() if p.grad is not None]),
        ):
            assert told[f"{key}/layer_{index}"] == pytest.approx(torch.cat(tensors).norm().item(), rel=1e-10)


def test_shards_count_once_over_all_ranks() -> None:
    """On 2 x 2 ranks, replicated over the first dimension and sharded over the second, four shards make two wholes."""
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (2, 2))
        piece = torch.arange(6.0).view(2, 3)
        tensor, share = _shard(DTensor.from_local(piece, mesh, [Replicate(), Shard(0)]))
        assert torch.equal(tensor, piece)
        assert share == 0.5
        assert _shard(DTensor.from_local(piece, mesh, [Shard(0), Shard(1)]))[1] == 1
        assert _shard(piece) == (piece, None)
    finally:
        torch.distributed.destroy_process_group()


# --- however the step is run


def test_two_ranks_added_are_one(tiny: Make, moe: Make) -> None:
    model, batches = model_of(tiny(ffn=moe())), batches_of(4)
    whole = collected(model, batches)
    ranks = [statistics_of(model, part, total=8) for part in (batches[:1], batches[1:])]
    told = ranks[0].rows(ranks[0].stacked + ranks[1].stacked)
    assert told.keys() == whole.keys()
    for name, value in whole.items():
        if not name.startswith("grad_norm"):  # each rank had its own gradients here; in training they are one
            assert told[name] == pytest.approx(value, rel=1e-9), name


def wrapped(model: Any) -> None:
    """Recomputation as a module around each layer."""
    for index, layer in enumerate(model.layers):
        model.layers[index] = checkpoint_wrapper(layer)


def called(model: Any) -> None:
    """Recomputation by whoever calls the layers, which then run as whole modules again."""

    def hidden(ids_BT: Tensor, context: ForwardContext) -> Tensor:
        context = model.prepare(ids_BT, context)
        x_BTD, state = model.embedding(ids_BT, context), {}
        for layer in model.layers:
            x_BTD, state = checkpoint(layer, x_BTD, state, context, use_reentrant=False)
        return x_BTD

    model.hidden = hidden


@pytest.mark.parametrize("inside", ["forward and backward", "forward"])
@pytest.mark.parametrize("dispatch", ["grouped", "loop"])
@pytest.mark.parametrize("recompute", [wrapped, called])
def test_recomputation_does_not_count_twice(
    tiny: Make, moe: Make, inside: str, dispatch: str, recompute: Callable[[Any], None]
) -> None:
    model, batches = model_of(tiny(ffn=moe(dispatch=dispatch))), batches_of(2)
    expected = collected(model, batches)
    recomputing: Any = copy.deepcopy(model)
    runs = []
    for layer in recomputing.layers:
        layer.ffn.register_forward_pre_hook(lambda *_: runs.append(1))
    recompute(recomputing)
    statistics = LayerStatistics(recomputing)
    for ids_BT in batches:
        with statistics.collecting(0.5):
            loss = loss_of(recomputing, ids_BT)
            if inside == "forward and backward":
                loss.backward()
        if inside == "forward":
            loss.backward()
    statistics.norms()
    assert len(runs) == 8, "every layer ran again in the backward"
    assert statistics.rows() == {name: pytest.approx(value, rel=1e-9) for name, value in expected.items()}


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_layers_are_seen(tiny: Make, recompute: bool) -> None:
    torch._dynamo.reset()  # it gives up on code that many tests before this one had compiled
    model, batches = model_of(tiny()), batches_of(2)
    expected = collected(model, batches)
    compiled: Any = copy.deepcopy(model)
    runs: list[int] = []

    def backend(graph: Any, example: Any) -> Any:
        def run(*args: Any) -> Any:
            runs.append(1)
            return graph(*args)

        return run

    for index, layer in enumerate(compiled.layers):
        layer.compile(backend=backend)
        if recompute:
            compiled.layers[index] = checkpoint_wrapper(layer)
    loss_of(compiled, batches[0]).backward()
    graphs = len(runs)
    assert graphs == (4 if recompute else 2)
    told = collected(compiled, batches)
    assert len(runs) == graphs, "layers run eagerly while statistics are collected"
    assert told == {name: pytest.approx(value, rel=1e-9) for name, value in expected.items()}
    loss_of(compiled, batches[0]).backward()
    assert len(runs) == 2 * graphs, "and compiled afterwards"


def test_training_is_not_changed_and_no_hook_stays(tiny: Make, moe: Make) -> None:
    model, batches = model_of(tiny(ffn=moe())), batches_of(2)
    plain = copy.deepcopy(model)
    collected(model, batches)
    for ids_BT in batches:
        loss_of(plain, ids_BT).backward()
    for (name, a), (_, b) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name  # type: ignore[arg-type]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    statistics = LayerStatistics(model)
    with pytest.raises(ZeroDivisionError), statistics.collecting(1.0):
        raise ZeroDivisionError
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_layer_that_is_hidden_is_an_error(tiny: Make) -> None:
    model: Any = model_of(tiny())
    statistics = LayerStatistics(model)
    model.layers[1] = copy.deepcopy(model.layers[1])
    with pytest.raises(RuntimeError, match="resid of layer 1 was not seen"), statistics.collecting(1.0):
        model(batches_of(1)[0])


def test_results_stay_on_the_device(tiny: Make) -> None:
    statistics = statistics_of(model_of(tiny()), batches_of(2))
    tensors = statistics.result()
    assert {name: value.item() for name, value in tensors.items()} == statistics.rows()
    assert all(value.ndim == 0 for value in tensors.values())
