"""The neurons of mixtures, whose experts see some tokens each; and with them all neurons of a model.

Shapes: N tokens, D d_model, F d_ff of an expert, E experts; M rows, one for each token and expert that it visits.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.components.moe import MoE
from sparsekit.probes.anatomy import ExpertParts, ExpertRows, Weight
from sparsekit.probes.decoder import watch_feed_forward
from sparsekit.probes.expert_bank import ExpertBank
from sparsekit.probes.huggingface import HuggingFaceView
from sparsekit.probes.layered import LayeredModel, trial_ids
from sparsekit.probes.neurons import unseen_parts
from sparsekit.sparsifiers.sites import DOWN, EXPERTS, SHARED, FeedForward, SiteOf, demand_some, feed_forward

EditRows = Callable[[Tensor, ExpertRows], Tensor]  # what experts read, [N, D], and their rows -> activations [M, F]


@dataclass(frozen=True)
class Experts:
    """A mixture's routed experts, whose down projections read act(W_gate x) * (W_up x), or act(W_up x).

    Attributes:
        parts: their matrices.
        activation: elementwise, or None where it was not found.
        visits: how many of them a token visits (in expectation where that varies).
        put: has activations edited in every forward, until the stack closes.
    """

    parts: ExpertParts
    activation: Callable[[Tensor], Tensor] | None
    visits: float
    put: Callable[[ExitStack, EditRows], None]

    @property
    def gate(self) -> Weight | None:
        return self.parts.gate

    @property
    def up(self) -> Weight:
        return self.parts.up

    @property
    def down(self) -> Weight:
        return self.parts.down

    def gates(self, x_ND: Tensor, rows: ExpertRows) -> Tensor:
        """act(W_gate x) of each row, [M, F]."""
        assert self.gate is not None and self.activation is not None, "asked for where there is one"
        return self.activation(projected(self.gate, x_ND, rows))


def projected(weight: Weight, x_ND: Tensor, rows: ExpertRows) -> Tensor:
    """W_e x + b_e of each row's token and expert, [M, O]."""
    y_MO = x_ND.new_zeros(len(rows.token_M), weight.weight.shape[1])
    for expert in rows.expert_M.unique().tolist():
        here = (rows.expert_M == expert).nonzero()[:, 0]
        bias = None if weight.bias is None else weight.bias[expert]
        y_MO[here] = nn.functional.linear(x_ND[rows.token_M[here]], weight.weight[expert], bias)
    return y_MO


def mixture(view: LayeredModel, layer: int) -> tuple[dict[str, FeedForward | Experts], str | None]:
    """A mixture's experts and its shared expert, and why one of them is not among these."""
    anatomy = view.anatomy(layer)
    experts, ffn = anatomy.experts, anatomy.ffn
    assert experts is not None, "asked of mixtures"
    unseen = view.sites(layer)["ffn_act"]
    if unseen is not None:
        return {}, unseen.removeprefix("not applicable: ")
    found: dict[str, FeedForward | Experts] = {}
    if isinstance(view, HuggingFaceView):
        found[EXPERTS] = Experts(experts, anatomy.activation, _visits(view, layer), _of_bank(view.bank(layer)))
        return found, "its shared expert cannot be seen" if layer in unseen_parts(view) else None
    assert isinstance(ffn, MoE), "sparsekit's mixtures that are seen into are"
    found[EXPERTS] = Experts(experts, anatomy.activation, experts.top_k, _of_decoder(ffn))
    if ffn.shared_expert is None:
        return found, None
    down, gate, up = (experts.shared.get(name) for name in ("down", "gate", "up"))
    if down is None:
        return found, "its shared expert has no down projection of its own"
    k, mean = ffn.router.experts_per_token, ffn.params.shared_combine == "mean"
    found[SHARED] = FeedForward(
        ffn.shared_expert, ffn.shared_expert, down, gate, up, getattr(ffn.shared_expert, "activation", None),
        "the shared expert has no known gate" if up is None else None, 1 / (k + 1) if mean else 1.0,
    )  # fmt: skip
    return found, None


@torch.no_grad()
def _visits(view: HuggingFaceView, layer: int) -> float:
    batch = view.start(trial_ids(view.vocab_size))
    _, seen = batch.observe(layer, batch.h_0, ["router"])
    visits: int = (seen["router"].expert_M < view.bank(layer).parts.n_experts).sum().item()
    return visits / batch.ids_BT.numel()


def _of_decoder(ffn: MoE) -> Callable[[ExitStack, EditRows], None]:
    def put(undo: ExitStack, edit: EditRows) -> None:
        running: list[ExitStack] = []

        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            x_ND = args[0].reshape(-1, args[0].shape[-1])
            running.append(ExitStack())
            watch_feed_forward(running[-1], ffn, ("ffn_act",), {"ffn_act": lambda rows: edit(x_ND, rows)}, {})

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            running.pop().close()

        undo.callback(ffn.register_forward_pre_hook(before).remove)
        undo.callback(ffn.register_forward_hook(after, always_call=True).remove)

    return put


def _of_bank(bank: ExpertBank) -> Callable[[ExitStack, EditRows], None]:
    def put(undo: ExitStack, edit: EditRows) -> None:
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            x_ND, expert_NK, weight_NK = [*args, *kwargs.values()][:3]
            rows = bank.rows(x_ND, expert_NK, weight_NK)
            act_MF = edit(x_ND, rows)
            if torch.equal(act_MF, rows.act_MF):
                return output  # the module's own, bit for bit
            return bank.output(rows._replace(act_MF=act_MF), len(x_ND)).to(output.dtype)

        undo.callback(bank.module.register_forward_hook(after, with_kwargs=True).remove)

    return put


def neurons(view: LayeredModel, gated: bool = False) -> tuple[dict[SiteOf, FeedForward | Experts], dict[int, str]]:
    """All neurons that can be masked, of dense feed-forwards and of mixtures; and why layers have none, or not all.

    With ``gated`` a gate has to be known where there is one.

    Raises:
        DataError: no layer has any.
    """
    found: dict[SiteOf, FeedForward | Experts] = {}
    missing: dict[int, str] = {}
    for layer in range(view.n_layers):
        parts: dict[str, FeedForward | Experts] = {}
        reason: str | None = None
        if view.anatomy(layer).experts is not None:
            parts, reason = mixture(view, layer)
        elif isinstance(dense := feed_forward(view, layer), FeedForward):
            parts = {DOWN: dense}
        else:
            reason = dense
        for name, each in parts.items():
            unknown = each.missing if isinstance(each, FeedForward) else None
            if isinstance(each, Experts) and each.gate is not None and each.activation is None:
                unknown = "no activation was found"
            if gated and unknown is not None:
                reason = unknown
            else:
                found[layer, name] = each
        if reason is not None:
            missing[layer] = reason
    return found, demand_some(found, missing)
