"""Monet: n^2 experts made of 2 n parts, gated by product keys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from sparsekit.components.contracts import Build, FeedForward, ForwardContext, attach_loss
from sparsekit.components.routers import widened
from sparsekit.spec.facts import Facts
from sparsekit.spec.slot import Choice, Slot, pick


class ProductKeys(FeedForward):
    """Base of both decompositions: gates g1, g2 [N, heads, n], of which expert (i, j) has g1_hi g2_hj at head h.

    Scores z = W x, batch-normalised to z' over tokens and keys, one statistic a head. Those with
    z' >= min(max z', quantile(1 - k / n) of the normal) are kept, some k of n, and g is the softmax of the kept z.
    In training the statistics are the micro-batch's, for which this is neither causal nor apart from other sequences;
    in eval they are running means, moved after each step. Losses: uniformity -mean log (mean over tokens of g) and
    ambiguity mean (1 - max g).
    """

    causal = False
    batch_coupled = True
    grouped = False  # statistics are of all tokens

    class Params(FeedForward.Params):
        n: PositiveInt = Field(examples=[16])
        d_expert: PositiveInt = Field(examples=[4])
        n_heads: PositiveInt = 4
        k: PositiveInt = 8
        activation: Annotated[Choice, Slot("activation")] = pick("relu2")
        uniformity: NonNegativeFloat = 0.001
        ambiguity: NonNegativeFloat = 0.001
        momentum: float = Field(default=0.1, gt=0, le=1)

    running_mean: Tensor
    running_var: Tensor

    @classmethod
    def check(cls, params: Any, facts: Facts) -> None:
        if params.k > params.n:
            raise ValueError(f"k ({params.k}) is above n ({params.n})")
        facts.child(params.activation)

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        self.threshold = math.sqrt(2) * float(torch.erfinv(torch.tensor(1 - 2 * params.k / params.n, device="cpu")))
        self.gates = nn.ModuleList(build.linear("router", build.d_model, params.n_heads * params.n) for _ in range(2))
        self.activation = build.child(params.activation)
        shape = 2, params.n_heads
        self.register_buffer("running_mean", torch.empty(shape))
        self.register_buffer("running_var", torch.empty(shape))
        self.counter("batch_mean", *shape)
        self.counter("batch_var", *shape)
        self.counter("uniformity_loss")
        self.counter("ambiguity_loss")

    def reset_parameters(self) -> None:
        self.running_mean.zero_()
        self.running_var.fill_(1.0)

    def after_step(self, counted: Mapping[str, Tensor]) -> None:
        self.running_mean.lerp_(counted["batch_mean"].to(self.running_mean.dtype), self.params.momentum)
        self.running_var.lerp_(counted["batch_var"].to(self.running_var.dtype), self.params.momentum)

    def route(self, x_ND: Tensor, context: ForwardContext) -> Tensor:
        """Both gates, [2, tokens, heads, n], with the losses attached in training."""
        keys = [widened(gate(x_ND, context)).unflatten(1, (-1, self.params.n)) for gate in self.gates]
        z_2NHn = torch.stack(keys)
        normal_2NHn = self._normalised(z_2NHn.detach())
        least = normal_2NHn.amax(-1, keepdim=True).clamp(max=self.threshold)
        gates_2NHn = z_2NHn.masked_fill(normal_2NHn < least, float("-inf")).softmax(-1)
        return self._with_losses(gates_2NHn, context) if self.training else gates_2NHn

    def _normalised(self, z_2NHn: Tensor) -> Tensor:
        """z' for choosing alone, through which no gradient goes."""
        mean_2H, var_2H = self.running_mean, self.running_var
        if self.training and z_2NHn.shape[1]:  # 0 tokens in a mixture whose expert nobody chose
            var_2H, mean_2H = torch.var_mean(z_2NHn, dim=(1, 3), correction=0)
            self.record("batch_mean", mean_2H)
            self.record("batch_var", var_2H)
        return (z_2NHn - mean_2H[:, None, :, None]) / (var_2H[:, None, :, None] + 1e-5).sqrt()

    def _with_losses(self, gates_2NHn: Tensor, context: ForwardContext) -> Tensor:
        n_tokens = max(gates_2NHn.shape[1], 1)
        share_2Hn = gates_2NHn.sum(1) / n_tokens
        uniformity = -share_2Hn.clamp(min=1e-9).log().mean()
        ambiguity = (1 - gates_2NHn.amax(-1)).sum(1).mean() / n_tokens
        self.record("uniformity_loss", uniformity)
        self.record("ambiguity_loss", ambiguity)
        loss = self.params.uniformity * uniformity + self.params.ambiguity * ambiguity
        return attach_loss(gates_2NHn, loss, context)

    def forward(self, x_BTD: Tensor, context: ForwardContext) -> Tensor:
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        g1_NHn, g2_NHn = self.route(x_ND, context).to(x_ND.dtype).unbind()
        return self.experts(x_ND, g1_NHn, g2_NHn, context).view_as(x_BTD)

    def experts(self, x_ND: Tensor, g1_NHn: Tensor, g2_NHn: Tensor, context: ForwardContext) -> Tensor:
        """sum over heads and experts (i, j) of g1_hi g2_hj E_ij(x), [N, D], in O(n)."""
        raise NotImplementedError

    def hidden(self, up: nn.Module, x_ND: Tensor, context: ForwardContext) -> Tensor:
        """Hidden units of the parts, [N, n, units]."""
        return self.activation(up(x_ND, context)).unflatten(-1, (self.params.n, -1))

    def flops_per_token(self, seq_len: int) -> float:
        mixing = 4.0 * self.params.n_heads * self.params.n * self.params.d_expert
        return super().flops_per_token(seq_len) + mixing


