"""A ``torch.nn.Module`` as a function of explicit parameters, and derivatives of such functions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hypergrad_rl.errors import ConfigError

Params = dict[str, Tensor]


class ModuleNetwork:
    """A ``torch.nn.Module`` as a function of explicit parameters: (..., obs_dim) -> (..., out_dim).

    The module sees states as (N, obs_dim). What requires no gradient stays as it is made.

    Raises:
        ConfigError: a module without parameters, or not on the CPU; one that keeps statistics of
            its inputs or draws random numbers; one whose frozen parts are made from random numbers,
            which no checkpoint has; another shape of output than (N, out_dim).
    """

    def __init__(
        self, make: Callable[[], torch.nn.Module], out_dim: int, generator: torch.Generator
    ) -> None:
        seed = int(torch.randint(2**31, (), generator=generator))
        self.module, self.out_dim = _seeded(make, seed), out_dim
        for layer in self.module.modules():
            if getattr(layer, "track_running_stats", False) or "Dropout" in type(layer).__name__:
                raise ConfigError(
                    f"a network has the layer {layer}: expected layers whose output is a function "
                    "of input and parameters alone, such as LayerNorm instead of BatchNorm"
                )
        places = {str(x.device) for x in [*self.module.parameters(), *self.module.buffers()]}
        if places - {"cpu"}:
            raise ConfigError(
                f"a network has parameters or buffers on {', '.join(sorted(places - {'cpu'}))}: "
                "expected all on the CPU, where agents are trained"
            )
        trained = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        self.params = {name: p.detach().clone() for name, p in trained.items()}
        if not self.params or "log_std" in self.params:
            raise ConfigError(
                f"a network has the parameters {list(self.params)}: expected at least one, and "
                "none named log_std, which the policy adds"
            )
        fixed = {n: x for n, x in self.module.state_dict().items() if n not in trained}
        again = _seeded(make, seed + 1).state_dict() if fixed else {}
        for name, value in fixed.items():
            if not torch.equal(value, again[name]):
                raise ConfigError(
                    f"a network's {name} is not trained, and not the same whenever the network is "
                    "made: expected it from a file or a generator of its own, so that a run can "
                    "be resumed and evaluated"
                )

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        """The module's output at x with these parameters."""
        rows = x.reshape(-1, x.shape[-1])
        out: Tensor = torch.func.functional_call(self.module, params, (rows,))
        if out.shape != (rows.shape[0], self.out_dim):
            raise ConfigError(
                f"a network gave an output of shape {tuple(out.shape)} for states of shape "
                f"{tuple(rows.shape)}: expected {(rows.shape[0], self.out_dim)}"
            )
        return out.reshape(*x.shape[:-1], self.out_dim)


def _seeded(make: Callable[[], torch.nn.Module], seed: int) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):  # modules initialise from the global generator
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs, too
        return make()


#: Takes gradients in each of a function's results to the gradient in its parameters.
Pull = Callable[[tuple[Tensor, ...]], Params]


def pullback(
    fn: Callable[[Params], tuple[Tensor, ...]], params: Params
) -> tuple[tuple[Tensor, ...], Pull]:
    """The results of ``fn(params)``, detached, and its Jacobian's transpose: of one pass forward.

    Compiled by ``torch.func``; eagerly by ``torch.autograd``, which is quicker there.
    """
    if torch.compiler.is_compiling():
        results, vjp = torch.func.vjp(fn, params)  # type: ignore[misc]  # two, without aux
        return results, lambda weights: vjp(weights)[0]
    with torch.enable_grad():
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in params.items()}
        results = fn(leaves)

    def pull(weights: tuple[Tensor, ...]) -> Params:
        grads = torch.autograd.grad(results, list(leaves.values()), weights, retain_graph=True)
        return dict(zip(leaves, grads, strict=True))

    return tuple(result.detach() for result in results), pull


def directional(fn: Callable[[Params], Tensor], params: Params, along: Params) -> Tensor:
    """d/ds fn(params + s along) at s = 0, by forward mode."""
    # Copies: compiled, forward mode wants point and tangent of one layout, and no views.
    point = {name: p.detach().clone() for name, p in params.items()}
    tangent = {name: torch.empty_like(p).copy_(along[name]) for name, p in point.items()}
    product: Tensor = torch.func.jvp(fn, (point,), (tangent,))[1]
    return product


class ModuleJacobian:
    """J = dV_w(s)/dw at N states, of any network: what :class:`ValueJacobian` is to the default.

    ``kernel`` forms J, N times the number of parameters, ``times`` does not.
    """

    def __init__(self, network: ModuleNetwork, params: Params, obs: Tensor) -> None:
        self.network, self.params, self.obs = network, params, obs
        self._made: tuple[tuple[Tensor, ...], Pull] | None = None

    def _values(self, params: Params, obs: Tensor) -> Tensor:
        return self.network(params, obs).squeeze(-1)

    def kernel(self) -> Tensor:
        """J J', (N, N)."""
        rows = torch.func.vmap(torch.func.grad(self._values), (None, 0))(self.params, self.obs)
        return torch.stack([r.flatten(1) @ r.flatten(1).T for r in rows.values()]).sum(0)

    def times(self, v: Params) -> Tensor:
        """J v, (N,), for v shaped like the parameters."""
        return directional(lambda w: self._values(w, self.obs), self.params, v)

    @property
    def values(self) -> Tensor:
        """V_w, (N,)."""
        return self._pass()[0][0]

    def pull(self, weights: Tensor) -> Params:
        """J' weights, shaped like the parameters, for weights (N,)."""
        return self._pass()[1]((weights,))

    def _pass(self) -> tuple[tuple[Tensor, ...], Pull]:
        """One pass forward, made where it is first asked for."""
        if self._made is None:
            self._made = pullback(lambda w: (self._values(w, self.obs),), self.params)
        return self._made

    def first(self, count: int) -> ModuleJacobian:
        """J at the first states alone."""
        return ModuleJacobian(self.network, self.params, self.obs[:count])
