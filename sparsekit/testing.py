"""The contract kit: what every registered component, built in or plugged in, is held to.

A plug-in's own test is one line::

    def test_contract():
        check_component("ffn", "my_ffn")  # a registered name, or a class that is not registered yet

It fails with a line for each way in which the component breaks its contract, and the name of the check at the end::

    ContractError: ffn 'my_ffn': parameter `gate.weight` receives no gradient [gradients]
    ffn 'my_ffn': output at position 3 changes when token 7 changes (in eval mode), but causal=True [causality]

What each kind is held to:

* every kind: a docstring, ``Params`` of :class:`sparsekit.Params`, an example that validates, also once it was dumped,
  a place in the JSON Schema;
* parts of a model (``MODEL_KINDS``), in a model of two layers: it is built without memory, every weight is filled, the
  same for the same seed; shapes; finite outputs and gradients, a gradient for every parameter; no output depends on
  later tokens or on other sequences unless ``causal = False`` or ``batch_coupled = True`` say so; eval mode draws
  nothing; a saved model is loaded as it was; bfloat16; compiled it computes the same. Besides, attention and its parts
  keep to documents and to their cache, and a feed-forward, an activation or a projection works in experts;
* source: documents are texts, none empty, the same ones each time, none in both splits; tokenizer: text comes back as
  it was, by ids below ``vocab_size``, also once saved and loaded; objective: a sum over targets; optimizer: every
  parameter in one group, a lower loss, a state that is all there is to save; schedule: factors in [0, 1] that depend on
  the step alone; callback: a run ends with the same weights as without it, also broken off and resumed; probe: finite
  numbers, the same each time, of a model that is left as it was; sparsifier: limits that are the same each time, on
  disk too, and leave no trace once removed.

Two more for tests of a formula: :func:`component_alone` and :func:`short_run`.

The checks themselves are in :mod:`sparsekit.checks` and :mod:`sparsekit.checks_beside`. Required parameters are filled
from ``EXAMPLES`` by field name, from a field's own ``Field(examples=[...])``, or by ``params``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from torch import nn

from sparsekit.checks import MODEL_KINDS, NEEDED, Check, Subject, checks_of, example
from sparsekit.components.contracts import Build
from sparsekit.errors import UnknownNameError
from sparsekit.examples import EXAMPLES, example_slot
from sparsekit.model.build import initialise
from sparsekit.registry import registry
from sparsekit.spec import Slot

if TYPE_CHECKING:
    from sparsekit.training.trainer import Trainer

__all__ = ["EXAMPLES", "MODEL_KINDS", "ContractError", "check_component", "component_alone", "short_run"]


class ContractError(AssertionError):
    """The ways in which a component breaks its contract, one line each."""


def check_component(
    kind: str,
    component: str | type,
    params: dict[str, Any] | None = None,
    *,
    compile_backend: str | None = "aot_eager",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Holds one component to its contract.

    A kernel whose ``refusal`` says that it cannot be trained on the device and in the dtype is held to what needs no
    backward, and one that cannot run there at all to what needs no forward.

    Args:
        kind: of the registry, such as "ffn".
        component: a registered name, or a class (registered under a private name meanwhile, if it is not).
        params: its parameters; required ones that are left out are filled by their examples.
        compile_backend: of torch.compile; None leaves that check out.
        device: where the model that it is tried in lives.
        dtype: of that model: float32, or a 16-bit one for what runs in no other.

    Raises:
        ContractError: a line for each way in which it breaks its contract.
        UnknownNameError, PluginError: nothing is registered under the name, or it cannot be imported.
    """
    device = torch.device(device)
    devices = [device.index or 0] if device.type == "cuda" else []
    with _registered(kind, component) as name, torch.random.fork_rng(devices=devices):
        try:
            cls = registry(kind).get(name)
        except UnknownNameError as error:
            raise UnknownNameError(f"{error}; pip install -e the package that brings it, again if it is new") from None
        label = f"{kind} {name.removeprefix('_')!r}"
        problems: dict[str, Exception | None] = {}
        subject = Subject(kind, name, cls, {"type": name, **(params or {})}, compile_backend, device, dtype)
        for check in (*checks_of(subject), *_beside(kind)):
            before = len(problems)
            try:
                if check is example:  # the one check that finds something out
                    subject = replace(subject, slot=example_slot(kind, name, subject.slot))
                for sentence in check(subject):
                    problems.setdefault(f"{label}: {sentence} [{check.__name__}]", None)
            except Exception as error:
                problems.setdefault(f"{label}: {_sentence(error)} [{check.__name__}]", error)
            if len(problems) > before and check in NEEDED:
                break
    if problems:
        raise ContractError("\n".join(problems)) from next((e for e in problems.values() if e), None)


