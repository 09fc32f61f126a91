"""Activation sparsity against loops over tokens, experts and neurons, and against models run with the thresholds."""

from __future__ import annotations

import math
from typing import Any

import naive_neurons as naive
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from naive_neurons import Neuron

from sparsekit.errors import DataError
from sparsekit.model.build import build_model
from sparsekit.probes import cett
from sparsekit.probes.activation_sparsity import ActivationSparsity
from sparsekit.probes.base import ProbeResult, Tokens
from sparsekit.probes.cett import Calibration, read_thresholds
from sparsekit.probes.layered import layered
from sparsekit.probes.neurons import downs

S, T = 4, 12
IDS = torch.randint(0, 64, (S, T), generator=torch.Generator().manual_seed(1))
TOKENS = Tokens.of(IDS, 3)
EXPERT = {"type": "swiglu", "d_ff": 12}
MOE = {"type": "moe", "n_experts": 3, "router": {"type": "top_k", "k": 2}, "expert": EXPERT}
FFNS: dict[str, Any] = {
    "swiglu": {"type": "swiglu", "d_ff": 24},
    "relu": {"type": "mlp", "d_ff": 24, "activation": "relu", "bias": True},
    "moe": MOE,
    "moe, shared": {**MOE, "shared_expert": {"type": "swiglu", "d_ff": 8}, "shared_combine": "mean"},
}


@pytest.fixture(params=FFNS)
def model(request, tiny):
    """In float64, with weights of some size."""
    model = build_model(tiny(ffn=FFNS[request.param]), seed=0).double().eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


