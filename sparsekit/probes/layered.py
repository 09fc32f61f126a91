"""Any causal language model as a stack of layers: what goes in, each layer as a function, and the way to logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekit.components.contracts import wide
from sparsekit.errors import SparsekitError
from sparsekit.probes.anatomy import Anatomy, RopeParts

Edit = Mapping[str, Callable[[Any], Any]]
SITES = ("attn_out", "ffn_out", "ffn_in", "ffn_act", "shared_act", "router", "q", "k", "v", "score")
MOST_LOGITS = {"cuda": 1 << 26}  # that exist at a time
MOST_LOGITS_ELSEWHERE = 1 << 24
TRIAL = (2, 5)  # sequences and tokens of the batch on which a view is tried out


class ViewError(SparsekitError):
    """A model that cannot be looked at layer by layer."""


class LayeredModel(ABC):
    """A causal language model, h_{l+1} = layer_l(h_l), logits = head(h_L); made by :func:`layered`.

    Attributes:
        model: what is looked at.
        blocks: its layers.
        layer_calls: how often a batch went through a layer, a branch counted once: what probes cost.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], d_model: int, vocab_size: int):
        self.model, self.blocks = model, list(blocks)
        self.n_layers, self.d_model, self.vocab_size = len(self.blocks), d_model, vocab_size
        weight = next(p for p in self.blocks[0].parameters() if p.is_floating_point())
        self.device: torch.device = weight.device
        self.dtype: torch.dtype = weight.dtype
        self.layer_calls = 0
        self._sites: dict[int, dict[str, str | None]] = {}
        self._anatomies: dict[int, Anatomy] = {}

    @abstractmethod
    def start(self, ids_BT: Tensor) -> Pass:
        """A batch on its way, before layer 0."""

    @abstractmethod
    def dissect(self, layer: int) -> Anatomy:
        """What :meth:`anatomy` keeps."""

    @abstractmethod
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
        """Has ``seen`` filled with what stands at sites while the layer runs, by hooks that ``undo`` takes back.

        Returns:
            The stream ``h``, as the layer is to be called with it.
        """

    def anatomy(self, layer: int) -> Anatomy:
        """A layer's parts."""
        if layer not in self._anatomies:
            self._anatomies[layer] = self.dissect(layer)
        return self._anatomies[layer]

    def sites(self, layer: int) -> dict[str, str | None]:
        """What can be observed in a layer: None where it can be, else "not applicable: reason".

        attn_out, ffn_out: what each sub-layer adds to the stream [N, T, D]; in a scheme that normalises or scales it
        first, after that. ffn_in: what the feed-forward reads [N, T, D]. ffn_act: the input of the down projection
        [N, T, F]; of experts :class:`~sparsekit.probes.anatomy.ExpertRows`, and shared_act those of a shared expert.
        router: a Routing with token_M. q [N, H, T, K], k and v [N, G, T, K]: as they enter the score; score: a
        :class:`~sparsekit.probes.anatomy.Score`, what joins them there. All can be edited but score.
        """
        if layer not in self._sites:
            self._sites[layer] = self._try_out(layer)
        return self._sites[layer]

    @torch.no_grad()
    def _try_out(self, layer: int) -> dict[str, str | None]:
        calls = self.layer_calls
        batch = self.start(trial_ids(self.vocab_size))
        told: dict[str, str | None] = {}
        for site in SITES:
            try:
                _, seen = batch.observe(layer, batch.h_0, [site])
                told[site] = None if site in seen else "not applicable: it was not seen"
            except ViewError as error:
                told[site] = f"not applicable: {error}"
        self.layer_calls = calls
        return told