def component_alone(
    kind: str,
    slot: Any,
    d_model: int = 16,
    max_seq_len: int = 32,
    *,
    facts: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float64,
    layer_index: int = 0,
    n_layers: int = 2,
    linear: Any = "plain",
    std: float = 0.3,
) -> nn.Module:
    """A component built without a model around it, every parameter random, to be held against its formula.

    Args:
        slot: its name, or an object with its ``type``.
        facts: what else its place in a model tells it, such as ``n_experts``.
        std: of its projections; to every parameter 0.1 times a normal number is added, as some start at 0 or 1.
    """
    init = Slot("init").validate({"type": "normal", "std": std})
    build = Build(d_model, max_seq_len, layer_index, n_layers, Slot("linear").validate(linear), init)
    with torch.device("meta"):
        module: nn.Module = build.child(Slot(kind).validate(slot), **(facts or {}))
    module = module.to(dtype).to_empty(device="cpu")
    initialise(module, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return module


def short_run(spec: str | Path, folder: Path, steps: int = 50, **model: Any) -> Trainer:
    """The trainer of a run's spec, done with a few steps on a small text of its own, on the CPU.

    Args:
        folder: an empty one, which gets the text and the run.
        model: other values in the spec's model.
    """
    from sparsekit.model.targets import Run
    from sparsekit.spec.load import read_json, validate
    from sparsekit.training.trainer import Trainer

    words = ("it", "is", "a", "truth", "acknowledged", "that", "one", "man", "in", "want", "of", "good")
    text = folder / "text.txt"
    text.write_text("\n".join(words[(i * i + 3 * i // 7) % len(words)] for i in range(4000)))
    raw = read_json(Path(spec))
    raw["model"] |= {"max_seq_len": 32, **model}
    raw["data"] = {"source": {"type": "text", "path": str(text)}}
    raw["train"] |= {"device": "cpu", "callbacks": [], "log_every": 1, "eval_tokens": 128, "micro_batch_size": 2}
    raw["train"]["max_steps"] = steps
    trainer = Trainer(validate(raw), Run(folder / "run"))
    trainer.fit()
    return trainer


def _beside(kind: str) -> tuple[Check, ...]:
    """What a kind that is no part of a model is held to."""
    if kind in MODEL_KINDS:
        return ()
    from sparsekit.checks_beside import CHECKS  # which imports all that trains and looks at models

    return CHECKS.get(kind, ())


@contextmanager
def _registered(kind: str, component: str | type) -> Iterator[str]:
    """The name that a component has in its registry, for the while."""
    names = registry(kind)
    if isinstance(component, str):
        yield component
        return
    entry = names.entry_of(component)
    if entry is not None and names.get(entry.name) is component:
        yield entry.name
        return
    name = f"_{component.__name__}"
    names.register(name)(component)
    try:
        yield name
    finally:
        names.unregister(name)


def _sentence(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(": ".join([".".join(map(str, e["loc"])), e["msg"]]).lstrip(": ") for e in error.errors())
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
