"""The neurons of feed-forwards, seen and switched off: what stands before each down projection, and which is active."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekit.components.contracts import wide
from sparsekit.errors import DataError
from sparsekit.probes.anatomy import Anatomy, ExpertRows, Weight
from sparsekit.probes.base import Array, Tokens
from sparsekit.probes.layered import LayeredModel

SITES = ("ffn_act", "shared_act")
WITH_INPUT = ("ffn_in", *SITES)
Seen = Tensor | ExpertRows
# layer, what is seen by site -> by SITES what is active of it, [M, F]
Active = Callable[[int, Mapping[str, Any]], dict[str, Tensor]]
Witness = Callable[[int, Mapping[str, tuple[ExpertRows, Tensor]], int, int], None]  # layer, both, sequences, tokens


class Down(NamedTuple):
    """The down projections of a layer's feed-forward (a dense one's, all experts' or the shared expert's).

    Attributes:
        weight_EDF: E is 1 outside of mixtures.
        norm_EF: ||W_down[:, i]||, in float32 or wider.
    """

    weight_EDF: Tensor
    norm_EF: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Down:
        weight_EDF = weight.detach().view(-1, *weight.shape[-2:])
        return cls(weight_EDF, torch.linalg.vector_norm(weight_EDF, dim=1, dtype=wide(weight.dtype)))


Downs = dict[int, dict[str, Down]]  # by layer, by the site that stands before it


def as_rows(seen: Seen) -> ExpertRows:
    """Activations as rows: a dense layer's are one a token, of expert 0, with weight 1."""
    if isinstance(seen, ExpertRows):
        return seen
    act_NF = seen.flatten(0, -2)
    token_N = torch.arange(act_NF.shape[0], device=act_NF.device)
    ones_N = torch.ones_like(token_N, dtype=wide(act_NF.dtype))
    return ExpertRows(act_NF, token_N, torch.zeros_like(token_N), ones_N)


def acts_of(seen: Seen) -> Tensor:
    """a of each row, [M, F]."""
    return seen.act_MF if isinstance(seen, ExpertRows) else seen.flatten(0, -2)


def sizes(seen: Seen, down: Down) -> Tensor:
    """c_i = |r a_i| ||W_down[:, i]|| of each row, r its routing weight: [M, F], in float32 or wider."""
    a_MF = acts_of(seen).to(down.norm_EF.dtype)
    if isinstance(seen, ExpertRows):
        return (a_MF * seen.weight_M[:, None]).abs() * down.norm_EF[seen.expert_M]
    return a_MF.abs() * down.norm_EF[0]


# --- which layers can be seen


def unseen(view: LayeredModel) -> dict[int, str]:
    """Why activations cannot be seen whole, by layer in which they cannot.

    Raises:
        DataError: they cannot in any.
    """
    return _demand_some(view, {layer: _site_missing(view, layer) for layer in range(view.n_layers)})


def downs(view: LayeredModel) -> tuple[Downs, dict[int, str]]:
    """The down projections by layer, and why layers are missing.

    Raises:
        DataError: all are.
    """
    found: Downs = {}
    missing: dict[int, str | None] = {}
    for layer in range(view.n_layers):
        missing[layer] = _site_missing(view, layer)
        if missing[layer] is None:
            weights = _down_weights(view.anatomy(layer))
            if len(weights) == sum(view.sites(layer)[site] is None for site in SITES):
                found[layer] = {site: Down.of(weight.weight) for site, weight in weights.items()}
            else:
                missing[layer] = view.anatomy(layer).missing.get("down", "no down projection was found")
    return found, _demand_some(view, missing)


def _down_weights(anatomy: Anatomy) -> dict[str, Weight]:
    if anatomy.experts is None:
        return {} if anatomy.down is None else {"ffn_act": anatomy.down}
    shared = anatomy.experts.shared.get("down")
    return {"ffn_act": anatomy.experts.down} | ({} if shared is None else {"shared_act": shared})


def _site_missing(view: LayeredModel, layer: int) -> str | None:
    told, experts = view.sites(layer), view.anatomy(layer).experts
    reason = told["ffn_act"]
    if reason is None and experts is not None and experts.shared:
        reason = told["shared_act"]
    return None if reason is None else reason.removeprefix("not applicable: ")


