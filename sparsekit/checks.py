"""What the contract kit checks: each check yields a sentence for every way in which a component breaks its contract.

The tables at the end say which kinds a check applies to.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekit import spec
from sparsekit.components.contracts import Component, Embedding, ForwardContext, Linear, Routing
from sparsekit.examples import EXAMPLES
from sparsekit.model.build import build_model, initialise
from sparsekit.model.cache import KVCache
from sparsekit.model.decoder import Decoder
from sparsekit.registry import OURSELVES, registry
from sparsekit.spec.schema import json_schema

VOCABULARY, BATCH, LENGTH, WIDTH = 64, 8, 16, 32
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Subject:
    """The component under test: its class, an example of its slot, and the tiny model it is tried in.

    The model's tensors are on ``device`` and of ``dtype``.
    """

    kind: str
    name: str
    cls: Any
    slot: dict[str, Any]
    compile_backend: str | None
    device: torch.device = CPU
    dtype: torch.dtype = torch.float32

    def spec(self, moe: bool = False) -> dict[str, Any]:
        """A model of two layers with the component in its slot; with ``moe``, inside experts."""
        kind, slot = self.kind, self.slot
        attention: dict[str, Any] = {"type": "gqa", "n_heads": 4, "n_kv_heads": 2}
        if self.device.type != "cpu":
            attention["head_dim"] = 64  # fused kernels have a least width
        ffn: dict[str, Any] = {"type": "swiglu", "d_ff": 48}
        model: dict[str, Any] = {"d_model": WIDTH, "n_layers": 2, "vocab_size": VOCABULARY, "max_seq_len": 2 * LENGTH}
        if kind in ("kernel", "position"):
            attention[kind] = slot
        elif kind == "normalizer":
            attention.update(normalizer=slot, kernel="eager")
        elif kind == "rope_scaling":
            attention["position"] = {"type": "rope", "scaling": slot}
        elif kind == "attention":
            attention = slot
        elif kind == "ffn":
            ffn = slot
        elif kind == "activation":
            ffn = {"type": "mlp", "d_ff": 48, "activation": slot}
        elif kind == "router":
            ffn = {"type": "moe", "n_experts": 4, "router": slot, "expert": EXAMPLES["expert"]}
        if moe:
            ffn = {"type": "moe", "n_experts": 4, "router": EXAMPLES["router"], "expert": ffn}
        model["block"] = {"attention": attention, "ffn": ffn}
        if kind in ("norm", "residual"):
            model["block"][kind] = slot
        elif kind in ("linear", "embedding", "init"):
            model[kind] = slot
        return {**model, "allow_leak": not getattr(self.cls, "causal", True)}

    def model(self, spec: dict[str, Any] | None = None, seed: int = 0) -> Decoder:
        """That model with noise upon its initial weights, so that what starts at zero shows too; in eval mode."""
        model = build_model(spec or self.spec(), seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return model.to(self.device, self.dtype).eval()

    def ids(self) -> Tensor:
        """The batch it is tried on."""
        ids = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
        return ids.to(self.device)

    def rounding(self, exact: float) -> float:
        """What may be rounding in float32, or in a 16-bit dtype where that is what the model runs in."""
        return exact if self.dtype == torch.float32 else 0.03

    def moved(self, before: Tensor, after: Tensor) -> Tensor:
        """Which rows of the last dimension differ by more than rounding does."""
        limit = self.rounding(1e-4) * before.abs().max()
        return ~((before - after).abs().amax(-1) <= limit)  # so that NaN has moved

    def local(self, model: nn.Module, name: str) -> str:
        """A parameter's name within the component, where it is of the component."""
        for path, module in model.named_modules():
            if type(module) is self.cls and name.startswith(f"{path}."):
                return name.removeprefix(f"{path}.")
        return name


Check = Callable[[Subject], Iterator[str]]


# What every kind is held to.


def docstring(subject: Subject) -> Iterator[str]:
    if not (subject.cls.__dict__.get("__doc__") or "").strip():
        yield f"{subject.cls.__name__} has no docstring"


def parameters(subject: Subject) -> Iterator[str]:
    declared = getattr(subject.cls, "Params", None)
    if not (isinstance(declared, type) and issubclass(declared, spec.Params)):
        yield f"{subject.cls.__name__}.Params does not derive from sparsekit.spec.Params"


