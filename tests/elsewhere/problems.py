"""What the tests here compute twice, with tensors of the CPU and with tensors elsewhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as tree

import hypergrad
from tests.elsewhere.device import DEVICE, WIDE, move

N = 12
DTYPES = [torch.float64] * WIDE + [torch.float32, torch.bfloat16, torch.float16]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded() -> torch.Generator:
    """One of the CPU, as users have: it must do for tensors of all devices."""
    return torch.Generator().manual_seed(0)


PARAMS = {"w": gaussian(4, 3) / 2, "b": torch.zeros(3), "u": gaussian(3, 1, seed=1) / 2}
X, Y = gaussian(20, 4, seed=2), gaussian(20, 1, seed=3)
ROOT = gaussian(N, N, seed=4)
MATRIX = ROOT @ ROOT.T / N + 0.1 * torch.eye(N)
V = gaussian(N, seed=5)


def model(params: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.tanh(x @ params["w"] + params["b"]) @ params["u"]


def squares(outputs: Tensor, y: Tensor) -> Tensor:
    return (outputs - y).square().mean()


def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return squares(model(params, x), y) + 0.05 * sum(p.square().sum() for p in params.values())


def stay(x: Any) -> Any:
    """What ``move`` is for the CPU."""
    return x


def tensors(x: Any) -> list[Tensor]:
    return [leaf for leaf in tree.tree_leaves(x) if isinstance(leaf, Tensor)]


def flat(x: Any) -> Tensor:
    leaves = [leaf.detach().cpu().to(torch.float64).reshape(-1) for leaf in tensors(x)]
    return torch.cat(leaves)


def dtype_there(dtype: torch.dtype) -> torch.dtype:
    """What is carried there where the CPU carries ``dtype``."""
    return torch.float32 if dtype == torch.float64 and not WIDE else dtype


def assert_same(here: Any, there: Any, rtol: float = 1e-5) -> None:
    """Both trees hold the same numbers to rounding, ``there`` on the device, every tensor."""
    assert tensors(there)
    assert {x.device for x in tensors(there)} == {DEVICE}
    assert [x.dtype for x in tensors(there)] == [dtype_there(x.dtype) for x in tensors(here)]
    gap = torch.linalg.vector_norm(flat(there) - flat(here))
    assert gap <= rtol * torch.linalg.vector_norm(flat(here))


def compare(make: Callable[[Any], Any], rtol: float = 1e-5) -> None:
    """``make(to)`` gives the same where ``to`` moves its tensors to the device."""
    found = []
    for to in (stay, move):
        torch.manual_seed(0)
        found.append(make(to))
    assert_same(found[0], found[1], rtol)


def compare_errors(make: Callable[[Any], Any], error: type[hypergrad.HypergradError]) -> None:
    """``make(to)`` raises the same, in the same words but for the device's name."""
    words = []
    for to in (stay, move):
        with pytest.raises(error) as caught:
            make(to)
        words.append(str(caught.value).replace(str(DEVICE), "cpu"))
    if not WIDE:  # and but for how much memory numbers take there
        words = [re.sub(r"[\d.,]+", "#", text) for text in words]
    assert words[0] == words[1]


def hessian(to: Any) -> Any:
    return hypergrad.hessian(loss, *to((PARAMS, X, Y)))


def without_forward_mode(cases: dict[str, Any], name: str) -> dict[str, Any]:
    """``cases`` but the one called ``name``, which needs float64.

    PyTorch gives a Python number times a tensor without dimension a tangent in float64.
    """
    return {key: case for key, case in cases.items() if WIDE or key != name}


#: Test matrices of Nyström's.
KINDS = ["gaussian", "columns", "diagonal", "structured"]
SOLVERS: dict[str, Any] = {
    "exact": hypergrad.Exact(),
    "cg": hypergrad.CG(rtol=1e-6),
    "minres": hypergrad.MINRES(rtol=1e-6),
    "gmres": hypergrad.GMRES(rtol=1e-6),
    "neumann": hypergrad.Neumann(num_terms=20),
    "nystrom": hypergrad.Nystrom(rank=6),
    "pcg": hypergrad.NystromPCG(rank=6, rtol=1e-6),
    "auto": hypergrad.Auto(rtol=1e-6),
    "identity": hypergrad.Identity(),
}