class Pass:
    """One batch on its way through a model: holds what layers are called with beside the stream.

    The stream of several branches goes through a layer at once: N = branches·B, branch-major, so that
    ``h_NTD.view(branches, B, T, D)`` tells them apart. Arguments belong to their layer, and layers may be called in
    any order.

    Attributes:
        ids_BT: on the model's device.
        h_0: [B, T, D], before layer 0.
    """

    def __init__(self, view: LayeredModel, ids_BT: Tensor, h_0: Tensor):
        self.view, self.ids_BT, self.h_0 = view, ids_BT, h_0

    def call(self, layer: int, h_NTD: Tensor, branches: int) -> Tensor:
        """The layer itself."""
        raise NotImplementedError

    def head(self, h_NTD: Tensor) -> Tensor:
        """Logits, the final norm included: [..., T, D] -> [..., T, V]."""
        raise NotImplementedError

    def rope(self, layer: int) -> RopeParts | None:
        """How the layer turns this batch's queries and keys, [T, R/2]; None where the anatomy has none."""
        rope, length = self.view.anatomy(layer).rope, self.ids_BT.shape[1]
        return None if rope is None else RopeParts(rope.cos[:length], rope.sin[:length])

    def layer(self, layer: int, h_NTD: Tensor) -> Tensor:
        """h_{l+1} of branches' h_l; computed in the model's dtype."""
        branches, left = divmod(h_NTD.shape[0], self.ids_BT.shape[0])
        if left or not branches:
            raise ValueError(f"{h_NTD.shape[0]} sequences are no multiple of the batch's {self.ids_BT.shape[0]}")
        self.view.layer_calls += branches
        return self.call(layer, h_NTD.to(self.view.dtype), branches)

    def observe(
        self, layer: int, h_NTD: Tensor, sites: Sequence[str], edit: Edit | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Runs a layer: (its output, what stood at the sites); ``edit`` by site puts something else there.

        What is edited is observed after the edit if it is among ``sites``.

        Raises:
            ViewError: the layer has no such site.
        """
        seen: dict[str, Any] = {}
        h_NTD = h_NTD.to(self.view.dtype)
        with ExitStack() as undo:
            h_NTD = self.view.watch(undo, self, layer, [*sites, *(edit or {})], edit or {}, seen, h_NTD)
            out = self.layer(layer, h_NTD)
        return out, {site: seen[site] for site in sites if site in seen}

    def losses(self, h_NTD: Tensor) -> Tensor:
        """[N] mean next-token cross-entropy of each sequence in nats, in float32 or wider, from h_L.

        Logits never exist for more than a bounded number of tokens.
        """
        n, length = h_NTD.shape[0], h_NTD.shape[1] - 1
        if length < 1:
            raise ValueError("a sequence of one token has nothing to predict")
        targets_NT = self.ids_BT[:, 1:].repeat(n // self.ids_BT.shape[0], 1)
        most = max(1, MOST_LOGITS.get(h_NTD.device.type, MOST_LOGITS_ELSEWHERE) // self.view.vocab_size)
        full = wide(self.view.dtype)
        losses_N = torch.empty(n, dtype=full, device=h_NTD.device)
        rows = max(1, most // length)
        for first in range(0, n, rows):
            h, targets = h_NTD[first : first + rows, :-1], targets_NT[first : first + rows]
            pieces = zip(h.split(most, dim=1), targets.split(most, dim=1), strict=True)
            parts = [
                F.cross_entropy(self.head(h).to(full).flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)
                for h, ids in pieces
            ]
            losses_N[first : first + rows] = torch.cat(parts, dim=1).mean(1)
        return losses_N


def watch_input(module: nn.Module, site: str, shape: Any, edit: Edit, seen: dict[str, Any]) -> Any:
    """Sees, or edits, the first tensor that a module is called with, as [*shape, width]; returns how to end it."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = None if args else next(key for key, value in kwargs.items() if isinstance(value, Tensor))
        x = args[0] if name is None else kwargs[name]
        whole = x.view(*shape, x.shape[-1])
        if site in edit:
            whole = edit[site](whole)
        seen[site] = whole
        put = whole.view(x.shape)
        return ((put, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: put})

    return module.register_forward_pre_hook(before, with_kwargs=True).remove


def layered(model: Any) -> LayeredModel:
    """The view by layers of a sparsekit Decoder or of a Hugging Face causal language model.

    Raises:
        ViewError: the model does not fit the view; the message says why.
    """
    from sparsekit.model.decoder import Decoder

    if isinstance(model, LayeredModel):
        return model
    if isinstance(model, Decoder):
        from sparsekit.probes.decoder import DecoderView

        return DecoderView(model)
    if isinstance(model, nn.Module):
        from sparsekit.probes.huggingface import HuggingFaceView

        return HuggingFaceView(model)
    raise ViewError(f"{type(model).__name__}: is no model; give a sparsekit or Hugging Face one")


def trial_ids(vocab_size: int, sequences: int = TRIAL[0], tokens: int = TRIAL[1]) -> Tensor:
    """Ids that differ from token to token as far as the vocabulary goes."""
    return (torch.arange(sequences * tokens) * 7 % max(1, vocab_size)).view(sequences, tokens)