def example(subject: Subject) -> Iterator[str]:
    """Validates, dumps and validates again."""
    slot = spec.Slot(subject.kind)
    first = slot.validate(subject.slot)
    dumped = first.dump()
    again = slot.validate(json.loads(json.dumps(dumped)))
    if first != again:
        yield f"validating what was dumped gives {again.dump()}, not {dumped}"


def schema(subject: Subject) -> Iterator[str]:
    entry = next(e for e in registry(subject.kind).entries() if e.name == subject.name)
    whole = json_schema({OURSELVES, entry.owner})  # what others have installed costs nothing here
    if f"{subject.kind}.{subject.name}" not in whole["$defs"]:
        yield "is not listed in the JSON Schema"
        return
    try:
        from jsonschema import Draft202012Validator
    except ImportError:
        return
    validator = Draft202012Validator({"$defs": whole["$defs"], "$ref": f"#/$defs/{subject.kind}"})
    for good in (subject.slot, spec.Slot(subject.kind).validate(subject.slot).dump()):
        if not validator.is_valid(good):
            yield f"the JSON Schema refuses {json.dumps(good)}"
    if validator.is_valid({**subject.slot, "no_such_parameter": 1}):
        yield "the JSON Schema accepts a parameter that does not exist"


# What the parts of a model are held to.


def _logits(model: nn.Module, ids: Tensor, context: ForwardContext | None = None, gradients: bool = False) -> Tensor:
    torch.manual_seed(2)  # what draws at random draws alike, so that runs can be compared
    with torch.set_grad_enabled(gradients):  # some kernels have a forward only
        logits: Tensor = model(ids, context)
    return logits


