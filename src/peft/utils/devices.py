"""What the device is, and other questions about the environment."""

from __future__ import annotations

import torch


def infer_device() -> str:
    """The accelerator of this machine, or "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    for name in ("mlu", "xpu", "npu"):
        backend = getattr(torch, name, None)
        if backend is not None and backend.is_available():
            return name
    return "cpu"
