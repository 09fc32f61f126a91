"""Every registered entry keeps its contract, and the contract kit notices when one does not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import PositiveInt
from torch import nn

from sparsekit.checks import Subject, checks_of, elsewhere
from sparsekit.components import attention, contracts, feedforward, kernels, norms, positions, routers
from sparsekit.components.contracts import (
    Activation,
    Embedding,
    FeedForward,
    ForwardContext,
    Init,
    Linear,
    Norm,
    Router,
    Routing,
)
from sparsekit.components.linears import PlainLinear
from sparsekit.registry import KINDS, registry
from sparsekit.testing import MODEL_KINDS, ContractError, check_component

# where no parameter alone is required, but one of several
PARAMS = {("tokenizer", "bpe"): {"vocab_size": 300}}
ENTRIES = [(kind, name) for kind in KINDS for name in registry(kind).names()]


@pytest.mark.parametrize(("kind", "name"), ENTRIES, ids=[f"{kind}-{name}" for kind, name in ENTRIES])
def test_every_entry_keeps_its_contract(kind: str, name: str) -> None:
    check_component(kind, name, PARAMS.get((kind, name)))


ELSEWHERE = [name for kind, name in ENTRIES if kind in MODEL_KINDS and elsewhere(registry(kind).get(name))]


def test_what_cannot_be_trained_on_the_cpu_is_known() -> None:
    """Of these the rest of the contract is held on a GPU, below; of no other is a check left out."""
    assert set(ELSEWHERE) <= {"flex", "varlen", "flash", "xformers"}
    held = {name: {check.__name__ for check in checks_of(subject)} for name, subject in _kernels().items()}
    assert {"causality", "documents", "shapes", "bfloat16"} <= held["flex"], "its forward runs on the CPU"
    assert not {"gradients", "compilation"} & held["flex"]
    assert "shapes" not in held["varlen"]
    assert {"gradients", "compilation", "cache"} <= held["sdpa"]


def _kernels() -> dict[str, Subject]:
    names = registry("kernel").names()
    return {name: Subject("kernel", name, registry("kernel").get(name), {"type": name}, None) for name in names}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", registry("kernel").names())
def test_kernels_keep_the_contract_on_a_gpu(name: str) -> None:
    """In float32, and in bfloat16 where that is refused."""
    device, cls = torch.device("cuda"), registry("kernel").get(name)
    dtype = torch.float32 if elsewhere(cls, device) is None else torch.bfloat16
    reason = elsewhere(cls, device, dtype)
    if reason is not None and "needs the package" in reason:
        pytest.skip(reason)
    assert reason is None
    check_component("kernel", name, device=device, dtype=dtype)


REPRESENTATIVES = {
    "attention": "gqa", "kernel": "eager", "normalizer": "softmax", "position": "rope", "rope_scaling": "yarn",
    "ffn": "moe", "activation": "gelu", "router": "top_k", "norm": "rmsnorm", "residual": "pre_norm",
    "linear": "plain", "embedding": "token", "init": "normal",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODEL_KINDS)
def test_real_compilation(kind: str) -> None:
    check_component(kind, REPRESENTATIVES[kind], compile_backend="inductor")


VARIANTS = [
    ("attention", "mha", {"n_heads": 4, "qk_norm": "rmsnorm", "window": 3, "bias": False}),
    ("attention", "gqa", {"n_heads": 6, "n_kv_heads": 3, "head_dim": 10, "kernel": "eager"}),
    ("attention", "mqa", {"n_heads": 4, "position": "none", "qk_norm": "layernorm"}),
    ("ffn", "mlp", {"d_ff": 20, "bias": True, "activation": "relu"}),
    ("ffn", "swiglu", {"d_ff": 20, "bias": True}),
    ("ffn", "moe", {"shared_expert": {"type": "swiglu", "d_ff": 24}, "shared_combine": "mean"}),
    ("ffn", "moe", {"dispatch": "loop", "expert": {"type": "mlp", "d_ff": 24, "bias": True}}),
    ("router", "top_k", {"k": 1}),
    ("router", "top_k", {"k": 3, "score": "sigmoid", "renormalize": True}),
    ("norm", "layernorm", {"bias": False}),
    ("residual", "pre_norm", {"scale": 0.25}),
    ("embedding", "token", {"scale": 12.0}),
]


@pytest.mark.parametrize(
    ("kind", "name", "params"), VARIANTS, ids=[f"{k}-{n}-{i}" for i, (k, n, _) in enumerate(VARIANTS)]
)
def test_other_parameters_keep_the_contract_too(kind: str, name: str, params: dict[str, Any]) -> None:
    check_component(kind, name, params)


# --- A component that is right, from outside the package: nothing is registered, nothing is left behind.


class Squared(FeedForward):
    """FFN(x) = W_down relu(W_up x)^2."""

    class Params(FeedForward.Params):
        d_ff: PositiveInt

    def __init__(self, params: Any, build: contracts.Build):
        super().__init__(params, build)
        self.up = build.linear("up", build.d_model, params.d_ff)
        self.down = build.linear("down", params.d_ff, build.d_model)

    def forward(self, x_BTD: Any, context: Any) -> Any:
        return self.down(self.up(x_BTD, context).relu().square(), context)


def test_a_class_that_is_not_registered_is_checked_and_not_left_behind() -> None:
    before = registry("ffn").names()
    check_component("ffn", Squared)
    check_component("ffn", Squared, {"d_ff": 16})
    assert registry("ffn").names() == before


def test_a_registered_class_is_found_by_its_class() -> None:
    check_component("norm", norms.RMSNorm, {"eps": 1e-3})


# --- Components that are wrong, each in one way.


class NoDocstring(Squared):
    pass


NoDocstring.__doc__ = None


class NoParams(Squared):
    """Params that do not derive."""

    Params = dict  # type: ignore[assignment]


class NeedsWhatNobodyKnows(Squared):
    """A required parameter without an example."""

    class Params(Squared.Params):
        flux: float


class UnusedParameter(Squared):
    """Owns a parameter that forward never reads."""

    def __init__(self, params: Any, build: contracts.Build):
        super().__init__(params, build)
        self.spare = build.linear("gate", build.d_model, 4)


class NoReset(Norm):
    """y = weight x, and nothing fills the weight."""

    def __init__(self, params: Any, build: contracts.Build):
        super().__init__(params, build)
        self.weight = nn.Parameter(torch.empty(self.width))

    def forward(self, x: Any) -> Any:
        return x * self.weight


class HalfReset(NoReset):
    """y = weight x + shift, of which the shift is forgotten."""

    def __init__(self, params: Any, build: contracts.Build):
        super().__init__(params, build)
        self.register_buffer("shift", torch.zeros(self.width))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Any) -> Any:
        return x * self.weight + self.shift


class Clock(NoReset):
    """Weights that no seed governs."""

    ticks = 0

    def reset_parameters(self) -> None:
        Clock.ticks += 1
        nn.init.constant_(self.weight, Clock.ticks)


class OneSeed(Init):
    """Draws the same whatever the seed."""

    def __call__(self, weight: Any, role: str) -> None:
        torch.manual_seed(0)
        nn.init.normal_(weight)


class Scalar(Norm):
    """y = gain x, the gain a tensor of no dimension."""

    def __init__(self, params: Any, build: contracts.Build):
        super().__init__(params, build)
        self.gain = nn.Parameter(torch.empty(()))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.gain)

    def forward(self, x: Any) -> Any:
        return self.gain * x


class OnCPU(Norm):
    """A buffer that ignores the device it is built on."""

    def __init__(self, params: Any, build: contracts.Build):
        super().__init__(params, build)
        self.register_buffer("table", torch.ones(self.width, device="cpu"))

    def reset_parameters(self) -> None:
        self.table.fill_(1)

    def forward(self, x: Any) -> Any:
        return x * self.table


class Summed(Squared):
    """A shape that the residual stream broadcasts without a word."""

    def forward(self, x_BTD: Any, context: Any) -> Any:
        return super().forward(x_BTD, context).sum(-1, keepdim=True)


class NotANumber(Activation):
    """0 / 0."""

    def forward(self, x: Any) -> Any:
        return x / (x - x)


class InfiniteGradient(Activation):
    """sqrt(x) where x > 0, else 0: of infinite slope at 0."""

    def forward(self, x: Any) -> Any:
        return (x * (x > 0)).sqrt()


class Detached(Norm):
    """No gradient comes through."""

    def forward(self, x: Any) -> Any:
        return x.detach()


class Leaking(attention.MultiHead):
    """Adds the mean over all positions, later ones too."""

    def forward(self, x_BTD: Any, context: Any) -> Any:
        return super().forward(x_BTD, context) + x_BTD.mean(1, keepdim=True)


class LeakingInTraining(attention.MultiHead):
    """Looks one token ahead, but only while training."""

    def forward(self, x_BTD: Any, context: Any) -> Any:
        y = super().forward(x_BTD, context)
        return y + x_BTD.roll(-1, 1) if self.training else y


class Deaf(kernels.SDPA):
    """Ignores documents and windows."""

    def prepare(self, *args: Any) -> Any:
        return None


class DeafAbroad(Deaf):
    """As Deaf, with gradients on a GPU only: what its forward shows is shown here."""

    gradients = ("cuda",)


class Forgetful(attention.MultiHead):
    """Says that it caches, and sees only the newest keys."""

    def forward(self, x_BTD: Any, context: Any) -> Any:
        return super().forward(x_BTD, ForwardContext())


class OneLength(attention.MultiHead):
    """Takes all sequences of a cache to be as long as the first, and says otherwise."""

    def forward(self, x_BTD: Any, context: Any) -> Any:
        first_BT = None if context.positions_BT is None else context.positions_BT[:1]
        return super().forward(x_BTD, replace(context, positions_BT=first_BT))


class ByPlace(positions.NoPosition):
    """Numbers positions from 0 in each forward, whatever the context says."""

    def forward(self, q_BHTK: Any, k_BGTK: Any, context: Any) -> Any:
        turn = torch.arange(q_BHTK.shape[2])[:, None].cos()
        return q_BHTK * turn, k_BGTK * turn


class BatchNorm(Norm):
    """Subtracts the mean over the batch."""

    def forward(self, x: Any) -> Any:
        return x - x.mean(0, keepdim=True)


class Shifted(Squared):
    """Adds the token before: causal, but not token-wise."""

    grouped = False

    def forward(self, x_BTD: Any, context: Any) -> Any:
        return super().forward(x_BTD + nn.functional.pad(x_BTD, (0, 0, 1, -1)), context)


class SaysSo(Shifted):
    """The same, and says so: no expert, and held to all else."""

    token_wise = False


class Noisy(Squared):
    """Draws noise in eval mode as well."""

    def forward(self, x_BTD: Any, context: Any) -> Any:
        return super().forward(x_BTD + torch.randn_like(x_BTD), context)


class Unsaved(Squared):
    """A random projection that state_dict does not hold."""

    grouped = False

    def __init__(self, params: Any, build: contracts.Build):
        super().__init__(params, build)
        self.register_buffer("projection", torch.empty(build.d_model), persistent=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.projection)

    def forward(self, x_BTD: Any, context: Any) -> Any:
        return super().forward(x_BTD * self.projection, context)


class Branching(Squared):
    """Looks at a value on the host, which breaks the graph."""

    def forward(self, x_BTD: Any, context: Any) -> Any:
        y = super().forward(x_BTD, context)
        return y if float(y.detach().sum()) > 0 else -y


class CompiledOtherwise(Squared):
    """Computes something else when compiled."""

    def forward(self, x_BTD: Any, context: Any) -> Any:
        y = super().forward(x_BTD, context)
        return 2 * y if torch.compiler.is_compiling() else y


class WideOnly(Norm):
    """Returns float32 whatever comes in."""

    def forward(self, x: Any) -> Any:
        return x.float()


class WideHead(PlainLinear):
    """Logits in float32 whatever comes in."""

    def forward(self, x: Any, context: Any = None) -> Any:
        y = super().forward(x, context)
        return y.float() if self.role == "head" else y


class Coarse(Norm):
    """Loses all but the sign in bfloat16."""

    def forward(self, x: Any) -> Any:
        return x.sign() if x.dtype == torch.bfloat16 else x


class OwnWeight(Squared):
    """Says that it can be grouped, with a weight that does not come from build.linear."""

    def __init__(self, params: Any, build: contracts.Build):
        super().__init__(params, build)
        self.gain = nn.Parameter(torch.empty(build.d_model))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.gain)

    def forward(self, x_BTD: Any, context: Any) -> Any:
        return super().forward(x_BTD * self.gain, context)


class NoContext(Squared):
    """Says that it can be grouped, and calls its projections without the context."""

    def forward(self, x_BTD: Any, context: Any) -> Any:
        return self.down(self.up(x_BTD).relu())


class Centred(Squared):
    """Mixes the rows it is given, which inside experts are another set for each way of dispatching."""

    causal = False
    batch_coupled = True

    def forward(self, x_BTD: Any, context: Any) -> Any:
        return super().forward(x_BTD - x_BTD.mean(0, keepdim=True), context)


class OutOfRange(routers.TopK):
    """Names an expert that does not exist."""

    def forward(self, x_ND: Any, context: Any) -> Routing:
        routing = super().forward(x_ND, context)
        return routing._replace(expert_M=routing.expert_M + 1)


class Ragged(Router):
    """Fewer weights than experts."""

    experts_per_token = 1

    def __init__(self, params: Any, build: contracts.Build):
        super().__init__(params, build)
        self.gate = build.linear("router", build.d_model, self.n_experts)

    def forward(self, x_ND: Any, context: Any) -> Routing:
        weight, expert = self.gate(x_ND, context).softmax(-1).max(-1)
        return Routing(expert, weight[:, None])


class NotTied(Embedding):
    """A table whose unembed has the wrong shape."""

    def __init__(self, params: Any, build: contracts.Build):
        super().__init__(params, build)
        self.weight = nn.Parameter(torch.empty(build.facts["vocab_size"], build.d_model))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)

    def forward(self, ids_BT: Any, context: Any) -> Any:
        return self.weight[ids_BT]

    def unembed(self, x_BTD: Any) -> Any:
        return x_BTD


class FlatLinear(Linear):
    """Cannot be an expert's projection."""

    def forward(self, x: Any, context: Any = None) -> Any:
        return nn.functional.linear(x, self.weight if self.weight.ndim == 2 else self.weight[0], self.bias)


