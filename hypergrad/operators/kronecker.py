"""Kronecker-factored curvature, from the package curvlinops."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any, Literal, get_args

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from ..errors import (
    DampingError,
    LeafTypeError,
    MissingPackageError,
    NonFiniteError,
    SolverOptionError,
)
from ..pytree import Tree, TreeLayout
from .interop import ForeignOperator
from .invertible import InvertibleOperator

FisherKind = Literal["exact", "sampled", "empirical", "forward-only"]
WeightSharing = Literal["expand", "reduce"]

#: Their names for the kinds.
_KINDS = {"exact": "type-2", "sampled": "mc", "empirical": "empirical"}
#: The losses as functions, and as the modules that the factors are defined for.
_LOSSES: dict[Any, type[torch.nn.Module]] = {
    torch.nn.functional.mse_loss: torch.nn.MSELoss,
    torch.nn.functional.cross_entropy: torch.nn.CrossEntropyLoss,
    torch.nn.functional.binary_cross_entropy_with_logits: torch.nn.BCEWithLogitsLoss,
}
#: Options of these losses that the factors take no account of, and where they change nothing.
_UNWEIGHTED = {"weight": None, "pos_weight": None, "ignore_index": -100}
_LAYERS = (torch.nn.Linear, torch.nn.Conv2d)


class KroneckerOperator(InvertibleOperator):
    """A block for each layer's parameters, of Kronecker factors; made by :func:`kfac`.

    Attributes:
        theirs: the operator of curvlinops.
    """

    def __init__(self, theirs: Any, layout: TreeLayout) -> None:
        super().__init__(layout)
        self.theirs = theirs
        self._foreign = ForeignOperator(theirs, layout)

    def _apply(self, block: Tensor) -> Tensor:
        return self._foreign._apply(block)

    def _transposed(self) -> KroneckerOperator:
        return self  # factors are symmetric

    def _inverse(self, damping: float) -> Callable[[Tensor], Tensor]:
        if damping == 0.0:
            raise DampingError(
                "damping is 0, expected a number > 0: Kronecker factors are singular in general, "
                "as with more inputs to a layer than samples."
            )
        inverse = _package().KFACInverseLinearOperator(
            self.theirs, damping=damping, use_exact_damping=True
        )
        return ForeignOperator(inverse, self.layout)._apply


def kfac(
    module: torch.nn.Module,
    loss_fn: Any,
    params: Tree,
    batches: Iterable[tuple[Any, Tensor]],
    *,
    eigenvalue_corrected: bool = False,
    fisher: FisherKind = "exact",
    num_samples: int = 1,
    weight_sharing: WeightSharing = "expand",
    separate_bias: bool = True,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> KroneckerOperator:
    """Kronecker-factored approximate curvature (KFAC, or EKFAC) of a module's loss.

    A layer's block of the Gauss-Newton (or Fisher) matrix is approximated by the Kronecker product
    of two small matrices: the second moment of the layer's inputs, and that of the gradients in its
    outputs.  It is exact for one linear layer with squared error; otherwise it is meant as a
    preconditioner, whose damped inverse costs two small eigendecompositions a layer.  The factors
    are computed by the package curvlinops, once, at the values that the parameters have now.

    Args:
        module: the network, called as ``module(inputs)``.
        loss_fn: ``torch.nn.MSELoss``, ``CrossEntropyLoss`` or ``BCEWithLogitsLoss``, or the
            function of the same name in ``torch.nn.functional`` with its default reduction.
        params: any tree of the module's own parameters, such as
            ``dict(module.named_parameters())``, or of tensors that share their memory.
        batches: pairs ``(inputs, targets)`` that can be iterated over again: a list, a
            ``DataLoader``.
        eigenvalue_corrected: EKFAC, with the exact second moments in the factors' eigenbasis; for
            outputs of two dimensions.
        fisher: ``"exact"``, one backward pass for each output; ``"sampled"``, with targets drawn
            from the model's distribution; ``"empirical"``, with those observed;
            ``"forward-only"``, with identity matrices for the gradients'.
        num_samples: targets drawn for each input, where they are.
        weight_sharing: for layers that are used at many positions, ``"expand"`` or ``"reduce"``.
        separate_bias: whether weight and bias of a layer are blocks of their own.
        generator: source of the draws; None for torch's global one.
        progress: whether to show a progress bar over the batches (needs tqdm).

    Returns:
        An operator on trees like ``params``, with ``.preconditioner(damping)`` and
        ``.solve(v, damping)``, where damping > 0 is added to the product of the factors, exactly.
        Products do not run under ``torch.compile``, which cannot trace the operators of curvlinops.

    Raises:
        MissingPackageError: curvlinops is not installed.
        SolverOptionError: another loss, one with ``weight``, ``pos_weight`` or ``ignore_index``, a
            tied parameter, a parameter in a layer other than ``Linear`` and
            ``Conv2d``, a one-shot iterator, or an unknown option.
        LeafTypeError: a leaf that is no parameter of the module, or is frozen.
        NonFiniteError: a factor holds nan or inf.
        DampingError: for the inverse, a damping of zero.

    Cost: one pass over the batches to count them, one with as many backward passes a batch as
    ``fisher`` says (two with EKFAC).  A product or solve costs a few small matrix products.
    Source: Martens and Grosse, arXiv 1503.05671; Grosse and Martens, arXiv 1602.01407; Eschenhagen
    et al., arXiv 2311.00636; EKFAC: George et al., arXiv 1806.03884.

    Examples:
        >>> import torch, hypergrad
        >>> module = torch.nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[2.0, 0.0], [0.0, 4.0]]), torch.zeros(2, 1)
        >>> params = dict(module.named_parameters())
        >>> hypergrad.kfac(module, torch.nn.MSELoss(), params, [(x, y)]).to_dense()
        tensor([[ 4.0000,  0.0000],
                [ 0.0000, 16.0000]])
    """
    package = _package()
    layout = TreeLayout.of(params, name="params")
    if fisher not in get_args(FisherKind):
        raise SolverOptionError(f"fisher is {fisher!r}, expected one of {get_args(FisherKind)}.")
    if weight_sharing not in get_args(WeightSharing):
        raise SolverOptionError(
            f"weight_sharing is {weight_sharing!r}, expected one of {get_args(WeightSharing)}."
        )
    counted = isinstance(num_samples, int) and not isinstance(num_samples, bool)
    if not counted or num_samples < 1 or (num_samples > 1 and fisher != "sampled"):
        raise SolverOptionError(
            f"num_samples is {num_samples!r} with fisher={fisher!r}, expected an integer >= 1, and "
            "1 unless targets are drawn (fisher='sampled')."
        )
    if iter(batches) is batches:
        raise SolverOptionError(
            "batches is an iterator, which is at its end after one pass; expected a list or a "
            "DataLoader. Use list(batches)."
        )
    device = torch.device("cpu") if generator is None else generator.device
    seed = int(torch.randint(2**31 - 1, (), generator=generator, device=device))
    made = (package.EKFACLinearOperator if eigenvalue_corrected else package.KFACLinearOperator)(
        module,
        _loss(loss_fn),
        _own_parameters(module, layout, params),
        batches,
        progressbar=progress,
        check_deterministic=False,
        seed=seed,
        fisher_type=_KINDS.get(fisher, fisher),
        mc_samples=num_samples,
        kfac_approx=weight_sharing,
        separate_weight_and_bias=separate_bias,
    )
    operator = KroneckerOperator(made, layout)
    # The first product computes the factors: now, at these parameters, and once.
    ones = torch.ones(1, layout.dim, dtype=layout.dtype, device=layout.device)
    if not bool(torch.isfinite(operator._apply(ones)).all()):
        raise NonFiniteError(
            "a Kronecker factor holds nan or inf. Look for an overflow, or diverged parameters."
        )
    return operator


def _package() -> Any:
    try:
        return import_module("curvlinops")
    except ImportError as error:
        raise MissingPackageError(
            "hypergrad.kfac needs the package curvlinops; install it with "
            'pip install "hypergrad-torch[kfac]" or pip install curvlinops-for-pytorch.'
        ) from error


def _loss(loss_fn: Any) -> torch.nn.Module:
    if isinstance(loss_fn, torch.nn.Module) and isinstance(loss_fn, tuple(_LOSSES.values())):
        for name, usual in _UNWEIGHTED.items():
            if getattr(loss_fn, name, usual) != usual:
                raise SolverOptionError(
                    f"loss_fn is a {type(loss_fn).__name__} with {name}={getattr(loss_fn, name)}, "
                    f"expected {usual}: curvlinops would leave it out without a word. Use "
                    "hypergrad.block_diagonal."
                )
        return loss_fn
    for function, make in _LOSSES.items():
        if loss_fn is function:
            return make()
    names = ", ".join(function.__name__ for function in _LOSSES)
    raise SolverOptionError(
        f"loss_fn is {loss_fn!r}, expected torch.nn.MSELoss(), CrossEntropyLoss() or "
        f"BCEWithLogitsLoss(), or one of the functions {names}: Kronecker factors are known for "
        "these. For others use hypergrad.block_diagonal."
    )


def _own_parameters(
    module: torch.nn.Module, layout: TreeLayout, params: Tree
) -> list[torch.nn.Parameter]:
    """The module's parameters that the leaves are, or share their memory with."""
    known = {p.data_ptr(): (name, p) for name, p in module.named_parameters()}
    names: dict[int, list[str]] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        names.setdefault(p.data_ptr(), []).append(name)
    layers = dict(module.named_modules())
    chosen = []
    for path, leaf in zip(layout.paths, torch_pytree.tree_leaves(params), strict=True):
        name, parameter = known.get(leaf.data_ptr(), ("", None))
        if parameter is None or parameter.shape != leaf.shape:
            raise LeafTypeError(
                f"params{path} is not a parameter of the module, expected the module's own. Pass "
                "dict(module.named_parameters()) or a part of it."
            )
        if len(names[parameter.data_ptr()]) > 1:
            raise SolverOptionError(
                f"params{path} is tied: it is {' and '.join(names[parameter.data_ptr()])}, "
                "expected parameters of one layer each: of the others curvlinops would see "
                "nothing. Leave it out of params, or use hypergrad.block_diagonal."
            )
        if not parameter.requires_grad:
            raise LeafTypeError(
                f"params{path} ({name}) is frozen: it does not require grad. Leave it out of "
                "params."
            )
        layer = layers[name.rpartition(".")[0]]
        if not isinstance(layer, _LAYERS):
            raise SolverOptionError(
                f"params{path} ({name}) belongs to a {type(layer).__name__}, expected a Linear or "
                "Conv2d layer: Kronecker factors are known for these. Leave it out of params, or "
                "use hypergrad.block_diagonal."
            )
        chosen.append(parameter)
    return chosen
