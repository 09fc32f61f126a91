"""Masks in mixtures: neurons of the experts that tokens visit, of sparsekit's mixtures and of Hugging Face's."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

from sparsekit.components.contracts import ForwardContext
from sparsekit.errors import DataError
from sparsekit.model.generate import generate
from sparsekit.probes.activation_sparsity import ActivationSparsity
from sparsekit.probes.base import Tokens
from sparsekit.probes.layered import layered
from sparsekit.probes.neurons import Gates, fat_eps, sparse_losses, top_k
from sparsekit.sparsifiers.base import losses
from sparsekit.sparsifiers.calibration import Calibration
from sparsekit.sparsifiers.choose import make

from .models import TOKENS, ids, logits, ours, same, state, theirs

NAMES = ["cett", "fat_eps", "top_k", "cats", "chess"]
EXPERT = {"type": "swiglu", "d_ff": 24}
ROUTED = {"type": "moe", "n_experts": 6, "router": {"type": "top_k", "k": 2}, "expert": EXPERT}
MIXED = {**ROUTED, "shared_expert": {"type": "swiglu", "d_ff": 40}, "shared_combine": "mean"}
UNGATED = {**ROUTED, "expert": {"type": "mlp", "d_ff": 24, "bias": True}}
SPARE = {
    **ROUTED,
    "n_experts": 40,
    "router": {"type": "switch", "capacity_factor": 1.0},
}  # experts and tokens left over
BIASED = {**ROUTED, "expert": {**EXPERT, "bias": True}, "shared_expert": {"type": "geglu", "d_ff": 20, "bias": True}}
MODELS: dict[str, Any] = {
    "routed": lambda **more: ours(ROUTED, **more),
    "mixed": lambda **more: ours(MIXED, **more),
    "ungated": lambda **more: ours(UNGATED, **more),
    "spare": lambda **more: ours(SPARE, **more),
    "mixtral": lambda **more: theirs("mixtral", **more),
    "olmoe": lambda **more: theirs("olmoe", **more),
    "qwen3_moe": lambda **more: theirs("qwen3_moe", **more),  # whose middle layer is dense
}


def calibrated(name: str, view: Any, **params: Any) -> Calibration:
    found: Calibration = make({"type": name, **params}).calibrate(view, TOKENS)
    return found


@functools.cache
def seen(model: str) -> Any:
    """A model's view, which tests leave as it was."""
    return layered(MODELS[model]())


@pytest.fixture(params=MODELS)
def view(request: pytest.FixtureRequest) -> Any:
    return seen(request.param)


@pytest.mark.parametrize("name", NAMES)
def test_of_what_tokens_visit_the_share_is_dropped_that_was_asked_for(view: Any, name: str) -> None:
    demand_share(view, name, 0.5)


@pytest.mark.parametrize("sparsity", [0.25, 0.75])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model", ["mixed", "olmoe"])
def test_of_what_tokens_visit_any_share_can_be_dropped(model: str, name: str, sparsity: float) -> None:
    demand_share(seen(model), name, sparsity)


def demand_share(view: Any, name: str, sparsity: float) -> None:
    calibration = calibrated(name, view, sparsity=sparsity)
    assert calibration.sparsity == pytest.approx(sparsity, abs=0.01)
    if name not in ("cett", "fat_eps"):  # those have their sparsity over all layers
        assert list(calibration.realised.values()) == pytest.approx([sparsity] * len(calibration.realised), abs=0.01)
    assert "missing" not in calibration.meta


@pytest.mark.parametrize("name", NAMES)
def test_dropping_nothing_changes_no_bit(view: Any, name: str) -> None:
    before = logits(view.model)
    with calibrated(name, view, sparsity=0.0).install(view):
        assert torch.equal(logits(view.model), before)


