"""Separate networks for actor and critic, as functions of an explicit tree of parameters.

Tanh layers by default, or any ``torch.nn.Module`` (:class:`ModuleNetwork`).

Parameters are plain dicts of tensors, so that a loss is a function of them, which is what a
hypergradient differentiates. A policy draws actions from noise that is sampled beforehand for the
whole rollout (Gumbel-max, or mean + std * noise): one call to the generator instead of one a step.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hypergrad_rl.layers import affine, tanh_layer
from hypergrad_rl.modules import ModuleJacobian, ModuleNetwork
from hypergrad_rl.modules import Params as Params
from hypergrad_rl.value_jacobian import ValueJacobian

#: One step of a policy on NumPy arrays: (observations, noise) -> actions.
Step = Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray[np.generic]]
#: V_w: (parameters, states (..., obs_dim)) -> (...).
ValueFn = Callable[[Params, Tensor], Tensor]


def init_mlp(sizes: Sequence[int], head_gain: float, generator: torch.Generator) -> Params:
    """Orthogonal weights, gain sqrt(2) in hidden layers, ``head_gain`` in the last; zero biases."""
    params: Params = {}
    last = len(sizes) - 2
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        weight = torch.empty(fan_out, fan_in)
        gain = head_gain if i == last else math.sqrt(2.0)
        torch.nn.init.orthogonal_(weight, gain, generator=generator)
        params[f"weight{i}"] = weight
        params[f"bias{i}"] = torch.zeros(fan_out)
    return params


def mlp(params: Params, x: Tensor) -> Tensor:
    """Tanh layers and a linear head: (..., in) -> (..., out)."""
    depth = sum(name.startswith("weight") for name in params)
    for i in range(depth - 1):
        x = tanh_layer(x, params[f"weight{i}"], params[f"bias{i}"])
    return affine(x, params[f"weight{depth - 1}"], params[f"bias{depth - 1}"])


def numpy_mlp(params: Params) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """``mlp`` of these parameters on NumPy arrays.

    Of the few states of a step the cost of a call counts: 7 us, by PyTorch 17, compiled 50.
    """
    arrays = [leaf.detach().numpy() for leaf in params.values()]
    layers = [(w.T.copy(), b) for w, b in zip(arrays[::2], arrays[1::2], strict=True)]

    def forward(x: NDArray[np.float32]) -> NDArray[np.float32]:
        for weight, bias in layers[:-1]:
            x = np.tanh(x @ weight + bias)
        weight, bias = layers[-1]
        result: NDArray[np.float32] = x @ weight + bias
        return result

    return forward


def init_critic(obs_dim: int, hidden: Sequence[int], generator: torch.Generator) -> Params:
    """Parameters of V_w: head gain 1."""
    return init_mlp([obs_dim, *hidden, 1], 1.0, generator)


def critic_value(params: Params, obs: Tensor) -> Tensor:
    """V_w(s): (..., obs_dim) -> (...)."""
    return mlp(params, obs).squeeze(-1)


Jacobian = ValueJacobian | ModuleJacobian

#: Make the networks of one's own from (obs_dim, out_dim) and from obs_dim; a critic's out_dim is 1.
ActorModule = Callable[[int, int], torch.nn.Module]
CriticModule = Callable[[int], torch.nn.Module]


@dataclass(frozen=True)
class Networks:
    """Networks of one's own, in place of tanh layers of widths ``config.hidden``.

    A module gets states as (N, obs_dim) float32, normalised if the run normalises, and reshapes
    them as it likes. It is a function of its input and its parameters: no dropout, no BatchNorm.

    Attributes:
        actor: makes the policy's module from (obs_dim, out_dim): (N, out_dim) logits of discrete
            actions, or means of continuous ones. None for the default.
        critic: makes the critic's module from obs_dim: (N, 1) values. None for the default.

    >>> import torch
    >>> from hypergrad_rl import make_config, train
    >>> def relu(obs_dim, out_dim=1):
    ...     return torch.nn.Sequential(
    ...         torch.nn.Linear(obs_dim, 8), torch.nn.ReLU(), torch.nn.Linear(8, out_dim)
    ...     )
    >>> config = make_config("ppo", env="CartPole-v1", total_steps=512)
    >>> list(train(config, networks=Networks(relu, relu)).agent.critic)
    ['0.weight', '0.bias', '2.weight', '2.bias']
    """

    actor: ActorModule | None = None
    critic: CriticModule | None = None

    @property
    def own(self) -> list[str]:
        """Which of both are not the default."""
        return [name for name in ("actor", "critic") if getattr(self, name) is not None]


DEFAULT_NETWORKS = Networks()


class Network:
    """A function of explicit parameters: tanh layers, or what ``make_module`` makes.

    That is called by ``init``, with (obs_dim, out_dim).
    """

    def __init__(
        self, out_dim: int, head_gain: float, make_module: ActorModule | None = None
    ) -> None:
        self.out_dim, self.head_gain, self.make_module = out_dim, head_gain, make_module
        self.module: ModuleNetwork | None = None

    def init(self, obs_dim: int, hidden: Sequence[int], generator: torch.Generator) -> Params:
        """Parameters; ``hidden`` are the widths of tanh layers."""
        make = self.make_module
        if make is None:
            return init_mlp([obs_dim, *hidden, self.out_dim], self.head_gain, generator)
        self.module = ModuleNetwork(lambda: make(obs_dim, self.out_dim), self.out_dim, generator)
        return self.module.params

    def outputs(self, params: Params, x: Tensor) -> Tensor:
        """(..., obs_dim) -> (..., out_dim)."""
        return mlp(params, x) if self.module is None else self.module(params, x)

    def on_numpy(self, params: Params) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
        """``outputs`` on NumPy arrays."""
        if self.module is None:
            return numpy_mlp(params)

        def forward(x: NDArray[np.float32]) -> NDArray[np.float32]:
            with torch.inference_mode():
                result: NDArray[np.float32] = self.outputs(params, torch.from_numpy(x)).numpy()
            return result

        return forward


class Critic(Network):
    """V_w: a network of one output, head gain 1."""

    def __init__(self, make_module: CriticModule | None = None) -> None:
        super().__init__(1, 1.0, make_module and (lambda obs_dim, _: make_module(obs_dim)))

    def __call__(self, params: Params, obs: Tensor) -> Tensor:
        """V_w(s): (..., obs_dim) -> (...)."""
        return self.outputs(params, obs).squeeze(-1)

    def jacobian(self, params: Params, obs: Tensor) -> Jacobian:
        """Of the values at states (N, obs_dim) in the parameters."""
        if self.module is None:
            return ValueJacobian(params, obs)
        return ModuleJacobian(self.module, params, obs)


DEFAULT_CRITIC = Critic()


class Policy(ABC):
    """pi_theta(a|s): how actions are drawn and how likely they are.

    Head gain 0.01: the first policy hardly depends on the state.
    """

    def __init__(self, num_outputs: int, make_module: ActorModule | None = None) -> None:
        self.network = Network(num_outputs, 0.01, make_module)

    def init(self, obs_dim: int, hidden: Sequence[int], generator: torch.Generator) -> Params:
        """Parameters theta."""
        return self.network.init(obs_dim, hidden, generator)

    @abstractmethod
    def noise(self, num_steps: int, num_envs: int, generator: torch.Generator) -> Tensor:
        """What ``act`` needs to draw num_steps x num_envs actions."""

    @abstractmethod
    def act(self, params: Params, obs: Tensor, noise: Tensor | None) -> Tensor:
        """Actions drawn with ``noise``; the most likely ones for None."""

    @abstractmethod
    def numpy_step(self, params: Params) -> Step:
        """``act`` on NumPy arrays, for the rollouts under these parameters."""

    @abstractmethod
    def log_prob(self, params: Params, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """The pair log pi(a|s) and entropy of pi(.|s), each (...)."""


class CategoricalPolicy(Policy):
    """Softmax policy over discrete actions; the outputs are logits."""

    def noise(self, num_steps: int, num_envs: int, generator: torch.Generator) -> Tensor:
        """Standard Gumbel noise: argmax(logits + noise) is a sample of softmax(logits)."""
        shape = (num_steps, num_envs, self.network.out_dim)
        return torch.empty(shape).exponential_(generator=generator).log_().neg_()

    def act(self, params: Params, obs: Tensor, noise: Tensor | None) -> Tensor:
        """Drawn actions, or the most likely ones."""
        logits = self.network.outputs(params, obs)
        return (logits if noise is None else logits + noise).argmax(-1)

    def numpy_step(self, params: Params) -> Step:
        """``act`` on NumPy arrays."""
        logits = self.network.on_numpy(params)
        return lambda obs, noise: (logits(obs) + noise).argmax(-1)

    def log_prob(self, params: Params, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """The pair log pi(a|s) and entropy."""
        log_probs = self.network.outputs(params, obs).log_softmax(-1)
        taken = log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
        return taken, -(log_probs.exp() * log_probs).sum(-1)


class GaussianPolicy(Policy):
    """Diagonal Gaussian; the outputs are means, and the standard deviation depends on no state."""

    def init(self, obs_dim: int, hidden: Sequence[int], generator: torch.Generator) -> Params:
        """Parameters theta."""
        params = super().init(obs_dim, hidden, generator)
        return {**params, "log_std": torch.zeros(self.network.out_dim)}

    def noise(self, num_steps: int, num_envs: int, generator: torch.Generator) -> Tensor:
        """Standard normal noise."""
        return torch.randn(num_steps, num_envs, self.network.out_dim, generator=generator)

    def act(self, params: Params, obs: Tensor, noise: Tensor | None) -> Tensor:
        """Drawn actions, or the most likely ones."""
        mean = self.network.outputs(_layers(params), obs)
        return mean if noise is None else mean + params["log_std"].exp() * noise

    def numpy_step(self, params: Params) -> Step:
        """``act`` on NumPy arrays."""
        mean = self.network.on_numpy(_layers(params))
        std = params["log_std"].detach().exp().numpy()
        return lambda obs, noise: mean(obs) + std * noise

    def log_prob(self, params: Params, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """The pair log pi(a|s) and entropy."""
        log_std, dim = params["log_std"], self.network.out_dim
        z = (actions - self.act(params, obs, None)) * (-log_std).exp()
        log_norm = log_std.sum() + 0.5 * dim * math.log(2 * math.pi)
        log_prob = -0.5 * z.square().sum(-1) - log_norm
        return log_prob, (log_norm + 0.5 * dim).expand_as(log_prob)


def _layers(params: Params) -> Params:
    return {name: leaf for name, leaf in params.items() if name != "log_std"}
