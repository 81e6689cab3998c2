"""Products of small matrices in a graph for PyTorch's compiler, computed without a BLAS.

``torch.mm`` hands a product to a BLAS, which looks at it anew in each call: a microsecond before
the first number, and vectors half as wide as there are on processors that it does not know.  Of the
kernels that oneDNN makes for one shape, PyTorch has a function; here generated code calls it.
"""

from __future__ import annotations

import ctypes
import math
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, Node

#: What follows was written against the inside of PyTorch's compiler, of this version.
_KNOWN = ("2", "13")
#: ``at::native::cpublas::brgemm`` of float32, with the types of its arguments.
_SYMBOL = "_ZN2at6native7cpublas6brgemmEllllllbPKfS3_Pfb"
#: Numbers in the second factor, at most: the kernel reads it again and again, from the caches.
_LARGEST = 2**18
#: What a copied number takes, a multiplication and a call, in nanoseconds.  They were measured on
#: one processor, and only weigh ways to compute the same.
_COPY, _KERNEL, _BLAS, _CALL_KERNEL, _CALL_BLAS = 0.25, 1 / 133, 1 / 50, 50, 600
#: An operation is there as long as its library.
_kept: list[Any] = []
#: The kernel computes so many columns at once, needed or not.
_COLUMNS = 16
#: Generated code begins with it.
_CODE = r"""
#ifndef HYPERGRAD_PRODUCT
#define HYPERGRAD_PRODUCT
#include <algorithm>
#include <cstdint>
#include <exception>
namespace at::native::cpublas {
void brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
            const float* a, const float* b, float* c, bool packed);
}
namespace hypergrad {
// Some rows of a product. Sums are formed of at most 512 terms, and then of those.
static inline void rows(const float* a, const float* b, float* c, int64_t m, int64_t k, int64_t n,
                        int64_t lda, int64_t ldb) {
  try {
    for (int64_t j = 0; j < k; j += 512)
      at::native::cpublas::brgemm(m, n, std::min<int64_t>(k - j, 512), lda, ldb, n, j > 0, a + j,
                                  b + j * ldb, c, false);
  } catch (const std::exception&) {  // oneDNN was turned off, or held to an old processor
    std::fill(c, c + m * n, 0.0f);
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < k; ++j)
        for (int64_t l = 0; l < n; ++l) c[i * n + l] += a[i * lda + j] * b[j * ldb + l];
  }
}
static inline void product(const float* a, const float* b, float* c, int64_t count, int64_t m,
                           int64_t k, int64_t n, int64_t step_a, int64_t lda, int64_t step_b,
                           int64_t ldb) {
  const int64_t parts = (m + 63) / 64;
  if (count * m * k * n < (1 << 21)) {  // threads would take longer to begin than to end
    for (int64_t i = 0; i < count; ++i)
      rows(a + i * step_a, b + i * step_b, c + i * m * n, m, k, n, lda, ldb);
    return;
  }
#pragma omp parallel for collapse(2)
  for (int64_t i = 0; i < count; ++i)
    for (int64_t p = 0; p < parts; ++p)
      rows(a + i * step_a + 64 * p * lda, b + i * step_b, c + (i * m + 64 * p) * n,
           std::min<int64_t>(m - 64 * p, 64), k, n, lda, ldb);
}
}  // namespace hypergrad
#endif
"""


def direct_products(graph: Graph) -> None:
    """Products of small matrices become calls of oneDNN's kernel for their shape, in place.

    A BLAS looks at a product anew each time, and MKL uses half of the vectors of a processor that
    is not Intel's: 128 x 64 times 64 x 64 takes it 10.3 microseconds where the kernel takes 4.0.
    The kernel wants matrices in rows: others are copied, or the product is computed transposed,
    whatever takes less by count.  Results lie in memory as before.

    Every graph of this library goes through it, before :func:`transpose_narrow`; it is public for
    those who compile more than that, as ``post_grad_custom_pre_pass`` of ``torch.compile``'s
    options or within such a pass.  It does something in PyTorch 2.13 on x86-64 Linux, with oneDNN
    and the option ``cpp_wrapper``.

    Args:
        graph: of ``aten`` operations, with the fake tensors of PyTorch's compiler in ``meta``.
            ``mm``, ``addmm`` and ``bmm`` of float32 tensors of the CPU are looked at, where those
            are there, and the sizes are known.

    Examples:
        >>> import torch, hypergrad
        >>> def quicken(graph):
        ...     hypergrad.direct_products(graph)
        ...     hypergrad.transpose_narrow(graph)
        >>> options = {"cpp_wrapper": True, "post_grad_custom_pre_pass": quicken}
        >>> multiply = torch.compile(torch.mm, options=options)
    """
    if not _calls_kernels():
        return
    aten = torch.ops.aten
    for target in (aten.mm.default, aten.bmm.default, aten.addmm.default):
        for node in graph.find_nodes(op="call_function", target=target):
            if _is_small(node):
                _replace(graph, node)


def _calls_kernels() -> bool:
    """Whether the code around the kernels will be C++, and there are any."""
    if not _has_kernel() or not bool(torch.backends.mkldnn.enabled):
        return False
    from torch._inductor import config

    return bool(config.cpp_wrapper)


def _is_small(node: Node) -> bool:
    if node.kwargs or not all("val" in x.meta for x in (node, *node.all_input_nodes)):
        return False  # a scaled sum; a graph that nothing is known of
    factors: list[Tensor] = [x.meta["val"] for x in node.args[-2:]]  # type: ignore[union-attr]
    if any(x.dtype != torch.float32 or x.device.type != "cpu" for x in factors):
        return False
    sizes = [size for x in factors for size in x.shape]
    return all(isinstance(size, int) and size > 0 for size in sizes)


