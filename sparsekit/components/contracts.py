"""What a component promises: the base classes, what it is built with, and what it sees in a forward.

Shapes, here and in every component: B batch, T queries, S keys, D d_model, H heads, G key-value heads, K head_dim,
F d_ff, N tokens (B·T), E experts, M assignments of a token to an expert, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sparsekit import spec
from sparsekit.spec.facts import Facts, check_children
from sparsekit.spec.slot import Choice

State = dict[str, Tensor]
ROLES = ("q", "k", "v", "o", "gate", "up", "down", "router", "head", "embed")


@dataclass(frozen=True)
class ExpertGroups:
    """Which rows of a batch belong to which expert.

    Either ``offsets_E`` (int32, the end of each expert's rows in a sorted [M, D] batch; rows past the last belong to
    none, of which there are none where ``complete``), or ``blend_GE``, by which each of G groups of rows [G, R, D] has
    one expert of its own, whose weights are sum_e blend[g, e] W_e; or ``expert``, one expert that owns every row.
    """

    offsets_E: Tensor | None = None
    expert: int = 0
    complete: bool = False
    blend_GE: Tensor | None = None


class Cache(Protocol):
    """Keys and values of earlier positions (see :mod:`sparsekit.model.cache`).

    Attributes:
        n_keys: how many keys ``extend`` gives back in this forward.
        ends_with_queries: the last of them is, in every sequence, that of its last query.
    """

    @property
    def n_keys(self) -> int: ...

    @property
    def ends_with_queries(self) -> bool: ...

    def extend(self, layer_index: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class ForwardContext:
    """What a component may need to know beside its input; a new need becomes a field here, never an argument.

    Attributes:
        positions_BT: position of each token, or None for 0 .. T-1.
        ids_BT: the token ids, for components that depend on them and not only on the stream.
        documents_BT: document of each token; attention stays within one. None where all is one document.
        prepared: what is worked out once a forward and shared by layers (masks), by key.
        cache: keys and values of earlier positions, when generating.
        progress: share of training done, in [0, 1].
        dtype: of the stream, for what is decided before a layer sees it.
        loss_scale: this micro-batch's share of the step's tokens, by which auxiliary losses scale their gradient.
        groups: inside experts, which rows belong to which.
        seq_len: told to a router: its rows are whole sequences of so many tokens, one after the other; None where they
            are not, as inside experts.
    """

    positions_BT: Tensor | None = None
    ids_BT: Tensor | None = None
    documents_BT: Tensor | None = None
    prepared: Mapping[str, Any] = field(default_factory=dict)
    cache: Cache | None = None
    dtype: torch.dtype = torch.float32
    progress: Tensor | float = 0.0
    loss_scale: Tensor | float = 1.0
    groups: ExpertGroups | None = None
    seq_len: int | None = None


@dataclass(frozen=True)
class Build:
    """What a component is built with: the model's sizes, and the two ways to make what is inside it.

    ``facts`` holds what the direct parent adds through :meth:`child`.
    """

    d_model: int
    max_seq_len: int
    layer_index: int
    n_layers: int
    linear_slot: Choice
    init_slot: Choice
    facts: Mapping[str, Any] = field(default_factory=dict)
    n_experts: int | None = None

    def linear(self, role: str, d_in: int, d_out: int, bias: bool = False) -> Linear:
        """A projection [..., d_in] -> [..., d_out], called as ``linear(x, context)``.

        What comes out is what the spec's ``linear`` slot says; inside experts it holds one matrix an expert. ``role``
        is one of q k v o gate up down router head, by which wrappers, initialisers and optimizers tell them apart.
        """
        made: Linear = self.child(self.linear_slot, role=role, d_in=d_in, d_out=d_out, bias=bias)
        return made

    def child(self, choice: Choice, **facts: Any) -> Any:
        """What fills a slot, told what it cannot know (a router its ``n_experts``, a qk_norm its ``width``)."""
        return choice.cls(choice.params, replace(self, facts=facts))

    def experts(self, n_experts: int | None) -> Build:
        """The same surroundings, in which every projection holds ``n_experts`` matrices."""
        return replace(self, n_experts=n_experts)


class Component(nn.Module):
    """Base of everything a model is made of.

    A module that owns parameters or buffers directly must define ``reset_parameters()``, which fills all of them;
    models are built on the meta device, where constructors write nothing.

    Attributes:
        causal: no output depends on a later token of its sequence.
        batch_coupled: outputs depend on other sequences of the batch (capacity limits do that).
        stateful: takes and returns state that flows across depth: ``forward(x, state, context) -> (y, state)``.
    """

    class Params(spec.Params):
        """What a spec may say of this component."""

    causal: bool = True
    batch_coupled: ClassVar[bool] = False
    stateful: ClassVar[bool] = False

    def __init__(self, params: Any, build: Build):
        super().__init__()
        self.params = params
        self.counters: tuple[str, ...] = ()

    @classmethod
    def check(cls, params: Any, facts: Facts) -> None:
        """Raises ValueError where the parameters do not fit their surroundings; runs without building anything.

        An override calls ``facts.child(params.slot, **facts)`` for each of its slots, with the facts it will build
        them with.
        """
        check_children(params, facts)

    def counter(self, name: str, *shape: int) -> None:
        """Adds a number (or an array) that forward writes by :meth:`record` and training collects and logs."""
        self.register_buffer(name, torch.zeros(shape), persistent=False)
        self.counters += (name,)

    def record(self, name: str, value: Tensor) -> None:
        """Overwrites a counter with this forward's value; safe under compilation and recomputation."""
        with torch.no_grad():
            getattr(self, name).copy_(value)

    def after_step(self, counted: Mapping[str, Tensor]) -> None:
        """Called in training after an update, with this component's counters averaged over the step's micro-batches.

        For state that moves by rule and not by gradient, such as a router's balancing bias.
        """

    def split(self, n: int) -> dict[str, int]:
        """How n processes share this component such that what they compute, each from the whole input, adds up.

        Returns:
            By the path of a projection below, 0 where each process holds a part of its outputs and 1 where of its
            inputs; by that of a parameter or a buffer, the dimension that is divided. All else is whole on each.

        Raises:
            ValueError: it cannot be divided, or not by n.
        """
        raise ValueError(f"{type(self).__name__} does not say how it could be divided")

    def active_parameters(self) -> int:
        """Parameters that one token passes through."""
        own = sum(p.numel() for p in self.parameters(recurse=False))
        return own + sum(active_parameters(child) for child in self.children())

    def flops_per_token(self, seq_len: int) -> float:
        """Forward floating-point operations for one token in a sequence of seq_len, a multiply-add counted as 2."""
        return sum(flops_per_token(child, seq_len) for child in self.children())


