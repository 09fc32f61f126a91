"""The parts of a Hugging Face layer, found by what depends on what and held against what the layer computes.

Nothing is taken for granted by its name: a part that cannot be confirmed on random input is missing, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsekit.probes.anatomy import Anatomy, NormParts, RopeParts, Weight
from sparsekit.probes.layered import ViewError, trial_ids
from sparsekit.probes.score import ScoreWatch

if TYPE_CHECKING:
    from sparsekit.probes.huggingface import HuggingFaceView

Found = dict[str, Any]


def dissect(view: HuggingFaceView, layer: int) -> Anatomy:
    """A layer's parts."""
    trial = Trial(view, layer)
    missing: dict[str, str] = dict(trial.parts.missing)
    found: Found = {"attention": trial.parts.attention, "ffn": trial.parts.ffn}
    if trial.parts.attention is not None:
        found |= of_attention(trial, missing)
    found |= of_feed_forward(trial, view, layer, missing)
    found |= of_residual(trial, missing)
    return Anatomy(**found, missing=missing)


class Trial:
    """One run of a layer on a random stream: what went into its modules and came out.

    Attributes:
        h, out: the stream before and after.
        read: by module the first tensor that it was called with, and what it returned, of its first call.
        added: by site, what was added to the stream.
        score: q, k, v and how they were scored.
    """

    def __init__(self, view: HuggingFaceView, layer: int):
        self.view, self.block, self.parts = view, view.blocks[layer], view.sublayers(layer)
        with torch.no_grad():
            self.batch: Any = view.start(trial_ids(view.vocab_size))
            generator = torch.Generator().manual_seed(layer)
            self.h = torch.randn(self.batch.h_0.shape, generator=generator).to(self.batch.h_0)
            self.read: dict[nn.Module, tuple[Tensor, Tensor]] = {}
            sites = [site for site in ("attn_out", "ffn_out") if view.sites(layer)[site] is None]
            with ExitStack() as undo:
                for module in self.block.modules():
                    undo.callback(module.register_forward_hook(self._keep, with_kwargs=True).remove)
                self.out, self.added = self.batch.observe(layer, self.h, sites)
        self.kwargs: dict[str, Any] = self.batch.calls[layer][1]
        self.layer = layer

    def _keep(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()]
        y = output[0] if isinstance(output, (tuple, list)) and output else output
        if tensors and isinstance(y, Tensor):
            self.read.setdefault(module, (tensors[0].detach().clone(), y.detach().clone()))

    def close(self, a: Tensor, b: Tensor) -> bool:
        """Equal to within rounding of the model's dtype, whether or not sequences stand in one row."""
        a = a.view_as(b) if a.numel() == b.numel() and a.shape[-1] == b.shape[-1] else a
        bound = {torch.float64: 1e-6, torch.float32: 1e-4}.get(a.dtype, 3e-2)
        return a.shape == b.shape and bool((a - b).double().norm() <= bound * b.double().norm().clamp(min=1e-30))

    def ratio(self, a: Tensor, b: Tensor) -> float | None:
        """The number c with a = c b, or None where there is none."""
        wide_a, wide_b = a.double().flatten(), b.double().flatten()
        c = float(wide_a @ wide_b / (wide_b @ wide_b).clamp(min=1e-30))
        if not self.close((c * b.double()).to(a), a):
            return None
        return 1.0 if abs(c - 1) < 1e-6 else c

    def weight(self, module: nn.Module, rows: Tensor | None = None) -> Weight | None:
        """A projection's matrix as [d_out, d_in], or those of its rows that are named."""
        x, y = (tensor.flatten(0, -2) for tensor in self.read[module])
        weight: Any = module.weight
        bias: Any = getattr(module, "bias", None)
        for matrix in (weight.detach(), weight.detach().T):
            if matrix.shape == (y.shape[-1], x.shape[-1]):
                got = x @ matrix.T
                if self.close(got if bias is None else got + bias.detach(), y):
                    bias = None if bias is None else bias.detach()
                    if rows is not None and len(rows) < len(matrix):
                        first, last = int(rows[0]), int(rows[-1]) + 1
                        which: Any = slice(first, last) if last - first == len(rows) else rows
                        return Weight(matrix[which], None if bias is None else bias[which])
                    return Weight(matrix, bias, module)
        return None


# --- attention


