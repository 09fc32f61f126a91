"""The mean Jacobian of every layer: how far a layer is from passing its input on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from sparsekit.components.contracts import wide
from sparsekit.errors import SpecError
from sparsekit.probes.base import Array, Probe, ProbeResult, Tokens, bootstrap
from sparsekit.probes.jacobian_estimates import estimate
from sparsekit.probes.jacobian_products import Copies, exact_sum
from sparsekit.probes.layered import LayeredModel, Pass
from sparsekit.probes.structured_jacobian import batch_size, jacobian_sum
from sparsekit.probes.structured_layer import StructuredLayer, why_not
from sparsekit.probes.token_jacobian import TokenSample, change_by_products, change_structured

METRICS = ("identity_deviation", "off_diagonal", "diagonal_mean", "diagonal_std", "frobenius", "spectral")
PROOFS = 2  # vector-Jacobian products that a structured layer is held against
Precision = Literal["float32", "tf32", "bf16"]


class Jacobian(Probe):
    """Distance of every layer's mean Jacobian from the identity, and of each token's own.

    J_l = 1/(S T) sum over sequences, tokens t' and t >= t' of dh_{l+1,t} / dh_{l,t'}, J[i,j] = d output i / d input j:
    identity_deviation ||J - I||_F / D, off_diagonal ||J - diag J||_F / sqrt(D^2 - D), diagonal_mean, diagonal_std
    (unbiased), frobenius ||J||_F, spectral (the largest singular value), each a layer and as mean over layers.
    Averaging J cancels what differs from token to token; token_deviation, the mean over tokens of
    ||dh_{l+1,t} / dh_{l,t} - I||_F / D, does not.

    Attributes of ``params``:
        method: "exact" (D vector-Jacobian products a layer), "structured" (exact too, in closed form: pre-norm layers
            of softmax attention with or without rope and a dense feed-forward), "estimate" (random directions, with
            standard errors), or "auto": structured where a layer's parts say so and, on the first batch, it agrees
            with a few exact products, else exact; ``meta["methods"]`` says which, ``meta["remarks"]`` why.
        precision: of the structured form's matrix products: "float32", "tf32" (on GPUs that have it), or "bf16"
            factors accumulated in float32. Null: as torch is set, and tf32 for models of half precision, which are
            themselves coarser.
        mean_jacobian: return J itself as a matrix [L, D, D].
        jackknife: so many groups of sequences (8 are usual) give every metric a standard error and every scalar an
            interval; 0 for none. The groups' sums are kept on the CPU.
        directions, iterations: of "estimate": Rademacher directions a layer, and steps for the spectral norm.
        token_positions, token_directions: positions a sequence, and Rademacher directions each, from which
            token_deviation is estimated; null for all positions, and for all axes instead of random directions.
        memory_gb: that it may take beside model and batch.

    Source: arXiv 2603.15389 (mean Jacobian); Hutchinson 1989 (estimates)
    """

    class Params(Probe.Params):
        method: Literal["auto", "exact", "structured", "estimate"] = "auto"
        precision: Precision | None = None
        mean_jacobian: bool = False
        jackknife: NonNegativeInt = 0
        directions: PositiveInt = 64
        iterations: PositiveInt = 3
        token_positions: PositiveInt | None = 1
        token_directions: PositiveInt | None = 32
        memory_gb: PositiveFloat = 2.0

    params: Params

    @torch.no_grad()
    def run(self, view: LayeredModel, tokens: Tokens) -> ProbeResult:
        params, sequences = self.params, tokens.ids_ST.shape[0]
        if params.jackknife == 1 or params.jackknife > sequences:
            raise SpecError(
                [f"jacobian.jackknife: {params.jackknife} groups of {sequences} sequences; take 2 to {sequences}"]
            )
        if params.method == "estimate" and (params.mean_jacobian or params.jackknife):
            asked = "mean_jacobian" if params.mean_jacobian else "jackknife"
            raise SpecError([f"jacobian.{asked}: an estimate has none; take method exact or auto"])
        if params.method == "estimate" and params.directions < 3:
            raise SpecError([f"jacobian.directions: {params.directions} give no standard error; take 3 or more"])
        run = Run(self, view, tokens)
        with products(params.precision, view):
            run.pass_over()
            result = ProbeResult(meta={"methods": run.methods})
            for remark in run.remarks:
                result.remark(remark)
            if params.method == "estimate":
                self._estimates(view, tokens, result)
            else:
                self._metrics(run, result)
        self._token_deviation(run, result)
        return result

    def _metrics(self, run: Run, result: ProbeResult) -> None:
        """From the sums of all tokens, and of all but one group's."""
        total = run.sums.sum(0) if len(run.sums) > 1 else run.sums[0]
        n = sum(run.tokens_in)
        per_layer = [metrics(total[layer] / n) for layer in range(len(total))]
        for name in METRICS:
            result.per_layer[name] = np.array([found[name] for found in per_layer])
            result.scalars[name] = float(result.per_layer[name].mean())
        if self.params.mean_jacobian:
            result.matrices["mean_jacobian"] = (total / n).cpu().numpy()
        if not self.params.jackknife:
            result.intervals |= dict.fromkeys(METRICS)
            result.remark("jacobian: no intervals, as its scalars are no means over sequences; ask for jackknife=8")
            return
        left_out = [
            [metrics((total[layer] - group[layer]) / (n - m)) for layer in range(len(total))]
            for group, m in zip(run.sums, run.tokens_in, strict=True)
        ]
        for name in METRICS:
            values_GL = np.array([[found[name] for found in row] for row in left_out])
            result.per_layer[f"{name}_se"] = jackknife_error(values_GL)
            error = float(jackknife_error(values_GL.mean(1)))
            reach = student_95(len(values_GL) - 1) * error
            result.intervals[name] = (result.scalars[name] - reach, result.scalars[name] + reach)

    def _estimates(self, view: LayeredModel, tokens: Tokens, result: ProbeResult) -> None:
        params, room = self.params, int(self.params.memory_gb * 1e9)
        found = estimate(view, tokens, params.directions, params.iterations, room, self.seed)
        for name in METRICS:
            result.per_layer[name] = found.values[name].cpu().numpy()
            result.per_layer[f"{name}_se"] = found.errors[name].cpu().numpy()
            result.scalars[name] = float(result.per_layer[name].mean())
        # directions are drawn anew in every layer
        errors = {name: float(x.square().sum().sqrt() / view.n_layers) for name, x in found.errors.items()}
        result.meta["standard_errors"] = errors
        result.intervals |= dict.fromkeys(METRICS)
        result.remark("jacobian: estimated; standard errors (_se) are over directions, not over sequences")
        if found.reason is not None:
            result.remark(found.reason)

    def _token_deviation(self, run: Run, result: ProbeResult) -> None:
        samples_LSP = run.token_deviation.cpu().numpy()
        samples_LS = samples_LSP.mean(2)
        n = samples_LS.shape[1]
        result.per_layer["token_deviation"] = samples_LS.mean(1)
        result.scalars["token_deviation"] = float(samples_LS.mean())
        if n < 2:
            result.per_layer["token_deviation_se"] = np.full(len(samples_LS), np.nan)
            result.intervals["token_deviation"] = None
            result.remark("token_deviation: no interval from one sequence")
            return
        result.per_layer["token_deviation_se"] = samples_LS.std(1, ddof=1) / n**0.5
        result.intervals["token_deviation"] = bootstrap(samples_LS.mean(0), seed=self.seed)


class Run:
    """One pass over the tokens: every layer's sum of Jacobians, group by group, and the deviation of single tokens.

    Attributes:
        sums: [groups, L, D, D] sums over tokens; empty where the norms are estimated.
        tokens_in: how many tokens went into each group's.
        token_deviation: [L, S, P].
        methods: of every layer.
    """

    def __init__(self, probe: Jacobian, view: LayeredModel, tokens: Tokens):
        self.params, self.view, self.tokens = probe.params, view, tokens
        self.room = int(probe.params.memory_gb * 1e9)
        self.wide = wide(view.dtype)
        self.remarks: list[str] = []
        self.methods = [self._method(layer) for layer in range(view.n_layers)]
        self.proved: set[int] = set()
        sequences, length = tokens.ids_ST.shape
        self.sample = TokenSample(
            sequences, length, probe.params.token_positions, probe.params.token_directions, probe.seed
        )
        self.token_deviation = torch.zeros(
            view.n_layers, *self.sample.position_SP.shape, dtype=torch.float64, device=view.device
        )
        groups = np.array_split(np.arange(sequences), max(1, probe.params.jackknife))
        self.groups = [range(int(group[0]), int(group[-1]) + 1) for group in groups]
        self.tokens_in = [len(group) * length for group in self.groups]
        shape = len(groups), view.n_layers, view.d_model, view.d_model
        if probe.params.method == "estimate":
            shape = (0, *shape[1:])
        bytes_needed = int(np.prod(shape)) * self.wide.itemsize
        here = bytes_needed < self.room // 3
        self.sums = torch.zeros(shape, dtype=self.wide, device=view.device if here else "cpu")
        self.room -= bytes_needed if here else 0

    def _method(self, layer: int) -> str:
        wanted = self.params.method
        if wanted in ("exact", "estimate"):
            return wanted
        reason = why_not(self.view.anatomy(layer))
        if reason is None:
            return "structured"
        return self._not_structured(layer, reason)

    def _not_structured(self, layer: int, reason: str) -> str:
        if self.params.method == "structured":
            raise SpecError([f"jacobian.method: layer {layer} has no structured form: {reason}; take auto or exact"])
        self.remarks.append(f"layer {layer}: exact and not structured, as {reason}")
        return "exact"

    def _batch_size(self) -> int:
        sizes = {self.tokens.batch_size} if {"exact", "estimate"} & set(self.methods) else set()
        if "structured" in self.methods:
            layer = StructuredLayer(self.view.anatomy(self.methods.index("structured")), None, self.wide)
            sizes.add(batch_size(layer, self.tokens.ids_ST.shape[1], self.room))
        return min(sizes)

    def pass_over(self) -> None:
        size = self._batch_size()
        for group, sequences in enumerate(self.groups):
            for first in range(sequences.start, sequences.stop, size):
                here = range(first, min(first + size, sequences.stop))
                batch = self.view.start(self.tokens.ids_ST[here.start : here.stop])
                h = batch.h_0
                for layer in range(self.view.n_layers):
                    out = batch.layer(layer, h)
                    self._layer(batch, layer, h, group, here)
                    h = out

    def _layer(self, batch: Pass, layer: int, h_BTD: Tensor, group: int, here: range) -> None:
        if self.methods[layer] == "structured":
            parts = StructuredLayer(self.view.anatomy(layer), batch.rope(layer), self.wide)
            x = h_BTD.to(self.wide)
            kind = torch.bfloat16 if self.params.precision == "bf16" else None
            found = jacobian_sum(parts, x, self.room, kind)
            if layer in self.proved or self._prove(batch, layer, h_BTD, found):
                self.sums[group, layer] += found.to(self.sums.device)
                self._tokens(layer, here, lambda place, v: change_structured(parts, x, place, v), x)
                return
        if self.methods[layer] == "exact":
            self.sums[group, layer] += exact_sum(batch, layer, h_BTD, self.room).to(self.sums.device)
        n = self.sample.directions or self.view.d_model
        graph = Copies.within(batch, layer, h_BTD, self.room, n)
        self._tokens(layer, here, lambda place, v: change_by_products(graph, place, v), h_BTD.to(self.wide))

    def _tokens(self, layer: int, here: range, change: Any, like: Tensor) -> None:
        for place in range(self.sample.position_SP.shape[1]):
            position_B = self.sample.position_SP[here.start : here.stop, place].to(like.device)
            v_CBD = self.sample.draw(here, place, like.shape[-1], like)
            deviation_B = self.sample.deviation(change(position_B, v_CBD))
            self.token_deviation[layer, here.start : here.stop, place] = deviation_B

    def _prove(self, batch: Pass, layer: int, h_BTD: Tensor, found: Tensor) -> bool:
        """Whether a structured sum agrees with exact products; else the layer is exact from now on."""
        generator = torch.Generator().manual_seed(layer)
        v_CD = (torch.randint(2, (PROOFS, self.view.d_model), generator=generator) * 2 - 1).to(found)
        exact = Copies.within(batch, layer, h_BTD, self.room, PROOFS).pull_sums(v_CD).to(found.dtype)
        identity = v_CD * (h_BTD.shape[0] * h_BTD.shape[1])
        off, whole = (v_CD @ found - exact).norm(), (exact - identity).norm()
        rounding = torch.finfo(self.view.dtype).eps * identity.norm()
        # many Hugging Face norms compute in float32 whatever the model's dtype
        tolerance = {torch.float64: 1e-6, torch.float32: 1e-3}.get(self.view.dtype, 5e-2)
        if self.params.precision in ("tf32", "bf16"):
            tolerance = max(tolerance, 5e-2)
        self.proved.add(layer)
        if off <= tolerance * whole + rounding:
            return True
        reason = f"on the first batch the two differ by {float(off / whole):.1e} of J - I, more than {tolerance:.0e}"
        self.methods[layer] = self._not_structured(layer, reason)
        return False


@contextmanager
def products(precision: Precision | None, view: LayeredModel) -> Iterator[None]:
    """Has torch multiply float32 matrices in a precision, and accumulate half precision in float32."""
    before = torch.get_float32_matmul_precision()
    matmul = torch.backends.cuda.matmul
    reduced = matmul.allow_bf16_reduced_precision_reduction
    coarse = precision == "tf32" or (precision is None and view.dtype.itemsize < 4)
    torch.set_float32_matmul_precision("high" if coarse else before if precision is None else "highest")
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        matmul.allow_bf16_reduced_precision_reduction = reduced


def metrics(mean_DD: Tensor) -> dict[str, float]:
    """Of one Jacobian, in float64."""
    j = mean_DD.double()
    d_model, diagonal = len(j), j.diagonal()
    off_diagonal = j - torch.diag(diagonal)
    axes = torch.eye(d_model, dtype=j.dtype, device=j.device)
    found = {
        "identity_deviation": (j - axes).norm() / d_model,
        "off_diagonal": off_diagonal.norm() / max(1, d_model**2 - d_model) ** 0.5,
        "diagonal_mean": diagonal.mean(),
        "diagonal_std": diagonal.std() if d_model > 1 else diagonal.new_zeros(()),
        "frobenius": j.norm(),
        "spectral": spectral_norm(j),
    }
    return dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True))


