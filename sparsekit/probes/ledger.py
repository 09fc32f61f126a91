"""What a layer adds to the stream, found by following its tensors: whatever the scheme, wherever it adds."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

ADDITIONS = {
    torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__, torch.Tensor.add_, torch.Tensor.__iadd__,
}  # fmt: skip
# what keeps a sum of parts a sum of parts, taken of each of them
LINEAR = {
    torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__, torch.Tensor.div,
    torch.Tensor.__truediv__, torch.Tensor.to, torch.Tensor.view, torch.Tensor.reshape, torch.Tensor.view_as,
    torch.Tensor.type_as, torch.nn.functional.dropout, torch.Tensor.contiguous, torch.Tensor.float,
}  # fmt: skip


class Ledger(TorchFunctionMode):
    """While a layer runs: which tensors come from a sub-layer, and what of it is added to something that does not.

    A sub-layer's output is marked, and what is computed from it outside of the sub-layers (a norm after it, a scale) is
    marked too. Where a marked tensor is added to an unmarked one of its shape, that is the residual sum, and the marked
    one is what the sub-layer adds; the sum is the stream, unmarked. A sub-layer may add the stream itself, too.

    Args:
        stream: what the layer is called with, the very object.
        sublayers: by site, the module whose output is marked.
        edit: by site, what is put in place of a contribution.
        seen: gets the contributions by site.
    """

    def __init__(
        self, stream: Tensor, sublayers: Mapping[str, nn.Module], edit: Mapping[str, Any], seen: dict[str, Any]
    ):
        super().__init__()
        self.edit, self.seen, self.sublayers = edit, seen, sublayers
        self.sums: dict[str, int] = dict.fromkeys(sublayers, 0)  # how often each was added
        self._shape = stream.shape
        self._streams = [stream]
        self._marked: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}  # tensor (so that its id stays its own), parts
        self._inside: list[str] = []

    def hooks(self, undo: ExitStack) -> None:
        """Marks outputs by hooks, which ``undo`` takes back."""
        for site, module in self.sublayers.items():
            undo.callback(module.register_forward_pre_hook(self._enter(site)).remove)
            undo.callback(module.register_forward_hook(self._leave(site), prepend=True).remove)

    def _enter(self, site: str) -> Any:
        def hook(module: nn.Module, inputs: Any) -> None:
            self._inside.append(site)

        return hook

    def _leave(self, site: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self._inside.pop()
            y = output[0] if isinstance(output, (tuple, list)) else output
            if not self._is_stream(y):
                self._mark(y, {site: y})

        return hook

    def _is_stream(self, x: Any) -> bool:
        return any(x is stream for stream in self._streams)

    def _mark(self, x: Tensor, parts: dict[str, Tensor]) -> None:
        self._marked[id(x)] = x, parts

    def _parts(self, x: Any) -> dict[str, Tensor]:
        return self._marked[id(x)][1] if id(x) in self._marked else {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in ADDITIONS and len(args) == 2 and not kwargs and all(isinstance(x, Tensor) for x in args):
            return self._add(func, *args)
        out = func(*args, **kwargs)
        if not self._inside and self._marked and isinstance(out, Tensor):
            marked = [x for x in args if isinstance(x, Tensor) and self._parts(x)]
            if marked and out.numel() == marked[0].numel():
                self._follow(func, marked, args, kwargs, out)
        return out

    def _follow(self, func: Any, marked: list[Tensor], args: Any, kwargs: Any, out: Tensor) -> None:
        """Marks what is computed from something marked: from one part, or from a sum in a way that keeps it one."""
        x, parts = marked[0], self._parts(marked[0])
        if out is x or self._is_stream(out):
            return
        if len({site for each in marked for site in self._parts(each)}) == 1:
            self._mark(out, dict.fromkeys(parts, out))
        elif func in LINEAR and len(marked) == 1:
            each = {n: func(*(p if a is x else a for a in args), **kwargs) for n, p in parts.items()}
            self._mark(out, each)

    def _add(self, func: Any, a: Tensor, b: Tensor) -> Tensor:
        if self._inside:  # some sub-layers are handed the stream and add it themselves
            for stream, other in ((a, b), (b, a)):
                if self._is_stream(stream) and not self._is_stream(other) and stream.shape == other.shape:
                    return self._sum(func, a, b, other, {self._inside[-1]: other})
            return func(a, b)
        ours, theirs = self._parts(a), self._parts(b)
        if a.numel() != b.numel():  # a bias
            out = func(a, b)
            if ours or theirs:
                self._follow(func, [a if ours else b], (a, b), {}, out)
            return out
        if ours and theirs:
            ours = {
                site: part.clone() if part is a else part for site, part in ours.items()
            }  # may be added to in place
            out = func(a, b)
            self._mark(out, {**ours, **theirs})
            return out
        if ours or theirs:
            return self._sum(func, a, b, a if ours else b, ours or theirs)
        return func(a, b)

    def _sum(self, func: Any, a: Tensor, b: Tensor, added: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """The residual sum itself."""
        put = {site: part.view(self._shape) for site, part in parts.items()}
        for site in parts:
            self.sums[site] = self.sums.get(site, 0) + 1
            if site in self.edit:
                put[site] = self.edit[site](put[site])
            self.seen[site] = put[site]
        if any(site in self.edit for site in parts):
            whole = torch.stack(list(put.values())).sum(0) if len(put) > 1 else next(iter(put.values()))
            whole = whole.to(added.dtype).view_as(added)
            a, b = (whole, b) if added is a else (a, whole)
        out = func(a, b)
        self._marked.pop(id(out), None)  # where it was added in place
        self._streams.append(out)
        return out