@pytest.mark.parametrize("name", ["cett", "top_k", "chess"])
def test_what_is_taken_out_leaves_nothing(view: Any, name: str) -> None:
    outputs, before = logits(view.model), state(view.model)
    calibration = calibrated(name, view, sparsity=0.6)
    assert same(before, state(view.model))
    installed = calibration.install(view)
    with torch.no_grad():
        assert not torch.equal(logits(view.model), outputs)
    with pytest.raises((IndexError, RuntimeError)):
        view.model(torch.full((1, 3), 10**6))
    installed.remove()
    assert same(before, state(view.model)) and torch.equal(logits(view.model), outputs)


# --- from the definition


def routed_rows(model: Any, layer: int, x_ND: Tensor) -> list[tuple[int, int, float]]:
    """(token, expert, weight) of every visit."""
    ffn = model.layers[layer].ffn
    routing = ffn.router(x_ND, ForwardContext(seq_len=len(x_ND)))
    n = len(routing.expert_M) // len(x_ND)
    token_M = routing.token_M if routing.token_M is not None else torch.arange(len(x_ND)).repeat_interleave(n)
    triples = zip(token_M.tolist(), routing.expert_M.tolist(), routing.weight_M.tolist(), strict=True)
    return [(t, e, w) for t, e, w in triples if e < ffn.n_experts and w != 0]


