"""A transformer as data: its sizes, its blocks, and which layer uses which."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from pydantic import (
    Field,
    GetJsonSchemaHandler,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError, core_schema

from sparsekit.spec.facts import Facts, Problem, check_choice
from sparsekit.spec.merge import merge
from sparsekit.spec.slot import Choice, Params, Slot, pick


class BlockSpec(Params):
    """One layer: attention and feed-forward, the norm they share, and how the residual scheme combines them."""

    residual: Annotated[Choice, Slot("residual")] = pick("pre_norm")
    norm: Annotated[Choice, Slot("norm")] = pick("rmsnorm")
    attention: Annotated[Choice, Slot("attention")]
    ffn: Annotated[Choice, Slot("ffn")]


class Partial:
    """Marks an object that holds some of a spec's fields, to be merged over a whole one."""

    schema_key = "x-partial"

    def __init__(self, of: type[Params]):
        self.of = of

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {self.schema_key: self.of.__name__}


class ModelSpec(Params):
    """A decoder-only transformer.

    ``block`` is every layer's; or ``blocks`` names several and ``pattern`` repeats their names over the depth (null
    takes back a block that was inherited).
    ``layers`` holds exceptions: ``"0"``, ``"-1"`` or a slice ``"4:12:2"``, each a partial block merged over the
    layer's own; the last match wins. Logits are multiplied by ``logit_scale``; ``logit_softcap`` c then turns a logit x
    into c tanh(x / c).
    """

    d_model: PositiveInt
    n_layers: PositiveInt
    vocab_size: PositiveInt
    max_seq_len: PositiveInt
    block: BlockSpec | None = None
    blocks: dict[str, BlockSpec] = Field(default_factory=dict)
    pattern: list[str] = Field(default_factory=list)
    layers: dict[str, Annotated[dict[str, Any], Partial(BlockSpec)]] = Field(default_factory=dict)
    embedding: Annotated[Choice, Slot("embedding")] = pick("token")
    final_norm: Annotated[Choice, Slot("norm")] | None = None  # null: the last layer's
    linear: Annotated[Choice, Slot("linear")] = pick("plain")
    init: Annotated[Choice, Slot("init")] = pick("normal")
    tie_embeddings: bool = False
    logit_scale: PositiveFloat = 1.0
    logit_softcap: PositiveFloat | None = None
    allow_leak: bool = False

    _per_layer: list[BlockSpec] = PrivateAttr()

    @field_validator("blocks", mode="before")
    @classmethod
    def _without_null(cls, blocks: Any) -> Any:
        if not isinstance(blocks, dict):
            return blocks
        return {name: block for name, block in blocks.items() if block is not None}

    @property
    def last_norm(self) -> Choice:
        """The norm before the head."""
        return self.final_norm or self._per_layer[-1].norm

    @property
    def per_layer(self) -> list[BlockSpec]:
        """The block of every layer, pattern and exceptions applied; equal blocks are one object."""
        return self._per_layer

    @model_validator(mode="after")
    def _resolve(self) -> ModelSpec:
        errors: list[tuple[tuple[str, ...], str]] = []
        self._per_layer = self._merge_layers(self._base_blocks())
        for path, message in self._check():
            errors.append((tuple(path.split(".")), message))
        raise_problems(errors)
        return self

    def _base_blocks(self) -> list[tuple[str, BlockSpec]]:
        """(path, block) of every layer before exceptions."""
        if (self.block is None) == (not self.blocks):
            raise_problems([(("block",), "give either 'block' (one for every layer) or 'blocks' with a 'pattern'")])
        if self.block is not None:
            if self.pattern:
                raise_problems([(("pattern",), "a pattern needs 'blocks', which names what it repeats")])
            return [("block", self.block)] * self.n_layers
        if not self.pattern and len(self.blocks) > 1:
            raise_problems([(("pattern",), f"required: which of {', '.join(self.blocks)} comes in which layer")])
        names = self.pattern or list(self.blocks)
        unknown = [
            (("pattern", str(i)), f"unknown block {name!r}; blocks: {', '.join(self.blocks)}")
            for i, name in enumerate(names)
            if name not in self.blocks
        ]
        mend = "name it in 'pattern', or set it to null"
        unused = [(("blocks", name), f"no layer uses it; {mend}") for name in self.blocks if name not in names]
        raise_problems(unknown or unused)
        return [(f"blocks.{name}", self.blocks[name]) for name in (names * self.n_layers)[: self.n_layers]]

    def _merge_layers(self, base: list[tuple[str, BlockSpec]]) -> list[BlockSpec]:
        overs: list[list[str]] = [[] for _ in base]
        for selector in self.layers:
            for index in self._select(selector):
                overs[index].append(selector)
        made: dict[tuple[str, ...], BlockSpec] = {}
        layers = []
        for (path, block), selectors in zip(base, overs, strict=True):
            key = (path, *selectors)
            for depth, selector in enumerate(selectors, start=2):
                if key[:depth] not in made:
                    made[key[:depth]] = self._except(block, selector)
                block = made[key[:depth]]
            layers.append(block)
        return layers

    def _except(self, block: BlockSpec, selector: str) -> BlockSpec:
        try:
            return BlockSpec.model_validate(merge(block.model_dump(mode="json"), self.layers[selector]))
        except ValidationError as error:
            raise_problems([(("layers", selector, *map(str, e["loc"])), e["msg"], e) for e in error.errors()])
            raise

    def _select(self, selector: str) -> range:
        """The layers that ``"3"``, ``"-1"`` or ``"4:12:2"`` names, as in Python."""
        parts = selector.split(":")
        try:
            numbers = [int(part) if part.strip() else None for part in parts]
            if len(numbers) == 1 and numbers[0] is not None:
                index = range(self.n_layers)[numbers[0]]
                return range(index, index + 1)
            if not 2 <= len(numbers) <= 3 or (len(numbers) == 3 and numbers[2] == 0):
                raise ValueError
        except IndexError:
            raise_problems([(("layers", selector), f"there is no layer {selector} among {self.n_layers}")])
        except ValueError:
            raise_problems(
                [(("layers", selector), "expected a layer such as '0' or '-1', or a slice such as '4:12:2'")]
            )
        return range(self.n_layers)[slice(*numbers)]

    def _check(self) -> list[Problem]:
        """What components say of themselves in these surroundings, each distinct block once."""
        top = Facts(self.d_model, self.max_seq_len, 0, self.n_layers)
        for name, choice in self.slots():
            check_choice(choice, replace(top, path=name))
        whole = dict(self._base_blocks())
        for path, block in whole.items():
            _check_block(block, path, top)
        # a mistake that an exception has inherited is told once, of the block
        told = {(path.removeprefix(base), message) for path, message in top.problems for base in whole}
        seen = {id(block) for block in whole.values()}
        for index, block in enumerate(self._per_layer):
            if id(block) not in seen:
                seen.add(id(block))
                path = f"layers.{self._last_selector(index)}"
                found = _check_block(block, path, replace(top, layer_index=index, problems=[]))
                top.problems.extend(p for p in found if (p[0].removeprefix(path), p[1]) not in told)
        return top.problems

    def _last_selector(self, index: int) -> str:
        return [selector for selector in self.layers if index in self._select(selector)][-1]


def _check_block(block: BlockSpec, path: str, facts: Facts) -> list[Problem]:
    for name, choice in block.slots():
        # a residual scheme builds the block's norms, so it is told which
        extra = {"norm": block.norm} if name == "residual" else {}
        check_choice(choice, replace(facts, path=f"{path}.{name}", extra=extra))
    return facts.problems


def raise_problems(problems: list[Any]) -> None:
    """Raises pydantic's error with a line for each (location, message[, pydantic's own details])."""
    if problems:
        raise ValidationError.from_exception_data("spec", [_details(*problem) for problem in problems])


def _details(loc: tuple[str, ...], message: str, own: Any = None) -> InitErrorDetails:
    # an error that is passed on keeps its type, by which spec.load chooses the words
    kind = own["type"] if own else "spec"
    error = PydanticCustomError(kind, "{text}", {"text": message})
    return InitErrorDetails(type=error, loc=loc, input=own["input"] if own else None)