class Unsaid(feedforward.MLP):
    """Params whose dump cannot be read back."""

    class Params(feedforward.MLP.Params):
        span: tuple[int, int] = (1, 2)  # strict: a JSON list is no tuple


BROKEN = [
    ("ffn", NoDocstring, "ffn 'NoDocstring': NoDocstring has no docstring"),
    ("ffn", NoParams, "NoParams.Params does not derive from sparsekit.spec.Params"),
    ("ffn", NeedsWhatNobodyKnows, "parameter 'flux' is required: give params="),
    ("ffn", Unsaid, r"span.*\[example\]"),
    ("ffn", UnusedParameter, "ffn 'UnusedParameter': parameter `spare.weight` receives no gradient"),
    ("norm", NoReset, r"owns weight but has no reset_parameters\(\) to fill them"),
    ("norm", HalfReset, "norm 'HalfReset': `shift` is not filled by reset_parameters"),
    ("norm", Clock, "`weight` differs between two models of one seed"),
    ("init", OneSeed, "two seeds give the same weights"),
    ("norm", Scalar, "parameter `gain` has no dimension; give it one, as FSDP2 shards no scalar"),
    ("norm", OnCPU, "`table` is on cpu although the model is built on meta"),
    ("ffn", Summed, r"the output is \[8, 16, 1\], not \[8, 16, 32\]"),
    ("activation", NotANumber, "the output is not finite"),
    ("activation", InfiniteGradient, "the gradient of .* is not finite"),
    ("norm", Detached, "receives no gradient"),
    ("attention", Leaking, "output at position 0 changes when token 15 changes .*, but causal=True"),
    ("attention", LeakingInTraining, r"output at position 13 changes when token 15 changes \(in training mode\)"),
    ("kernel", Deaf, "the output of a document changes when the document before it changes"),
    ("kernel", DeafAbroad, "the output of a document changes when the document before it changes"),
    ("attention", Forgetful, "with a key-value cache the output at position 5 is another, but caches=True"),
    ("attention", OneLength, "with longer sequences in its cache the output at position . is another, but ragged=True"),
    ("position", ByPlace, "with a key-value cache the output at position 5 is another"),
    ("norm", BatchNorm, "the output of sequence 0 changes when sequence 1 changes .*, but batch_coupled=False"),
    ("ffn", Shifted, "permuting the tokens does not permute the outputs"),
    ("ffn", Noisy, "two forwards in eval mode differ"),
    ("ffn", Unsaved, "a saved and loaded model gives other logits"),
    ("ffn", Branching, r"\[compilation\]"),
    ("ffn", CompiledOtherwise, "compiled logits differ by"),
    ("norm", WideOnly, r"\[bfloat16\]"),
    ("linear", WideHead, "the logits of a bfloat16 model are torch.float32"),
    ("norm", Coarse, "in bfloat16 the logits are off by"),
    ("ffn", OwnWeight, "cannot be grouped: its parameter gain does not come from build.linear"),
    ("ffn", NoContext, r"call linear\(x, context\)"),
    ("ffn", Centred, "as grouped experts it does not compute what a loop over experts computes"),
    ("linear", FlatLinear, "inside experts not every expert's part of .* receives a gradient"),
    ("router", OutOfRange, "experts are 0 .. E - 1"),
    ("router", Ragged, "expert_M must be int64 and as long as weight_M"),
    ("embedding", NotTied, r"unembed gives \[8, 16, 32\], not \[8, 16, 64\]"),
]