@pytest.fixture(scope="module")
def trained():
    """Two layers that have learned a rule, and text that follows it."""
    generator = torch.Generator().manual_seed(2)

    def text(n: int) -> torch.Tensor:
        """Token i is followed by 5 i + 1 or, at every third place, by the token before it."""
        ids = torch.randint(0, 64, (n, 24), generator=generator)
        for t in range(2, 24):
            ids[:, t] = ids[:, t - 2] if t % 3 == 0 else (5 * ids[:, t - 1] + 1) % 64
        return ids

    attention, ffn = {"type": "gqa", "n_heads": 4, "n_kv_heads": 2}, {"type": "swiglu", "d_ff": 64}
    spec = {"d_model": 32, "n_layers": 2, "vocab_size": 64, "max_seq_len": 32}
    model = build_model({**spec, "block": {"attention": attention, "ffn": ffn}}, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        ids = text(48)
        optimizer.zero_grad()
        F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    return model.double().eval(), text(16)


def measured(model: Any, tokens: Tokens = TOKENS, **params: Any) -> ProbeResult:
    return ActivationSparsity(ActivationSparsity.Params(**params)).run(layered(model), tokens)


def largest(visited: list[Neuron], share: float) -> list[Neuron]:
    k = max(1, round(share * len(visited)))
    return sorted(visited, key=lambda neuron: -abs(neuron.a))[:k]


RULES: dict[str, tuple[dict[str, Any], Any]] = {
    "nonzero": ({}, lambda visited: [n for n in visited if n.a != 0]),
    "top_k": ({"k": 0.3}, lambda visited: [n for n in largest(visited, 0.3) if n.a != 0]),
    "fat_eps": ({"eps": 0.2}, lambda visited: [n for n in visited if n.a != 0 and abs(n.gate) > 0.2]),
}


@pytest.mark.parametrize("metric", RULES)
def test_dense_metrics_against_the_loop(model, metric):
    params, rule = RULES[metric]
    result = measured(model, metric=metric, recent=3, pictured=2, **params)
    downs_of = [[m.weight for name, m in layer.ffn.named_modules() if name.endswith("down")] for layer in model.layers]
    of_sizes = [sum(w.shape[-1] * (w.shape[0] if w.ndim == 3 else 1) for w in weights) for weights in downs_of]
    for layer, sequences in enumerate(naive.dense(model, IDS)):
        shares, of_all, united, unused = [], [], [], []
        counts: dict[tuple[int, int], int] = {}
        for s, tokens in enumerate(sequences):
            kept = [{(n.expert, n.index) for n in rule(visited)} for visited in tokens]
            for t, (visited, active) in enumerate(zip(tokens, kept, strict=True)):
                shares.append(len(active) / len(visited))
                of_all.append(len(active) / of_sizes[layer])
                if s < 2:
                    assert result.arrays["heat_map"][layer, s, t] == pytest.approx(shares[-1], abs=1e-6)
                for place in active:
                    counts[place] = counts.get(place, 0) + 1
            united.append(len(set().union(*kept[:8])) / of_sizes[layer])  # one whole chunk of 8 in 12 tokens
            unused += [1 - len(set().union(*kept[t - 2 : t + 1])) / of_sizes[layer] for t in range(2, T)]
        assert result.per_layer["activation_ratio"][layer] == pytest.approx(np.mean(shares), abs=1e-12)
        assert result.per_layer["union_density"][layer] == pytest.approx(np.mean(united), abs=1e-12)
        assert result.per_layer["aggregated_sparsity"][layer] == pytest.approx(np.mean(unused), abs=1e-12)
        if "activation_ratio_of_all" in result.per_layer:
            assert result.per_layer["activation_ratio_of_all"][layer] == pytest.approx(np.mean(of_all), abs=1e-12)
        frequencies = result.arrays["frequency"][layer]
        assert len(frequencies) == of_sizes[layer]
        assert sorted(frequencies[frequencies > 0]) == pytest.approx(sorted(n / (S * T) for n in counts.values()))
    ratio = result.scalars["activation_ratio"]
    assert ratio == pytest.approx(result.per_layer["activation_ratio"].mean())
    low, high = result.intervals["activation_ratio"]
    assert low <= ratio <= high
    assert ("activation_ratio_of_all" in result.scalars) == hasattr(model.layers[0].ffn, "router")


def test_frequencies_stand_at_their_neurons(tiny):
    model = build_model(tiny(ffn=FFNS["relu"], n_layers=1), seed=0).double()
    with torch.no_grad():
        model.layers[0].ffn.up.weight.zero_()
        model.layers[0].ffn.up.bias.copy_(torch.arange(24) - 20.0)  # relu leaves the last three
    result = measured(model, metric="nonzero")
    assert result.arrays["frequency"][0].tolist() == [0.0] * 21 + [1.0] * 3
    assert result.scalars["activation_ratio"] == result.scalars["union_density"] == 3 / 24
    assert result.scalars["aggregated_sparsity"] == 21 / 24


def test_the_curve_against_the_loop(model):
    result = measured(model, metric="cett", grid=9, held_out=False)
    for layer, sequences in enumerate(naive.dense(model, IDS)):
        tokens = [visited for sequence in sequences for visited in sequence]
        t, curve = (x[~np.isnan(x)] for x in (result.arrays[name][layer] for name in ("curve_t", "curve_cett")))
        assert (t[0], curve[0], curve[-1]) == (0, 0, 1)
        assert (np.diff(t) > 0).all()
        for one_t, one in zip(t, curve, strict=True):
            # the last but one is the largest c, which another order of multiplication may put on the other side
            nudged = [naive.cett(tokens, one_t * (1 + nudge)) for nudge in (-1e-12, 1e-12)]
            assert min(abs(x - one) for x in nudged) == pytest.approx(0, abs=1e-9)
        found = result.per_layer["threshold"][layer]
        above = int(np.flatnonzero(curve > 0.2)[0])
        assert t[above - 1] <= found < t[above]
        assert naive.cett(tokens, found) == pytest.approx(0.2, abs=float(curve[above] - curve[above - 1]))


@pytest.mark.parametrize("held_out", [False, True])
def test_thresholds_drop_in_the_model_what_they_drop_in_the_loop(model, held_out):
    result = measured(model, metric="cett", cett=0.3, held_out=held_out)
    thresholds = read_thresholds(result.meta["thresholds"], 2)
    assert thresholds == tuple(result.per_layer["threshold"])
    parts = {"perplexity_ratio": IDS[::2] if held_out else IDS}
    if held_out:
        parts["perplexity_ratio_held_out"] = IDS[1::2]
    for name, ids in parts.items():
        with naive.dropping(model, lambda layer, neuron: neuron.c >= thresholds[layer]):
            sparse = naive.loss(model, ids)
        assert result.scalars[name] == pytest.approx(math.exp(sparse - naive.loss(model, ids)), rel=1e-9)
    seen: list[Any] = []
    with naive.dropping(model, lambda layer, neuron: neuron.c >= thresholds[layer], seen):
        model(IDS[1::2] if held_out else IDS)
    for layer in range(2):
        active = [sum(n.c >= thresholds[layer] and n.a != 0 for n in visited) / len(visited)
                  for place, _, visited in seen if place == layer]  # fmt: skip
        assert result.per_layer["activation_ratio"][layer] == pytest.approx(np.mean(active), abs=1e-12)


def test_cett_ppl_on_a_trained_model_is_what_it_says(trained):
    model, ids = trained
    result = measured(model, Tokens.of(ids, 4), metric="cett_ppl", p=0.01)
    assert result.meta["status"] == "ok"
    assert 1.009 <= result.scalars["perplexity_ratio"] <= 1.01
    assert 0 < result.scalars["activation_ratio"] < 1
    low, high = result.meta["bracket"]
    assert low == result.scalars["cett"] < high
    thresholds = result.per_layer["threshold"]
    for name, part in (("perplexity_ratio", ids[::2]), ("perplexity_ratio_held_out", ids[1::2])):
        with naive.dropping(model, lambda layer, neuron: neuron.c >= thresholds[layer]):
            sparse = naive.loss(model, part)
        assert result.scalars[name] == pytest.approx(math.exp(sparse - naive.loss(model, part)), rel=1e-9)


def test_cett_ppl_is_the_search_in_which_every_step_measures(trained, monkeypatch):
    """Bisection in CETT; at each step CETT is measured anew, in the whole model, at every point of the grid."""
    monkeypatch.setattr(cett, "FINER", 1)
    model, ids = trained
    ids = ids[:2, :12]
    result = measured(model, Tokens.of(ids, 2), metric="cett_ppl", p=0.05, grid=12, held_out=False)
    tokens = [[v for sequence in sequences for v in sequence] for sequences in naive.dense(model, ids)]
    grids = [[x for x in t if not math.isnan(x)] for t in result.arrays["curve_t"]]
    dense = naive.loss(model, ids)
    low, high, found, ratio = 0.0, 1.0, (0.0, 0.0), 1.0
    tried: dict[tuple[float, ...], float] = {}
    while high - low > 1e-6 and ratio < 1.05 - 1e-3:
        target = (low + high) / 2
        stays = [next(i for i, t in enumerate(grid) if naive.cett(visited, t) > target)
                 for visited, grid in zip(tokens, grids, strict=True)]  # fmt: skip
        thresholds = tuple(grid[i - 1] for grid, i in zip(grids, stays, strict=True))
        if thresholds not in tried:
            with naive.dropping(model, lambda layer, neuron, t=thresholds: neuron.c >= t[layer]):
                tried[thresholds] = math.exp(naive.loss(model, ids) - dense)
        if tried[thresholds] <= 1.05:
            low, found, ratio = target, thresholds, tried[thresholds]
        else:
            high = target
    assert result.scalars["cett"] == low
    assert tuple(result.per_layer["threshold"]) == found
    assert result.scalars["perplexity_ratio"] == pytest.approx(ratio, rel=1e-9)


def test_feed_forwards_that_do_not_matter_saturate(tiny):
    model = build_model(tiny(), seed=0).double()
    with torch.no_grad():
        for layer in model.layers:
            layer.ffn.down.weight *= 1e-6
    result = measured(model)
    assert result.meta["status"] == "saturated"
    assert result.scalars["cett"] == 1
    assert result.scalars["perplexity_ratio"] <= 1.01
    assert result.scalars["activation_ratio_dense"] < 0.02, "all is dropped but what is above the other text's maximum"


def test_neurons_that_can_only_go_together_are_a_step(tiny):
    ffn = {"type": "mlp", "d_ff": 1, "activation": "relu", "bias": True}
    model = build_model(tiny(ffn=ffn, n_layers=1), seed=0).double()
    with torch.no_grad():
        inner = model.layers[0].ffn
        inner.up.weight.zero_()
        inner.up.bias.fill_(2.0)
        inner.down.weight.normal_(generator=torch.Generator().manual_seed(3)).mul_(5)
    ids = IDS.clone()
    direction = model.layers[0].ffn.down.weight[:, 0]
    with torch.no_grad():  # the one neuron makes token 7 likely, and that is what stands there
        model.head.weight[7] = direction / direction.norm() * 3
    ids[:] = 7
    result = measured(model, Tokens.of(ids, 2), p=0.01)
    assert result.meta["status"] == "step"
    assert result.scalars["perplexity_ratio"] == 1
    assert result.per_layer["threshold"][0] <= 2 * float(direction.detach().norm())
    assert result.scalars["activation_ratio"] == 1
    low, high = result.meta["bracket"]
    assert high - low <= 1e-6


def test_tokens_without_output_are_left_out_and_counted(tiny):
    model = build_model(tiny(ffn={"type": "mlp", "d_ff": 24, "activation": "relu"}), seed=0).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
        model.layers[0].ffn.up.weight[1:] = 0  # one neuron is left, which some tokens use
        model.layers[1].ffn.up.weight.zero_()
    result = measured(model, metric="cett", cett=0.5, held_out=False)
    sequences = naive.dense(model, IDS)[0]
    idle = sum(all(n.a == 0 for n in visited) for tokens in sequences for visited in tokens)
    assert 0 < idle < S * T
    assert result.per_layer["zero_output_tokens"].tolist() == [idle, S * T]
    assert np.isfinite(result.per_layer["threshold"]).all()
    assert result.per_layer["threshold"][1] == 0
    assert result.scalars["perplexity_ratio"] == pytest.approx(1, abs=0.5)
    assert any("output was 0" in remark for remark in result.meta["remarks"])


def test_thresholds_are_wider_than_a_narrow_model(model):
    narrow = model.to(torch.bfloat16)
    result = measured(narrow, metric="cett", held_out=False)
    thresholds = torch.tensor(result.per_layer["threshold"])
    assert (thresholds.float().double() == thresholds).all(), "float32"
    assert (thresholds.bfloat16().double() != thresholds).any(), "and no less"
    banks, _ = downs(layered(narrow))
    assert {down.norm_EF.dtype for by_site in banks.values() for down in by_site.values()} == {torch.float32}


def test_nothing_is_left_behind(model):
    before = {name: x.clone() for name, x in model.state_dict().items()}
    logits = model(IDS)
    for metric in ("nonzero", "top_k", "fat_eps", "cett", "cett_ppl"):
        measured(model, metric=metric)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert torch.equal(model(IDS), logits)
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_batches_make_no_difference(model):
    for metric in ("top_k", "fat_eps"):  # the grid of cett comes from the first batch
        whole, parts = (measured(model, Tokens.of(IDS, size), metric=metric) for size in (4, 1))
        assert parts.scalars == pytest.approx(whole.scalars, rel=1e-12)


def test_how_often_layers_run(tiny):
    view = layered(build_model(tiny(), seed=0))
    for metric in ("nonzero", "top_k", "fat_eps"):
        view.layer_calls = 0
        ActivationSparsity(ActivationSparsity.Params(metric=metric)).run(view, TOKENS)
        assert view.layer_calls == 2 * 2, "two layers, two batches: one pass"
    banks, _ = downs(view)
    curves = Calibration(banks, 2, 8).curves
    assert set(curves) == {0, 1}
    view.layer_calls = 0
    result = ActivationSparsity().run(view, Tokens.of(IDS, 4))
    # the dense pass of either half, the runs of the search, and the last run
    assert view.layer_calls == 2 * (2 + result.meta["runs"] + 1)


def test_experts_in_a_loop_cannot_be_seen(tiny):
    with pytest.raises(DataError) as refused:
        measured(build_model(tiny(ffn={**MOE, "dispatch": "loop"}), seed=0), metric="nonzero")
    assert str(refused.value) == (
        "activation_sparsity: no layer can be measured; of layer 0: its experts run one after the other, not as one "
        "grouped product"
    )


def test_layers_that_cannot_be_seen_are_told_and_left_dense(tiny):
    spec = tiny(n_layers=3)
    block = spec.pop("block")
    other = {**block, "ffn": {**MOE, "dispatch": "loop"}}
    model = build_model({**spec, "blocks": {"a": block, "b": other}, "pattern": ["a", "b", "a"]}, seed=0)
    result = measured(model, metric="cett")
    assert np.isnan(result.per_layer["activation_ratio"]).tolist() == [False, True, False]
    assert result.per_layer["threshold"][1] == 0
    assert (
        "layer 1: not applicable: its experts run one after the other, not as one grouped product"
        in result.meta["remarks"]
    )


def hugging_face(name: str) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, OPTConfig, Phi3Config

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    sizes |= {"max_position_embeddings": 64, "intermediate_size": 24, "initializer_range": 0.3}
    config = {
        "llama": LlamaConfig(**sizes),
        "phi3": Phi3Config(**sizes, pad_token_id=0),
        "opt": OPTConfig(**{k: v for k, v in sizes.items() if k != "intermediate_size"}, ffn_dim=24,
                         word_embed_proj_dim=32, init_std=0.3),
        "mixtral": MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2),
    }[name]  # fmt: skip
    torch.manual_seed(0)
    eager = {"experts_implementation": "eager"} if name == "mixtral" else {}
    return AutoModelForCausalLM.from_config(config, **eager).double().eval()