def of_attention(trial: Trial, missing: dict[str, str]) -> Found:
    """q, k, v by which outputs of which projections the scored ones depend on; o as what comes after."""
    attention = trial.parts.demand("attention")
    linears = trial.parts.linears["attention"]
    leaves: dict[nn.Module, Tensor] = {}
    seen: dict[str, Any] = {}

    def cut(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        leaves[module] = output.detach().requires_grad_()  # a projection of a projection depends on the last alone
        return leaves[module]

    with ExitStack() as undo:
        undo.enter_context(torch.enable_grad())
        for module in linears:
            undo.callback(module.register_forward_hook(cut).remove)
        score = ScoreWatch(attention, trial.h.shape[0], {}, seen)
        score.hooks(undo)
        undo.enter_context(score)
        trial.batch.call(trial.layer, trial.h, 1)
    if not {"q", "k", "v"} <= set(seen) or score.softmaxes != 1 or score.context is None:
        missing |= dict.fromkeys("qkvo", "it does not score queries and keys once")
        return {}
    found: Found = {"n_heads": seen["q"].shape[1], "n_kv_heads": seen["k"].shape[1], "head_dim": seen["q"].shape[-1]}
    found["scale"] = score.scale
    extras: set[str] = set()
    before: Found = {}
    for name in "qkv":
        before[name] = found[name] = None
        owners = _owners(seen[name], leaves)
        rows = next(iter(owners.values()), None)
        wanted = seen[name].shape[1] * seen[name].shape[-1]
        if len(owners) != 1 or rows is None or len(rows) != wanted:
            missing[name] = f"{name} does not come from {wanted} outputs of one projection"
            continue
        module = next(iter(owners))
        found[name] = trial.weight(module, rows)
        y = leaves[module].detach()[..., rows]
        before[name] = y.view(*trial.h.shape[:2], -1, seen[name].shape[-1]).transpose(1, 2)
    with torch.no_grad():
        scored = {name: seen[name].detach() for name in "qkv"}
        found |= _turns(trial, before, scored, found, extras, missing)
        extras |= _beyond_plain(trial, score, scored)
        o = [m for m in linears if _reads(leaves[m], trial, m, score.context)]
        found["o"] = trial.weight(o[-1]) if o else None
        if found["o"] is None:
            missing["o"] = "no projection of the weighted values was found"
    window = next((w for w in (getattr(attention, n, None) for n in ("sliding_window", "window_size")) if w), None)
    extras |= {"window"} if window else set()
    found["attention_extras"] = tuple(sorted(extras))
    return found


def _owners(scored: Tensor, leaves: dict[nn.Module, Tensor]) -> dict[nn.Module, Tensor]:
    """Of each projection that a tensor depends on, the outputs that it does."""
    if not scored.requires_grad:
        return {}
    weight = torch.randn(scored.shape, generator=torch.Generator().manual_seed(1)).to(scored)
    with torch.enable_grad():
        total = (scored * weight).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, retain_graph=True)
    owners = {}
    for module, gradient in zip(leaves, gradients, strict=True):
        if gradient is not None:
            rows = gradient.flatten(0, -2).abs().sum(0).nonzero()[:, 0]
            if len(rows):
                owners[module] = rows
    return owners


def _reads(leaf: Tensor, trial: Trial, module: nn.Module, context: Tensor) -> bool:
    """Whether a projection's input is what the attention made of the values, heads side by side."""
    x = trial.read[module][0]
    heads = context.detach()
    heads = heads.reshape(trial.h.shape[0], -1, *heads.shape[-2:]).transpose(1, 2)
    return x.numel() == heads.numel() and trial.close(x.reshape(heads.shape), heads)


def _turns(
    trial: Trial, before: Found, scored: Found, found: Found, extras: set[str], missing: dict[str, str]
) -> Found:
    """How projections become what is scored: turned by position, scaled, or normalised besides."""
    rope = angles(trial.kwargs)
    told: Found = {}
    for name in "qkv":
        if before[name] is None:
            continue
        for turned, used in ((before[name], None), (_turn(before[name], rope), rope) if rope else (before[name], None)):
            ratio = trial.ratio(scored[name], turned)
            if ratio is not None:
                if used is not None:
                    told["rope"] = rope
                weight = found[name]
                if ratio != 1.0 and weight is not None:
                    told[name] = Weight(weight.weight * ratio, None if weight.bias is None else weight.bias * ratio)
                break
        else:
            normed = any(p.ndim == 1 for m in trial.parts.demand("attention").modules() for p in _own_weights(m))
            norm = _head_norm(trial, before[name], scored[name], rope) if name != "v" else None
            if norm is not None:
                extras.add("qk_norm")
                told[f"{name}_norm"], told["rope"] = norm, rope
                continue
            extras.add("qk_norm" if normed else "position")
            told["rope"] = rope if normed else None
            if told["rope"] is None:
                missing["rope"] = f"how {name} turns by position was not found"
    return told


