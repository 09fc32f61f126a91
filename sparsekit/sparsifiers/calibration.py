"""What a sparsifier learned of a model: limits by layer and site, and what they come to; on disk and back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsekit.errors import CheckpointError, SpecError
from sparsekit.files import write_json, written_whole
from sparsekit.probes.layered import LayeredModel, layered
from sparsekit.sparsifiers.installed import Installed, SiteOf
from sparsekit.sparsifiers.rules import Limit
from sparsekit.sparsifiers.sites import DOWN, EXPERTS, SHARED
from sparsekit.spec.load import packages_then_and_now

if TYPE_CHECKING:
    from sparsekit.sparsifiers.base import Sparsifier

JSON, TENSORS, THRESHOLDS = "calibration.json", "calibration.safetensors", "thresholds.txt"


@dataclass(frozen=True)
class Calibration:
    """Limits of one sparsifier on one model.

    Attributes:
        sparsifier: its registered name; ``params`` are its own.
        limits: by (layer, projection).
        realised: the share of zeros at each masked input, on the data that it was calibrated on.
        weights: matrix entries that a token's masked input meets; of experts, of those that it visits.
        meta: what it was calibrated on, and what the search for it came to.
    """

    sparsifier: str
    params: Mapping[str, Any]
    limits: Mapping[SiteOf, Limit]
    realised: Mapping[SiteOf, float]
    weights: Mapping[SiteOf, int]
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """The mean of ``realised`` over the masked projections' weights: the share of them that need not be read."""
        return mean_of(self.realised, self.weights)

    def made(self) -> Sparsifier:
        """The sparsifier itself.

        Raises:
            SpecError: it cannot be had; the message names the package that it was of.
        """
        from sparsekit.sparsifiers.choose import make

        try:
            return make({"type": self.sparsifier, **self.params})
        except SpecError as error:
            missing, other = packages_then_and_now(self.meta)
            raise SpecError(missing or other + error.problems) from None

    def install(self, model: nn.Module | LayeredModel, kernels: bool = False, count: bool = True) -> Installed:
        """Masks a model until ``remove()``; see :class:`~sparsekit.sparsifiers.installed.Installed`.

        Raises:
            DataError: the model is not the one that was calibrated on, or nothing in it can be masked.
        """
        view = layered(model)
        return Installed(view, self.made().targets(view, self.limits), kernels, count, self.realised)

    def thresholds(self, n_layers: int) -> tuple[float, ...] | None:
        """One a layer, 0 where a layer has none; None where limits are other than one number a layer."""
        found = [0.0] * n_layers
        for (layer, name), limit in self.limits.items():
            if name not in (DOWN, EXPERTS, SHARED) or limit.threshold is None or limit.threshold.ndim:
                return None
            found[layer] = float(limit.threshold)
        return tuple(found)

    def save(self, folder: str | Path) -> list[Path]:
        """Writes ``calibration.json`` and, where limits are one an input, ``calibration.safetensors``; each whole.

        Returns:
            What was written.
        """
        folder = Path(folder)
        written: list[Path] = []
        tensors = {_key(where): x.threshold for where, x in self.limits.items() if _wide(x.threshold)}
        digest = None
        if tensors:
            from safetensors.torch import save

            data = save({name: x.detach().cpu().contiguous() for name, x in tensors.items() if x is not None})
            digest = hashlib.sha256(data).hexdigest()
            written.append(folder / TENSORS)
            with written_whole(written[-1]) as temporary:
                temporary.write_bytes(data)
        sites = []
        for (layer, name), limit in self.limits.items():
            t, where = limit.threshold, (layer, name)
            one = None if t is None or _wide(t) else float(t)
            sites.append({
                "layer": layer, "site": name, "threshold": one, "k": limit.k,
                "sparsity": self.realised.get(where), "weights": self.weights[where],
            })  # fmt: skip
        told = {"sparsifier": self.sparsifier, "params": dict(self.params), "sparsity": self.sparsity}
        written.append(folder / JSON)  # last: who finds it finds all
        write_json(written[-1], {**told, "sites": sites, "tensors": digest, "meta": self.meta})
        return written

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """What :meth:`save` wrote, from its folder or its JSON file.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        path = Path(path)
        path = path / JSON if path.is_dir() else path
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            tensors = _tensors(path.with_name(TENSORS), told["tensors"])
            limits: dict[SiteOf, Limit] = {}
            realised: dict[SiteOf, float] = {}
            weights: dict[SiteOf, int] = {}
            for site in told["sites"]:
                where = int(site["layer"]), str(site["site"])
                t = tensors.get(_key(where))
                if t is None and site["threshold"] is not None:
                    t = torch.tensor(site["threshold"], dtype=torch.float64)
                if (t is None) == (site["k"] is None):
                    raise ValueError(f"layer {where[0]}, {where[1]}: wants a threshold or k")
                limits[where], weights[where] = Limit(t, site["k"]), int(site["weights"])
                if site["sparsity"] is not None:
                    realised[where] = float(site["sparsity"])
            return cls(told["sparsifier"], told["params"], limits, realised, weights, told["meta"])
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such calibration; sparsekit sparsify writes one") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: is no calibration, or is damaged ({error}); calibrate again") from None


def mean_of(shares: Mapping[SiteOf, float], weights: Mapping[SiteOf, int]) -> float:
    """The mean of sites' shares by their weights; 0 where there are none."""
    total = sum(weights[where] for where in shares)
    return sum(share * weights[where] for where, share in shares.items()) / total if total else 0.0


def _key(where: SiteOf) -> str:
    return f"{where[0]}.{where[1]}"


def _wide(threshold: Tensor | None) -> bool:
    return threshold is not None and threshold.ndim > 0


def _tensors(path: Path, digest: str | None) -> dict[str, Tensor]:
    if digest is None:
        return {}
    from safetensors.torch import load

    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise ValueError(f"{path.name} is not what was written with it")
    return load(data)