def acts(module: Any, x_D: Tensor, expert: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(gate, a, W_down, its bias) of one expert, or of a shared one, for one token."""

    def part(name: str) -> tuple[Tensor, Tensor | None]:
        linear = getattr(module, name)
        if expert is None:
            return linear.weight, linear.bias
        return linear.weight[expert], None if linear.bias is None else linear.bias[expert]

    up = F.linear(x_D, *part("up"))
    gate = module.activation(F.linear(x_D, *part("gate"))) if hasattr(module, "gate") else None
    a = module.activation(up) if gate is None else gate * up
    return (a if gate is None else gate), a, *part("down")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "ffn", [ROUTED, MIXED, UNGATED, SPARE, BIASED], ids=["routed", "mixed", "ungated", "spare", "biased"]
)
@torch.no_grad()
def test_a_mixture_drops_what_the_definition_says(ffn: dict[str, Any], name: str) -> None:
    model = ours(ffn, dtype=torch.float64, n_layers=2)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            parameter.copy_(torch.linspace(-0.5, 0.5, parameter.numel()).view(parameter.shape))
    x_ND = torch.randn(9, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    calibration = calibrated(name, layered(model), sparsity=0.5)
    mixture = model.layers[1].ffn
    wanted, zeros, entries = torch.zeros_like(x_ND), 0, 0
    mean = mixture.params.shared_combine == "mean"
    visits = routed_rows(model, 1, x_ND)
    k = mixture.router.experts_per_token
    for t, x_D in enumerate(x_ND):
        # (neuron's size for the threshold, its limit, |a|, what it adds) of each neuron that the token visits
        groups: dict[str, list[tuple[float, float, float, Tensor]]] = {"experts": [], "shared": []}
        places = [("experts", e, w * (k / (k + 1) if mean else 1)) for token, e, w in visits if token == t]
        if mixture.shared_expert is not None:
            places.append(("shared", None, 1 / (k + 1) if mean else 1.0))
        for place, expert, r in places:
            module = mixture.shared_expert if expert is None else mixture.experts
            gate, a, down, bias = acts(module, x_D, expert)
            threshold = calibration.limits[1, place].threshold
            for i in range(len(a)):
                n_D = r * a[i] * down[:, i]
                size = {"cett": n_D.norm(), "top_k": a[i].abs()}.get(name, gate[i].abs())
                at = 0.0
                if name != "top_k":
                    wide = threshold.ndim == 2 and expert is not None
                    at = threshold[expert, i] if wide else threshold[i] if threshold.ndim else threshold
                groups[place].append((float(size), float(at), n_D))
            wanted[t] += 0 if bias is None else r * bias
        for place, group in groups.items():
            stay = calibration.limits[1, place].k if group and name == "top_k" else None
            if stay is not None:  # of all that the token visits together
                stay *= len(group) // {"experts": 24, "shared": len(group)}[place]
                least = sorted((size for size, *_ in group), reverse=True)[stay - 1]
            for size, at, n_D in group:
                kept = size >= least if stay is not None else size > at
                wanted[t] += n_D if kept else 0
                zeros, entries = zeros + (not kept), entries + 1
    with calibration.install(model) as installed:
        got = mixture(x_ND[None], ForwardContext())[0]
        realised = {place: share for (layer, place), share in installed.realised().items() if layer == 1}
    assert torch.allclose(got, wanted, atol=1e-12)
    widths = {"experts": 24 * len(visits), "shared": entries - 24 * len(visits)}
    assert sum(realised[place] * widths[place] for place in realised) == pytest.approx(zeros)
    assert 0.2 < zeros / entries < 0.8


@pytest.mark.parametrize("name", ["cett", "fat_eps", "top_k"])
@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe", "routed"])
@torch.no_grad()
def test_masks_are_the_probes(family: str, name: str) -> None:
    """Losses with what the probe calls inactive dropped by the probe's own way."""
    view = layered(MODELS[family](dtype=torch.float64))
    calibration = calibrated(name, view, sparsity=0.5)
    if name == "cett":
        from sparsekit.probes.cett import above
        from sparsekit.probes.neurons import downs

        active: Any = above(calibration.thresholds(view.n_layers), downs(view)[0])
    elif name == "fat_eps":
        eps, gates = float(next(iter(calibration.limits.values())).threshold), Gates(view)
        active = lambda layer, seen: fat_eps(eps, gates, layer, seen)  # noqa: E731
    else:
        active = lambda layer, seen: top_k(0.5, layer, seen)  # noqa: E731
    wanted = sparse_losses(view, TOKENS, active, {})
    with calibration.install(view):
        assert losses(view, TOKENS) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("name", ["mixed", "olmoe"])
def test_cett_finds_what_the_probe_does(name: str) -> None:
    view = layered(MODELS[name]())
    told = ActivationSparsity(ActivationSparsity.Params(p=0.02, held_out=False)).run(view, TOKENS)
    calibration = make("cett:p=0.02").calibrate(view, TOKENS)
    assert calibration.thresholds(3) == pytest.approx(tuple(told.per_layer["threshold"]))
    assert calibration.sparsity == pytest.approx(1 - told.scalars["activation_ratio"], abs=1e-5)
    dense = losses(view, TOKENS).mean()
    with calibration.install(view):
        ratio = math.exp(losses(view, TOKENS).mean() - dense)
    assert ratio == pytest.approx(told.scalars["perplexity_ratio"], abs=1e-6)


def test_chess_has_channels_for_every_expert_and_an_unvisited_one_those_of_all() -> None:
    """E[up^2] of each expert over its own tokens; of 40 experts 7 tokens visit 7 at most."""
    model = ours(SPARE, dtype=torch.float64, n_layers=1)
    few = Tokens.of(ids(1, 7), 1)
    calibration = make("chess:sparsity=0.5").calibrate(layered(model), few)
    limit = calibration.limits[0, "experts"].threshold
    assert limit.shape == (40, 24) and (limit > 0).all() and limit.isfinite().all()
    read: list[Tensor] = []
    handle = model.layers[0].ffn.register_forward_pre_hook(lambda m, args: read.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(few.ids_ST)
        handle.remove()
        visits, squares = routed_rows(model, 0, read[0]), {}
        for t, e, _ in visits:
            up = F.linear(read[0][t], model.layers[0].ffn.experts.up.weight[e])
            squares.setdefault(e, []).append(up.square())
    assert 2 <= len(squares) <= 7
    mean = {e: torch.stack(each).mean(0) for e, each in squares.items()}
    roots = [limit[e] * mean[e].sqrt() for e in mean]
    assert torch.allclose(torch.stack(roots), roots[0][0].expand(len(roots), 24)), "t_i sqrt(E[up_i^2]) = sqrt(T)"
    everywhere = torch.cat([torch.stack(each) for each in squares.values()]).mean()
    unvisited = next(e for e in range(40) if e not in squares)
    assert torch.allclose(limit[unvisited] * everywhere.sqrt(), roots[0][0].expand(24))
    with calibration.install(model):
        assert logits(model, ids(4)).isfinite().all()


def test_a_batch_that_no_expert_takes() -> None:
    """A router whose every choice is left over."""
    model = ours(ROUTED, n_layers=1)
    calibrations = [calibrated(name, layered(model), sparsity=0.5) for name in NAMES]
    router = model.layers[0].ffn.router

    def nobody(module: Any, args: Any, routing: Any) -> Any:
        return routing._replace(expert_M=torch.full_like(routing.expert_M, 6), complete=False)

    handle = router.register_forward_hook(nobody)
    dense = logits(model, ids(1, 3))
    for calibration in calibrations:
        with calibration.install(model) as installed:
            assert torch.equal(logits(model, ids(1, 3)), dense)
            assert installed.realised() == {}
    handle.remove()


# --- in use


def test_text_is_written_under_masks_with_and_without_kernels(tmp_path: Any) -> None:
    """A shared expert skips what is masked; the calibration read from a disk does the same."""
    model = ours({**MIXED, "shared_combine": "sum"})
    calibration = calibrated("chess", layered(model), sparsity=0.85)
    calibration.save(tmp_path)
    texts = []
    for each, kernels in ((calibration, False), (calibration, True), (Calibration.load(tmp_path), False)):
        with each.install(model, kernels=kernels):
            texts.append(list(generate(model, [1, 2, 3], 12, temperature=0)))
    assert texts[0] == texts[1] == texts[2] != list(generate(model, [1, 2, 3], 12, temperature=0))


def test_two_at_once_come_out_in_any_order(view: Any) -> None:
    before = logits(view.model)
    first, second = (calibrated(name, view, sparsity=0.5) for name in ("cats", "top_k"))
    with second.install(view):
        alone = logits(view.model)
    a, b = first.install(view), second.install(view)
    a.remove()
    assert torch.equal(logits(view.model), alone)
    b.remove()
    assert torch.equal(logits(view.model), before)


def test_a_shared_expert_that_cannot_be_seen_stays_dense() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_experts": 4,
             "num_key_value_heads": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}  # fmt: skip
    model = AutoModelForCausalLM.from_config(Qwen2MoeConfig(**sizes, num_experts_per_tok=2)).eval()
    calibration = calibrated("top_k", layered(model), sparsity=0.5)
    assert set(calibration.limits) == {(0, "experts"), (1, "experts")}
    assert calibration.sparsity == 0.5 and calibration.weights[0, "experts"] == 2 * 16 * 32
    assert calibration.meta["missing"] == dict.fromkeys("01", "its shared expert cannot be seen")


def test_what_cannot_be_seen_is_told() -> None:
    looped = layered(ours({**ROUTED, "dispatch": "loop"}))
    with pytest.raises(DataError) as caught:
        calibrated("cats", looped, sparsity=0.5)
    reason = "its experts run one after the other, not as one grouped product"
    assert str(caught.value) == f"no layer's activations can be masked; of layer 0: {reason}"
    other = {**ROUTED, "expert": {"type": "drelu", "d_ff": 24}}
    mixed = layered(ours(other, layers={"1": {"ffn": MIXED}}))
    calibration = calibrated("cats", mixed, sparsity=0.5)
    assert set(calibration.limits) == {(1, "experts"), (1, "shared")}
    assert calibration.meta["missing"]["0"] == "DReLU is neither act(up x) nor act(gate x) * (up x)"
    wide = calibrated("chess", layered(ours({**ROUTED, "n_experts": 4})), sparsity=0.5)
    with pytest.raises(DataError) as caught:
        wide.install(ours(ROUTED))
    mend = "the calibration is of another model; calibrate on this one"
    assert str(caught.value) == f"layer 0, experts: 96 thresholds for 144 inputs: {mend}"
