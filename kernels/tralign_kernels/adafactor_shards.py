"""Adafactor's step on one process's shard of a parameter, by the kernels of `adafactor`.

A parameter is cut along its first dimension: a matrix by rows, a stack by matrices. The halves of a
step are two calls. Between them `sums` is added up over all shards:

    matrix  Σ G² and t = Σ G²/r by columns, Σ r      2·C + 1 numbers
    stack   Σ U²                                     1
    vector  Σ U²                                     1

and Σ W² where it is asked for. Nothing but scratch, `found_inf` and the copies in here is written
before all shards have been heard of.
"""

# pyright: reportCallIssue=false

import math
from typing import Any

import torch
import triton
from torch import Tensor

from . import adafactor as whole
from .adafactor import AdafactorOptions, plan_of
from .launch import device_of


class AdafactorShard:
    """The step of one shard.

    Args:
        weight, grad: the shard, fp32, bf16 or fp16, contiguous; `finish` writes the weight.
        shape: of the whole parameter.
        squares: float32, written by `finish`: (r (..., R), c (..., C)), c of all rows where a
            matrix is cut; or a vector's own.
        bad: () float32; 1 is written if a gradient is NaN or infinite.
        left_out: (1,) float32, as in `adafactor_step_`.
        rms: () float32, written with `scale`.
    """

    sums: Tensor  # (n,) float32

    def __init__(
        self,
        weight: Tensor,
        grad: Tensor,
        shape: tuple[int, ...],
        squares: tuple[Tensor, ...],
        bad: Tensor,
        left_out: Tensor,
        rms: Tensor | None,
        options: AdafactorOptions,
    ) -> None:
        whole._check(weight, grad, squares, bad, left_out, rms if options.scale else None)
        self._weight, self._grad, self._shape, self._squares = weight, grad, shape, squares
        self._left_out, self._rms = left_out, bad if rms is None else rms
        self._scaled, self._numel = options.scale, float(math.prod(shape))
        step = float(options.step)
        self._running = (options.step**options.decay, step, options.decay, options.eps)
        self._update = (
            options.lr, options.eps_scale, options.threshold, options.weight_decay
        )  # fmt: skip
        self._cut = len(shape) == 2
        with device_of(weight):
            self.sums = self._measure_vector(bad) if len(shape) < 2 else self._measure(bad)

    def _measure_vector(self, bad: Tensor) -> Tensor:
        size = self._weight.numel()
        programs = triton.cdiv(size, whole._VECTOR)
        if not size:
            return self._weight.new_zeros(1 + self._scaled, dtype=torch.float32)
        (sums,) = whole._scratch((2 * programs,), self._weight.device)
        self._vector(sums, programs, bad, (0, 0), MEASURES=True, UPDATES=False)
        return sums[: 2 * programs].view(2, programs)[: 1 + self._scaled].sum(1)

    def _vector(self, sums, programs, flag, random, **parts: bool) -> None:
        size = self._weight.numel()
        whole._adafactor_vector_kernel[(triton.cdiv(size, whole._VECTOR),)](
            self._weight, self._grad, self._squares[0], sums, self._rms, flag, self._left_out, size,
            programs, self._numel, *self._running, *self._update, *random, SCALED=self._scaled,
            BLOCK=whole._VECTOR, SUMS=whole._SUMS, num_warps=whole._WARPS, **parts,
        )  # fmt: skip

    def _measure(self, bad: Tensor) -> Tensor:
        M, R, C = self._sizes()
        if not M * R:
            numbers = 2 * C + 1 if self._cut else 1
            return self._weight.new_zeros(numbers + self._scaled, dtype=torch.float32)
        plan = plan_of(M, R, C)
        groups = M * plan.groups
        sizes = (M * R, groups, groups * plan.parts, 2 * groups * C, M, 0)
        scratch = whole._Scratch(*whole._scratch(sizes, self._weight.device))
        self._rows = scratch.rows
        whole._adafactor_statistics_kernel[(plan.parts, groups)](
            self._grad, self._weight, self._squares[0], scratch.rows, scratch.totals,
            scratch.squares, scratch.partials, bad, self._left_out, R, C, plan.groups, plan.rows,
            *self._running, SCALED=self._scaled, SPLIT=plan.parts > 1, BLOCK=plan.block,
            num_warps=plan.num_warps,
        )  # fmt: skip
        partials = scratch.partials[: 2 * groups * C].view(2, M, plan.groups, C).sum(2)
        totals = scratch.totals[:groups].view(M, plan.groups).sum(1)
        squares = scratch.squares[: groups * plan.parts].sum().view(1)
        own = [squares] if self._scaled else []
        if self._cut:
            return torch.cat([partials.view(-1), totals, *own])
        # matrices that are whole: their columns' means now, in a copy until all have been heard of
        self._column, never = self._squares[1].clone(), torch.zeros_like(bad)
        rho = self._factors(self._column, totals, partials, squares, never)
        return torch.cat([rho.sum().view(1), *own])

    def _factors(self, column, totals, partials, squares, flag) -> Tensor:
        """(M·blocks,) parts of ρ²; writes `column`, and `_means`."""
        M, _, C = self._sizes()
        blocks = triton.cdiv(C, whole._COLUMNS)
        self._means = torch.empty(M, dtype=torch.float32, device=column.device)
        parts = torch.empty(M * blocks, dtype=torch.float32, device=column.device)
        whole._adafactor_factors_kernel[(M, blocks)](
            column, totals.contiguous(), squares.contiguous(), partials.contiguous(), self._means,
            parts, self._rms, flag, self._left_out, M, self._shape[-2], C, 1, 1, self._numel,
            *self._running, SCALED=self._scaled and self._cut, GROUPS=whole._PARTIALS,
            BLOCK=whole._COLUMNS, SUMS=whole._SUMS, num_warps=4,
        )  # fmt: skip
        return parts

    def _sizes(self) -> tuple[int, int, int]:
        shape: Any = self._weight.shape
        return math.prod(shape[:-2]), shape[-2], shape[-1]

    def finish(
        self,
        sums: Tensor,  # (n,) float32, of all shards
        found_inf: Tensor,  # () float32: 1 where no step is to be made
        *,
        seed: int = 0,
        first_counter: int = 0,
    ) -> None:
        sums, random = sums.contiguous(), (seed, first_counter)
        held = bool(self._weight.numel())
        with device_of(self._weight):
            if len(self._shape) > 1:
                self._finish(sums, found_inf, random)
            elif held:
                self._vector(sums, 1, found_inf, random, MEASURES=False, UPDATES=True)
        if not held:  # no kernel runs, but steps are counted alike on all processes
            self._left_out.add_(found_inf)

    def _finish(self, sums: Tensor, found_inf: Tensor, random: tuple[int, int]) -> None:
        M, R, C = self._sizes()
        count, rho = 1, sums[:1]
        if self._cut:
            partials, totals, squares = sums[: 2 * C], sums[2 * C : 2 * C + 1], sums[2 * C + 1 :]
            squares = squares if self._scaled else totals
            rho = self._factors(self._squares[1], totals, partials, squares, found_inf)
            count = len(rho)
        else:
            if not M * R:
                return
            good = found_inf == 0
            self._squares[1].copy_(torch.where(good, self._column, self._squares[1]))
            if self._scaled:
                rms = (sums[1] / self._numel).sqrt_()
                self._rms.copy_(torch.where(good, rms, self._rms))
        if not M * R:
            return
        tile = plan_of(M, R, C).tile
        rows = whole._TILES[tile]
        whole._adafactor_update_kernel[(M * triton.cdiv(R, rows),)](
            self._weight, self._grad, self._squares[0], self._squares[1], self._rows, self._means,
            rho, self._rms, found_inf, self._left_out, R, C, count, self._numel, *self._update,
            *random, SCALED=self._scaled, ROWS=rows, BLOCK=tile, SUMS=whole._SUMS,
            num_warps=whole._WARPS,
        )  # fmt: skip
