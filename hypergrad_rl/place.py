"""Where an agent is and learns: on the CPU, whatever PyTorch's default device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_T = TypeVar("_T")


def on_the_cpu(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """``function``, which makes its tensors there, also after ``torch.set_default_device``.

    Only where another device is set: as a context, the device costs every call of PyTorch's.
    """

    @functools.wraps(function)
    def there(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        if torch.get_default_device().type == "cpu":
            return function(*args, **kwargs)
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return there