def active_parameters(module: nn.Module) -> int:
    """Of a component what it says; of a plain module its parameters and its children's."""
    if isinstance(module, Component):
        return module.active_parameters()
    own = sum(p.numel() for p in module.parameters(recurse=False))
    return own + sum(active_parameters(child) for child in module.children())


def flops_per_token(module: nn.Module, seq_len: int) -> float:
    """Of a component what it says; of a plain module its linear layers'."""
    if isinstance(module, Component):
        return module.flops_per_token(seq_len)
    own = 2.0 * module.weight.numel() if isinstance(module, nn.Linear) else 0.0
    return own + sum(flops_per_token(child, seq_len) for child in module.children())


class Init:
    """How weights are drawn, in place, from torch's global generator (which the model seeds by parameter name)."""

    class Params(spec.Params):
        pass

    def __init__(self, params: Any, build: Build):
        self.params, self.build = params, build

    def __call__(self, weight: Tensor, role: str) -> None:
        raise NotImplementedError


class Linear(Component):
    """A projection [..., d_in] -> [..., d_out] with a role; inside experts, one matrix an expert.

    A wrapper overrides :meth:`effective_weight` (masks, N:M) or :meth:`forward` (activation sparsity), and thereby
    reaches every projection of every component.

    Attributes:
        weight: [d_out, d_in], or [E, d_out, d_in] inside experts.
        divisible: some of the weight's rows make some of the outputs, and some of its columns, with the inputs that
            belong to them, a summand of each; then processes can share it.
    """

    divisible: ClassVar[bool] = False

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        facts = build.facts
        self.role: str = facts["role"]
        self.d_in: int = facts["d_in"]
        self.d_out: int = facts["d_out"]
        self.n_experts = build.n_experts
        stack = () if build.n_experts is None else (build.n_experts,)
        self.weight = nn.Parameter(torch.empty(*stack, self.d_out, self.d_in))
        self.bias = nn.Parameter(torch.empty(*stack, self.d_out)) if facts["bias"] else None
        self.init: Init = build.child(build.init_slot)

    def reset_parameters(self) -> None:
        self.init(self.weight, self.role)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def effective_weight(self) -> Tensor:
        """The weight that forward multiplies with, shaped as ``weight``."""
        return self.weight

    def only_weight(self) -> Tensor | None:
        """The weight where forward is a product with it and nothing besides, so that a kernel can take its place."""
        return None

    def forward(self, x: Tensor, context: ForwardContext | None = None) -> Tensor:
        raise NotImplementedError

    def beside(self, others: Sequence[Linear], x: Tensor, context: ForwardContext | None) -> list[Tensor]:
        """This projection of x and those of others; see :func:`projections`."""
        return [linear(x, context) for linear in (self, *others)]

    def active_parameters(self) -> int:
        own = sum(p.numel() for p in self.parameters(recurse=False))
        return own // (self.n_experts or 1)

    def flops_per_token(self, seq_len: int) -> float:
        return 2.0 * self.d_in * self.d_out

    def extra_repr(self) -> str:
        experts = "" if self.n_experts is None else f", n_experts={self.n_experts}"
        return f"{self.role}, {self.d_in} -> {self.d_out}, bias={self.bias is not None}{experts}"


