"""How much arithmetic a step is, and what share of the device's peak a run reaches (MFU)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode

from bocage.ssl.engine.parallel.distributed import Precision

# Dense TFLOP/s in 16 bits and in float32 (without TF32, which torch by default uses for convolutions alone), by words
# of the device's name; from the vendors' data sheets. The more specific names come first.
_PEAKS = {
    "B200": (2250.0, 75.0),
    "GH200": (989.0, 67.0),
    "H200": (989.0, 67.0),
    "H100 PCIe": (756.0, 51.0),
    "H100 NVL": (835.0, 60.0),
    "H100": (989.0, 67.0),
    "A100": (312.0, 19.5),
    "A40": (149.7, 37.4),
    "A30": (165.0, 10.3),
    "A10": (125.0, 31.2),
    "L40S": (362.0, 91.6),
    "L40": (181.0, 90.5),
    "L4": (121.0, 30.3),
    "V100": (125.0, 15.7),
    "T4": (65.0, 8.1),
    "MI300X": (1307.0, 163.4),
    "MI250X": (191.5, 47.9),  # torch shows its two dies as two devices
}


def peak(device: str, precision: Precision) -> float | None:
    """Dense FLOP/s of a device by its name, e.g. ``NVIDIA A100-SXM4-80GB``; None when it is not known."""
    for name, (half, single) in _PEAKS.items():
        if re.search(rf"\b{name}\b", device, re.IGNORECASE):
            return 1e12 * (single if precision == "fp32" else half)
    return None


class FlopCounter:
    """Counts the first forward pass of a process; backward passes are taken as twice that.

    Multiplications and additions of matrix products, convolutions and attention count, as usual for MFU (Chowdhery et
    al., arXiv 2204.02311); what is computed again to save memory does not. Passes differ with what samples hold, so
    that figures are good to some per cent.

    Args:
        device: of the model.
        precision: of the forward pass.
        compiled: blocks are compiled; their operations cannot be seen, and nothing is told.
    """

    def __init__(self, device: torch.device, precision: Precision, *, compiled: bool) -> None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self._peak = peak(name, precision)
        self._flops = 0
        self._counted = compiled

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Context of a forward pass."""
        if self._counted:
            yield
            return
        with FlopCounterMode(display=False) as counter:
            yield
        self._flops, self._counted = 3 * counter.get_total_flops(), True

    def figures(self, passes: int, seconds: float) -> dict[str, float]:
        """``tflops``, of this rank in a second, and where the peak is known ``mfu``, a share, for a step of so many."""
        if not self._flops:
            return {}
        rate = self._flops * passes / seconds
        return {"tflops": rate / 1e12} | ({"mfu": rate / self._peak} if self._peak is not None else {})
