"""What every layer does in a training step: variance, moments, density, expert load, norms.

Shapes: L layers, S sites (resid, attn_out, ffn_out), K sums kept of a site, E experts, N tokens, D channels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import get_world_size

from sparsekit.components.contracts import ForwardContext, Linear, wide
from sparsekit.model.decoder import Decoder
from sparsekit.model.dtensor import is_dtensor
from sparsekit.model.meanwhile import run_eagerly
from sparsekit.probes.site_means import SITES, SUMS, WITHOUT_MOMENTS, moments_of, ratio, site_means, unbiased
from sparsekit.training.gradients import copies


class LayerStatistics:
    """Statistics of every layer over one training step, weighted over its micro-batches and summed where they arise.

    Make one for each step that is due, and run each micro-batch, forward and backward, inside :meth:`collecting`.
    What is kept is one tensor of sums, ``stacked``: ranks add theirs, and :meth:`rows` says what the whole came to.
    Until then nothing makes the host wait for the device.

    At the sites ``resid`` (the layer's output), ``attn_out`` and ``ffn_out`` (what the sub-layer returns, before a
    residual scheme scales, normalises or adds it), by key ``<name>/<site>/layer_<l>``:

    * variance: of a token over channels, unbiased, mean over tokens; rms; frobenius: norm of the whole step's tensor.
    * with moments, of all entries x: skewness m3 / m2^1.5, kurtosis m4 / m2^2, cv std / |mean|; of each token over
      channels: token_skewness and token_kurtosis, their means and (``…_std``) standard deviations over tokens.

    And by key ``<name>/layer_<l>``:

    * density: share of hidden units that are not 0, read where the projection of role "down" reads them; of experts,
      the units that tokens visit.
    * load_max: the largest expert's share of the assignments times E; load_entropy: that of the shares over log E;
      dropped: as the router counts it. Of the outermost mixture, where there is one.
    * param_norm and grad_norm, after :meth:`norms`.

    0/0 is 0. Moments are sums in float64 of centred sums in float32 (or wider), so that they lose nothing to a mean
    far from 0. Layers compiled by ``layer.compile()`` run eagerly meanwhile: torch.compile does not look at hooks
    that come after it.

    Source: arXiv 2603.15389 (variance and moments)
    """

    def __init__(self, model: Decoder, moments: bool = True, alike: int = 1):
        self.model = model
        self.moments, self.alike = moments, alike
        self.layers: list[Any] = list(model.layers)
        self._downs = [[m for m in layer.ffn.modules() if _is_down(m)] for layer in self.layers]
        self._loads = dict(self._counting("load"))
        self._drops = dict(self._counting("dropped"))
        n_layers = len(self.layers)
        most = max((module.load.numel() for module in self._loads.values()), default=0)
        self._shapes: dict[str, tuple[int, ...]] = {
            "weight": (),
            "tokens": (),
            "sites": (len(SUMS) if moments else WITHOUT_MOMENTS, len(SITES), n_layers),
            "units": (2, n_layers),  # not 0, all
            "load": (n_layers, most),
            "dropped": (n_layers,),
            "squares": (2, 2, n_layers),  # whole on every rank, sharded; of parameters, of gradients
        }
        device = next(model.parameters()).device
        # one pass over what a layer returns in place of a dozen; worth its compilation where layers are compiled too
        fuse = device.type == "cuda" and any(layer._compiled_call_impl is not None for layer in self.layers)
        self._site_means = _fused_site_means() if fuse else site_means
        wide = torch.float32 if device.type == "mps" else torch.float64  # which has no float64
        self.stacked = torch.zeros(sum(map(math.prod, self._shapes.values())), dtype=wide, device=device)
        self._sums = self._split(self.stacked)
        self._weight: float | Tensor = 0.0
        self._open: int | None = None
        self._seen: set[tuple[str, int]] = set()
        self._has_norms = False

    @contextmanager
    def collecting(self, weight: float | Tensor) -> Iterator[None]:
        """Collects from one micro-batch, whose forward and backward run inside.

        The backward too, as recomputation compares what it keeps with what the forward kept, and both must therefore
        run eagerly; a layer is counted the first time only.

        Args:
            weight: the micro-batch's share of the step's targets, over all ranks.

        Raises:
            RuntimeError: a layer was not seen, as when something was compiled that hides it.
        """
        self._weight, self._open = weight, None
        self._seen.clear()
        with ExitStack() as undo:
            run_eagerly(undo, self.model)
            for index in range(len(self.layers)):
                for handle in self._hooks(index):
                    undo.callback(handle.remove)
            yield
        for index in range(len(self.layers)):
            for site in SITES:
                if (site, index) not in self._seen:
                    raise RuntimeError(f"statistics: {site} of layer {index} was not seen; was the layer replaced?")
        self._sums["weight"] += weight

    @torch.no_grad()
    def norms(self) -> None:
        """Adds the norms of each layer's parameters and gradients; once a step, after its last backward."""
        self._has_norms = True
        for index, layer in enumerate(self.layers):
            for parameter in layer.parameters():
                for place, tensor in enumerate((parameter, parameter.grad)):
                    if tensor is not None:
                        shard, share = _shard(tensor)
                        square = _norm(shard).square()
                        if share is None:  # whole on every rank: in the sum over ranks the weights make it one
                            self._sums["squares"][0, place, index] += square * self._sums["weight"]
                        else:
                            self._sums["squares"][1, place, index] += square * share

    def result(self, stacked: Tensor | None = None) -> dict[str, Tensor]:
        """The statistics by key, each a tensor of no dimensions.

        Args:
            stacked: sums of several ranks, added; by default this one's.
        """
        sums = self._sums if stacked is None else self._split(stacked)
        weight = sums["weight"]
        sites = dict(zip(SUMS, ratio(sums["sites"], weight), strict=False))
        told = {
            f"{name}/{site}/layer_{index}": value
            for name, values in self._of_sites(sites, sums["tokens"]).items()
            for site, row in zip(SITES, values, strict=True)
            for index, value in enumerate(row)
        }
        density = ratio(sums["units"][0], sums["units"][1])
        dropped = ratio(sums["dropped"], weight)
        norms = (ratio(sums["squares"][0], weight) + sums["squares"][1]).sqrt()
        for index in range(len(self.layers)):
            if self._downs[index]:
                told[f"density/layer_{index}"] = density[index]
            if index in self._loads:
                n_experts = self._loads[index].load.numel()
                share_E = ratio(sums["load"][index], sums["load"][index].sum())
                entropy = -torch.special.xlogy(share_E, share_E).sum()
                told[f"load_max/layer_{index}"] = share_E.max() * n_experts
                told[f"load_entropy/layer_{index}"] = entropy / math.log(max(2, n_experts))
            if index in self._drops:
                told[f"dropped/layer_{index}"] = dropped[index]
            if self._has_norms:
                told[f"param_norm/layer_{index}"], told[f"grad_norm/layer_{index}"] = norms[:, index]
        return told

    def rows(self, stacked: Tensor | None = None) -> dict[str, float]:
        """:meth:`result` as numbers; here, once, the host waits for the device."""
        stacked = self.stacked if stacked is None else stacked
        return {name: value.item() for name, value in self.result(stacked.cpu()).items()}

    def _counting(self, counter: str) -> Iterator[tuple[int, Any]]:
        """Of each feed-forward the outermost module that has a counter of a name, where there is one."""
        for index, layer in enumerate(self.layers):
            for module in layer.ffn.modules():
                if counter in getattr(module, "counters", ()):
                    yield index, module
                    break

    def _split(self, stacked: Tensor) -> dict[str, Tensor]:
        """The parts of a stacked tensor, as views."""
        parts = stacked.split([math.prod(shape) for shape in self._shapes.values()])
        return {name: part.view(self._shapes[name]) for name, part in zip(self._shapes, parts, strict=True)}

    def _of_sites(self, means: Mapping[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
        """What is told of sites, each [S, L], from the means of SUMS."""
        n_entries = tokens * self.model.spec.d_model
        told = {"variance": means["variance"], "rms": means["x2"].sqrt()}
        told["frobenius"] = told["rms"] * n_entries.sqrt()
        if self.moments:
            told |= moments_of(means, n_entries)
            for name in ("skewness", "kurtosis"):
                mean, square = means[name], means[f"{name}^2"]
                told[f"token_{name}"] = mean
                told[f"token_{name}_std"] = ((square - mean**2).clamp(min=0) * unbiased(tokens)).sqrt()
        return told

    def _hooks(self, index: int) -> Iterator[Any]:
        """Registers a layer's hooks, which act the first time the layer runs and no more."""
        layer = self.layers[index]

        def begin(module: nn.Module, inputs: Any) -> None:
            self._open = None if ("resid", index) in self._seen else index

        def end(module: nn.Module, inputs: Any, output: Any) -> None:
            if self._open == index:
                self._see("resid", index, output)
                self._see_experts(index)
            self._open = None

        def watch(site: str) -> Any:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                if self._open == index:
                    self._see(site, index, output)

            return hook

        def before_down(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
            if self._open == index:
                self._see_hidden(index, *inputs, **options)

        yield layer.register_forward_pre_hook(begin)
        yield layer.attention.register_forward_hook(watch("attn_out"))
        yield layer.ffn.register_forward_hook(watch("ffn_out"))
        for down in self._downs[index]:
            yield down.register_forward_pre_hook(before_down, with_kwargs=True)
        yield layer.register_forward_hook(end)

    @torch.no_grad()
    def _see(self, site: str, index: int, output: Any) -> None:
        """Adds what a layer or a sub-layer returned; of (output, state) the output."""
        x_ND = (output[0] if isinstance(output, tuple) else output).detach().flatten(0, -2)
        means_K = self._site_means(x_ND, self.moments, self.stacked.dtype)
        self._sums["sites"][:, SITES.index(site), index] += means_K * self._weight
        self._seen.add((site, index))
        if (site, index) == ("resid", 0):
            self._sums["tokens"] += x_ND.shape[0] / self.alike

    @torch.no_grad()
    def _see_hidden(self, index: int, x: Tensor, context: ForwardContext | None = None) -> None:
        """Adds the hidden units that a down projection reads, but for rows that belong to no expert."""
        x_MF = x.detach().flatten(0, -2)
        active_M = (x_MF != 0).sum(-1, dtype=self.stacked.dtype)
        n_rows: Tensor | int = x_MF.shape[0]
        if context is not None and context.groups is not None and context.groups.offsets_E is not None:
            n_rows = context.groups.offsets_E[-1]
            active_M = torch.where(torch.arange(x_MF.shape[0], device=x.device) < n_rows, active_M, 0)
        self._sums["units"][0, index] += active_M.sum() * self._weight
        self._sums["units"][1, index] += n_rows * x_MF.shape[1] * self._weight

    @torch.no_grad()
    def _see_experts(self, index: int) -> None:
        """Adds what a mixture and its router counted in this forward."""
        if index in self._loads:
            load_E = self._loads[index].load
            self._sums["load"][index, : load_E.numel()] += load_E * self._weight
        if index in self._drops:
            self._sums["dropped"][index] += self._drops[index].dropped * self._weight


@functools.cache
def _fused_site_means() -> Any:
    return torch.compile(site_means, dynamic=False)


def _is_down(module: nn.Module) -> bool:
    return isinstance(module, Linear) and module.role == "down"


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor.detach(), dtype=wide(tensor.dtype))


def _shard(tensor: Tensor) -> tuple[Tensor, float | None]:
    """This rank's shard, and by which its square counts in a sum over ranks; None for what is no DTensor."""
    if not is_dtensor(tensor):
        return tensor, None
    return tensor.to_local(), 1 / copies(tensor, get_world_size())
