"""BlockFFN's router: as many experts a token as its scores say, and losses that make neighbours want the same ones."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from sparsekit.components.contracts import Build, ForwardContext, Router, Routing, attach_loss
from sparsekit.components.routers import widened
from sparsekit.errors import SparsekitError
from sparsekit.spec.facts import Facts
from sparsekit.spec.slot import Choice, Slot, pick


class BlockFFN(Router):
    """Every expert whose score a = relu(W x) is above 0, weighted by RMSNorm(a): no k, and no softmax.

    Of p = a / sum(a), in chunks of ``chunk`` consecutive tokens: chunk loss 1 - mean over chunks and experts of
    prod over the chunk's tokens of (1 - p), the chance that a chunk needs an expert. Of the scores r = W x before the
    relu: locality loss BCE(sigmoid(s r_t), sigmoid(s r_t-1)), s ``sharpness``, over neighbours. Both are attached with
    their coefficients, whose defaults are this package's. Counters tell the share of experts that a token, and that a
    whole chunk, leaves out.

    The paper's experts are {"type": "mlp", "activation": "silu"}. ``max_experts`` keeps a token's largest scores alone,
    which bounds the rows that are laid out for it. Costs are counted as at initialisation, where every second score is
    above 0. Shapes: x [N, D] of whole sequences -> N min(E, max_experts) assignments, those of no expert naming E.

    Raises:
        SparsekitError: in training with losses inside an expert, where rows are no sequences.

    Source: Song et al. 2025, arXiv 2507.08771 (the router, and the losses for chunk-level sparsity)
    """

    class Params(Router.Params):
        norm: Annotated[Choice, Slot("norm")] = pick("rmsnorm")
        chunk: PositiveInt = 8
        chunk_loss: NonNegativeFloat = 0.01
        locality_loss: NonNegativeFloat = 0.001
        sharpness: PositiveFloat = 4.0
        max_experts: PositiveInt | None = None

    @classmethod
    def check(cls, params: Any, facts: Facts) -> None:
        facts.child(params.norm, width=facts["n_experts"])

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        self.slots = min(self.n_experts, params.max_experts or self.n_experts)
        self.experts_per_token = min(self.slots, self.n_experts / 2)
        self.gate = build.linear("router", build.d_model, self.n_experts)
        self.norm = build.child(params.norm, width=self.n_experts)
        for name in ("chunk_loss", "locality_loss", "token_sparsity", "chunk_sparsity"):
            self.counter(name)

    def forward(self, x_ND: Tensor, context: ForwardContext) -> Routing:
        logits_NE = widened(self.gate(x_ND, context))
        scores_NE = logits_NE.relu()
        weight_NE = self.norm(scores_NE.to(self.gate.weight.dtype)).to(scores_NE.dtype)
        self.record("token_sparsity", (scores_NE == 0).sum() / max(scores_NE.numel(), 1))
        if self.training:
            weight_NE = self._with_losses(weight_NE, logits_NE, scores_NE, context)
        used_NE = (scores_NE > 0).detach()
        expert_NE = torch.arange(self.n_experts, device=x_ND.device).expand_as(scores_NE)
        expert_NE = expert_NE.masked_fill(~used_NE, self.n_experts)
        if self.slots == self.n_experts:
            return Routing.per_token(expert_NE, weight_NE, complete=False)
        best_NK = scores_NE.detach().topk(self.slots, dim=-1).indices
        return Routing.per_token(expert_NE.gather(1, best_NK), weight_NE.gather(1, best_NK), complete=False)

    def _with_losses(self, weight: Tensor, logits_NE: Tensor, scores_NE: Tensor, context: ForwardContext) -> Tensor:
        if not (self.params.chunk_loss or self.params.locality_loss):
            return weight
        if context.seq_len is None:
            raise SparsekitError(
                "blockffn's losses go by which tokens are neighbours, which a mixture inside an expert cannot tell; "
                "set chunk_loss and locality_loss to 0 there"
            )
        shape = (-1, context.seq_len)
        chunk, inside = chunk_losses(scores_NE.unflatten(0, shape), self.params.chunk)
        locality = locality_loss(logits_NE.unflatten(0, shape) * self.params.sharpness)
        self.record("chunk_loss", chunk)
        self.record("chunk_sparsity", 1 - inside)
        self.record("locality_loss", locality)
        return attach_loss(weight, self.params.chunk_loss * chunk + self.params.locality_loss * locality, context)


def chunk_losses(scores_BTE: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """(1 - mean prod (1 - p), the share of experts that a chunk needs); a sequence's last chunk may be short."""
    p_BTE = scores_BTE / scores_BTE.sum(-1, keepdim=True).clamp(min=1e-9)
    pad = -p_BTE.shape[1] % chunk  # with 0, which needs nothing
    p_BCLE = F.pad(p_BTE, (0, 0, 0, pad)).unflatten(1, (-1, chunk))
    return 1 - (1 - p_BCLE).prod(2).mean(), (p_BCLE > 0).any(2).to(p_BTE.dtype).mean()


def locality_loss(logits_BTE: Tensor) -> Tensor:
    """BCE of each token's sigmoid(z) against that of the token before it, mean over tokens that have one."""
    now, before = logits_BTE[:, 1:], logits_BTE[:, :-1]
    total: Tensor = (F.softplus(now) - before.sigmoid() * now).sum()
    return total / max(now.numel(), 1)
