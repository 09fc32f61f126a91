"""An open, typed field of a spec, which a registry fills.

A component owns its typed ``Params``; its parent holds a *slot*, ``{"type": "<registered name>", ...params}`` or just
``"<name>"`` where every parameter has a default. A slot is validated in two steps, the name in the registry and then
the rest with that class's ``Params``, so that an entry registered after the parent was defined works all the same::

    class Params(Component.Params):
        n_heads: PositiveInt
        position: Annotated[Choice, Slot("position")] = pick("rope")
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, cast

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, model_validator
from pydantic_core import PydanticCustomError, core_schema

from sparsekit.errors import PluginError, UnknownNameError
from sparsekit.registry import registry, target_of


class Choice:
    """What fills a slot: a registered name, its validated parameters, and (imported when asked for) its class."""

    __slots__ = ("kind", "params", "type")

    def __init__(self, kind: str, type: str, params: Params):
        self.kind, self.type, self.params = kind, type, params

    @property
    def cls(self) -> Any:
        return registry(self.kind).get(self.type)

    def dump(self) -> dict[str, Any]:
        """``{"type": ..., **params}``, plain JSON values."""
        return {"type": self.type, **self.params.model_dump(mode="json")}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Choice) and (self.kind, self.type, self.params) == (
            other.kind,
            other.type,
            other.params,
        )

    def __hash__(self) -> int:
        return hash((self.kind, self.type, self.params.model_dump_json()))

    def __repr__(self) -> str:
        return f"Choice({self.kind}, {self.dump()})"


class Params(BaseModel):
    """Base of everything a spec may hold: strict types, no unknown keys, finite numbers, immutable."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _type_of_default(cls, data: Any) -> Any:
        """Lets ``{"theta": 5e5}`` stand for the default's type with that parameter changed."""
        if not isinstance(data, dict):
            return data
        for name, field in cls.model_fields.items():
            given = data.get(name)
            if isinstance(given, dict) and "type" not in given and slot_of(field) is not None:
                default = field.default
                if isinstance(default, dict):
                    data = {**data, name: {**default, **given}}
        return data

    def slots(self) -> Iterator[tuple[str, Choice]]:
        """The filled slots among the fields: (path below this object, choice), lists of slots included."""
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Choice):
                yield name, value
            elif isinstance(value, (list, tuple)):
                yield from ((f"{name}.{i}", item) for i, item in enumerate(value) if isinstance(item, Choice))


class Slot:
    """Marks a field as filled by a registry: ``Annotated[Choice, Slot("ffn")]``."""

    schema_key: ClassVar[str] = "x-slot"

    def __init__(self, kind: str):
        registry(kind)  # an unknown kind is a mistake at definition, not at use
        self.kind = kind

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self.validate, serialization=core_schema.plain_serializer_function_ser_schema(Choice.dump)
        )

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        # Never expanded in place: slots recurse (moe -> expert -> ffn -> moe). spec.schema turns it into a reference.
        return {self.schema_key: self.kind}

    def validate(self, value: Any) -> Choice:
        if isinstance(value, Choice) and value.kind == self.kind:
            return value
        if isinstance(value, str):
            value = {"type": value}
        if not isinstance(value, dict) or not isinstance(value.get("type"), str):
            raise PydanticCustomError(
                "slot_type",
                "expected the name of a registered {kind}, or an object with its 'type'; registered: {names}",
                {"kind": self.kind, "names": ", ".join(registry(self.kind).names())},
            )
        name = value["type"]
        try:
            cls = registry(self.kind).get(name)
        except (UnknownNameError, PluginError) as error:
            # the text goes in as a value, since braces in it would be read as a template
            raise PydanticCustomError("slot_name", "{text}", {"text": str(error)}) from None
        params_type = getattr(cls, "Params", None)
        if not (isinstance(params_type, type) and issubclass(params_type, Params)):
            raise PydanticCustomError(
                "slot_class",
                "{kind} {name} ({cls}) has no Params that derive from sparsekit.Params",
                {"kind": self.kind, "name": repr(name), "cls": target_of(cls)},
            )
        params = params_type.model_validate({key: item for key, item in value.items() if key != "type"})
        return Choice(self.kind, name, params)


def pick(type: str, **params: Any) -> Choice:
    """The default of a slot, validated (and its class imported) only when a spec leaves the slot out."""
    return cast(Choice, {"type": type, **params})


def slot_of(field: Any) -> Slot | None:
    """The slot marker of a pydantic field (also of ``Slot | None``), or None."""
    return find_slot((field.annotation, *field.metadata))


def find_slot(annotation: Any) -> Slot | None:
    """The slot marker inside an annotation, however wrapped, or None; does not look into lists and dicts."""
    if isinstance(annotation, Slot):
        return annotation
    if isinstance(annotation, tuple):
        parts: tuple[Any, ...] = annotation
    elif getattr(annotation, "__metadata__", None):
        parts = annotation.__metadata__
    elif getattr(annotation, "__args__", None) and getattr(annotation, "__origin__", None) not in (list, tuple, dict):
        parts = annotation.__args__
    else:
        return None
    return next((found for found in map(find_slot, parts) if found), None)
