"""The contract kit notices what is wrong with sources, tokenizers, callbacks, probes and all else beside a model."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import Field, PositiveInt

from sparsekit.components.feedforward import MLP
from sparsekit.data.sources import Embedded, Source
from sparsekit.data.tokenizers import Tokenizer
from sparsekit.errors import UnknownNameError
from sparsekit.probes.base import Probe, ProbeResult
from sparsekit.sparsifiers.inputs import Teal
from sparsekit.testing import ContractError, check_component
from sparsekit.training.callbacks import Callback
from sparsekit.training.objectives import Loss, Objective
from sparsekit.training.optimizers import Optimizer
from sparsekit.training.schedules import Schedule

COUNT = itertools.count()


class Words(Source):
    """Two texts to train on, another to validate on."""

    texts: Any = {"train": ["one two", "three"], "validation": ["four"]}

    def documents(self, split: str) -> Any:
        if split not in self.texts:
            raise ValueError(f"unknown split {split!r}")
        yield from self.texts[split]


class Overlapping(Words):
    """The same text on both sides."""

    texts = {"train": ["one two", "three"], "validation": ["three"]}


class Empty(Words):
    """An empty document."""

    texts = {"train": ["one two", ""], "validation": ["four"]}


class Bytes(Words):
    """Bytes in place of text."""

    texts = {"train": ["one", b"two"], "validation": ["four"]}


class Silent(Words):
    """Nothing to validate on."""

    texts = {"train": ["one"], "validation": []}


class AnySplit(Words):
    """Takes any name of a split."""

    def documents(self, split: str) -> Any:
        yield from self.texts.get(split, ["five"])


class Unrepeatable(Words):
    """Other texts each time."""

    def documents(self, split: str) -> Any:
        yield from super().documents(split)
        yield f"{split} {next(COUNT)}"


class Letters(Tokenizer):
    """A token for each code point below 0x20000, and one that ends a text."""

    name = "letters"
    vocab_size = 0x20001
    eos_id = 0x20000

    def encode_batch(self, texts: Any) -> Any:
        return [np.array([ord(sign) for sign in text], dtype=self.dtype) for text in texts]

    def decode(self, ids: Any) -> str:
        return "".join(chr(int(i)) for i in ids if i != self.eos_id)


class Lower(Letters):
    """Forgets capitals."""

    def decode(self, ids: Any) -> str:
        return super().decode(ids).lower()


class Narrow(Letters):
    """Says that it has fewer tokens than it uses."""

    vocab_size = 100
    eos_id = 99
    dtype = np.dtype(np.uint32)


class LoudEnd(Letters):
    """Decodes the end of a text."""

    def decode(self, ids: Any) -> str:
        return "".join(chr(int(i)) for i in ids)


class Mean(Objective):
    """The mean of logits, and not a sum."""

    def __call__(self, model: Any, batch: Any, context: Any) -> Loss:
        total = model(batch.ids_BT, context).square().mean()
        return Loss(total, total.detach())


class Attached(Objective):
    """What is reported still hangs on the graph."""

    def __call__(self, model: Any, batch: Any, context: Any) -> Loss:
        total = model(batch.ids_BT, context).square().sum()
        return Loss(total, total)


class Forgetful(Optimizer):
    """Leaves half of the parameters out."""

    def build(self, model: Any) -> Any:
        return torch.optim.SGD([p for p in model.parameters() if p.ndim < 2], lr=1e-2)


class Uphill(Optimizer):
    """Maximises."""

    def build(self, model: Any) -> Any:
        return torch.optim.SGD(model.parameters(), lr=1e-2, maximize=True)


class CountsAlone(torch.optim.SGD):
    def __init__(self, parameters: Any):
        super().__init__(parameters, lr=1e-2)
        self.steps = 0

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        for group in self.param_groups:
            group["lr"] = 1e-2 / self.steps
        return super().step(closure)


class Unsaved(Optimizer):
    """Keeps a count that its state does not hold."""

    def build(self, model: Any) -> Any:
        return CountsAlone(model.parameters())


class Steep(Schedule):
    """Twice the peak."""

    def after_warmup(self, done: int, total: int, warmup: int) -> float:
        return 2.0


class Remembering(Schedule):
    """Halves at each call."""

    def __init__(self, params: Any):
        super().__init__(params)
        self.now = 1.0

    def after_warmup(self, done: int, total: int, warmup: int) -> float:
        self.now *= 0.99
        return self.now


class Disturbs(Callback):
    """Adds noise to a weight."""

    def on_step(self, trainer: Any) -> None:
        with torch.no_grad():
            next(iter(trainer.model.parameters())).add_(torch.rand(()))


class Fails(Callback):
    """Fails at the end."""

    def on_end(self, trainer: Any, finished: bool) -> None:
        raise RuntimeError("no luck")


class Named(Probe):
    """What the first layer gives, by a name."""

    def numbers(self, view: Any, tokens: Any) -> ProbeResult:
        return ProbeResult(scalars={"size": 1.0}, per_layer={"size": np.ones(view.n_layers)})

    def run(self, view: Any, tokens: Any) -> ProbeResult:
        return self.numbers(view, tokens)


class Wandering(Named):
    """Disturbs from no generator of its own."""

    def numbers(self, view: Any, tokens: Any) -> ProbeResult:
        return ProbeResult(scalars={"draw": float(next(COUNT))})


class Moving(Named):
    """Changes a weight and leaves it changed."""

    def numbers(self, view: Any, tokens: Any) -> ProbeResult:
        next(iter(view.model.parameters())).add_(1)
        return super().numbers(view, tokens)


class Endless(Named):
    """Finds infinity."""

    def numbers(self, view: Any, tokens: Any) -> ProbeResult:
        return ProbeResult(scalars={"size": float("inf")})


class Long(Named):
    """A number for more layers than there are."""

    def numbers(self, view: Any, tokens: Any) -> ProbeResult:
        return ProbeResult(per_layer={"size": np.ones(view.n_layers + 1)})


class Blank(Named):
    """Finds nothing."""

    def numbers(self, view: Any, tokens: Any) -> ProbeResult:
        return ProbeResult()


class Fickle(Teal):
    """Another limit each time."""

    def fit(self, *args: Any) -> Any:
        share = 0.1 + 0.2 * (next(COUNT) % 4)
        self.params = self.params.model_copy(update={"sparsity": share})
        return super().fit(*args)


class Idle(Teal):
    """Finds nothing to mask."""

    def fit(self, *args: Any) -> Any:
        return {}


RIGHT = [("source", Words), ("tokenizer", Letters), ("probe", Named), ("callback", Callback), ("sparsifier", Teal)]
WRONG = [
    ("source", Overlapping, "a document is in both splits: 'three'"),
    ("source", Empty, "document 1 of 'train' is empty"),
    ("source", Bytes, "document 1 of 'train' is of type bytes, not str"),
    ("source", Silent, r"documents\('validation'\) gives none"),
    ("source", AnySplit, r"documents\('no_such_split'\) raises no ValueError"),
    ("source", Unrepeatable, r"documents\('train'\) gives other documents the second time"),
    ("tokenizer", Lower, r"decodes to '<\|endoftext\|> </s> \[eos\] "),
    ("tokenizer", Narrow, "reach 119, but vocab_size is 100"),
    ("tokenizer", LoudEnd, "eos_id decodes to text"),
    ("objective", Mean, "it is a sum over targets"),
    ("objective", Attached, "reported carries a gradient; detach it"),
    ("optimizer", Forgetful, "parameter `embedding.weight` is in 0 groups, not in one"),
    ("optimizer", Uphill, "after 20 steps on one batch the loss is"),
    ("optimizer", Unsaved, "from a saved state it goes on otherwise"),
    ("schedule", Steep, r"the factor of step 0 of 200 is 2.0, not in \[0, 1\]"),
    ("schedule", Remembering, "depends on what was asked for before"),
    ("callback", Disturbs, "with it a run ends with other weights"),
    ("callback", Fails, "RuntimeError: no luck"),
    ("probe", Wandering, "a second run with the same seed finds other numbers"),
    ("probe", Moving, "the model is another after it: `embedding.weight` has changed"),
    ("probe", Endless, "scalar 'size' is inf, not a finite float"),
    ("probe", Long, "per_layer 'size' has 4 values for 3 layers"),
    ("probe", Blank, "the result is empty"),
    ("sparsifier", Fickle, "a second calibration with the same seed finds other limits"),
    ("sparsifier", Idle, "calibrate finds no limit"),
]


@pytest.mark.parametrize(("kind", "cls"), RIGHT, ids=[cls.__name__ for _, cls in RIGHT])
def test_what_is_right_passes(kind: str, cls: type) -> None:
    check_component(kind, cls)


@pytest.mark.parametrize(("kind", "cls", "words"), WRONG, ids=[cls.__name__ for _, cls, _ in WRONG])
def test_each_breach_is_told(kind: str, cls: type, words: str) -> None:
    with pytest.raises(ContractError, match=words) as caught:
        check_component(kind, cls)
    for line in str(caught.value).splitlines():
        assert line.startswith(f"{kind} '{cls.__name__}': "), "one line for each failure, naming the component"


def test_a_source_that_reads_what_is_not_there_is_wrong_where_its_author_named_it() -> None:
    class NoNovel(Embedded):
        """Novels that do not come with the package."""

        def documents(self, split: str) -> Any:
            raise FileNotFoundError("no such novel")

    with pytest.raises(ContractError, match="FileNotFoundError: no such novel"):
        check_component("source", NoNovel)


def test_a_name_that_is_not_registered_is_no_breach() -> None:
    with pytest.raises(UnknownNameError, match="unknown ffn 'mine'; registered: .*; pip install -e the package that"):
        check_component("ffn", "mine")


def test_a_parameter_says_itself_what_may_stand_for_it() -> None:
    class Wide(MLP):
        """A layer whose width has a name of its own."""

        class Params(MLP.Params):
            d_ff: PositiveInt = 1
            flux: PositiveInt = Field(examples=[12])

        @classmethod
        def check(cls, params: Any, facts: Any) -> None:
            if params.flux != 12:
                raise ValueError(f"flux is {params.flux}")

    class Unnamed(MLP):
        """As Wide, without an example."""

        class Params(MLP.Params):
            flux: PositiveInt

    check_component("ffn", Wide, compile_backend=None)
    with pytest.raises(ContractError, match=r"'flux' is required: give params=\{'flux': ...\}, or declare it with"):
        check_component("ffn", Unnamed, compile_backend=None)
