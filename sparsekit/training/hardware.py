"""What the device can do at most, how much of it is used, and how much memory is taken."""

from __future__ import annotations

import re
import resource
import sys
import time
from pathlib import Path

import torch

GIB = 2**30
STATM = Path("/proc/self/statm")

# Dense peaks in TFLOP/s of (bfloat16, float16, tf32, float32), None where the device lacks it, by a pattern that the
# device's name holds; the first that fits. Data sheets give many of them with 2:4 sparsity: those are halved here.
# Half precision is with accumulation in float32, as training has it.
PEAKS: tuple[tuple[str, tuple[float | None, float | None, float | None, float | None]], ...] = (
    (r"GB200", (2500, 2500, 1250, 80)),  # NVIDIA Blackwell data sheet, GB200 NVL72, one GPU
    (r"B200", (2250, 2250, 1100, 75)),  # NVIDIA Blackwell data sheet, HGX B200, one GPU
    (r"H200 NVL", (835.5, 835.5, 417.5, 60)),  # NVIDIA H200 data sheet
    (r"H200|GH200", (989.5, 989.5, 494.5, 67)),  # NVIDIA H200 and GH200 data sheets
    (r"H100 NVL", (835.5, 835.5, 417.5, 60)),  # NVIDIA H100 data sheet
    (r"H100 PCIe", (756.5, 756.5, 378, 51)),  # NVIDIA H100 data sheet
    (r"H100|H800", (989.5, 989.5, 494.5, 67)),  # NVIDIA H100 data sheet, SXM
    (r"H20\b", (148, 148, 74, 44)),  # NVIDIA H20 data sheet
    (r"A100|A800", (312, 312, 156, 19.5)),  # NVIDIA A100 data sheet, PCIe and SXM
    (r"A40\b", (149.7, 149.7, 74.8, 37.4)),  # NVIDIA A40 data sheet
    (r"A10\b", (125, 125, 62.5, 31.2)),  # NVIDIA A10 data sheet
    (r"L40S", (362.05, 362.05, 183, 91.6)),  # NVIDIA L40S data sheet
    (r"L40\b", (181.05, 181.05, 90.5, 90.5)),  # NVIDIA L40 data sheet
    (r"L4\b", (121, 121, 60, 30.3)),  # NVIDIA L4 data sheet
    (r"RTX 4090", (165.2, 165.2, 82.6, 82.6)),  # NVIDIA Ada GPU architecture whitepaper, appendix A
    (r"RTX 3090 Ti", (80, 80, 40, 40)),  # NVIDIA Ampere GA102 whitepaper v2.1, appendix A
    (r"RTX 3090", (71, 71, 35.6, 35.6)),  # NVIDIA Ampere GA102 whitepaper, table 9
    (r"V100-PCIE", (None, 112, None, 14)),  # NVIDIA V100 data sheet, PCIe
    (r"V100", (None, 125, None, 15.7)),  # NVIDIA V100 data sheet, SXM2
    (r"T4\b", (None, 65, None, 8.1)),  # NVIDIA T4 data sheet
    (r"MI325X", (1307.4, 1307.4, 653.7, 163.4)),  # AMD Instinct MI325X data sheet
    (r"MI300X", (1307.4, 1307.4, 653.7, 163.4)),  # AMD Instinct MI300X data sheet
    (r"MI250", (191.5, 191.5, None, 47.9)),  # AMD Instinct MI250X data sheet, halved: each of its two dies is a device
)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Floating-point operations a second of dense matrix products, at most, by the vendor's data sheet.

    Args:
        device: one device; of several, multiply by their number.
        dtype: in which products run; float32 counts as TF32 where torch is told to use that.

    Returns:
        None on a CPU, on a device that the table does not know, and for a dtype that it lacks.
    """
    if device.type != "cuda":
        return None
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return peak_by_name(torch.cuda.get_device_name(device), dtype, tf32)


def peak_by_name(name: str, dtype: torch.dtype, tf32: bool = False) -> float | None:
    """As :func:`peak_flops`, of a device of that name."""
    kinds = (torch.bfloat16, torch.float16, "tf32", torch.float32)
    for pattern, peaks in PEAKS:
        if re.search(pattern, name):
            found = dict(zip(kinds, peaks, strict=True))
            faster = found["tf32"] if tf32 and dtype == torch.float32 else None
            peak = faster or found.get(dtype)
            return None if peak is None else peak * 1e12
    return None


def mfu(tokens_per_second: float, training_flops_per_token: float, peak: float | None) -> float | None:
    """Model FLOPs utilisation: tokens a second times FLOPs a token needs, over the peak; None where that is not known.

    What a token needs is the forward and backward of the model as written, a multiply-add counted as 2 and attention
    over the whole sequence (:func:`sparsekit.model.accounting.describe`); what is computed again in the backward does
    not count.

    Args:
        tokens_per_second: of all devices together.
        peak: of all devices together.

    Source: Chowdhery et al. 2022, arXiv 2204.02311, appendix B
    """
    return None if peak is None else tokens_per_second * training_flops_per_token / peak


def memory(device: torch.device) -> dict[str, float]:
    """Memory in GiB, by key.

    On a GPU ``memory_allocated_gib`` and ``memory_reserved_gib``, the most since the last call; elsewhere
    ``memory_resident_gib``, what the process has in RAM now (where the system does not tell, the most it ever had).
    """
    if device.type == "cuda":
        told = {
            "memory_allocated_gib": torch.cuda.max_memory_allocated(device) / GIB,
            "memory_reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
        }
        torch.cuda.reset_peak_memory_stats(device)
        return told
    if STATM.exists():
        resident = int(STATM.read_text().split()[1]) * resource.getpagesize()
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"memory_resident_gib": resident / GIB}


class Meter:
    """Speed, MFU, waiting and memory between one reading and the next.

    Args:
        device: this process's.
        flops_per_token: of training.
        peak: FLOP/s of all devices together; None where MFU is not known.
        tokens, wait_seconds: counted so far.
    """

    def __init__(
        self, device: torch.device, flops_per_token: float, peak: float | None, tokens: int, wait_seconds: float
    ):
        self.device, self.flops_per_token, self.peak = device, flops_per_token, peak
        self._last = time.monotonic(), tokens, wait_seconds

    def read(self, tokens: int, wait_seconds: float) -> dict[str, float]:
        """tokens_per_second, mfu where it is known, data_wait (share of time spent on waiting for data), memory."""
        began, old_tokens, old_wait = self._last
        self._last = time.monotonic(), tokens, wait_seconds
        seconds = max(1e-9, self._last[0] - began)
        row = {"tokens_per_second": (tokens - old_tokens) / seconds, "data_wait": (wait_seconds - old_wait) / seconds}
        used = mfu(row["tokens_per_second"], self.flops_per_token, self.peak)
        return row | ({} if used is None else {"mfu": used}) | memory(self.device)