def _head_norm(trial: Trial, before: Tensor, scored: Tensor, rope: RopeParts | None) -> NormParts | None:
    """A norm of each head over its own channels, after which it turns."""
    for module in trial.parts.demand("attention").modules():
        x, y = trial.read.get(module, (before, before))
        if list(module.children()) or x.shape[-1] != before.shape[-1] or not _own_weights(module):
            continue
        norm = norm_of(trial, module, x, y)
        if norm is not None:
            normed = norm(before.double()).to(before.dtype)
            if trial.close(normed if rope is None else _turn(normed, rope), scored):
                return norm
    return None


def _own_weights(module: nn.Module) -> Iterable[Tensor]:
    own = dict(module.named_parameters(recurse=False))
    return [own["weight"]] if "weight" in own and not isinstance(module, nn.Linear) else []


def angles(kwargs: Mapping[str, Any]) -> RopeParts | None:
    """The angles that a layer is handed, where they are a pair (cos, sin) of which both halves are alike."""
    for value in kwargs.values():
        if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(x, Tensor) for x in value):
            cos, sin = (x[0] if x.ndim == 3 else x for x in value)
            half = cos.shape[-1] // 2
            if cos.ndim == 2 and torch.equal(cos[:, :half], cos[:, half:]) and cos.shape == sin.shape:
                return RopeParts(cos[:, :half].clone(), sin[:, :half].clone())
    return None


def _turn(x: Tensor, rope: RopeParts) -> Tensor:
    if rope.channels > x.shape[-1]:
        return x
    turned, still = x[..., : rope.channels], x[..., rope.channels :]
    a, b = turned.chunk(2, dim=-1)
    turned = torch.cat((a * rope.cos - b * rope.sin, b * rope.cos + a * rope.sin), dim=-1)
    return torch.cat((turned, still), dim=-1).to(x.dtype)


def _beyond_plain(trial: Trial, score: ScoreWatch, scored: Found) -> set[str]:
    """Empty where the values' weights are a causal softmax of scale q k^T and no more."""
    groups = scored["q"].shape[1] // scored["k"].shape[1]
    k, v = (scored[name].repeat_interleave(groups, 1) for name in "kv")
    scores = (scored["q"] @ k.transpose(-2, -1)).double() * (score.scale or 1.0)
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    plain = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v.double()
    assert score.context is not None
    told = score.context.detach().double().reshape(plain.shape)
    return set() if trial.close(plain.to(trial.h), told.to(trial.h)) else {"score"}


# --- feed-forward


def of_feed_forward(trial: Trial, view: HuggingFaceView, layer: int, missing: dict[str, str]) -> Found:
    """gate, up and down, such that the down projection reads activation(gate x) * (up x), or activation(up x)."""
    down = trial.parts.down
    if down is None:
        try:
            bank = view.bank(layer)
        except ViewError as error:
            missing |= dict.fromkeys(("up", "down", "experts"), str(error))
            return {}
        missing |= dict.fromkeys(("gate", "up", "down"), "the feed-forward is a mixture of experts")
        return {"experts": bank.parts, "activation": bank.activation}
    found: Found = {"down": trial.weight(down)}
    act = trial.read[down][0].flatten(0, -2)
    others = [m for m in trial.parts.linears["ffn"] if m is not down]
    for activation in _activations(trial):
        for gate, up in _readings(trial, others, act.shape[-1]):
            if up is not None and trial.close(_apply(trial, others[0], activation, gate, up), act):
                return {**found, "gate": gate, "up": up, "activation": activation}
    missing |= dict.fromkeys(
        ("gate", "up"), "what the down projection reads is neither act(up x) nor act(gate x) * (up x)"
    )
    return found


def _activations(trial: Trial) -> Sequence[Callable[[Tensor], Tensor]]:
    """The elementwise functions at hand: modules of the layer without parameters that ran."""
    return [
        m for m in trial.read if not list(m.parameters()) and not list(m.children()) and not isinstance(m, nn.Dropout)
    ]


def _readings(trial: Trial, others: list[nn.Module], d_ff: int) -> Iterable[tuple[Weight | None, Weight | None]]:
    """(gate, up): every way in which the projections before the last may be meant."""
    if len(others) == 2:
        first, second = (trial.weight(m) for m in others)
        yield first, second
        yield second, first
    elif len(others) == 1 and trial.read[others[0]][1].shape[-1] == d_ff:
        yield None, trial.weight(others[0])
    elif len(others) == 1 and trial.read[others[0]][1].shape[-1] == 2 * d_ff:
        halves = [trial.weight(others[0], torch.arange(d_ff) + begin) for begin in (0, d_ff)]
        yield halves[0], halves[1]
        yield halves[1], halves[0]


