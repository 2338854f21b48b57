"""The machine that runs: what is said of it beside a Result, and how much memory work took."""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch


def bf16(device: str | torch.device = "cpu") -> bool:
    """Whether the device multiplies in bf16 itself; where it does not, bf16 is no faster than fp32."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(torch.cpu.get_capabilities().get("avx512_bf16"))


@cache
def environment() -> dict[str, Any]:
    """What the numbers were computed with; nothing that names a person or a folder."""
    import transformers

    return {
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "system": platform.system(), "machine": platform.machine(),
        "cpu": torch.cpu.get_capabilities().get("cpu_name", "unknown"), "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "bf16": bf16("cuda" if torch.cuda.is_available() else "cpu"),
    }  # fmt: skip


def peak_memory() -> Callable[[], float | None]:
    """A function that returns the most memory held since, in MB, beyond what is held now.

    On a GPU that of its tensors, on Linux the process's; elsewhere None, since it cannot be reset.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return lambda: (torch.cuda.max_memory_allocated() - before) / 2**20
    status = Path("/proc/self/status")
    read = lambda what: next(
        int(x.split()[1]) / 1024 for x in status.read_text().splitlines() if x.startswith(what)
    )
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the highest value so far
        held = read("VmRSS")
    except OSError:
        return lambda: None
    return lambda: max(0.0, read("VmHWM") - held)