def spectral_norm(j_DD: Tensor, most: int = 256) -> Tensor:
    """The largest singular value, to the precision of the matrix.

    By Lanczos's method on J^T J, every vector held orthogonal to all before it, until the residual of the largest value
    found is rounding. All eigenvalues, of which this is one, take longer on a GPU than all the rest of the metrics, and
    gigabytes; they are worked out where ``most`` steps were not enough, as among singular values that are nearly equal.

    Source: Golub & Van Loan 2013, Matrix Computations, 10.1 and 10.3
    """
    d_model, most = len(j_DD), min(most, len(j_DD))
    q_D = torch.randn(d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(j_DD)
    q_D = q_D / q_D.norm()
    basis_KD, inner_K, next_K = j_DD.new_zeros(most, d_model), j_DD.new_zeros(most), j_DD.new_zeros(most)
    for k in range(most):
        basis_KD[k] = q_D
        w_D = j_DD.T @ (j_DD @ q_D)
        inner_K[k] = w_D @ q_D
        q_D = w_D - basis_KD[: k + 1].T @ (basis_KD[: k + 1] @ w_D)
        next_K[k] = q_D.norm()
        for _ in range(2):  # where nothing but rounding is left, that is not orthogonal yet
            q_D = q_D / q_D.norm().clamp(min=torch.finfo(j_DD.dtype).tiny)
            q_D = q_D - basis_KD[: k + 1].T @ (basis_KD[: k + 1] @ q_D)
        q_D = q_D / q_D.norm().clamp(min=torch.finfo(j_DD.dtype).tiny)
        if k % 16 == 15 or k == most - 1:
            inner, following = inner_K[: k + 1].cpu(), next_K[: k + 1].cpu()
            if not inner.isfinite().all():
                return torch.full_like(next_K[0], torch.nan)
            within = following[:-1]
            values, vectors = torch.linalg.eigh(inner.diag() + within.diag(1) + within.diag(-1))
            residual = following[-1] * vectors[-1, -1].abs()
            if k == d_model - 1 or residual <= 8 * torch.finfo(j_DD.dtype).eps * values[-1]:
                return values[-1].clamp(min=0).sqrt().to(j_DD.device)
    return torch.linalg.eigvalsh(j_DD @ j_DD.T)[-1].clamp(min=0).sqrt()


def jackknife_error(values_G: Array) -> Any:
    """sqrt((G - 1)/G sum_g (value_g - mean)^2) of values that leave out one group each, over the first axis.

    Source: Tukey 1958, Annals of Mathematical Statistics 29
    """
    groups = len(values_G)
    return np.sqrt((groups - 1) / groups * np.square(values_G - values_G.mean(0)).sum(0))


def student_95(degrees: int) -> float:
    """By how many standard errors an estimate with few degrees of freedom (5 or more: to 3e-3) is off in 5% of cases.

    Source: Abramowitz & Stegun 1964, eq. 26.7.5
    """
    z = 1.959964
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3