class Norm(Component):
    """Normalises the last dimension, ``width`` wide (a fact; d_model where the parent says nothing)."""

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        self.width: int = build.facts.get("width", build.d_model)

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Activation(Component):
    """An elementwise non-linearity."""

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Position(Component):
    """Where a token stands, as seen by attention; built with the fact ``head_dim``."""

    def forward(self, q_BHTK: Tensor, k_BGTK: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class Attention(Component):
    """A token mixer: x [batch, seq, d_model] -> [batch, seq, d_model], the contribution before it is added.

    Attributes:
        caches: given ``context.cache``, it keeps its keys and values there; where an attention does not, generation
            runs the whole sequence again for each token.
        ragged: with a cache it goes by each sequence's own ``context.positions_BT``, and not by how many queries or
            keys there are; where an attention does not, only sequences that are equally long share a forward.
    """

    caches: bool = False
    ragged: bool = False

    def forward(self, x_BTD: Tensor, context: ForwardContext) -> Tensor:
        raise NotImplementedError

    def prepare(self, seq_len: int, device: torch.device, context: ForwardContext) -> tuple[str, Any] | None:
        """What may be worked out once a forward for all layers alike: (key, value) for ``context.prepared``."""
        return None

    def cache_bytes_per_token(self, element_size: int) -> int:
        """Bytes of keys and values that one token leaves in the cache of this layer."""
        return 0


class FeedForward(Component):
    """A map x [..., d_model] -> [..., d_model], the contribution before it is added.

    Attributes:
        token_wise: a token's output depends on that token, whatever its place and company. One that looks further (at
            a mean over the sequence) says False: it is no expert, and generation runs the whole sequence each time.
        grouped: all its parameters come from ``build.linear``, called as ``linear(x, context)``, so that it runs as
            grouped experts unedited; one that cannot says False, and a MoE builds and loops over copies of it.
    """

    token_wise: ClassVar[bool] = True
    grouped: ClassVar[bool] = True

    def silu_gated(self) -> tuple[Linear, Linear, Linear] | None:
        """(gate, up, down) where it is W_down (silu(W_gate x) * W_up x) and nothing besides, so that a kernel can take
        its place."""
        return None

    def stacked_experts(self) -> nn.Module | None:
        """The child whose projections hold one matrix an expert, called as ``child(x_MD, context)`` with rows sorted by
        expert and ``context.groups.offsets_E``, if there is one: processes can divide its experts among them.

        Raises:
            ValueError: there are experts, but not such a child.
        """
        return None

    def forward(self, x_BTD: Tensor, context: ForwardContext) -> Tensor:
        raise NotImplementedError


class Routing(NamedTuple):
    """Assignments of tokens to experts, M of them; M is known without looking at the data.

    An entry that is not used names expert E, one past the last.

    Attributes:
        expert_M: int64, the expert of each assignment.
        weight_M: by which the expert's output is multiplied before it is added to the token's.
        token_M: int64, its token; None where every token has equally many and they come token by token.
        complete: every entry is used.
    """

    expert_M: Tensor
    weight_M: Tensor
    token_M: Tensor | None = None
    complete: bool = True

    @classmethod
    def per_token(cls, expert_NK: Tensor, weight_NK: Tensor, complete: bool = True) -> Routing:
        """The usual case: K slots for each of N tokens."""
        return cls(expert_NK.reshape(-1), weight_NK.reshape(-1), None, complete)


class Router(Component):
    """Sends tokens to experts; built with the fact ``n_experts``.

    Attributes:
        experts_per_token: how many experts a token visits (in expectation, where it varies).
    """

    experts_per_token: float

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        self.n_experts: int = build.facts["n_experts"]

    def forward(self, x_ND: Tensor, context: ForwardContext) -> Routing:
        raise NotImplementedError


class Residual(Component):
    """How a layer's norms, sub-layers and the stream combine; built with the fact ``norm``, the block's norm slot."""

    def forward(
        self, x_BTD: Tensor, state: State, context: ForwardContext, attention: Attention, ffn: FeedForward
    ) -> tuple[Tensor, State]:
        raise NotImplementedError


class Embedding(Component):
    """Token ids [batch, seq] -> [batch, seq, d_model]; built with the fact ``vocab_size``."""

    def forward(self, ids_BT: Tensor, context: ForwardContext) -> Tensor:
        raise NotImplementedError

    def unembed(self, x_BTD: Tensor) -> Tensor:
        """Logits [batch, seq, vocab] by the same table, where embeddings are tied."""
        raise NotImplementedError


def projections(x: Tensor, context: ForwardContext | None, first: Linear, *others: Linear) -> list[Tensor]:
    """``[linear(x, context) for linear in …]``, for those that read one input and may be worked out as one product."""
    return first.beside(others, x, context)


def divided(name: str, size: int, n: int) -> None:
    """Demands that n processes can share evenly what there is ``size`` of.

    Raises:
        ValueError: they cannot.
    """
    if size % n:
        raise ValueError(f"{name} ({size}) cannot be divided by {n}")


def below(path: str, parts: Mapping[str, int]) -> dict[str, int]:
    """What a child's :meth:`Component.split` says, as its parent says it."""
    return {f"{path}.{name}": dim for name, dim in parts.items()}


def run(sublayer: Component, x: Tensor, state: State, context: ForwardContext) -> tuple[Tensor, State]:
    """Calls a sub-layer, with state if it declares any: (its output, the state after it)."""
    if sublayer.stateful:
        y, state = sublayer(x, state, context)
        return y, state
    return sublayer(x, context), state


def compute_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What a matrix product of tensors of a dtype runs in: autocast's where that is on."""
    # not is_autocast_available, in which torch 2.11's compiler breaks a graph
    autocasts = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if autocasts else dtype


def constant(function: Callable[..., bool]) -> Callable[..., bool]:
    """``torch.compiler.assume_constant_result``, which loads the whole compiler, a second of a start, to set this."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def wide(dtype: torch.dtype) -> torch.dtype:
    """What numbers of a dtype are added up in: float32, or float64 where they are."""
    return torch.promote_types(dtype, torch.float32)


class _AttachLoss(torch.autograd.Function):
    """Identity on an activation, whose backward also gives a loss its gradient."""

    @staticmethod
    def forward(activation: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        return activation.view_as(activation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (scale,) = ctx.saved_tensors
        return gradient, scale, None


def attach_loss(activation: Tensor, loss: Tensor, context: ForwardContext) -> Tensor:
    """The activation unchanged, such that minimising the model's loss minimises this one too.

    The gradient of ``loss`` is ``context.loss_scale`` whatever becomes of the activation downstream, so a step of
    several micro-batches weighs it as it weighs the cross-entropy, and recomputation does not count it twice.
    ``loss`` already carries its coefficient.
    """
    scale = torch.as_tensor(context.loss_scale, dtype=loss.dtype, device=loss.device)
    out: Tensor = _AttachLoss.apply(activation, loss, scale)  # type: ignore[no-untyped-call]
    return out


def counters(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """(module name, counter name, value) of every counter in a model."""
    for name, module in model.named_modules():
        for counter in getattr(module, "counters", ()):
            yield name, counter, getattr(module, counter)
