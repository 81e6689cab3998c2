"""JAX: jitted CG of ``jax.scipy``, lineax and jaxopt, from parameters and batch to the answer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .contenders import Contender, Solve, Solved, Team
from .jax_problems import make_product
from .problems import Problem

#: (damped product, v, work) -> x, to be jitted; the work is a traced number: one compilation.
Jitted = Callable[[Callable[[Any], Any], Any, Any], Any]

QUARTERS = "quarters of a digit of rtol"


def _scipy(matvec: Callable[[Any], Any], v: Any, work: Any) -> Any:
    return jax.scipy.sparse.linalg.cg(matvec, v, tol=0.0, maxiter=work)[0]


def _jaxopt(matvec: Callable[[Any], Any], v: Any, work: Any) -> Any:
    from jaxopt.linear_solve import solve_cg

    return solve_cg(matvec, v, tol=0.0, maxiter=work)


def _lineax(matvec: Callable[[Any], Any], v: Any, work: Any) -> Any:
    import lineax

    tag = lineax.positive_semidefinite_tag
    operator = lineax.FunctionLinearOperator(matvec, jax.eval_shape(lambda: v), tag)
    solver = lineax.CG(rtol=(10.0 ** (-work / 4)).astype(v.dtype), atol=0.0)
    return lineax.linear_solve(operator, v, solver, throw=False).value


def _prepare(solve: Jitted, problem: Problem) -> Solve:
    facts = problem.facts
    arrays = {name: jnp.asarray(array) for name, array in problem.arrays.items()}
    v = jnp.asarray(problem.v)

    def once(arrays: dict[str, Any], v: Any, work: Any) -> Any:
        product = make_product(facts, arrays)
        return solve(lambda x: product(x) + facts.damping * x, v, work)

    run = jax.jit(once)
    return lambda work: Solved(run(arrays, v, np.int32(work)).block_until_ready())


def team() -> Team:
    """What is installed of the three."""
    jax.config.update("jax_enable_x64", True)
    known: list[tuple[str, str, Jitted, str]] = [
        ("jax.scipy cg", "jax", _scipy, "iterations"),
        ("jaxopt solve_cg", "jaxopt", _jaxopt, "iterations"),
        ("lineax CG", "lineax", _lineax, QUARTERS),
    ]
    contenders, missing = [], {}
    for name, package, solve, knob in known:
        try:
            import_module(package)
        except ImportError as error:
            missing[name] = str(error)
        else:
            contenders.append(Contender(name, partial(_prepare, solve), knob))
    return Team("JAX", tuple(contenders), missing)
