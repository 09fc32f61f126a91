"""Triton's kernels in tests: in its interpreter and as machine code for an H100, both without a GPU, or on one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

# The interpreter makes numbers of arrays with one entry, which numpy 2.4 refuses; bfloat16 it truncates, and takes for
# integers in tl.dot.
PATCHED = """
from triton.runtime import interpreter

patch = interpreter._patch_lang_tensor

def patched(tensor, *rest):
    patch(tensor, *rest)
    tensor.__index__ = lambda self: self.handle.data.item()

interpreter._patch_lang_tensor = patched
"""


def interpreted(code: str) -> None:
    """Runs code whose last line prints "all agree" in a process whose kernels are interpreted."""
    pytest.importorskip("triton", reason="triton is not installed")
    done = subprocess.run(
        [sys.executable, "-c", PATCHED + code],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.endswith("all agree\n"), done.stderr[-2000:]


def demand_gpu() -> None:
    """Skips a test where no kernel can run."""
    if not torch.cuda.is_available() or find_spec("triton") is None:
        pytest.skip("needs a CUDA device and triton")


def code_for_an_h100(kernel: Any, tensors: dict[str, str], sizes: dict[str, int], plan: Any, **constants: int) -> Any:
    """Compiled as the first call on such a device would; told as a call tells it, sizes of 1 become constants."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        signature[name] = tensors.get(name, "i32" if sizes.get(name, 1) > 1 else "constexpr")
        if name in tensors or (sizes.get(name, 1) > 1 and sizes[name] % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    fixed = constants | {name: size for name, size in sizes.items() if size == 1}
    places = {(kernel.arg_names.index(name),): value for name, value in fixed.items()}
    source = ASTSource(kernel, signature, places, attributes)
    stages = {} if "STAGES" in constants else {"num_stages": plan.stages}  # or the kernel's loop tells them
    return compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": plan.warps, **stages})


def resources(code: Any, folder: Path) -> dict[str, int]:
    """Registers, stack and local memory of a thread, as the machine code states them."""
    import triton

    (folder / "kernel.cubin").write_bytes(code.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    told = subprocess.run(
        [tool, "--dump-resource-usage", folder / "kernel.cubin"], capture_output=True, text=True, check=True
    )
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", told.stdout)}
