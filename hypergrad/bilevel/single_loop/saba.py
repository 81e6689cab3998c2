"""SABA: SOBA's directions with SAGA's variance reduction."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

from ...errors import SolverOptionError, StateError
from ...pytree import Tree
from .base import SingleLoop, Vectors
from .oracles import Batch, Oracle
from .state import BlockMemory, SingleLoopState

#: The five remembered quantities: which problem's blocks they belong to, and their layout.
_QUANTITIES = {
    "inner_gradient": ("inner", "inner"),
    "hvp": ("inner", "inner"),
    "cross": ("inner", "outer"),
    "outer_gradient_inner": ("outer", "inner"),
    "outer_gradient_outer": ("outer", "outer"),
}


@dataclass(frozen=True)
class SABA(SingleLoop):
    """SABA: SOBA whose every direction is variance-reduced, for problems that are finite sums.

    The data of each problem are cut into numbered blocks, once and for all; a step draws one block
    of each uniformly and names it.  Every quantity remembers its last value on every block, so
    that the noise of a step vanishes as the variables settle: constant step sizes converge.

    Attributes:
        inner_loss: see :class:`SingleLoop`.  The mean of the blocks' losses must be the loss of
            all data: blocks of one size for a loss that is a mean over the block.
        outer_loss: likewise.
        inner_lr: step size rho of w.
        outer_lr: step size gamma of y.
        num_inner_blocks: blocks of the inner problem's data.
        num_outer_blocks: blocks of the outer problem's data.
        linear_lr: step size of v; ``inner_lr`` if None, as in the paper.

    Memory: with p entries in the inner tree and d in the outer one,
    ``num_inner_blocks * (2 p + d) + num_outer_blocks * (p + d)`` numbers.  Larger blocks need less.
    A step writes into it, so that a state can be stepped from once; ``state.clone()`` branches.
    The memory starts at zero, and a direction before all blocks were seen is noisier than later.

    Cost of a step: that of :class:`SOBA`.
    Source: Dagreou, Ablin, Vaiter and Moreau, NeurIPS 2022, arXiv 2201.13409, equations 11.  With
    constant step sizes the squared norm of the hypergradient falls as 1 / T, and linearly if the
    outer problem satisfies the Polyak-Lojasiewicz inequality (theorems 3 and 4).

    Examples:
        >>> import torch, hypergrad
        >>> data = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
        >>> inner = lambda w, y, x: 0.5 * ((w - y * x.mean()) ** 2).sum()
        >>> outer = lambda w, y, x: 0.5 * ((w - x) ** 2).mean()
        >>> method = hypergrad.SABA(
        ...     inner, outer, inner_lr=0.2, outer_lr=0.1, num_inner_blocks=2, num_outer_blocks=2
        ... )
        >>> state = method.init(torch.zeros(()), torch.zeros(()))
        >>> draw = torch.Generator().manual_seed(0)
        >>> for _ in range(2000):
        ...     i, j = torch.randint(2, (2,), generator=draw).tolist()
        ...     state = method.step(state, [data[i]], [data[j]], inner_index=i, outer_index=j)
        >>> state.inner_params.round(decimals=3), state.outer_params.round(decimals=3)
        (tensor(1.5000), tensor(1.))
    """

    _: KW_ONLY
    num_inner_blocks: int
    num_outer_blocks: int
    linear_lr: float | Callable[[int], float] | None = None

    def init(
        self, inner_params: Tree, outer_params: Tree, *, ihvp: Tree | None = None
    ) -> SingleLoopState:
        """The state before the first step, with an empty memory; see :meth:`SingleLoop.init`."""
        state = super().init(inner_params, outer_params, ihvp=ihvp)
        blocks = {"inner": self.num_inner_blocks, "outer": self.num_outer_blocks}
        entries = {name: state.vectors[name].numel() for name in ("inner", "outer")}
        sizes = {name: (blocks[of], entries[on]) for name, (of, on) in _QUANTITIES.items()}
        return replace(state, memory=BlockMemory.zeros(sizes, state.vectors["inner"]))

    def step(
        self,
        state: SingleLoopState,
        inner_batches: Iterable[Any] | None = None,
        outer_batches: Iterable[Any] | None = None,
        *,
        inner_index: int | None = None,
        outer_index: int | None = None,
    ) -> SingleLoopState:
        """One step of all variables; see :meth:`SingleLoop.step`.

        Args:
            state: from :meth:`init` or the step before; its memory moves on to the new state.
            inner_batches: one batch: the data of the inner block ``inner_index``.
            outer_batches: one batch: the data of the outer block ``outer_index``.
            inner_index: which block, in 0 .. ``num_inner_blocks`` - 1; may be left out only where
                there is one.
            outer_index: likewise.

        Raises:
            SolverOptionError: an index that is missing or out of range; and as
                :meth:`SingleLoop.step`.
            StateError: the state has been stepped from before.
            HypergradError: see :meth:`SingleLoop.step`; the memory is then as before.
        """
        blocks = (
            _checked_index(inner_index, self.num_inner_blocks, "inner_index"),
            _checked_index(outer_index, self.num_outer_blocks, "outer_index"),
        )
        oracle, inner, outer = self._prepare(state, inner_batches, outer_batches)
        return self._advance(state, oracle, self._update(oracle, state, inner, outer, blocks))

    def _update(
        self,
        oracle: Oracle,
        now: SingleLoopState,
        inner: list[Batch],
        outer: list[Batch],
        blocks: tuple[int, int] = (0, 0),
    ) -> Vectors:
        memory = self._memory(now)
        w, y, v = (now.vectors[name] for name in ("inner", "outer", "ihvp"))
        rates = [self._rate(name, now.step) for name in ("inner_lr", "linear_lr", "outer_lr")]
        g = oracle.inner_products(w, y, v, inner[0], hvp=True, cross=True)
        f_inner, f_outer = oracle.outer_gradients(w, y, outer[0])
        values = (g.gradient, g.hvp, g.cross, f_inner, f_outer)
        index = dict(zip(("inner", "outer"), blocks, strict=True))
        news = {
            name: (index[of], value)
            for (name, (of, _)), value in zip(_QUANTITIES.items(), values, strict=True)
        }
        mean = {name: memory.estimate(name, *new) for name, new in news.items()}
        direction = mean["outer_gradient_outer"] - mean["cross"]
        vectors = {
            "inner": w - rates[0] * mean["inner_gradient"],
            "ihvp": v - rates[1] * (mean["hvp"] - mean["outer_gradient_inner"]),
            "outer": y - rates[2] * direction,
            "outer_direction": direction,
        }
        # Only what led to finite variables is remembered: a failed step can be tried anew.
        self._check_finite(now, vectors)
        memory.remember(news)
        return vectors

    def _memory(self, state: SingleLoopState) -> BlockMemory:
        memory = state.memory
        if memory is None:
            raise StateError("this state of SABA has no memory. Make it with SABA's init.")
        for name, (of, _) in _QUANTITIES.items():
            blocks = self.num_inner_blocks if of == "inner" else self.num_outer_blocks
            if len(memory.tables[name]) != blocks:
                raise StateError(
                    f"this state remembers {len(memory.tables[name])} {of} blocks, but this "
                    f"method has {blocks}. Make it with this method's init."
                )
        if memory.step != state.step:
            raise StateError(
                f"this state of step {state.step} has been stepped from before: its memory is at "
                f"step {memory.step}. Go on from the state that step returned, or step from "
                "state.clone() to branch."
            )
        return memory


def _checked_index(index: int | None, blocks: int, name: str) -> int:
    if index is None and blocks == 1:
        return 0
    whole = isinstance(index, numbers.Integral) and not isinstance(index, bool)
    if index is None or not whole or not 0 <= index < blocks:
        raise SolverOptionError(
            f"{name} is {index!r}, expected an integer in 0 .. {blocks - 1}: the number of the "
            "block whose data the batch is."
        )
    return int(index)