def _demand_some(view: LayeredModel, missing: Mapping[int, str | None]) -> dict[int, str]:
    reasons = {layer: reason for layer, reason in missing.items() if reason is not None}
    if len(reasons) == view.n_layers:
        raise DataError(f"activation_sparsity: no layer can be measured; of layer 0: {reasons[0]}")
    return reasons


def unseen_parts(view: LayeredModel) -> list[int]:
    """Mixtures that hold a projection to the stream beside the experts that can be seen: a shared expert's."""
    found = []
    for layer in range(view.n_layers):
        anatomy = view.anatomy(layer)
        if anatomy.experts is not None and not anatomy.experts.shared and anatomy.ffn is not None:
            shapes = [p.shape for p in anatomy.ffn.parameters() if p.ndim == 2]
            found += [layer] if any(shape[0] == view.d_model for shape in shapes) else []
    return found


# --- what is active


def nonzero(layer: int, seen: Mapping[str, Any]) -> dict[str, Tensor]:
    """a_i != 0."""
    return {site: acts_of(seen[site]) != 0 for site in SITES if site in seen}


def top_k(share: float, layer: int, seen: Mapping[str, Any]) -> dict[str, Tensor]:
    """The round(share * visited) largest |a_i| of each token, at least one; of all the experts that it visits."""
    parts = {site: as_rows(seen[site]) for site in SITES if site in seen}
    n_tokens = 1 + max(int(rows.token_M.max()) for rows in parts.values() if len(rows.token_M))
    width = max(rows.act_MF.shape[1] for rows in parts.values())
    token_M = torch.cat([rows.token_M for rows in parts.values()])
    order_M = token_M.argsort(stable=True)  # a token's rows side by side, whatever site they are of
    first_N = torch.searchsorted(token_M[order_M], torch.arange(n_tokens, device=token_M.device))
    slot_M = torch.empty_like(token_M)
    slot_M[order_M] = torch.arange(len(token_M), device=token_M.device) - first_N[token_M[order_M]]
    size_MF = torch.cat(
        [
            F.pad(_visited(rows, rows.act_MF.abs()), (0, width - rows.act_MF.shape[1]), value=-1)
            for rows in parts.values()
        ]
    )
    size_NC = size_MF.new_full((n_tokens, int(slot_M.max()) + 1, width), -1)
    size_NC[token_M, slot_M] = size_MF
    size_NC = size_NC.flatten(1)
    k_N = ((size_NC >= 0).sum(1) * share).round().clamp(min=1)
    rank_NC = size_NC.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    kept_NC = (rank_NC < k_N[:, None]) & (size_NC > 0)
    kept_MF = kept_NC.view(n_tokens, -1, width)[token_M, slot_M]
    split = kept_MF.split([len(rows.token_M) for rows in parts.values()])
    return {site: kept[:, : rows.act_MF.shape[1]] for (site, rows), kept in zip(parts.items(), split, strict=True)}


def _visited(rows: ExpertRows, x_MF: Tensor) -> Tensor:
    """Values of rows that a token visits, -1 in the others."""
    return torch.where(rows.weight_M[:, None] != 0, x_MF, -1)


def fat_eps(eps: float, gates: Gates, layer: int, seen: Mapping[str, Any]) -> dict[str, Tensor]:
    """a_i != 0 and |gate_i| > eps; where there is no gate, |a_i| > eps."""
    return {
        site: (gates.of(layer, site, seen).abs() > eps) & (acts_of(seen[site]) != 0) for site in SITES if site in seen
    }


