"""The default critic's derivatives by formula: its Jacobian in factors, columns of its Hessian."""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor

from hypergrad_rl.layers import tanh_layer
from hypergrad_rl.modules import Params


class ValueJacobian:
    """J = dV_w(s)/dw at N states (N, obs_dim), layer by layer in factors: never formed.

    A layer's part of J has the rows delta_i (a_i, 1)', with a_i its input and delta_i the gradient
    of V(s_i) in its output. So its part of J J' is (delta_i . delta_j) (a_i . a_j + 1): N^2 times
    the sum of the widths, where forming J costs N, and the product N^2, times their products.
    """

    def __init__(self, params: Params, obs: Tensor) -> None:
        self.params = params
        inputs = [obs]
        depth = len(params) // 2
        for i in range(depth - 1):
            inputs.append(tanh_layer(inputs[-1], params[f"weight{i}"], params[f"bias{i}"]))
        head, bias = params[f"weight{depth - 1}"], params[f"bias{depth - 1}"]
        #: V_w, (N,).  Compiled, the sums of the head are part of what comes before and after them.
        self.values = (inputs[-1] * head).sum(-1) + bias
        deltas = [torch.ones_like(obs[:, :1])]  # the head is linear with one output
        for i in reversed(range(1, depth)):
            weight, slope = params[f"weight{i}"], 1 - inputs[i].square()
            deltas.insert(0, (weight if i == depth - 1 else deltas[0] @ weight) * slope)
        self.factors = list(zip(deltas, inputs, strict=True))

    def kernel(self) -> Tensor:
        """J J', (N, N)."""
        *hidden, (_, last) = self.factors  # delta = 1 at the head
        parts = [(d @ d.T) * (a @ a.T + 1) for d, a in hidden]
        return functools.reduce(torch.add, parts, last @ last.T + 1)

    def times(self, v: Params) -> Tensor:
        """J v, (N,), for v shaped like the parameters."""
        parts = [
            (d * torch.nn.functional.linear(a, v[f"weight{i}"], v[f"bias{i}"])).sum(-1)
            for i, (d, a) in enumerate(self.factors)
        ]
        return torch.stack(parts).sum(0)

    def pull(self, weights: Tensor) -> Params:
        """J' weights, shaped like the parameters, for weights (N,)."""
        grads: Params = {}
        *hidden, (_, last) = self.factors  # delta = 1 at the head
        for i, (d, a) in enumerate(hidden):
            rows = weights[:, None] * d
            grads |= {f"weight{i}": rows.T @ a, f"bias{i}": rows.sum(0)}
        i, rows = len(hidden), weights[:, None]
        return grads | {f"weight{i}": (rows * last).sum(0, keepdim=True), f"bias{i}": rows.sum(0)}

    def hessian_columns(self, targets: Tensor, units: Tensor) -> Tensor:
        """Columns of the Hessian of the mean of (V_w - targets)^2 in w: (k, n), for targets (N,).

        ``units`` are k unit vectors (k, n) that name them. The weights of a unit vector are p q'
        in one layer: a row there, a column at its input. So the first two layers change by outer
        products, where a product with any vector has three products of matrices a layer more.
        Cost: for two hidden layers, two products of a matrix with k N rows (Pearlmutter 1994 has
        the formulas for any vector, of which these are what is left).
        """
        deltas, inputs = zip(*self.factors, strict=True)
        count, last = len(units), len(deltas) - 1
        weights = [self.params[f"weight{i}"] for i in range(last + 1)]
        rows, columns, biases = self._places(units)
        # N states lie first, so that blocks are matrices: (N, k, width).
        scale = 2 / len(targets)
        errors = scale * (self.values - targets)
        along = [a @ q.T + b for a, q, b in zip(inputs, columns, biases, strict=True)]

        # Forward: how a layer's input changes.  ``first``, (N, k), is how that of the second does,
        # in the one entry that changes.
        first, changes = torch.zeros_like(along[0]), [torch.zeros_like(inputs[0])[:, None]]
        for i in range(last):
            change = along[i][..., None] * rows[i]
            slope = 1 - inputs[i + 1].square()
            if i == 0:
                first = along[0] * (slope @ rows[0].T)
            elif i == 1:
                change = change + first[..., None] * (rows[0] @ weights[1].T)
            else:
                change = change + changes[i] @ weights[i].T
            changes.append(slope[:, None] * change)
        values_change = along[last] + (changes[last] * weights[last]).sum(-1)

        # Backward: how the gradient in a layer's output changes, and with it that in its weights.
        down = scale * values_change
        grads = {
            f"weight{last}": down.T @ inputs[last] + (errors[:, None, None] * changes[last]).sum(0),
            f"bias{last}": down.sum(0),
        }
        arriving, arriving_change = weights[last], columns[last][None]
        for i in reversed(range(last)):
            out = inputs[i + 1]
            delta_change = (1 - out.square())[:, None] * arriving_change
            delta_change = delta_change - 2 * (out * arriving)[:, None] * changes[i + 1]
            weighted = errors[:, None] * deltas[i]
            total = down[..., None] * deltas[i][:, None] + errors[:, None, None] * delta_change
            grad = (total.flatten(1).T @ inputs[i]).unflatten(0, (count, -1))
            if i == 1:
                grad = grad + (weighted.T @ first).T[..., None] * rows[0][:, None]
            elif i > 1:
                part = weighted.T @ changes[i].flatten(1)
                grad = grad + part.unflatten(1, (count, -1)).transpose(0, 1)
            grads |= {f"weight{i}": grad, f"bias{i}": total.sum(0)}
            if i > 0:
                arriving = deltas[i] @ weights[i]
                arriving_change = delta_change @ weights[i]
                arriving_change = arriving_change + (deltas[i] @ rows[i].T)[..., None] * columns[i]
        return torch.cat([grads[name].reshape(count, -1) for name in self.params], 1)

    def _places(self, units: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Which output and input of each layer, or which bias, each unit vector stands for.

        As (k, outputs) and (k, inputs) with ones there, and (k,); zeros in the other layers.
        """
        leaves = torch.split(units, [leaf.numel() for leaf in self.params.values()], 1)
        parts = dict(zip(self.params, leaves, strict=True))
        rows, columns, biases = [], [], []
        for i in range(len(self.factors)):
            weight = parts[f"weight{i}"].view(len(units), *self.params[f"weight{i}"].shape)
            bias = parts[f"bias{i}"]
            rows.append(weight.sum(2) + bias)
            columns.append(weight.sum(1))
            biases.append(bias.sum(1))
        return rows, columns, biases

    def first(self, count: int) -> ValueJacobian:
        """J at the first states alone."""
        part = copy.copy(self)
        part.values = self.values[:count]
        part.factors = [(d[:count], a[:count]) for d, a in self.factors]
        return part
