"""The view by layers of a Hugging Face causal language model: found by structure, held against the model's logits."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.model.meanwhile import evaluating, stand_in
from sparsekit.probes.anatomy import Anatomy, RopeParts
from sparsekit.probes.expert_bank import ExpertBank, bank_of
from sparsekit.probes.layered import TRIAL, Edit, LayeredModel, Pass, ViewError, trial_ids, watch_input
from sparsekit.probes.ledger import Ledger
from sparsekit.probes.score import ScoreWatch
from sparsekit.probes.sublayers import Sublayers, sublayers_of

Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a layer is called with beside the stream
STREAM = "hidden_states"  # the stream's name where it is handed over by name
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}  # relative; narrower dtypes: 5e-2


class HuggingFaceView(LayeredModel):
    """Of any model whose decoder layers are one ModuleList, called one after the other in a forward.

    What a layer is called with beside the stream (rotary angles, masks, positions) is caught in a forward in which
    layers hand on what they get, and replayed. Head is whatever the model does after its last layer.

    Raises:
        ViewError: there is no such list, or layer by layer the logits are not the model's own.
    """

    def __init__(self, model: nn.Module):
        self._options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
        find: Any = getattr(model, "get_input_embeddings", lambda: None)
        table = find()
        n_ids = int(getattr(table, "num_embeddings", 0)) or 2
        with evaluating(model), torch.no_grad():
            layers, logits, tuples = self._find_layers(model, trial_ids(n_ids))
            self.list_name, self._tuples = layers, tuples
            blocks = list(model.get_submodule(layers).children())
            super().__init__(model, blocks, 0, logits.shape[-1])
            self.device = next(p for p in blocks[0].parameters() if p.ndim == 1 or p.ndim == 2).device
            self.d_model = self._catch(trial_ids(n_ids))[0].shape[-1]
            self._batched: dict[int, list[Any]] = {}
            self._sublayers: dict[int, Sublayers] = {}
            self._banks: dict[int, ExpertBank | str] = {}
            self._verify(trial_ids(n_ids), logits)

    def _find_layers(self, model: nn.Module, ids_BT: Tensor) -> tuple[str, Tensor, list[int | None]]:
        """The list's name, the model's logits, and of each layer how long a tuple it returns (None: a tensor)."""
        lists = {name: list(m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
        calls: dict[int, list[tuple[int, Tensor | None, Any]]] = {}
        order = iter(range(10**9))

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            calls.setdefault(id(module), []).append((next(order), _stream(args, kwargs), output))

        with ExitStack() as undo:
            for member in {id(m): m for members in lists.values() for m in members}.values():
                undo.callback(member.register_forward_hook(after, with_kwargs=True).remove)
            device = next(model.parameters()).device
            try:
                logits = logits_of(model(input_ids=ids_BT.to(device), **self._options))
            except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
                raise ViewError(f"{type(model).__name__}: cannot be called with token ids alone ({error})") from None
        if logits is None or logits.ndim != 3:
            raise ViewError(f"{type(model).__name__}: returns no logits; is it a causal language model?")
        found = [name for name, members in lists.items() if _is_stack([calls.get(id(m), []) for m in members])]
        found = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
        if len(found) != 1:
            told = ", ".join(found) if found else "none"
            raise ViewError(
                f"{type(model).__name__}: wants one list of layers, each called once with what the one before it "
                f"returned; found {told}"
            )
        outputs = [calls[id(m)][0][2] for m in lists[found[0]]]
        return found[0], logits, [len(out) if isinstance(out, tuple) else None for out in outputs]

    @contextmanager
    def _instead(self, stubs: Sequence[Any]) -> Iterator[None]:
        """Functions in place of the layers' forwards."""
        with ExitStack() as undo:
            for block, stub in zip(self.blocks, stubs, strict=True):
                stand_in(undo, block, stub)
            yield

    def _as_returned(self, layer: int, h: Tensor) -> Any:
        length = self._tuples[layer]
        return h if length is None else (h, *[None] * (length - 1))

    def _catch(self, ids_BT: Tensor) -> tuple[Tensor, list[Call]]:
        """What layer 0 gets, and what each is called with beside it; no layer is computed."""
        caught: list[Call] = []
        streams: list[Tensor] = []

        class Enough(Exception):
            pass

        def catch(layer: int) -> Any:
            def stub(*args: Any, **kwargs: Any) -> Any:
                h = _stream(args, kwargs)
                assert h is not None
                streams.append(h)
                by_name = {name: value for name, value in kwargs.items() if value is not h}
                caught.append((args[1:] if args else (), by_name))
                if layer == self.n_layers - 1:
                    raise Enough
                return self._as_returned(layer, h)

            return stub

        with self._instead([catch(layer) for layer in range(self.n_layers)]), suppress(Enough):
            self.model(input_ids=ids_BT.to(self.device), **self._options)
        return streams[0], caught

    def batched(self, length: int) -> list[Any]:
        """Of each layer's arguments those that are by sequence; a window's mask is there at some lengths only."""
        if length not in self._batched:
            small, large = (self._catch(trial_ids(self.vocab_size, n, length))[1] for n in (TRIAL[0], TRIAL[0] + 1))
            self._batched[length] = [_batched(a, b) for a, b in zip(small, large, strict=True)]
        return self._batched[length]

    def head(self, h: Tensor) -> Tensor:
        """The model's own way from h_L to logits: its forward, in which the last layer returns h."""
        # each token as a sequence of its own, so that no mask of tokens by tokens is made
        h_N1D = h.to(self.dtype).reshape(-1, 1, self.d_model)
        last = self.n_layers - 1

        def passing(layer: int) -> Any:
            def stub(*args: Any, **kwargs: Any) -> Any:
                return self._as_returned(layer, h_N1D if layer == last else _stream(args, kwargs))  # type: ignore[arg-type]

            return stub

        ids_N1 = torch.zeros(h_N1D.shape[:2], dtype=torch.int64, device=h.device)
        with self._instead([passing(layer) for layer in range(self.n_layers)]):
            logits = logits_of(self.model(input_ids=ids_N1, **self._options))
        assert logits is not None
        return logits.view(*h.shape[:-1], -1)

    def _verify(self, ids_BT: Tensor, wanted: Tensor) -> None:
        batch = self.start(ids_BT)
        h = batch.h_0
        changing = 0.0
        for layer in range(self.n_layers):
            out = batch.layer(layer, h)
            changing += float((batch.layer(layer, h) - out).double().norm())
            h = out
        off = (batch.head(h) - wanted).double().norm() / wanted.double().norm().clamp(min=1e-30)
        if not off <= TOLERANCE.get(self.dtype, 5e-2) or changing:
            raise ViewError(
                f"{type(self.model).__name__}: run one by one, the layers of {self.list_name} give other logits than "
                f"the model (by {off:.1e}, relative) or differ from call to call; they hand on more than the stream"
            )
        self.layer_calls = 0

    def start(self, ids_BT: Tensor) -> HuggingFacePass:
        ids_BT = ids_BT.to(self.device)
        h_0, calls = self._catch(ids_BT)
        return HuggingFacePass(self, ids_BT, h_0, calls)

    def dissect(self, layer: int) -> Anatomy:
        from sparsekit.probes.dissection import dissect

        return dissect(self, layer)

    def sublayers(self, layer: int) -> Sublayers:
        """Which modules are attention and feed-forward."""
        if layer not in self._sublayers:
            with torch.no_grad():
                batch = self.start(trial_ids(self.vocab_size))
                h = torch.randn(batch.h_0.shape, generator=torch.Generator().manual_seed(layer)).to(batch.h_0)
                self._sublayers[layer] = sublayers_of(self.blocks[layer], lambda: batch.call(layer, h, 1), h.shape)
        return self._sublayers[layer]

    def bank(self, layer: int) -> ExpertBank:
        """A layer's experts.

        Raises:
            ViewError: it has none, or they are of another make.
        """
        parts = self.sublayers(layer)
        if layer not in self._banks:
            with torch.no_grad():
                try:
                    self._banks[layer] = bank_of(parts.demand("ffn"), self.d_model, self.dtype, self.device)
                except ViewError as error:
                    self._banks[layer] = str(error)
        bank = self._banks[layer]
        if isinstance(bank, str):
            raise ViewError(bank)
        return bank

    def watch(
        self,
        undo: ExitStack,
        batch: Pass,
        layer: int,
        sites: Sequence[str],
        edit: Edit,
        seen: dict[str, Any],
        h: Tensor,
    ) -> Tensor:
        parts = self.sublayers(layer)
        if {"attn_out", "ffn_out"} & set(sites):
            for site, name in (("attn_out", "attention"), ("ffn_out", "ffn")):
                if site in sites:
                    parts.demand(name)
            h = h.view(h.shape)  # an object of its own, which the ledger can follow
            marked = {"attn_out": parts.attention, "ffn_out": parts.ffn_end}
            ledger = Ledger(h, {site: m for site, m in marked.items() if m is not None}, edit, seen)
            ledger.hooks(undo)
            undo.enter_context(ledger)
        if {"q", "k", "v", "score"} & set(sites):
            score = ScoreWatch(parts.demand("attention"), h.shape[0], edit, seen)
            score.hooks(undo)
            undo.enter_context(score)
        if {"router", "shared_act"} & set(sites) or ("ffn_act" in sites and parts.down is None):
            self.bank(layer).watch(undo, sites, edit, seen)
        elif "ffn_act" in sites:
            undo.callback(watch_input(parts.demand("down"), "ffn_act", h.shape[:2], edit, seen))
        if "ffn_in" in sites:
            ffn = parts.demand("ffn")
            reader = ffn if ffn is not self.blocks[layer] else parts.linears["ffn"][0]
            undo.callback(watch_input(reader, "ffn_in", h.shape[:2], edit, seen))
        return h