@pytest.mark.parametrize(("kind", "cls", "words"), BROKEN, ids=[cls.__name__ for _, cls, _ in BROKEN])
def test_each_breach_is_told(kind: str, cls: type, words: str) -> None:
    with pytest.raises(ContractError, match=words) as caught:
        check_component(kind, cls)
    for line in str(caught.value).splitlines():
        assert line.startswith(f"{kind} '{cls.__name__}': "), "one line for each failure, naming the component"


def test_what_a_component_declares_is_taken_at_its_word() -> None:
    class Declared(Squared):
        """Subtracts the mean over positions, later ones too, and says so."""

        causal = False
        grouped = False

        def forward(self, x_BTD: Any, context: Any) -> Any:
            return super().forward(x_BTD - x_BTD.mean(-2, keepdim=True), context)

    class Coupled(BatchNorm):
        """As BatchNorm, and says so."""

        batch_coupled = True

    check_component("ffn", Declared)
    check_component("ffn", SaysSo)
    check_component("norm", Coupled)


@pytest.mark.slow
def test_what_aot_eager_alone_cannot_compile_is_no_breach() -> None:
    """torch's: the backward of elu on a transposed tensor, as linear attentions have it. Inductor takes it."""

    class Linear(attention.MultiHead):
        """y_t = sum over s <= t of f(q_t) f(k_s) v_s, over the sum of f(q_t) f(k_s), f = elu + 1."""

        caches = False

        def attend(self, q_BHTK: Any, k_BHTK: Any, v_BHTV: Any, context: Any) -> Any:
            q, k = (nn.functional.elu(x) + 1 for x in (q_BHTK, k_BHTK))
            length = q.shape[2]
            seen = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()[None]
            if context.documents_BT is not None:
                seen = seen & (context.documents_BT[:, :, None] == context.documents_BT[:, None, :])
            s_BHTT = (q @ k.transpose(-1, -2)).masked_fill(~seen[:, None], 0)
            return (s_BHTT @ v_BHTV / s_BHTT.sum(-1, keepdim=True)).transpose(1, 2).flatten(2)

    check_component("attention", Linear, {"position": "none"})


def test_without_the_declaration_the_same_is_a_breach() -> None:
    class Undeclared(Squared):
        """Subtracts the mean over positions, later ones too."""

        grouped = False

        def forward(self, x_BTD: Any, context: Any) -> Any:
            return super().forward(x_BTD - x_BTD.mean(-2, keepdim=True), context)

    with pytest.raises(ContractError, match="changes when token 15 changes"):
        check_component("ffn", Undeclared)


def test_a_mistake_in_an_unregistered_class_leaves_no_name_behind() -> None:
    before = registry("norm").names()
    with pytest.raises(ContractError):
        check_component("norm", NoReset)
    assert registry("norm").names() == before


def test_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    check_component("ffn", Squared, compile_backend=None)
    assert torch.equal(torch.get_rng_state(), state)