@torch.no_grad()
def _apply(trial: Trial, reader: nn.Module, activation: Any, gate: Weight | None, up: Weight) -> Tensor:
    x = trial.read[reader][0].flatten(0, -2)
    through = x @ up.weight.T if up.bias is None else x @ up.weight.T + up.bias
    if gate is None:
        return activation(through)
    gated = x @ gate.weight.T if gate.bias is None else x @ gate.weight.T + gate.bias
    return activation(gated) * through


# --- norms and the residual sum


def of_residual(trial: Trial, missing: dict[str, str]) -> Found:
    """The scheme, from what sub-layers read and what becomes of what they return."""
    if set(trial.added) != {"attn_out", "ffn_out"}:
        missing["residual"] = "what the sub-layers add to the stream was not found"
        return {}
    attention, end = trial.parts.demand("attention"), trial.parts.demand("ffn_end")
    scales = [
        trial.ratio(trial.added[site], trial.read[module][1].view_as(trial.h))
        for site, module in (("attn_out", attention), ("ffn_out", end))
    ]
    scales = [_added_inside(trial, s, site) for s, site in zip(scales, ("attn_out", "ffn_out"), strict=True)]
    middle = trial.h + trial.added["attn_out"]
    whole = trial.close(middle + trial.added["ffn_out"], trial.out)
    first_linear = next((m for m in trial.parts.linears["ffn"]), end)
    ffn_reader = trial.parts.ffn if trial.parts.ffn is not trial.block else first_linear
    reads_1 = trial.read[attention][0]
    reads_2 = trial.read[ffn_reader][0].view_as(trial.h) if ffn_reader is not None else None
    norm_1 = _norm_between(trial, trial.h, reads_1)
    norm_2 = None if reads_2 is None else _norm_between(trial, middle, reads_2)
    parallel = reads_2 is not None and norm_2 is None
    if parallel:
        assert reads_2 is not None
        norm_2 = _norm_between(trial, trial.h, reads_2)
    alike = None not in scales and math.isclose(*(scale or 0.0 for scale in scales), rel_tol=1e-4)
    if whole and alike and norm_1 is not None and norm_2 is not None:
        name = "parallel" if parallel else "pre_norm"
    elif whole and not alike and norm_1 is not None and norm_2 is not None:
        name = "peri_norm"
    elif whole and trial.close(reads_1, trial.h):
        name = "output_norm"
    else:
        name = "other"
    for field, norm in (("norm_1", norm_1), ("norm_2", norm_2)):
        if norm is None:
            missing[field] = "no RMSNorm or LayerNorm of the stream that the sub-layer reads was found"
    scale = scales[0] if alike and scales[0] is not None else 1.0
    return {"residual": name, "branch_scale": scale, "norm_1": norm_1, "norm_2": norm_2}


def _added_inside(trial: Trial, scale: float | None, site: str) -> float | None:
    """1 where a sub-layer adds the stream itself, so that what it returns is the sum."""
    if scale is not None:
        return scale
    module = trial.parts.demand("attention" if site == "attn_out" else "ffn_end")
    before = trial.h if site == "attn_out" else trial.h + trial.added["attn_out"]
    return 1.0 if trial.close(before + trial.added[site], trial.read[module][1].view_as(trial.h)) else None


def _norm_between(trial: Trial, stream: Tensor, read: Tensor) -> NormParts | None:
    """The norm that turns the stream into what a sub-layer reads."""
    for module, (x, y) in trial.read.items():
        if not list(module.children()) and trial.close(y, read) and trial.close(x, stream):
            norm = norm_of(trial, module, x, y)
            if norm is not None:
                return norm
    return None


def norm_of(trial: Trial, module: nn.Module, x: Tensor, y: Tensor) -> NormParts | None:
    """A module as an RMSNorm or LayerNorm, if on this input it is one."""
    own = dict(module.named_parameters(recurse=False))
    weight, bias = own.get("weight"), own.get("bias")
    epsilons = [v for v in vars(module).values() if isinstance(v, float) and 0 < v < 1e-2] or [1e-5]
    weights: list[Tensor | None] = [None] if weight is None else [weight.detach(), 1.0 + weight.detach()]
    for kind in ("rmsnorm", "layernorm"):
        for each in weights:
            for eps in epsilons:
                norm = NormParts(kind, each, None if bias is None else bias.detach(), eps)
                if trial.close(norm(x.double()).to(y.dtype), y):
                    return norm
    return None