class Monet(ProductKeys):
    """y = sum over heads h and n^2 experts (i, j) of g1_hi g2_hj (V_j act(U_i x + b_i) + c_j): horizontal experts.

    Worked out as sum_j V_j (sum_h g2_hj (sum_i g1_hi act(U_i x + b_i))) + sum_hj g2_hj c_j. Gates as in ProductKeys.
    With ``n`` 512 there are 262144 experts of ``d_expert`` hidden units in 2 n d_expert d_model weights.

    Shapes: [batch, seq, d_model] -> same.

    Source: Park et al. 2024, arXiv 2412.04139 (horizontal expert decomposition; both losses)
    """

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        self.up = build.linear("up", build.d_model, params.n * params.d_expert, True)
        self.down = build.linear("down", params.n * params.d_expert, build.d_model)
        self.c = nn.Parameter(torch.empty(params.n, build.d_model))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.c)

    def experts(self, x_ND: Tensor, g1_NHn: Tensor, g2_NHn: Tensor, context: ForwardContext) -> Tensor:
        mixed_NHm = g1_NHn @ self.hidden(self.up, x_ND, context)
        spread_Nnm = g2_NHn.mT @ mixed_NHm
        y_ND: Tensor = self.down(spread_Nnm.flatten(1), context)
        return y_ND + g2_NHn.sum(1) @ self.c


class MonetVertical(ProductKeys):
    """As monet, with expert (i, j) = V_ij act(U_ij x + b_ij) + c_ij stacked of halves: vertical experts.

    U_ij = [U1_i; U2_j], V_ij = [V11_i V12_i; V21_j V22_j], and b_ij and c_ij alike: the upper half of the output is
    V11_i act(U1_i x + b1_i) + V12_i act(U2_j x + b2_j) + c1_i, the lower one has j's V21, V22 and c2.

    Shapes: [batch, seq, d_model] -> same; d_model and ``d_expert`` are even.

    Source: Park et al. 2024, arXiv 2412.04139 (vertical expert decomposition)
    """

    @classmethod
    def check(cls, params: Any, facts: Facts) -> None:
        for name, size in (("d_expert", params.d_expert), ("d_model", facts.d_model)):
            if size % 2:
                raise ValueError(f"{name} ({size}) must be even, as experts are stacked of halves")
        super().check(params, facts)

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        units, half = params.n * params.d_expert // 2, build.d_model // 2
        self.up1, self.up2 = (build.linear("up", build.d_model, units, True) for _ in range(2))
        self.down11, self.down12, self.down21, self.down22 = (build.linear("down", units, half) for _ in range(4))
        self.c1, self.c2 = (nn.Parameter(torch.empty(params.n, half)) for _ in range(2))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.c1)
        nn.init.zeros_(self.c2)

    def experts(self, x_ND: Tensor, g1_NHn: Tensor, g2_NHn: Tensor, context: ForwardContext) -> Tensor:
        one_Nnm, two_Nnm = self.hidden(self.up1, x_ND, context), self.hidden(self.up2, x_ND, context)
        sum1_Nn1, sum2_Nn1 = g1_NHn.sum(1)[..., None], g2_NHn.sum(1)[..., None]  # the other gate sums to 1
        cross1_Nnm, cross2_Nnm = g1_NHn.mT @ (g2_NHn @ two_Nnm), g2_NHn.mT @ (g1_NHn @ one_Nnm)
        upper = self.down11((sum1_Nn1 * one_Nnm).flatten(1), context) + self.down12(cross1_Nnm.flatten(1), context)
        lower = self.down21(cross2_Nnm.flatten(1), context) + self.down22((sum2_Nn1 * two_Nnm).flatten(1), context)
        return torch.cat((upper + sum1_Nn1[..., 0] @ self.c1, lower + sum2_Nn1[..., 0] @ self.c2), dim=-1)