@pytest.mark.parametrize("name", ["llama", "phi3", "opt", "mixtral"])
def test_hugging_face_models(name):
    model = hugging_face(name)
    layers = model.model.decoder.layers if name == "opt" else model.model.layers
    caught: list[list[Any]] = [[] for _ in layers]
    hooks = []
    for found, layer in zip(caught, layers, strict=True):
        module = layer.mlp.experts if name == "mixtral" else layer.fc1 if name == "opt" else layer.mlp
        hooks.append(module.register_forward_pre_hook(lambda m, args, found=found: found.append(args)))
    with torch.no_grad():
        model(IDS)
    for hook in hooks:
        hook.remove()
    fat, top = measured(model, metric="fat_eps", eps=0.1), measured(model, metric="top_k", k=0.25)
    for number, (layer, ((x, *routing),)) in enumerate(zip(layers, caught, strict=True)):
        shares, kept = [], []
        for token, x_D in enumerate(x.reshape(-1, 32)):
            with torch.no_grad():
                if name == "mixtral":
                    both = [layer.mlp.experts.gate_up_proj[e] @ x_D for e in routing[0][token]]
                    gates = [F.silu(y[:24]) for y in both]
                    acts = [gate * y[24:] for gate, y in zip(gates, both, strict=True)]
                elif name == "opt":
                    gates = acts = [F.relu(layer.fc1(x_D))]
                else:
                    gate, up = (layer.mlp.gate_up_proj(x_D).chunk(2) if name == "phi3"
                                else (layer.mlp.gate_proj(x_D), layer.mlp.up_proj(x_D)))  # fmt: skip
                    gates, acts = [F.silu(gate)], [F.silu(gate) * up]
            gate, act = torch.cat(gates), torch.cat(acts)
            shares.append(float(((gate.abs() > 0.1) & (act != 0)).double().mean()))
            k = round(0.25 * len(act))
            kept.append(int((act.abs().topk(k).values > 0).sum()) / len(act))
        assert fat.per_layer["activation_ratio"][number] == pytest.approx(np.mean(shares), abs=1e-12)
        assert top.per_layer["activation_ratio"][number] == pytest.approx(np.mean(kept), abs=1e-12)
    result = measured(model, metric="cett_ppl", p=0.02, held_out=False)
    assert result.scalars["perplexity_ratio"] <= 1.02
    thresholds = read_thresholds(result.meta["thresholds"], 2)
    if name in ("llama", "phi3", "opt"):  # by hooks before the down projection itself
        hooks = []
        for layer, t in zip(layers, thresholds, strict=True):
            down = layer.fc2 if name == "opt" else layer.mlp.down_proj
            norm_F = down.weight.detach().norm(dim=0)
            hooks.append(down.register_forward_pre_hook(
                lambda m, args, norm_F=norm_F, t=t: (args[0] * (args[0].abs() * norm_F >= t),)
            ))  # fmt: skip
        with torch.no_grad():
            logits = model(IDS).logits
        for hook in hooks:
            hook.remove()
        sparse = F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        with torch.no_grad():
            logits = model(IDS).logits
        dense = F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        assert result.scalars["perplexity_ratio"] == pytest.approx(math.exp(sparse - dense), rel=1e-9)
