"""Which experts a token visits, and with what weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from sparsekit.components.contracts import Build, ForwardContext, Router, Routing, attach_loss, wide
from sparsekit.spec.facts import Facts

FEW = 8  # choices of a token that are found, and compared with all experts, one by one where that is compiled


class LearnedRouter(Router):
    """Base of the routers that score experts by a projection of the token, with the two usual auxiliary losses.

    Load balance is E sum_e share_e mean(s_e), share_e the choices of e over all choices and s the scores divided by
    their sum: 1 where all is uniform. z is mean logsumexp(W x)^2. ``jitter`` multiplies the router's input
    by U(1 - jitter, 1 + jitter) in training.
    """

    class Params(Router.Params):
        load_balance: NonNegativeFloat = 0.01
        z_loss: NonNegativeFloat = 0.001
        jitter: float = Field(default=0.0, ge=0, lt=1)

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        self.gate = build.linear("router", build.d_model, self.n_experts)
        self.counter("load_balance_loss")
        self.counter("z_loss")
        self.counter("confidence")

    def logits(self, x_ND: Tensor, context: ForwardContext) -> Tensor:
        """[tokens, experts], in float32 or wider."""
        if self.training and self.params.jitter:
            x_ND = x_ND * torch.empty_like(x_ND).uniform_(1 - self.params.jitter, 1 + self.params.jitter)
        return widened(self.gate(x_ND, context))

    def with_losses(
        self, weight: Tensor, chosen_NE: Tensor, scores_NE: Tensor, logits_NE: Tensor, context: ForwardContext
    ) -> Tensor:
        """The weights, with the auxiliary losses attached in training.

        Args:
            weight: what is handed on, of any shape.
            chosen_NE: 1 where a token chose an expert, else 0.
        """
        n_tokens = max(scores_NE.shape[0], 1)  # 0 in a mixture inside a mixture, where nobody chose it
        self.record("confidence", scores_NE.amax(-1).sum() / n_tokens)
        if not self.training:
            return weight
        shares_E = (scores_NE / scores_NE.sum(-1, keepdim=True)).sum(0) / n_tokens
        chosen_E = chosen_NE.sum(0)
        balance = self.n_experts * (chosen_E / chosen_E.sum().clamp(min=1) * shares_E).sum()
        z = logits_NE.logsumexp(-1).square().sum() / n_tokens
        self.record("load_balance_loss", balance)
        self.record("z_loss", z)
        return attach_loss(weight, self.params.load_balance * balance + self.params.z_loss * z, context)


def check_k(k: int, facts: Facts) -> None:
    if k > facts["n_experts"]:
        raise ValueError(f"k ({k}) is above n_experts ({facts['n_experts']})")


def capacity(factor: float, n_tokens: int, n_experts: int) -> int:
    """ceil(factor N / E), where 1.1 * 30 / 11 is 3 and not just above it."""
    return math.ceil(round(factor * n_tokens / n_experts, 9))


def widened(logits: Tensor) -> Tensor:
    """In float32 or wider, which a softmax over experts needs."""
    return logits.to(wide(logits.dtype))


# Compiled, comparisons become part of the passes before and after, which scattering and gathering cannot; as they are
# written they would be three-dimensional.


def one_hot(expert_NK: Tensor, scores_NE: Tensor) -> Tensor:
    """[tokens, experts], 1 where a token chose an expert."""
    if _compared(expert_NK):
        return _matches(expert_NK, scores_NE).any(1).to(scores_NE.dtype)
    return torch.zeros_like(scores_NE).scatter(1, expert_NK, 1.0)


def of_chosen(scores_NE: Tensor, expert_NK: Tensor) -> Tensor:
    """The scores of the chosen experts, [tokens, choices]."""
    if _compared(expert_NK):
        return torch.where(_matches(expert_NK, scores_NE), scores_NE[:, None], 0.0).sum(-1)
    return scores_NE.gather(1, expert_NK)


def _compared(expert_NK: Tensor) -> bool:
    return expert_NK.shape[1] <= FEW and torch.compiler.is_compiling()


def _matches(expert_NK: Tensor, scores_NE: Tensor) -> Tensor:
    """[tokens, choices, experts]"""
    return expert_NK[..., None] == torch.arange(scores_NE.shape[1], device=scores_NE.device)


class TopK(LearnedRouter):
    """The k experts of highest score, s = softmax(W x) or sigmoid(W x), weighted by s (renormalised on request).

    ``n_groups`` splits the experts into groups, of which a token may use the ``k_groups`` whose two best scores have
    the largest sum. ``bias_rate`` balances without a loss: a bias joins the scores for the choice alone, and after
    each step moves by that rate, up for experts with less than their share of tokens and down for the rest.

    Source: Shazeer et al. 2017, arXiv 1701.06538; losses: arXiv 2101.03961, eq. 4, and 2202.08906, eq. 5; groups and
    bias: DeepSeek-AI 2024, arXiv 2412.19437, sec. 2.1.2
    """

    class Params(LearnedRouter.Params):
        k: PositiveInt
        score: Literal["softmax", "sigmoid"] = "softmax"
        renormalize: bool = False
        n_groups: PositiveInt = 1
        k_groups: PositiveInt = 1
        bias_rate: NonNegativeFloat = 0.0

    bias_E: Tensor

    @classmethod
    def check(cls, params: Any, facts: Facts) -> None:
        check_k(params.k, facts)
        n_experts = facts["n_experts"]
        if n_experts % params.n_groups:
            raise ValueError(f"n_experts ({n_experts}) is not divisible by n_groups ({params.n_groups})")
        if params.k_groups > params.n_groups:
            raise ValueError(f"k_groups ({params.k_groups}) is above n_groups ({params.n_groups})")
        reach = params.k_groups * n_experts // params.n_groups
        if params.k > reach:
            raise ValueError(f"k ({params.k}) is above the {reach} experts of k_groups ({params.k_groups}) groups")

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        self.experts_per_token = params.k
        if params.bias_rate:
            self.register_buffer("bias_E", torch.empty(self.n_experts))
            self.counter("chosen_E", self.n_experts)

    def reset_parameters(self) -> None:
        if self.params.bias_rate:
            self.bias_E.zero_()

    def after_step(self, counted: Mapping[str, Tensor]) -> None:
        if self.params.bias_rate:
            chosen_E = counted["chosen_E"]
            self.bias_E += self.params.bias_rate * torch.sign(chosen_E.mean() - chosen_E)

    def forward(self, x_ND: Tensor, context: ForwardContext) -> Routing:
        logits_NE = self.logits(x_ND, context)
        scores_NE = logits_NE.softmax(-1) if self.params.score == "softmax" else logits_NE.sigmoid()
        expert_NK = self._choose(scores_NE.detach())
        weight_NK = of_chosen(scores_NE, expert_NK)
        if self.params.renormalize:
            weight_NK = weight_NK / weight_NK.sum(-1, keepdim=True)
        chosen_NE = one_hot(expert_NK, scores_NE)
        if self.params.bias_rate:
            self.record("chosen_E", chosen_NE.sum(0) / max(x_ND.shape[0], 1))
        return Routing.per_token(expert_NK, self.with_losses(weight_NK, chosen_NE, scores_NE, logits_NE, context))

    def _choose(self, scores_NE: Tensor) -> Tensor:
        if self.params.bias_rate:
            scores_NE = scores_NE + self.bias_E
        if self.params.n_groups > 1:
            grouped_NGE = scores_NE.unflatten(1, (self.params.n_groups, -1))
            best_NG = grouped_NGE.topk(min(2, grouped_NGE.shape[-1]), dim=-1).values.sum(-1)
            open_NG = torch.zeros_like(best_NG).scatter(1, best_NG.topk(self.params.k_groups).indices, 1.0)
            shut_NGE = (open_NG == 0)[..., None].expand_as(grouped_NGE)
            scores_NE = grouped_NGE.masked_fill(shut_NGE, float("-inf")).flatten(1)
        return largest(scores_NE, self.params.k)


def largest(scores_NE: Tensor, k: int) -> Tensor:
    """Which are the k largest of each row, the largest first, [N, k]; at least k are above -inf.

    Compiled, a few are found one after the other in the pass that made the scores, which is hardly longer for it;
    torch's own way is two kernels more, .08 and .17 ms for 32,768 tokens (4 of 32, 8 of 64; H200).
    """
    if k > FEW or not torch.compiler.is_compiling():
        return scores_NE.topk(k, dim=-1).indices
    rest_NE = scores_NE.detach()
    experts_E = torch.arange(scores_NE.shape[1], device=scores_NE.device)
    found: list[Tensor] = []
    for _ in range(k):
        found.append(rest_NE.argmax(-1, keepdim=True))
        rest_NE = rest_NE.masked_fill(experts_E == found[-1], float("-inf"))
    return torch.cat(found, dim=-1)


class NoisyTopK(Router):
    """softmax over the k largest of h = W x + noise, noise ~ N(0, softplus(W_noise x)^2) in training.

    Auxiliary losses: w_importance CV(sum of weights an expert)^2 + w_load CV(expected number of its tokens)^2.

    Source: Shazeer et al. 2017, arXiv 1701.06538, eq. 3-11
    """

    class Params(Router.Params):
        k: PositiveInt
        w_importance: NonNegativeFloat = 0.1
        w_load: NonNegativeFloat = 0.1

    @classmethod
    def check(cls, params: Any, facts: Facts) -> None:
        check_k(params.k, facts)

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        self.experts_per_token = params.k
        self.gate = build.linear("router", build.d_model, self.n_experts)
        self.noise = build.linear("router", build.d_model, self.n_experts)
        self.counter("importance_loss")
        self.counter("load_loss")

    def forward(self, x_ND: Tensor, context: ForwardContext) -> Routing:
        clean_NE = widened(self.gate(x_ND, context))
        if not self.training:
            top_NK, expert_NK = clean_NE.topk(self.params.k, dim=-1)
            return Routing.per_token(expert_NK, top_NK.softmax(-1))
        spread_NE = F.softplus(widened(self.noise(x_ND, context)))
        noisy_NE = clean_NE + torch.randn_like(clean_NE) * spread_NE
        top_NK, expert_NK = noisy_NE.topk(self.params.k, dim=-1)
        weight_NK = top_NK.softmax(-1)
        importance_E = torch.zeros_like(clean_NE).scatter(1, expert_NK, weight_NK).sum(0)
        load_E = self._chance_of_choice(clean_NE, noisy_NE, spread_NE).sum(0)
        importance, load = squared_variation(importance_E), squared_variation(load_E)
        self.record("importance_loss", importance)
        self.record("load_loss", load)
        loss = self.params.w_importance * importance + self.params.w_load * load
        return Routing.per_token(expert_NK, attach_loss(weight_NK, loss, context))

    def _chance_of_choice(self, clean_NE: Tensor, noisy_NE: Tensor, spread_NE: Tensor) -> Tensor:
        """P(x, i): the chance that expert i is among the k, were only its own noise drawn again."""
        k = self.params.k
        if k == self.n_experts:
            return torch.ones_like(clean_NE)
        top_NK = noisy_NE.topk(k + 1, dim=-1).values
        inside_NE = noisy_NE >= top_NK[:, k - 1 : k]
        rival_NE = torch.where(inside_NE, top_NK[:, k : k + 1], top_NK[:, k - 1 : k])
        return torch.special.ndtr((clean_NE - rival_NE) / spread_NE)


def squared_variation(values: Tensor) -> Tensor:
    """Variance over squared mean, the variance that of the values themselves: 0 for a single one."""
    return values.var(correction=0) / (values.mean().square() + 1e-10)


class Switch(LearnedRouter):
    """The expert of highest probability; an expert takes its first ceil(capacity_factor N / E) tokens, in their order.

    A token beyond its expert's capacity passes through the residual alone; the share of those is counted.

    Source: Fedus, Zoph & Shazeer 2021, arXiv 2101.03961, eq. 1-6
    """

    batch_coupled = True

    class Params(LearnedRouter.Params):
        capacity_factor: PositiveFloat = 1.25
        z_loss: NonNegativeFloat = 0.0

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        self.experts_per_token = 1
        self.counter("dropped")

    def forward(self, x_ND: Tensor, context: ForwardContext) -> Routing:
        logits_NE = self.logits(x_ND, context)
        scores_NE = logits_NE.softmax(-1)
        weight_N1, expert_N1 = scores_NE.max(-1, keepdim=True)
        chosen_NE = one_hot(expert_N1, scores_NE)
        place_N1 = (chosen_NE.cumsum(0) * chosen_NE).sum(-1, keepdim=True)  # 1 for an expert's first token
        over_N1 = place_N1 > capacity(self.params.capacity_factor, x_ND.shape[0], self.n_experts)
        self.record("dropped", over_N1.sum(dtype=scores_NE.dtype) / max(x_ND.shape[0], 1))
        weight_N1 = self.with_losses(weight_N1, chosen_NE, scores_NE, logits_NE, context)
        return Routing.per_token(expert_N1.masked_fill(over_N1, self.n_experts), weight_N1, complete=False)


class ExpertChoice(Router):
    """Each expert takes the ceil(capacity_factor N / E) tokens that score it highest, s = softmax(W x), weighted by s.

    Loads are equal without a loss; but whether an earlier token is taken depends on later ones and on the batch.

    Source: Zhou et al. 2022, arXiv 2202.09368, eq. 1-2
    """

    causal = False
    batch_coupled = True

    class Params(Router.Params):
        capacity_factor: PositiveFloat = 2.0

    @classmethod
    def check(cls, params: Any, facts: Facts) -> None:
        if params.capacity_factor > facts["n_experts"]:
            raise ValueError(f"capacity_factor ({params.capacity_factor}) is above n_experts ({facts['n_experts']})")

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        self.experts_per_token = params.capacity_factor
        self.gate = build.linear("router", build.d_model, self.n_experts)

    def forward(self, x_ND: Tensor, context: ForwardContext) -> Routing:
        scores_NE = widened(self.gate(x_ND, context)).softmax(-1)
        n_tokens = x_ND.shape[0]
        taken = min(n_tokens, capacity(self.params.capacity_factor, n_tokens, self.n_experts))
        weight_EC, token_EC = scores_NE.T.topk(taken, dim=-1)
        expert_EC = torch.arange(self.n_experts, device=x_ND.device)[:, None].expand_as(token_EC)
        return Routing(expert_EC.reshape(-1), weight_EC.reshape(-1), token_EC.reshape(-1))


class TopP(LearnedRouter):
    """The fewest experts, likeliest first, whose softmax probabilities reach p together; weighted by them as they are.

    At most ``max_experts`` of them. Load balance counts each token's likeliest expert alone. Costs are counted as at
    initialisation, where all experts are equally likely; the counter ``experts`` tells how many a token really visits.

    Source: Yang et al. 2024, arXiv 2403.18926, eq. 5-6; Huang et al. 2024, arXiv 2403.07652, eq. 3
    """

    class Params(LearnedRouter.Params):
        p: float = Field(default=0.4, gt=0, le=1)
        max_experts: PositiveInt | None = None

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        self.slots = min(self.n_experts, params.max_experts or self.n_experts)
        self.experts_per_token = min(self.slots, math.ceil(params.p * self.n_experts))
        self.counter("experts")

    def forward(self, x_ND: Tensor, context: ForwardContext) -> Routing:
        logits_NE = self.logits(x_ND, context)
        scores_NE = logits_NE.softmax(-1)
        weight_NK, expert_NK = scores_NE.topk(self.slots, dim=-1)
        before_NK = weight_NK.cumsum(-1) - weight_NK  # what likelier experts hold already
        used_NK = (before_NK < self.params.p).detach()
        used_NK[:, 0] = True
        self.record("experts", used_NK.sum(dtype=scores_NE.dtype) / max(x_ND.shape[0], 1))
        first_NE = one_hot(expert_NK[:, :1], scores_NE)
        weight_NK = self.with_losses(weight_NK * used_NK, first_NE, scores_NE, logits_NE, context)
        return Routing.per_token(expert_NK.masked_fill(~used_NK, self.n_experts), weight_NK, complete=False)


class Hash(Router):
    """Experts fixed by a hash of the token's id: k of them, weighted 1/k; nothing is learned.

    Source: Roller et al. 2021, arXiv 2106.04426, sec. 3
    """

    class Params(Router.Params):
        k: PositiveInt = 1
        seed: int = Field(default=0, ge=0)

    @classmethod
    def check(cls, params: Any, facts: Facts) -> None:
        check_k(params.k, facts)

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        self.experts_per_token = params.k

    def forward(self, x_ND: Tensor, context: ForwardContext) -> Routing:
        if context.ids_BT is None:
            raise TypeError("the hash router needs context.ids_BT, the token ids; the decoder gives them")
        mixed_N = mix(context.ids_BT.reshape(-1) + (self.params.seed << 20))
        first_N = mixed_N % self.n_experts
        expert_NK = (first_N[:, None] + torch.arange(self.params.k, device=x_ND.device)) % self.n_experts
        weight_NK = torch.full(expert_NK.shape, 1.0 / self.params.k, dtype=x_ND.dtype, device=x_ND.device)
        return Routing.per_token(expert_NK, weight_NK)


def mix(values: Tensor) -> Tensor:
    """A 31-bit integer in which every bit depends on every bit of the 31 given."""
    mask = (1 << 31) - 1
    for multiplier in (0x45D9F3B, 0x27D4EB2D):
        values = ((values ^ (values >> 15)) * multiplier) & mask
    return values ^ (values >> 15)
