"""A Hugging Face mixture's experts: stacked matrices behind a router, worked out once more where one looks inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekit.components.contracts import Routing
from sparsekit.probes.anatomy import ExpertParts, ExpertRows, Weight
from sparsekit.probes.layered import Edit, ViewError


@dataclass(frozen=True)
class ExpertBank:
    """Experts called as ``module(x_ND, expert_NK, weight_NK)``: y_t = sum_k weight W_down (act(W_gate x) * (W_up x)).

    Attributes:
        activation: elementwise.
        parts: the matrices.
    """

    module: nn.Module
    activation: Callable[[Tensor], Tensor]
    parts: ExpertParts

    def rows(self, x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor) -> ExpertRows:
        """Activations by expert, those of one expert side by side."""
        expert_M, order_M = expert_NK.flatten().sort(stable=True)
        token_M, weight_M = order_M // expert_NK.shape[1], weight_NK.flatten()[order_M]
        used = expert_M < self.parts.n_experts
        expert_M, token_M, weight_M = expert_M[used], token_M[used], weight_M[used]
        act_MF = x_ND.new_empty(len(token_M), self.parts.down.weight.shape[-1])
        gate = self.parts.gate
        for e, here in self._each(expert_M):
            x = x_ND[token_M[here]]
            up = F.linear(x, self.parts.up.weight[e])
            act_MF[here] = self.activation(up) if gate is None else self.activation(F.linear(x, gate.weight[e])) * up
        return ExpertRows(act_MF, token_M, expert_M, weight_M)

    def output(self, rows: ExpertRows, n_tokens: int) -> Tensor:
        """What the experts add up to, [N, D]."""
        down = self.parts.down.weight
        y_ND = rows.act_MF.new_zeros(n_tokens, down.shape[1])
        for e, here in self._each(rows.expert_M):
            y = F.linear(rows.act_MF[here], down[e]) * rows.weight_M[here, None]
            y_ND.index_add_(0, rows.token_M[here], y.to(y_ND.dtype))
        return y_ND

    def _each(self, expert_M: Tensor) -> Any:
        experts = torch.arange(self.parts.n_experts, device=expert_M.device)
        ends = torch.searchsorted(expert_M, experts, right=True).tolist()
        spans = zip(range(self.parts.n_experts), [0, *ends], ends, strict=False)
        return ((e, slice(begin, end)) for e, begin, end in spans if end > begin)

    def watch(self, undo: ExitStack, sites: Sequence[str], edit: Edit, seen: dict[str, Any]) -> None:
        """Sees the routing and the activations; edited ones take the way through here and not the module's."""
        if "shared_act" in sites:
            raise ViewError("a shared expert is not looked into")
        rows: list[ExpertRows] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x, expert_NK, weight_NK = _arguments(args, kwargs)
            n_tokens, k = expert_NK.shape
            token_M = torch.arange(n_tokens, device=x.device).repeat_interleave(k)
            routing = Routing(expert_NK.reshape(-1), weight_NK.reshape(-1), token_M)
            if "router" in edit:
                routing = edit["router"](routing)
                if routing.expert_M.numel() != expert_NK.numel():
                    raise ViewError("an edited routing keeps its length; name expert E for what is not used")
                expert_NK = routing.expert_M.view(n_tokens, k)
                weight_NK = routing.weight_M.view(n_tokens, k)
            seen["router"] = routing
            if "ffn_act" in sites:
                found = self.rows(x, expert_NK, weight_NK)
                if "ffn_act" in edit:
                    found = found._replace(act_MF=edit["ffn_act"](found))
                seen["ffn_act"] = found
                rows.append(found)
            return (x, expert_NK, weight_NK), {}

        def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return self.output(rows[-1], args[0].shape[0]).to(output.dtype) if "ffn_act" in edit else output

        undo.callback(self.module.register_forward_pre_hook(before, with_kwargs=True).remove)
        undo.callback(self.module.register_forward_hook(after).remove)


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    x, expert_NK, weight_NK = [*args, *kwargs.values()][:3]
    return x, expert_NK, weight_NK


def bank_of(ffn: nn.Module, d_model: int, dtype: torch.dtype, device: torch.device) -> ExpertBank:
    """The experts below a mixture, held against the module itself on random tokens.

    Raises:
        ViewError: there are none, or what they compute is not the formula.
    """
    stacked = [m for m in ffn.modules() if sum(p.ndim == 3 for p in m.parameters(recurse=False)) >= 2]
    if not stacked:
        raise ViewError(f"{type(ffn).__name__} has no router and no stacked experts")
    module = stacked[0]
    matrices = [p.detach() for p in module.parameters(recurse=False) if p.ndim == 3]
    activations = [m for m in module.children() if not list(m.parameters())] or [nn.SiLU()]
    n_experts = matrices[0].shape[0]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, d_model, generator=generator).to(device=device, dtype=dtype)
    expert_NK = (torch.arange(14, device=device) % n_experts).view(7, 2)
    weight_NK = torch.rand(7, 2, generator=generator).to(x) + 0.5
    wanted = module(x, expert_NK, weight_NK)
    for gate, up, down in _readings(matrices, d_model):
        for activation in activations:
            parts = ExpertParts(n_experts, 0.0, None if gate is None else Weight(gate), Weight(up), Weight(down))
            bank = ExpertBank(module, activation, parts)
            got = bank.output(bank.rows(x, expert_NK, weight_NK), len(x))
            if (got - wanted).norm() <= 1e-2 * wanted.norm() and _close(got, wanted, dtype):
                return bank
    raise ViewError(f"{type(module).__name__}: its experts are not W_down (act(W_gate x) * (W_up x))")


def _close(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    bound = {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 3e-2)
    return bool((got - wanted).norm() <= bound * wanted.norm())


def _readings(matrices: Sequence[Tensor], d_model: int) -> Any:
    """(gate, up, down) as [E, d_out, d_in], every way in which the shapes allow it."""
    down = next((m for m in reversed(matrices) if m.shape[1] == d_model), None)
    others = [m for m in matrices if m is not down and m.shape[2] == d_model]
    if down is None:
        return
    d_ff = down.shape[2]
    if len(others) == 1 and others[0].shape[1] == 2 * d_ff:
        halves = others[0].split(d_ff, dim=1)
        yield halves[0], halves[1], down
        yield halves[1], halves[0], down
    elif len(others) == 1 and others[0].shape[1] == d_ff:
        yield None, others[0], down
    elif len(others) == 2:
        yield others[0], others[1], down
        yield others[1], others[0], down
