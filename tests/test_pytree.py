from __future__ import annotations

from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
import torch.utils._pytree as torch_pytree
from hypothesis import given

import hypergrad
from hypergrad.norms import row_norms
from hypergrad.precision import working_dtype
from hypergrad.pytree import TreeLayout, tree_leaves
from tests.strategies import F32, F64, flat, gaussian, quick_and_thorough, tree_like, trees

Point = namedtuple("Point", "x y")


@quick_and_thorough
@given(tree=trees())
def test_flatten_and_unflatten_are_inverse_to_each_other(effort: str, tree: Any) -> None:
    layout = TreeLayout.of(tree)
    vector = layout.flatten(tree)
    assert torch.equal(vector, flat(tree))
    back = layout.unflatten(vector)
    assert torch_pytree.tree_structure(back) == torch_pytree.tree_structure(tree)
    pairs = zip(tree_leaves(back), tree_leaves(tree), strict=True)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


@quick_and_thorough
@given(tree=trees())
def test_a_block_holds_one_tree_a_row(effort: str, tree: Any) -> None:
    layout = TreeLayout.of(tree)
    block = gaussian(3, layout.dim)
    stacked = layout.unflatten_block(block)
    assert TreeLayout.of(stacked, batched=True).shapes == layout.shapes
    assert torch.equal(layout.flatten_block(stacked), block)
    for row in range(3):
        one = torch_pytree.tree_map(lambda leaf, row=row: leaf[row], stacked)
        assert torch.equal(layout.flatten(one), block[row])


def test_dicts_are_matched_by_key_and_lists_match_tuples() -> None:
    layout = TreeLayout.of({"a": torch.zeros(2), "b": [torch.zeros(()), torch.zeros(1)]})
    other = OrderedDict(b=(torch.tensor(3.0), torch.tensor([4.0])), a=torch.tensor([1.0, 2.0]))
    assert layout.flatten(other).tolist() == [1.0, 2.0, 3.0, 4.0]


def test_named_tuples_keep_their_type() -> None:
    tree = Point(torch.zeros(2), torch.ones(()))
    back = TreeLayout.of(tree).unflatten(torch.arange(3.0))
    assert isinstance(back, Point)
    assert back.y == 2.0


def test_mixed_dtypes_meet_in_the_promoted_one_and_come_back() -> None:
    tree = {"half": torch.ones(2, dtype=torch.bfloat16), "double": torch.ones(1, dtype=F64)}
    layout = TreeLayout.of(tree)
    assert layout.dtype == F64
    back = layout.unflatten(layout.flatten(tree))
    assert {k: v.dtype for k, v in back.items()} == {"half": torch.bfloat16, "double": F64}


def test_two_16_bit_formats_meet_in_float32() -> None:
    tree = [torch.ones(1, dtype=torch.float16), torch.ones(1, dtype=torch.bfloat16)]
    assert TreeLayout.of(tree).dtype == F32


def test_flattened_trees_carry_no_graph_and_share_no_memory() -> None:
    leaf = torch.ones(2, requires_grad=True)
    vector = TreeLayout.of(leaf).flatten(leaf * 2)
    assert not vector.requires_grad
    vector = TreeLayout.of(leaf).flatten(leaf)
    vector += 1
    assert torch.equal(leaf.detach(), torch.ones(2))


def test_empty_leaves_beside_others_are_kept() -> None:
    tree = {"none": torch.zeros(0, 3), "some": torch.ones(2)}
    back = TreeLayout.of(tree).unflatten(torch.arange(2.0))
    assert back["none"].shape == (0, 3)


def test_the_first_leaf_that_is_not_finite_is_named() -> None:
    tree = {"fine": torch.ones(2), "bad": torch.tensor([1.0, float("nan"), float("inf")])}
    layout = TreeLayout.of(tree)
    with pytest.raises(hypergrad.NonFiniteError, match=r"2 of 3 entries of leaf \['bad'\]"):
        layout.check_finite(layout.flatten(tree), "v")


@pytest.mark.parametrize("size", [1e-300, 1e-200, 1.0, 1e200, 1e300])
def test_norms_neither_overflow_nor_underflow(size: float) -> None:
    block = torch.tensor([[3.0 * size, 4.0 * size], [0.0, 0.0]], dtype=F64)
    norms = row_norms(block)
    assert norms[0] / size == pytest.approx(5.0, rel=1e-15)
    assert norms[1] == 0.0


def test_recurrences_are_wider_than_products() -> None:
    cpu = torch.device("cpu")
    assert working_dtype(F32, cpu) == F64
    assert working_dtype(torch.bfloat16, cpu) == F32


def test_tree_like_is_the_inverse_of_flat() -> None:
    tree = {"z": torch.zeros(2, 2), "a": (torch.zeros(()),)}
    assert torch.equal(flat(tree_like(tree, torch.arange(5.0))), torch.arange(5.0))


def test_types_for_storage_are_refused() -> None:
    # PyTorch calls them floating-point, but has no arithmetic for them.
    with pytest.raises(
        hypergrad.LeafTypeError, match=r"float8_e4m3fn, expected .* of 16 bits or more"
    ):
        TreeLayout.of(torch.zeros(3).to(torch.float8_e4m3fn))