class HuggingFacePass(Pass):
    """One batch on its way, with what its layers are called with."""

    view: HuggingFaceView

    def __init__(self, view: HuggingFaceView, ids_BT: Tensor, h_0: Tensor, calls: list[Call]):
        super().__init__(view, ids_BT, h_0)
        self.calls = calls
        self._repeated: dict[tuple[int, int], Call] = {}

    def call(self, layer: int, h_NTD: Tensor, branches: int) -> Tensor:
        args, kwargs = self.arguments(layer, branches)
        out = self.view.blocks[layer](h_NTD, *args, **kwargs)
        h: Tensor = out[0] if isinstance(out, tuple) else out
        return h

    def arguments(self, layer: int, branches: int) -> Call:
        """What a layer is called with beside the stream, for so many branches."""
        if branches == 1:
            return self.calls[layer]
        if (layer, branches) not in self._repeated:
            memo: dict[int, Tensor] = {}  # layers share masks and angles
            batched = self.view.batched(self.ids_BT.shape[1])
            for other in range(self.view.n_layers):
                again = _repeat(self.calls[other], batched[other], branches, memo)
                self._repeated[other, branches] = again
        return self._repeated[layer, branches]

    def head(self, h_NTD: Tensor) -> Tensor:
        return self.view.head(h_NTD)

    def rope(self, layer: int) -> RopeParts | None:
        from sparsekit.probes.dissection import angles

        return None if self.view.anatomy(layer).rope is None else angles(self.calls[layer][1])


