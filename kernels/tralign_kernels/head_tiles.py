"""What kernels share that work on tiles of the head's product: which tile, the product, the launch.

Letters: N scored tokens (rows), H hidden size, W rows of the weight: the vocabulary's columns
[start, start + W). A work item is one block of rows and `SPLIT` columns, which are as many tiles as
they need. Which columns an item has depends on the shape alone, so that results do not depend on
the number of multiprocessors, nor on the order of the items.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .ema import round_nearest
from .launch import FLOAT_PRECISION, DotLaunch, dot
from .logprob import score

# Columns of a work item: 16 tiles of 128. Llama 3's vocabulary has 63 items a row, so that 2,048
# rows make 504 of them (3.8 for each of an H100's 132 SMs) and leave 0.5 kB a row to combine.
SPLIT = 2048
# Rows whose hidden states stay in the L2 cache (16 MB at H = 4,096, of an A100's 40 and an H100's
# 50) while all of the weight passes by; it is read from device memory once for every such group.
GROUP = 2048


@triton.jit
def _load_tile(
    source, row, column, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """(ROWS, COLUMNS) of a row-major matrix, zeros outside of it."""
    if TMA:
        tile = source.load([row, column])
    else:
        i = row + tl.arange(0, ROWS)
        j = column + tl.arange(0, COLUMNS)
        inside = (i < rows)[:, None] & (j < columns)[None, :]
        address = source + i.to(tl.int64)[:, None] * stride + j[None, :]
        tile = tl.load(address, mask=inside, other=0.0)
    return tile


@triton.jit
def _place_of(item, row_blocks, splits, GROUP_BLOCKS: tl.constexpr):
    """(block of rows, split): rows vary fastest within a group of blocks, then splits, then groups.

    Programs that run together read the same part of the weight, which thus comes from device memory
    once a group, and hidden states that the L2 cache holds.
    """
    if GROUP_BLOCKS == 0:  # all rows are one group
        block, split = item % row_blocks, item // row_blocks
    else:
        first = item // (GROUP_BLOCKS * splits) * GROUP_BLOCKS
        blocks = tl.minimum(GROUP_BLOCKS, row_blocks - first)
        place = item % (GROUP_BLOCKS * splits)
        block, split = first + place % blocks, place // blocks
    return block, split


@triton.jit
def product_of_tile(
    hidden, weight, bias_ptr, first_row, first_column, N, W, H, hidden_stride, weight_stride,
    BIAS: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """(ROWS, COLUMNS) fp32 logits, not rounded; zeros in columns that are not there."""
    x = tl.zeros((ROWS, COLUMNS), tl.float32)
    if BIAS:  # first, not last: registers are scarcest after the product
        column = first_column + tl.arange(0, COLUMNS)
        x += tl.load(bias_ptr + column, mask=column < W, other=0.0).to(tl.float32)[None, :]
    for k in range(0, H, DEPTH):
        a = _load_tile(hidden, first_row, k, N, H, hidden_stride, ROWS, DEPTH, TMA)
        b = _load_tile(weight, first_column, k, W, H, weight_stride, COLUMNS, DEPTH, TMA)
        x = dot(a, b.T, x, PRECISION)
    return x


@triton.jit
def scores_of(x, column, W, inner, outer, dtype: tl.constexpr, SOFTCAP: tl.constexpr):
    """fp32 scores of logits; -inf in columns that are not there."""
    z = score(round_nearest(x, dtype).to(tl.float32), inner, outer, SOFTCAP)
    return tl.where((column < W)[None, :], z, -float("inf"))


@triton.jit
def store_tile(target, first_row, first_column, rows, columns, stride, values, TMA: tl.constexpr):
    """`values` into a row-major matrix, what lies outside of it left out."""
    ROWS: tl.constexpr = values.shape[0]
    COLUMNS: tl.constexpr = values.shape[1]
    if TMA:
        target.store([first_row, first_column], round_nearest(values, target.dtype))
    else:
        row, column = first_row + tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        address = target + row.to(tl.int64)[:, None] * stride + column[None, :]
        tl.store(address, round_nearest(values, target.dtype.element_ty), mask=inside)


@triton.jit
def item_of(
    item, targets_ptr, start, N, W, row_blocks, splits, SPLIT: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """(split, its first row, rows, whether they are there, begin and end of its columns, the
    targets' columns, -1 where a target lies elsewhere) of a work item."""
    block, split = _place_of(item, row_blocks, splits, GROUP // ROWS)
    first_row = block * ROWS
    row = first_row + tl.arange(0, ROWS)
    row_inside = row < N
    begin = split * SPLIT
    end = tl.minimum(begin + SPLIT, W)
    # a target lies in one item, which alone writes it; 32 bits, as the columns it is sought in
    target = tl.load(targets_ptr + row, mask=row_inside, other=-1) - start
    own = row_inside & (target >= begin) & (target < end)
    return split, first_row, row, row_inside, begin, end, tl.where(own, target, -1).to(tl.int32)


@triton.jit
def halves_of(tile):
    """The left and the right columns."""
    ROWS: tl.constexpr = tile.shape[0]
    COLUMNS: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


def grid_of(N: int, W: int, launch: DotLaunch, device: torch.device) -> tuple[int]:
    items = triton.cdiv(N, launch.rows) * splits_of(W)
    assert items < 2**31, (N, W)
    return (min(items, _multiprocessors(device)) if launch.persistent else items,)


def splits_of(W: int) -> int:
    return triton.cdiv(W, SPLIT)


def sizes_of(
    hidden: Tensor, weight: Tensor, powers: Tensor | None
) -> tuple[int, int, int, int, int, int]:
    """(N, W, H, row strides of the three)"""
    (N, H), W = hidden.shape, weight.shape[0]
    stored = 0 if powers is None else powers.stride(0)
    return N, W, H, hidden.stride(0), weight.stride(0), stored


def tile_options(launch: DotLaunch, name: str, grouped: bool = True) -> dict[str, Any]:
    """The keywords of both kernels that come with a launch.

    Args:
        name: of the architecture.
        grouped: whether rows are taken in groups; small tiles have no registers left for it on
            sm_80.
    """
    return {
        "TMA": launch.tma,
        "PRECISION": FLOAT_PRECISION[name],
        "SPLIT": SPLIT,
        "GROUP": GROUP if grouped else 0,
        "ROWS": launch.rows,
        "COLUMNS": launch.columns,
        "DEPTH": launch.depth,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }


def operands_of(hidden: Tensor, weight: Tensor, launch: DotLaunch) -> tuple[Any, Any]:
    """As pointers or, with TMA, descriptors."""
    if not launch.tma:
        return hidden, weight
    return (
        _describe(hidden, launch.rows, launch.depth),
        _describe(weight, launch.columns, launch.depth),
    )


def target_of(powers: Tensor, launch: DotLaunch) -> Any:
    if not launch.tma:
        return powers
    return _describe(powers, launch.rows, launch.columns // launch.parts)


def is_aligned(matrix: Tensor) -> bool:
    """Whether TMA can address it, and pointers 16 bytes a thread: as every language model's."""
    return (matrix.data_ptr() | matrix.stride(0) | matrix.shape[1]) % 16 == 0


def _describe(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], [rows, columns])


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 3  # interpreted: fewer programs than items, as on a GPU
    return torch.cuda.get_device_properties(device).multi_processor_count


def check_powers(powers: Tensor, hidden: Tensor, weight: Tensor, softcap: bool) -> None:
    assert not softcap, "a softcap's slope is not in the powers"
    assert powers.shape == (len(hidden), len(weight)), powers.shape
    assert powers.dtype == hidden.dtype == torch.bfloat16, (powers.dtype, hidden.dtype)
    for matrix in (powers, hidden, weight):
        assert matrix.stride(1) == 1, matrix.stride()
        assert is_aligned(matrix), (matrix.data_ptr(), matrix.shape, matrix.stride())
