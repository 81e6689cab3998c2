"""How many digits what is carried has: more than the products, where a device has them."""

from __future__ import annotations

import torch

#: Kinds of devices that have no float64.
NARROW_DEVICES = {"mps"}


def working_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the recurrences: wider than the products', where the device allows it.

    Products dominate the cost, so the recurrences are carried in float64 (float32 on devices
    without it, and for 16-bit products), which leaves the products' own rounding as the only
    error that matters.
    """
    if dtype in (torch.float16, torch.bfloat16) or device.type in NARROW_DEVICES:
        return torch.float32
    return torch.float64
