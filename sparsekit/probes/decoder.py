"""The view by layers of sparsekit's own models."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsekit.components.attention import HeadAttention, KernelAttention
from sparsekit.components.contracts import Component, ForwardContext, Linear, Routing, State
from sparsekit.components.kernels import Extras, visible
from sparsekit.components.moe import MoE
from sparsekit.components.norms import LayerNorm, RMSNorm, WeightedNorm
from sparsekit.components.positions import RoPE
from sparsekit.components.residuals import (
    LayerNormScaling,
    MixLN,
    Parallel,
    ParallelTwoNorms,
    PreNorm,
    SequentialResidual,
)
from sparsekit.model.decoder import Block, Decoder
from sparsekit.model.meanwhile import run_eagerly
from sparsekit.probes.anatomy import Anatomy, ExpertParts, ExpertRows, NormParts, RopeParts, Score, Weight
from sparsekit.probes.layered import Edit, LayeredModel, Pass, ViewError, trial_ids, watch_input
from sparsekit.probes.ledger import Ledger


class DecoderView(LayeredModel):
    """Of a sparsekit Decoder.

    What layers hand on beside the stream (declared state) is, as any argument of a layer, what it is in the
    undisturbed pass. Components whose sequences depend on each other run branch by branch.
    """

    model: Decoder

    def __init__(self, model: Decoder):
        super().__init__(model, cast(Sequence[nn.Module], model.layers), model.spec.d_model, model.spec.vocab_size)
        self.coupled = [
            any(isinstance(m, Component) and m.batch_coupled for m in block.modules()) for block in self.blocks
        ]
        self.stateful = False
        with torch.no_grad():
            batch = DecoderPass(self, trial_ids(self.vocab_size, tokens=min(2, model.spec.max_seq_len)))
            self.stateful = any(batch.dense_states())

    def start(self, ids_BT: Tensor) -> DecoderPass:
        most = self.model.spec.max_seq_len
        if ids_BT.shape[1] > most:
            raise ViewError(f"sequences of {ids_BT.shape[1]} tokens are longer than the model's max_seq_len, {most}")
        return DecoderPass(self, ids_BT)

    def dissect(self, layer: int) -> Anatomy:
        return anatomy_of(cast(Block, self.blocks[layer]))

    def watch(
        self,
        undo: ExitStack,
        batch: Pass,
        layer: int,
        sites: Sequence[str],
        edit: Edit,
        seen: dict[str, Any],
        h: Tensor,
    ) -> Tensor:
        block = cast(Block, self.blocks[layer])
        if self.coupled[layer] and h.shape[0] != batch.ids_BT.shape[0]:
            raise ViewError("sequences depend on each other here; observe one branch at a time")
        run_eagerly(undo, block)
        if {"attn_out", "ffn_out"} & set(sites):
            h = h.view(h.shape)  # an object of its own, which the ledger can follow
            ledger = Ledger(h, {"attn_out": block.attention, "ffn_out": block.ffn}, edit, seen)
            ledger.hooks(undo)
            undo.enter_context(ledger)
        if {"q", "k", "v", "score"} & set(sites):
            context = cast(DecoderPass, batch).context(h.shape[0] // batch.ids_BT.shape[0])
            watch_score(undo, block.attention, context, edit, seen)
        if "ffn_in" in sites:
            undo.callback(watch_input(block.ffn, "ffn_in", h.shape[:2], edit, seen))
        if {"ffn_act", "shared_act", "router"} & set(sites):
            watch_feed_forward(undo, block.ffn, sites, edit, seen)
        return h


class DecoderPass(Pass):
    """One batch on its way through a Decoder."""

    view: DecoderView

    def __init__(self, view: DecoderView, ids_BT: Tensor):
        ids_BT = ids_BT.to(view.device)
        self._contexts: dict[int, ForwardContext] = {}
        self._states: list[State] | None = None
        self.model = view.model
        super().__init__(view, ids_BT, ids_BT)
        self.h_0 = self.model.embedding(ids_BT, self.context(1))

    def context(self, branches: int) -> ForwardContext:
        """What layers are called with; masks are worked out once for each number of branches."""
        if branches not in self._contexts:
            ids_NT = self.ids_BT.repeat(branches, 1)
            self._contexts[branches] = self.model.prepare(ids_NT, ForwardContext())
        return self._contexts[branches]

    def dense_states(self) -> list[State]:
        """What each layer is handed beside the stream in the undisturbed pass."""
        if self._states is None:
            h, state = self.h_0, cast(State, {})
            states = [state]
            for block in self.view.blocks[:-1]:
                h, state = block(h, state, self.context(1))
                states.append(state)
            self._states = states
        return self._states

    def call(self, layer: int, h_NTD: Tensor, branches: int) -> Tensor:
        if branches > 1 and self.view.coupled[layer]:
            return torch.cat([self.call(layer, h_BTD, 1) for h_BTD in h_NTD.chunk(branches)])
        state: State = self.dense_states()[layer] if self.view.stateful else {}
        if branches > 1:
            state = {name: x.repeat(branches, *[1] * (x.ndim - 1)) for name, x in state.items()}
        out: Tensor = self.view.blocks[layer](h_NTD, state, self.context(branches))[0]
        return out

    def head(self, h_NTD: Tensor) -> Tensor:
        return self.model.logits(h_NTD.to(self.view.dtype), replace(self.context(1), ids_BT=None))


# --- sites


def watch_score(
    undo: ExitStack, attention: nn.Module, context: ForwardContext, edit: Edit, seen: dict[str, Any]
) -> None:
    """Queries, keys and values as the kernel gets them, and what it does with them."""
    if not isinstance(attention, KernelAttention):
        raise ViewError(f"{type(attention).__name__} has no kernel that would be called with q, k and v")

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        heads = [edit.get(site, lambda x: x)(x) for site, x in zip("qkv", inputs[:3], strict=True)]
        seen.update(zip("qkv", heads, strict=True))
        extras: Extras = inputs[5]
        mask = visible(attention.asked, heads[0].shape[2], heads[0].device, context)
        rest = extras.softcap, extras.slopes_H, extras.sink_H, extras.normalizer
        seen["score"] = Score(extras.scale, mask, *rest)
        return *heads, *inputs[3:]

    undo.callback(attention.kernel.register_forward_pre_hook(before).remove)


def watch_feed_forward(undo: ExitStack, ffn: nn.Module, sites: Sequence[str], edit: Edit, seen: dict[str, Any]) -> None:
    """The input of the down projection; in a mixture of every expert's, with the routing."""
    if not isinstance(ffn, MoE):
        if "router" in sites or "shared_act" in sites:
            raise ViewError(f"{type(ffn).__name__} has no {'router' if 'router' in sites else 'shared expert'}")
        undo.callback(_before_down(only_down(ffn), "ffn_act", edit, seen, lambda act, context: act))
        return
    k = ffn.router.experts_per_token
    routed_share, shared_share = (k / (k + 1), 1 / (k + 1)) if ffn.params.shared_combine == "mean" else (1.0, 1.0)
    routings: list[Routing] = []

    def after_router(module: nn.Module, inputs: tuple[Any, ...], output: Routing) -> Routing:
        n_rows, n_tokens = output.expert_M.shape[0], inputs[0].shape[0]
        token_M = output.token_M
        if token_M is None:
            token_M = torch.arange(n_tokens, device=output.expert_M.device).repeat_interleave(n_rows // n_tokens)
        whole = edit.get("router", lambda x: x)(output._replace(token_M=token_M))
        if "router" not in edit:
            routings.append(whole)
            seen["router"] = whole
            return output  # the dispatch has a quicker way where tokens come in order
        routings.append(whole)
        seen["router"] = whole
        return cast(Routing, whole)

    undo.callback(ffn.router.register_forward_hook(after_router).remove)
    if "ffn_act" in sites:
        if ffn.dispatch != ffn._grouped:
            raise ViewError("its experts run one after the other, not as one grouped product")

        def rows(act_MF: Tensor, context: ForwardContext) -> ExpertRows:
            routing = routings[-1]
            expert_M, order_M = routing.expert_M.sort(stable=True)
            used = expert_M < ffn.n_experts
            token_M, weight_M = cast(Tensor, routing.token_M)[order_M], routing.weight_M[order_M] * routed_share
            return ExpertRows(
                torch.where(used[:, None], act_MF, 0), token_M, torch.where(used, expert_M, 0), weight_M * used
            )

        undo.callback(_before_down(only_down(ffn.experts), "ffn_act", edit, seen, rows))
    if "shared_act" in sites:
        if ffn.shared_expert is None:
            raise ViewError("there is no shared expert")

        def shared(act_NF: Tensor, context: ForwardContext) -> ExpertRows:
            token_N = torch.arange(act_NF.shape[0], device=act_NF.device)
            weight_N = torch.full(act_NF.shape[:1], shared_share, dtype=act_NF.dtype, device=act_NF.device)
            return ExpertRows(act_NF, token_N, torch.zeros_like(token_N), weight_N)

        undo.callback(_before_down(only_down(ffn.shared_expert), "shared_act", edit, seen, shared))


def only_down(module: nn.Module) -> Linear:
    """The one projection of role "down" below a module.

    Raises:
        ViewError: there is none, or more than one.
    """
    found = [m for m in module.modules() if isinstance(m, Linear) and m.role == "down"]
    if len(found) != 1:
        raise ViewError(f"{type(module).__name__} has {len(found) or 'no'} projections of role down, not one")
    return found[0]


def _before_down(down: Linear, site: str, edit: Edit, seen: dict[str, Any], told: Callable[..., Any]) -> Any:
    """Sees, or edits, what a down projection reads; an edit gets what is seen and returns the activations alone."""

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        act, *rest = inputs
        whole = told(act, rest[0] if rest else None)
        if site in edit:
            act = edit[site](whole)
            whole = whole._replace(act_MF=act) if isinstance(whole, ExpertRows) else act
        seen[site] = whole
        return act, *rest

    return down.register_forward_pre_hook(before).remove


# --- anatomy


def anatomy_of(block: Block) -> Anatomy:
    """Read off a block's components."""
    found: dict[str, Any] = {"attention": block.attention, "ffn": block.ffn}
    missing: dict[str, str] = {}
    found |= _of_residual(block.residual, missing)
    found |= _of_attention(block.attention, missing)
    found |= _of_feed_forward(block.ffn, missing)
    return Anatomy(**found, missing=missing)


def _of_residual(residual: nn.Module, missing: dict[str, str]) -> dict[str, Any]:
    scheme = residual.scheme if isinstance(residual, MixLN) else residual
    name = type(scheme).__name__
    if isinstance(scheme, ParallelTwoNorms):
        norms = {
            "norm_1": norm_parts(scheme.attention_norm, missing, "norm_1"),
            "norm_2": norm_parts(scheme.ffn_norm, missing, "norm_2"),
        }
        return {"residual": "parallel", "branch_scale": scheme.scale, **norms}
    if isinstance(scheme, Parallel):
        norm = norm_parts(scheme.norm, missing, "norm_1")
        return {"residual": "parallel", "branch_scale": scheme.scale, "norm_1": norm, "norm_2": norm}
    if type(scheme) in (PreNorm, LayerNormScaling):
        shrink = scheme.shrink if isinstance(scheme, LayerNormScaling) else 1.0
        norms = {
            "norm_1": norm_parts(cast(nn.Module, scheme.attention_norm), missing, "norm_1", shrink),
            "norm_2": norm_parts(cast(nn.Module, scheme.ffn_norm), missing, "norm_2", shrink),
        }
        return {"residual": "pre_norm", "branch_scale": scheme.scale, **norms}
    scale = scheme.scale if isinstance(scheme, SequentialResidual) else 1.0
    missing["norm_1"] = missing["norm_2"] = f"the scheme {name} does not only normalise what a sub-layer reads"
    return {"residual": re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower(), "branch_scale": scale}


def norm_parts(norm: nn.Module, missing: dict[str, str], field: str, shrink: float = 1.0) -> NormParts | None:
    """Of an RMSNorm or LayerNorm; ``shrink`` multiplies its output."""
    if type(norm) not in (RMSNorm, LayerNorm):
        missing[field] = f"{type(norm).__name__} is neither an RMSNorm nor a LayerNorm"
        return None
    norm = cast(WeightedNorm, norm)
    weight, bias = norm.scale(), getattr(norm, "bias", None)
    if shrink != 1.0:
        like = next(norm.parameters(), None)
        weight = torch.ones(norm.width) if weight is None and like is None else weight
        weight = None if weight is None else weight * shrink
        bias = None if bias is None else bias * shrink
    kind = "rmsnorm" if isinstance(norm, RMSNorm) else "layernorm"
    return NormParts(kind, _detached(weight), _detached(bias), norm.params.eps)


def _of_attention(attention: nn.Module, missing: dict[str, str]) -> dict[str, Any]:
    if not isinstance(attention, HeadAttention):
        missing |= dict.fromkeys("qkvo", f"{type(attention).__name__} is not made of one q, k, v and o each")
        return {}
    params = attention.params
    extras = set(attention.asked.features)  # window, sinks, softcap, sink_logits, alibi, normalizer
    extras |= {"qk_norm"} if attention.q_norm is not None else set()
    extras |= {"output_gate"} if attention.gate is not None else set()
    rope = None
    if type(attention.position) is RoPE:
        rope = RopeParts(attention.position.cos, attention.position.sin)
    elif params.position.type not in ("none", "alibi"):
        extras.add(params.position.type)
        missing["rope"] = f"positions are told by {type(attention.position).__name__}"
    norms = {}
    for name in ("q_norm", "k_norm"):
        norm = getattr(attention, name)
        norms[name] = None if norm is None else norm_parts(norm, missing, name)
    return {
        **norms,
        **{name: weight_of(getattr(attention, name), missing, name) for name in "qkvo"},
        "n_heads": attention.n_heads, "n_kv_heads": attention.n_kv_heads, "head_dim": attention.head_dim,
        "scale": attention.head_dim**-0.5, "rope": rope, "attention_extras": tuple(sorted(extras)),
    }  # fmt: skip


def _of_feed_forward(ffn: nn.Module, missing: dict[str, str]) -> dict[str, Any]:
    if not isinstance(ffn, MoE):
        found = _of_dense(ffn, missing)
        return found
    missing |= dict.fromkeys(("gate", "up", "down"), "the feed-forward is a mixture of experts")
    why: dict[str, str] = {}
    one = _of_dense(ffn.experts, why) if not isinstance(ffn.experts, nn.ModuleList) else {}
    if one.get("up") is None or one.get("down") is None:
        missing["experts"] = why.get("up", "experts are copies that run one after the other")
        return {}
    shared = {} if ffn.shared_expert is None else _of_dense(ffn.shared_expert, missing)
    parts = {name: weight for name, weight in shared.items() if isinstance(weight, Weight)}
    experts = ExpertParts(ffn.n_experts, ffn.router.experts_per_token, one["gate"], one["up"], one["down"], parts)
    return {"experts": experts, "activation": one["activation"]}


def _of_dense(ffn: nn.Module, missing: dict[str, str]) -> dict[str, Any]:
    """gate, up, down and the activation of MLP and gated feed-forwards."""
    from sparsekit.components.feedforward import MLP, DReLU, GatedBase

    known = isinstance(ffn, (MLP, GatedBase)) and not isinstance(ffn, DReLU)
    if not known:
        reason = f"{type(ffn).__name__} is neither act(up x) nor act(gate x) * (up x)"
        missing |= dict.fromkeys(("gate", "up"), reason)
        try:
            return {"gate": None, "up": None, "down": weight_of(only_down(ffn), missing, "down"), "activation": None}
        except ViewError as error:
            missing["down"] = str(error)
            return {"gate": None, "up": None, "down": None, "activation": None}
    found: Any = ffn
    gate = weight_of(found.gate, missing, "gate") if isinstance(ffn, GatedBase) else None
    up, down = weight_of(found.up, missing, "up"), weight_of(found.down, missing, "down")
    return {"gate": gate, "up": up, "down": down, "activation": found.activation}


def weight_of(linear: Linear, missing: dict[str, str], name: str) -> Weight | None:
    """What a projection multiplies with, if that is a matrix product and no more."""
    from sparsekit.components.linears import MaskedLinear, PlainLinear

    if type(linear).forward not in (PlainLinear.forward, MaskedLinear.forward):
        missing[name] = f"{type(linear).__name__} does more than multiply with a matrix"
        return None
    return Weight(linear.effective_weight().detach(), _detached(linear.bias), linear)


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()