class Gates:
    """The gate values act(W_gate x) of feed-forwards.

    Attributes:
        missing: why they are not known, by layer in which they are not.

    Raises:
        DataError: they are not in any.
    """

    def __init__(self, view: LayeredModel):
        self.view = view
        missing = {layer: self._reason(layer) for layer in range(view.n_layers)}
        self.missing = _demand_some(view, missing)

    def _reason(self, layer: int) -> str | None:
        anatomy = self.view.anatomy(layer)
        if anatomy.experts is None and anatomy.gate is None:  # either it has none, or it was not found
            return anatomy.missing.get("gate")
        if anatomy.activation is None:
            return anatomy.missing.get("activation", "no activation was found")
        read = self.view.sites(layer)["ffn_in"]
        return None if read is None else read.removeprefix("not applicable: ")

    def _gate(self, layer: int, site: str) -> Weight | None:
        anatomy = self.view.anatomy(layer)
        if anatomy.experts is None:
            return anatomy.gate if site == "ffn_act" else None
        return anatomy.experts.gate if site == "ffn_act" else anatomy.experts.shared.get("gate")

    def of(self, layer: int, site: str, seen: Mapping[str, Any]) -> Tensor:
        """[M, F] of what is seen at a site, ``ffn_in`` being seen too; a_i itself where there is no gate."""
        gate = self._gate(layer, site)
        if gate is None:
            return acts_of(seen[site])
        activation: Any = self.view.anatomy(layer).activation
        x_ND, rows = seen["ffn_in"].flatten(0, -2), as_rows(seen[site])
        if gate.weight.ndim == 2:
            gated: Tensor = activation(F.linear(x_ND[rows.token_M], gate.weight, gate.bias))
            if site == "shared_act":
                self._demand_same(layer, gated, x_ND[rows.token_M], rows.act_MF)
            return gated
        gate_MF = torch.empty_like(rows.act_MF)
        for expert in range(gate.weight.shape[0]):
            here = (rows.expert_M == expert).nonzero()[:, 0]
            bias = None if gate.bias is None else gate.bias[expert]
            gate_MF[here] = F.linear(x_ND[rows.token_M[here]], gate.weight[expert], bias)
        gated = activation(gate_MF)
        return gated

    def _demand_same(self, layer: int, gated_NF: Tensor, x_ND: Tensor, act_NF: Tensor) -> None:
        """A shared expert may have another activation than the experts, whose is known."""
        experts = self.view.anatomy(layer).experts
        assert experts is not None
        up = experts.shared["up"]
        if not torch.allclose(gated_NF * F.linear(x_ND, up.weight, up.bias), act_NF, rtol=1e-2, atol=1e-3):
            raise DataError(
                f"activation_sparsity: layer {layer}: the shared expert's gate is not the experts'; use another metric"
            )


# --- a model that drops what is inactive


def sparse_losses(
    view: LayeredModel, tokens: Tokens, active: Active, missing: Mapping[int, str], witness: Witness | None = None
) -> Array:
    """[S] the loss of each sequence when a_i is 0 wherever it is not active, in all layers but the missing ones."""
    losses = []
    for ids_BT in tokens.batches():
        batch = view.start(ids_BT)
        h = batch.h_0
        for layer in range(view.n_layers):
            if layer in missing:
                h = batch.layer(layer, h)
                continue
            drop = Drop(active, layer)
            edits = {site: partial(drop, site) for site in WITH_INPUT if view.sites(layer)[site] is None}
            h, _ = batch.observe(layer, h, [], edits)
            if witness is not None:
                parts = {site: (as_rows(drop.seen[site]), kept) for site, kept in drop.kept.items()}
                witness(layer, parts, *ids_BT.shape)
        losses.append(batch.losses(h).double().cpu().numpy())
    found: Array = np.concatenate(losses)
    return found


class Drop:
    """Puts 0 in place of what a rule calls inactive, as the sites of one layer are come to one after the other."""

    def __init__(self, active: Active, layer: int):
        self.active, self.layer = active, layer
        self.seen: dict[str, Any] = {}
        self.kept: dict[str, Tensor] = {}

    def __call__(self, site: str, seen: Any) -> Tensor:
        self.seen[site] = seen
        whole: Tensor = seen.act_MF if isinstance(seen, ExpertRows) else seen
        if site not in SITES:
            return whole
        ours = {name: self.seen[name] for name in ("ffn_in", site) if name in self.seen}
        self.kept[site] = self.active(self.layer, ours)[site]
        return torch.where(self.kept[site].view(whole.shape), whole, 0)