def logits_of(output: Any) -> Tensor | None:
    """Of what a causal language model returns, or None where it returns none."""
    if isinstance(output, Tensor):
        return output
    found = output[0] if isinstance(output, tuple) and output else getattr(output, "logits", None)
    return found if isinstance(found, Tensor) else None


def _stream(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What a layer is called with first."""
    h = args[0] if args else kwargs.get(STREAM)
    return h if isinstance(h, Tensor) else None


def _is_stack(calls: Sequence[list[tuple[int, Tensor | None, Any]]]) -> bool:
    """Whether modules were called once each, one after the other, each with what the one before returned."""
    if any(len(each) != 1 for each in calls):
        return False
    before, last = None, -1
    for ((order, h, output),) in calls:
        out = output[0] if isinstance(output, tuple) and output else output
        if h is None or not isinstance(out, Tensor) or h.ndim != 3 or out.shape != h.shape or order < last:
            return False
        if before is not None and not torch.equal(h, before):
            return False
        before, last = out, order
    return True


def _batched(small: Any, large: Any) -> Any:
    """Which tensors of a layer's arguments have the batch, or a multiple of it, as their first dimension.

    Found by comparing the arguments of two batches that differ in nothing but their size.
    """
    if isinstance(small, Tensor):
        if not isinstance(large, Tensor) or not small.ndim or not large.ndim:
            return False
        return small.shape[0] * (TRIAL[0] + 1) == large.shape[0] * TRIAL[0]
    if isinstance(small, Mapping):
        return {key: _batched(value, large[key]) for key, value in small.items()}
    if isinstance(small, (tuple, list)):
        return [_batched(a, b) for a, b in zip(small, large, strict=True)]
    return False


def _repeat(value: Any, batched: Any, branches: int, memo: dict[int, Tensor]) -> Any:
    """The arguments for several branches."""
    if isinstance(value, Tensor):
        if not batched:
            return value
        if id(value) not in memo:
            memo[id(value)] = value.repeat(branches, *[1] * (value.ndim - 1))
        return memo[id(value)]
    if isinstance(value, dict):
        return {key: _repeat(item, batched[key], branches, memo) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_repeat(item, flag, branches, memo) for item, flag in zip(value, batched, strict=True))
    if isinstance(value, list):
        return [_repeat(item, flag, branches, memo) for item, flag in zip(value, batched, strict=True)]
    return value
