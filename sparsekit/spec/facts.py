"""What a parent knows and its children cannot: the same facts when a spec is checked and when a model is built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sparsekit.spec.slot import Choice, Params

Problem = tuple[str, str]  # (JSON path, message)


@dataclass(frozen=True)
class Facts:
    """The surroundings of a component at check time.

    ``extra`` holds what the direct parent adds (a router's ``n_experts``, a qk_norm's ``width``); ``path`` is where
    in the spec the component stands.
    """

    d_model: int
    max_seq_len: int
    layer_index: int
    n_layers: int
    path: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list, repr=False)
    params: Params | None = None

    def __getitem__(self, name: str) -> Any:
        return self.extra[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.extra.get(name, default)

    def child(self, choice: Choice, **facts: Any) -> None:
        """Checks what fills a slot of the component being checked, telling it what it cannot know."""
        name = next((n for n, c in self.params.slots() if c is choice), "") if self.params is not None else ""
        path = f"{self.path}.{name}" if self.path and name else self.path or name
        check_choice(choice, replace(self, path=path, extra=facts))


def check_choice(choice: Choice, facts: Facts) -> None:
    """Runs the ``check`` of what fills a slot, and through it those below; problems gather in ``facts.problems``."""
    here = replace(facts, params=choice.params)
    check = getattr(choice.cls, "check", None)
    if check is None:
        check_children(choice.params, here)
        return
    try:
        check(choice.params, here)
    except ValueError as error:
        facts.problems.append((facts.path, str(error)))


def check_children(params: Params, facts: Facts) -> None:
    """Checks every slot of a component without further facts: what a component that adds none wants."""
    for _, choice in params.slots():
        facts.child(choice)


def walk(params: Params, path: str = "") -> Iterator[tuple[str, Choice]]:
    """Every filled slot below an object, depth first, with its JSON path."""
    for name, choice in params.slots():
        here = f"{path}.{name}" if path else name
        yield here, choice
        yield from walk(choice.params, here)
