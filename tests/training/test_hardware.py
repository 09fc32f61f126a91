"""Peaks by a device's name, utilisation by its formula, memory that is really taken."""

from __future__ import annotations

import re

import pytest
import torch

from sparsekit.training.hardware import PEAKS, memory, mfu, peak_by_name, peak_flops

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# names as the driver gives them
NAMES = {
    "NVIDIA A100-SXM4-80GB": (312e12, 19.5e12),
    "NVIDIA A100 80GB PCIe": (312e12, 19.5e12),
    "NVIDIA A10G": (None, None),
    "NVIDIA A40": (149.7e12, 37.4e12),
    "NVIDIA A10": (125e12, 31.2e12),
    "NVIDIA H100 80GB HBM3": (989.5e12, 67e12),
    "NVIDIA H100 PCIe": (756.5e12, 51e12),
    "NVIDIA H100 NVL": (835.5e12, 60e12),
    "NVIDIA H200": (989.5e12, 67e12),
    "NVIDIA H200 NVL": (835.5e12, 60e12),
    "NVIDIA H20": (148e12, 44e12),
    "NVIDIA GH200 480GB": (989.5e12, 67e12),
    "NVIDIA B200": (2250e12, 75e12),
    "NVIDIA GB200": (2500e12, 80e12),
    "NVIDIA L40S": (362.05e12, 91.6e12),
    "NVIDIA L40": (181.05e12, 90.5e12),
    "NVIDIA L4": (121e12, 30.3e12),
    "NVIDIA GeForce RTX 4090": (165.2e12, 82.6e12),
    "NVIDIA GeForce RTX 3090": (71e12, 35.6e12),
    "NVIDIA GeForce RTX 3090 Ti": (80e12, 40e12),
    "Tesla V100-SXM2-16GB": (None, 15.7e12),
    "Tesla V100-PCIE-32GB": (None, 14e12),
    "Tesla T4": (None, 8.1e12),
    "AMD Instinct MI300X": (1307.4e12, 163.4e12),
    "AMD Instinct MI325X": (1307.4e12, 163.4e12),
    "AMD Instinct MI250X / MI250": (191.5e12, 47.9e12),
    "NVIDIA GeForce GTX 1080": (None, None),
}


@pytest.mark.parametrize("name", NAMES)
def test_peak_by_name(name: str) -> None:
    assert (peak_by_name(name, BF16), peak_by_name(name, FP32)) == pytest.approx(NAMES[name])


def test_every_line_of_the_table_is_some_device_of_these() -> None:
    reached = {next((pattern for pattern, _ in PEAKS if re.search(pattern, name)), None) for name in NAMES}
    assert reached - {None} == {pattern for pattern, _ in PEAKS}


def test_dtypes() -> None:
    h100 = "NVIDIA H100 80GB HBM3"
    assert peak_by_name(h100, FP32, tf32=True) == 494.5e12
    assert peak_by_name(h100, BF16, tf32=True) == 989.5e12
    assert peak_by_name("Tesla V100-SXM2-16GB", FP32, tf32=True) == 15.7e12, "which has none"
    assert peak_by_name("Tesla V100-SXM2-16GB", FP16) == 125e12
    assert peak_by_name(h100, torch.float64) is None
    assert peak_flops(torch.device("cpu"), BF16) is None


def test_mfu() -> None:
    """The example of PaLM's appendix B: 540e9 parameters, 118 layers of 48 heads of 256, 2048 tokens, 6144 TPU v4."""
    flops = 6 * 540.35e9 + 12 * 118 * 48 * 256 * 2048
    assert mfu(238_300, flops, 6144 * 275e12) == pytest.approx(0.462, abs=0.002)
    assert mfu(238_300, flops, None) is None


def test_memory_grows_by_what_is_taken() -> None:
    before = memory(torch.device("cpu"))["memory_resident_gib"]
    taken = torch.ones(2**26)  # a quarter of a GiB
    after = memory(torch.device("cpu"))["memory_resident_gib"]
    assert after - before == pytest.approx(0.25, abs=0.05)
    del taken


@pytest.mark.gpu
def test_memory_of_a_gpu_is_the_most_since_the_last_call() -> None:
    device = torch.device("cuda")
    memory(device)
    torch.ones(2**28, device=device)
    told = memory(device)
    assert told["memory_allocated_gib"] >= 1.0
    assert told["memory_reserved_gib"] >= told["memory_allocated_gib"]
    assert memory(device)["memory_allocated_gib"] < told["memory_allocated_gib"]
    assert peak_flops(device, BF16) is None or peak_flops(device, BF16) > 0  # type: ignore[operator]
