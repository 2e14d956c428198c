"""Whether to compute on a GPU, and how; cards by their data sheets.

Never on the CPU by accident, where the machine has a GPU that PyTorch does not see.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass

import torch

from common import ConfigError, reason

DTYPES = {"auto": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}  # --mixed_precision
VERSION = r"{} Version: *(\d+(?:\.\d+)*)"  # in nvidia-smi's header; newer ones say "CUDA UMD Version"
ON_CPU = "To compute on the CPU all the same, which takes hours: --device cpu, or CUDA_VISIBLE_DEVICES= in front of the command"


@dataclass(frozen=True)
class Gpu:
    """A card, by its data sheet."""

    name: str  # part of the name that the driver reports
    memory_gb: int  # as it is sold
    memory_gib: float  # as the driver reports it
    bf16_flops: float  # per second, dense, accumulated in float32
    memory_rate: float  # bytes per second
    link_rate: float  # bytes per second to other GPUs of the node, in one direction: NVLink or PCIe


GPUS = (
    Gpu("RTX 4060", 8, 7.6, 30e12, 272e9, 16e9),
    Gpu("RTX 3060", 12, 11.6, 25e12, 360e9, 32e9),
    Gpu("RTX 4080", 16, 15.7, 97e12, 717e9, 32e9),
    Gpu("RTX 4090", 24, 23.6, 165e12, 1008e9, 32e9),
    Gpu("RTX 5090", 32, 31.4, 209e12, 1792e9, 64e9),
    Gpu("L40S", 48, 44.5, 362e12, 864e9, 32e9),
    Gpu("H100", 80, 79.1, 989e12, 3350e9, 450e9),
    Gpu("A100", 80, 79.1, 312e12, 2039e9, 300e9),
    Gpu("H200", 141, 139.8, 989e12, 4800e9, 450e9),
    Gpu("B200", 180, 178.4, 2250e12, 8000e9, 900e9),
)


def find_gpu(driver_name: str) -> Gpu | None:
    """The card with this name; None for unknown ones, weaker variants included."""
    variants = r"(?! (Ti|SUPER|Laptop|PCIe|NVL)\b)"
    return next((gpu for gpu in GPUS if re.search(rf"\b{gpu.name}\b{variants}", driver_name)), None)


def has_bf16(device: torch.device) -> bool:
    """Whether it computes in bfloat16, as from Ampere on; `torch.cuda.is_bf16_supported` counts GPUs that emulate it."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def repeat_to_the_bit() -> None:
    """From now on, the same work on the same GPUs gives the same bits; to be called before CUDA starts.

    An operation that cannot would be PyTorch's error.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS otherwise chooses workspaces by what streams do
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads it, and filling takes time


def on_gpu(device: str) -> bool:
    """Whether --device, auto or cpu or cuda, is a GPU.

    raises: ConfigError for cuda without a GPU, and for auto where nvidia-smi shows one that PyTorch does not see
    """
    if device == "cpu" or torch.cuda.is_available():
        return device != "cpu"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or "UNSEEN_GPU_IS_FINE" in os.environ
    found = [] if hidden else re.findall(r"^GPU \d+: (.*?)(?: \(UUID.*)?$", _nvidia_smi("--list-gpus"), re.MULTILINE)
    if found:
        raise ConfigError(f"nvidia-smi shows {len(found)} GPU(s), {found[0]}, but {_why_unseen()}. {ON_CPU}")
    if device == "cuda":
        raise ConfigError("--device cuda: this PyTorch sees no GPU")
    return False


def _why_unseen() -> str:
    """What keeps PyTorch from the GPU, and the remedy."""
    pytorch, build, shown = f"this PyTorch, {torch.__version__},", torch.version.cuda, _nvidia_smi()
    install = f"with {sys.prefix}/bin/pip, by the command that pytorch.org/get-started names for"
    if build is None:
        return f"{pytorch} is built for the CPU only: install a build for CUDA, {install} it"
    newest, driver = (re.search(VERSION.format(name), shown) for name in ("CUDA(?: UMD)?", "Driver"))
    if newest and _number(newest[1]) < _number(build):
        its = f"its driver{f' {driver[1]}' if driver else ''}"
        return (
            f"{its} runs CUDA up to {newest[1]} and {pytorch} is built for CUDA {build}: update the driver, or install PyTorch "
            f"for CUDA {newest[1]} or older, {install} that version"
        )
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"{pytorch} does not see it: {reason(error)}. `nvidia-smi` and `python -m torch.utils.collect_env` say more"
    return f"{pytorch} does not see it; `python -m torch.utils.collect_env` says more"


def _number(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def _nvidia_smi(*options: str) -> str:
    """What it prints; "" where there is none."""
    if not shutil.which("nvidia-smi"):
        return ""
    try:
        return subprocess.run(["nvidia-smi", *options], capture_output=True, text=True, timeout=60, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