def _work(a: Tensor, b: Tensor) -> float:
    """Nanoseconds that A B takes by the kernel, more or less, and the copies that it needs."""
    if b.shape[-1] * b.shape[-2] > _LARGEST:
        return math.inf
    copied = sum(x.numel() for x in (a, b) if not _lies_in_rows(x))
    columns = -(-b.shape[-1] // _COLUMNS) * _COLUMNS
    return _CALL_KERNEL + _COPY * copied + _KERNEL * a.numel() * columns


def _replace(graph: Graph, node: Node) -> None:
    """The product as it stands, or B' A' transposed, whichever takes less; or neither."""
    aten, value = torch.ops.aten, node.meta["val"]
    *others, a, b = node.args
    left, right = a.meta["val"], b.meta["val"]  # type: ignore[union-attr]
    blas = _CALL_BLAS + _BLAS * left.numel() * right.shape[-1]
    straight, turned = _work(left, right), _work(right.mT, left.mT) + _COPY * value.numel()
    if blas <= min(straight, turned):
        return

    def call(target: Any, *args: Any, **options: Any) -> Node:
        new = graph.call_function(target, args, options)
        known = [x.meta["val"] if isinstance(x, Node) else x for x in args]
        new.meta["val"] = target(*known, **options)
        return new

    def transposed(x: Any) -> Node:
        dims = x.meta["val"].dim()
        return call(aten.permute.default, x, [*range(dims - 2), dims - 1, dims - 2])

    def in_rows(x: Any) -> Any:
        if _lies_in_rows(x.meta["val"]):
            return x
        return call(aten.clone.default, x, memory_format=torch.contiguous_format)

    with graph.inserting_before(node):
        if straight <= turned:
            result = call(_product_operation(), in_rows(a), in_rows(b))
        else:
            factors = [in_rows(transposed(x)) for x in (b, a)]
            result = transposed(call(_product_operation(), *factors))
            result = call(aten.clone.default, result, memory_format=torch.contiguous_format)
        if others:
            result = call(aten.add.Tensor, result, others[0])
    node.replace_all_uses_with(result)
    graph.erase_node(node)


@lru_cache(maxsize=1)
def _has_kernel() -> bool:
    """Whether this PyTorch and this processor have the kernel."""
    if tuple(torch.__version__.split(".")[:2]) != _KNOWN:
        return False
    processor, onednn = torch.backends.cpu.get_cpu_capability(), cast(Any, torch.backends.mkldnn)
    if processor not in ("AVX2", "AVX512") or not onednn.is_available():
        return False
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    return library.is_file() and hasattr(ctypes.CDLL(str(library)), _SYMBOL)


def _lies_in_rows(x: Tensor) -> bool:
    """Whether the kernel can read matrices of shape (..., m, n) as they are."""
    return bool(x.stride(-1) == 1 and x.stride(-2) >= x.shape[-1])


@lru_cache(maxsize=1)
def _product_operation() -> Any:
    """``hypergrad::product(a, b)``: a @ b of float32 stacks of one number of dimensions.

    Its code by PyTorch's compiler, with a wrapper in C++, is the kernel; its results lie in rows.
    """
    from torch._inductor import ir  # takes as long to import as the rest of the library
    from torch._inductor.lowering import register_lowering

    class Product(ir.ExternKernelOut):
        def codegen(self, wrapper: Any) -> None:
            if not hasattr(wrapper, "hypergrad_product"):
                wrapper.hypergrad_product = True
                wrapper.header.splice(_CODE)
            a, b = inputs = list[Any](self.inputs)
            *batch, m, k = map(int, a.get_size())
            n = int(b.get_size()[-1])
            steps = [
                step
                for x in inputs
                for step in ([0] * (not batch) + list(map(int, x.get_stride())))[:2]
            ]
            numbers = [*(batch or [1]), m, k, n, *steps]
            places = [_place(x) for x in (a, b, self)]
            wrapper.writeline(f"hypergrad::product({', '.join(map(str, (*places, *numbers)))});")

    def _place(x: Any) -> str:
        offset = int(x.get_layout().offset) if isinstance(x, ir.ReinterpretView) else 0
        return f"static_cast<float*>({x.get_name()}.data_ptr()) + {offset}"

    def _ready(x: Any) -> Any:
        """As a tensor in memory that lies in rows."""
        x = ir.ExternKernel.realize_input(x)
        if ir.is_storage_and_layout(x) and not isinstance(x.get_layout(), ir.FlexibleLayout):
            *_, rows, step = x.get_stride()
            if step == 1 and rows >= x.get_size()[-1]:
                return x
        return ir.ExternKernel.require_contiguous(x)

    def _multiply(a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    def _shaped(a: Tensor, b: Tensor) -> Tensor:
        return a.new_empty(*a.shape[:-1], b.shape[-1])

    library: Any = torch.library.Library("hypergrad", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define("product(Tensor a, Tensor b) -> Tensor")
    library.impl("product", _multiply, "CompositeExplicitAutograd")
    torch.library.register_fake("hypergrad::product", _shaped, lib=library)
    operation = torch.ops.hypergrad.product.default
    _kept.append(library)

    @register_lowering(operation, type_promotion_kind=None)
    def _lowered(a: Any, b: Any) -> Any:
        a, b = _ready(a), _ready(b)
        size = [*a.get_size()[:-1], b.get_size()[-1]]
        return ir.TensorBox.create(
            Product(ir.FixedLayout(a.get_device(), a.get_dtype(), size), [a, b])
        )

    return operation