def _train_step(subject: Subject, model: nn.Module) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Logits and gradients of the next-token loss, in training mode."""
    ids = subject.ids()
    logits = _logits(model.train(), ids, gradients=True)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def _components(model: nn.Module) -> list[Component]:
    return [module for module in model.modules() if isinstance(module, Component)]


def meta_build(subject: Subject) -> Iterator[str]:
    model = build_model(subject.spec(), device="meta")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_meta:
            yield f"`{subject.local(model, name)}` is on {tensor.device} although the model is built on meta"
        if isinstance(tensor, nn.Parameter) and not tensor.ndim:
            yield f"parameter `{subject.local(model, name)}` has no dimension; give it one, as FSDP2 shards no scalar"


def initialisation(subject: Subject) -> Iterator[str]:
    """Fills every parameter and buffer, the same for the same seed."""
    for model_spec in (subject.spec(), subject.spec(moe=True)) if subject.kind == "init" else (subject.spec(),):
        models = [build_model(model_spec, device="meta").to_empty(device="cpu") for _ in range(3)]
        for model, seed in zip(models, (0, 0, 1), strict=True):
            with torch.no_grad():
                for tensor in (*model.parameters(), *model.buffers()):
                    tensor.fill_(float("nan") if tensor.is_floating_point() else 1)
            initialise(model, seed)
        first, same, other = (dict((*m.named_parameters(), *m.named_buffers())) for m in models)
        for name, tensor in first.items():
            if not tensor.isfinite().all():
                yield f"`{subject.local(models[0], name)}` is not filled by reset_parameters"
            elif not torch.equal(tensor, same[name]):
                yield f"`{subject.local(models[0], name)}` differs between two models of one seed"
        if all(torch.equal(tensor, other[name]) for name, tensor in first.items()):
            yield "two seeds give the same weights"


def shapes(subject: Subject) -> Iterator[str]:
    model, problems = subject.model(), dict[str, None]()

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        problems.update(dict.fromkeys(_shape_problems(subject.kind, module, args, output)))

    for module in model.modules():
        if type(module) is subject.cls:
            module.register_forward_hook(hook)
    try:
        logits = _logits(model, subject.ids())
    except Exception:
        if not problems:
            raise
        yield from problems  # which say more than what came of them
        return
    yield from problems
    if logits.shape != (BATCH, LENGTH, VOCABULARY):
        yield f"the model's logits are {list(logits.shape)}, not {[BATCH, LENGTH, VOCABULARY]}"
    if subject.kind == "embedding" and subject.cls.unembed is not Embedding.unembed:
        tied = _logits(subject.model({**subject.spec(), "tie_embeddings": True}), subject.ids())
        if tied.shape != logits.shape:
            yield f"unembed gives {list(tied.shape)}, not {list(logits.shape)}"


def _shape_problems(kind: str, module: Any, args: Any, output: Any) -> Iterator[str]:
    if kind == "router":
        yield from _routing_problems(output, module.n_experts, args[0].shape[0])
        return
    several = kind in ("position", "residual") or getattr(module, "stateful", False)
    outputs = output[: 2 if kind == "position" else 1] if several else (output,)
    for got, x in zip(outputs, args, strict=False):
        expected = list(x.shape)
        if kind == "embedding":
            expected = [*expected, WIDTH]
        elif kind in ("linear", "kernel"):
            expected[-1] = module.d_out if kind == "linear" else args[2].shape[-1]
        if list(got.shape) != expected:
            yield f"the output is {list(got.shape)}, not {expected}"


def _routing_problems(routing: Routing, n_experts: int, n_tokens: int) -> Iterator[str]:
    expert, weight, token = routing.expert_M, routing.weight_M, routing.token_M
    if expert.dtype != torch.int64 or expert.ndim != 1 or expert.shape != weight.shape:
        yield f"expert_M must be int64 and as long as weight_M, not {expert.dtype} {list(expert.shape)}"
    elif expert.min() < 0 or expert.max() > n_experts - bool(routing.complete):
        last = "E - 1 where complete" if routing.complete else "E"
        yield f"experts are 0 .. {last}, E {n_experts}; got {int(expert.min())} .. {int(expert.max())}"
    elif token is None and len(expert) % n_tokens:
        yield f"without token_M every token has equally many entries; got {len(expert)} for {n_tokens} tokens"
    elif token is not None and (token.shape != expert.shape or token.min() < 0 or token.max() >= n_tokens):
        yield "token_M must name a token for every entry"


def finite(subject: Subject) -> Iterator[str]:
    model = subject.model()
    if not _logits(model, subject.ids()).isfinite().all():
        yield "the output is not finite"


def finite_gradients(subject: Subject) -> Iterator[str]:
    model = subject.model()
    for name, gradient in _train_step(subject, model)[1].items():
        if gradient is not None and not gradient.isfinite().all():
            yield f"the gradient of `{subject.local(model, name)}` is not finite"


def gradients(subject: Subject) -> Iterator[str]:
    model = subject.model()
    for name, gradient in _train_step(subject, model)[1].items():
        if gradient is None or not gradient.any():
            yield f"parameter `{subject.local(model, name)}` receives no gradient"


def causality(subject: Subject) -> Iterator[str]:
    model = subject.model()
    if not all(module.causal for module in _components(model)):
        return
    for training in (False, True):
        ids = subject.ids()
        before = _logits(model.train(training), ids)
        for changed in (LENGTH - 1, LENGTH // 2):
            other = ids.clone()
            other[0, changed] = (other[0, changed] + 1) % VOCABULARY
            moved = subject.moved(before, _logits(model, other))[0, :changed].nonzero()
            if len(moved):
                mode = "training" if training else "eval"
                yield (
                    f"output at position {int(moved[0])} changes when token {changed} changes (in {mode} mode), "
                    f"but causal=True"
                )
                return  # the same again for other tokens would say no more


def batch_coupling(subject: Subject) -> Iterator[str]:
    model = subject.model()
    if any(module.batch_coupled for module in _components(model)):
        return
    for training in (False, True):
        ids, other = subject.ids(), subject.ids()
        other[1] = (other[1] + 1) % VOCABULARY
        before, after = (_logits(model.train(training), batch) for batch in (ids, other))
        if subject.moved(before, after)[0].any():
            mode = "training" if training else "eval"
            yield f"the output of sequence 0 changes when sequence 1 changes (in {mode} mode), but batch_coupled=False"
            return


def documents(subject: Subject) -> Iterator[str]:
    """Attention stays within a document."""
    model, half = subject.model(), LENGTH // 2
    ids, other = subject.ids(), subject.ids()
    other[:, :half] = (other[:, :half] + 1) % VOCABULARY
    context = ForwardContext(documents_BT=(torch.arange(LENGTH, device=ids.device) >= half).long().expand(BATCH, -1))
    if subject.moved(_logits(model, ids, context), _logits(model, other, context))[:, half:].any():
        yield "the output of a document changes when the document before it changes (context.documents_BT)"


def cache(subject: Subject) -> Iterator[str]:
    """Token by token through the cache gives what the whole sequence gives."""
    model, ids = subject.model(), subject.ids()
    if not all(layer.attention.caches for layer in model.layers) or not all(m.causal for m in _components(model)):
        return
    whole, store, parts = _logits(model, ids), KVCache(LENGTH), []
    for start, end in pairwise((0, 5, *range(6, LENGTH + 1))):
        parts.append(_logits(model, ids[:, start:end], store.context(end - start, ids.device)))
        store.length = end
    moved = subject.moved(whole, torch.cat(parts, dim=1)).nonzero()
    if len(moved):
        yield f"with a key-value cache the output at position {int(moved[0, 1])} is another, but caches=True"


def ragged(subject: Subject) -> Iterator[str]:
    """Sequences of different lengths go on in one cache as each goes on alone."""
    model, ids = subject.model(), subject.ids()
    if not all(layer.attention.caches and layer.attention.ragged for layer in model.layers):
        return
    if not all(m.causal for m in _components(model)):
        return
    whole, store, start = _logits(model, ids), KVCache(LENGTH), LENGTH // 2
    _logits(model, ids[:, :start], store.context(start, ids.device))
    lengths, row = [start - index % 4 for index in range(BATCH)], torch.arange(BATCH, device=ids.device)
    for _ in range(3):
        store.length = max(lengths)
        context = store.ragged(lengths, 1, ids.device)
        at = torch.tensor(lengths, device=ids.device)
        moved = subject.moved(whole[row, at], _logits(model, ids[row, at][:, None], context)[:, 0]).nonzero()
        if len(moved):
            place = lengths[int(moved[0, 0])]
            yield f"with longer sequences in its cache the output at position {place} is another, but ragged=True"
            return
        lengths = [length + 1 for length in lengths]


def deterministic(subject: Subject) -> Iterator[str]:
    model = subject.model()
    with torch.no_grad():
        if not torch.equal(model(subject.ids()), model(subject.ids())):
            yield "two forwards in eval mode differ"


def saving(subject: Subject) -> Iterator[str]:
    from safetensors.torch import load, save

    model, fresh = subject.model(), subject.model(seed=1)
    fresh.load_state_dict(load(save({name: t.contiguous() for name, t in model.state_dict().items()})))
    if not torch.equal(_logits(model, subject.ids()), _logits(fresh, subject.ids())):
        yield "a saved and loaded model gives other logits: something that shapes the output is not in state_dict"


def compilation(subject: Subject) -> Iterator[str]:
    """Each layer compiles (whole, unless the component says that it cannot) and computes the same."""
    if subject.compile_backend is None:
        return
    eager = subject.model()
    logits, wanted = _train_step(subject, eager)
    try:
        logits_compiled, got = _compiled_step(subject, subject.compile_backend)
    except Exception as error:
        untraceable = (torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError)
        if subject.compile_backend != "aot_eager" or isinstance(error, untraceable):
            raise
        # which fails at some operators that inductor takes, such as the backward of elu on a transposed tensor
        logits_compiled, got = _compiled_step(subject, "inductor")
    limit = subject.rounding(1e-5)
    if not torch.allclose(logits, logits_compiled, rtol=limit, atol=limit):
        worst = (logits - logits_compiled).abs().max()
        yield f"compiled logits differ by {worst:.1e}"
    for name, gradient in wanted.items():
        other = got[name]
        if gradient is not None and (other is None or not torch.allclose(gradient, other, rtol=limit, atol=limit)):
            yield f"the compiled gradient of `{subject.local(eager, name)}` is another"


def _compiled_step(subject: Subject, backend: str) -> tuple[Tensor, dict[str, Tensor | None]]:
    """As :func:`_train_step`, of a model that is compiled layer by layer."""
    model = subject.model()
    torch._dynamo.reset()
    for module in (model.embedding, *model.layers):
        module.compile(backend=backend, fullgraph=getattr(subject.cls, "fullgraph", True))
    return _train_step(subject, model)


def bfloat16(subject: Subject) -> Iterator[str]:
    if subject.dtype != torch.float32:
        return  # as everything is that it would be compared with
    model = subject.model()
    reference = _logits(model, subject.ids())
    logits = _logits(model.to(torch.bfloat16), subject.ids())
    if logits.dtype != torch.bfloat16:
        yield f"the logits of a bfloat16 model are {logits.dtype}"
    # of tokens the middle one, since rounding may send some to another expert
    error = ((logits.float() - reference).norm(dim=-1) / reference.norm(dim=-1)).median()
    if not error < 0.05:
        yield f"in bfloat16 the logits are off by {error:.0%}"


def token_wise(subject: Subject) -> Iterator[str]:
    """Permuted tokens give permuted outputs."""
    model = subject.model()
    ffn = model.layers[0].ffn
    if ffn.stateful or not ffn.token_wise:
        return
    seen: list[tuple[Any, ...]] = []
    ffn.register_forward_hook(lambda module, args, output: seen.append((*args, output)))
    _logits(model, subject.ids())
    x_BTD, context, y_BTD = seen[0]
    order = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(3))
    by_token = {f.name: getattr(context, f.name) for f in fields(context) if f.name.endswith("_BT")}
    permuted = replace(context, **{name: None if t is None else t[:, order] for name, t in by_token.items()})
    torch.manual_seed(2)
    if subject.moved(y_BTD[:, order], ffn(x_BTD[:, order], permuted)).any():
        yield "permuting the tokens does not permute the outputs: a feed-forward is token-wise"


def experts(subject: Subject) -> Iterator[str]:
    """Works inside a mixture of experts, whose grouped products equal its loop."""
    if not getattr(subject.cls, "token_wise", True):
        return
    one = subject.model(subject.spec(moe=True))
    grouped = _logits(one, subject.ids())
    loop_spec = subject.spec(moe=True)
    loop_spec["block"]["ffn"]["dispatch"] = "loop"
    loop = _logits(subject.model(loop_spec), subject.ids())
    if subject.moved(loop, grouped).any():
        yield "as grouped experts it does not compute what a loop over experts computes"
    _train_step(subject, one)
    for path, module in one.named_modules():
        for name, parameter in module.named_parameters(recurse=False) if isinstance(module, Linear) else ():
            if module.n_experts is not None and (parameter.grad is None or not parameter.grad.flatten(1).any(1).all()):
                yield f"inside experts not every expert's part of `{path}.{name}` receives a gradient"


SPEC_CHECKS: tuple[Check, ...] = (docstring, parameters, example, schema)
MODEL_CHECKS: tuple[Check, ...] = (
    meta_build, initialisation, shapes, finite, finite_gradients, gradients, causality, batch_coupling, deterministic,
    saving, bfloat16, compilation,
)  # fmt: skip
KIND_CHECKS: dict[str, tuple[Check, ...]] = {
    "attention": (documents, cache, ragged),
    "kernel": (documents, cache, ragged),
    "position": (documents, cache, ragged),
    "normalizer": (documents, cache, ragged),
    "ffn": (token_wise, experts),
    "activation": (token_wise, experts),
    "linear": (experts,),
}
WITHOUT_FORWARD: tuple[Check, ...] = (*SPEC_CHECKS, meta_build, initialisation)
WITH_BACKWARD: tuple[Check, ...] = (finite_gradients, gradients, compilation, experts)
# where one of these fails, later ones say nothing
NEEDED = (parameters, example, meta_build, initialisation, shapes, finite, finite_gradients)
MODEL_KINDS = (
    "attention", "kernel", "normalizer", "position", "rope_scaling", "ffn", "activation", "router", "norm", "residual",
    "linear", "embedding", "init",
)  # fmt: skip


def checks_of(subject: Subject) -> tuple[Check, ...]:
    """Every check that a component is held to on a device and in a dtype, in order."""
    if subject.kind not in MODEL_KINDS:
        return SPEC_CHECKS
    where = subject.device, subject.dtype
    if elsewhere(subject.cls, *where, gradients=False) is not None:
        return WITHOUT_FORWARD
    checks = (*SPEC_CHECKS, *MODEL_CHECKS, *KIND_CHECKS.get(subject.kind, ()))
    trains = elsewhere(subject.cls, *where) is None
    return tuple(check for check in checks if trains or check not in WITH_BACKWARD)


def elsewhere(
    cls: Any,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    gradients: bool = True,
) -> str | None:
    """Why a component (a kernel) cannot be trained, or without gradients run, there; None where it can."""
    refusal = getattr(cls, "refusal", None)
    return None if refusal is None else refusal(device, dtype, gradients=gradients)
