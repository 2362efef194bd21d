"""Adafactor whose work on a parameter is done in blocks, and in two halves for those in shards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Adafactor

from tralign_fast.distributed.optimizer_state import restore_dtypes
from tralign_fast.ops.ema import local_shard, round_stochastically_
from tralign_fast.training.optimizer_kernels import adafactor_state

# Elements of a block: 64 MB in fp32, three of which live at a time.
_BLOCK = 1 << 24


class BlockAdafactor(Adafactor):
    """`transformers.Adafactor` without a temporary of the size of a weight.

    On a CPU, and as the reference of the kernels. The same update from the same states (Shazeer and
    Stern 2018, arXiv 1804.04235, algorithm 4), fp32 inside (fp64 for fp64 weights), block of rows
    after block of rows, in two passes over the gradient:

        R, C ← means of G² + ε over columns and rows, averaged over steps
        U = G / sqrt(R Cᵀ / mean(R)),   ρ = RMS(U)
        W ← W - lr·U / max(1, ρ/d)

    bf16 and fp16 weights are rounded stochastically: at lr 1e-6 an update is 1e-4 of the spacing
    that bf16 has around 0.02, and nearest rounding (transformers') would drop every single one.
    The random bits are the device's default generator's.

    Memory: 128 MB beside state and gradient; transformers' holds four fp32 copies of the weight
    (8 GiB for the LM head of Llama-3-8B). torch's Adafactor needs one copy in the weight's dtype,
    but keeps bf16 statistics for bf16 weights, and its default ε (bf16's own, 8e-3, squared) hides
    the second moments of all gradients below 8e-3.

    With `found_inf`, a () float32 tensor of 1 on the device, a step changes neither weights nor
    statistics, but for the number of steps on the host, which `take_back` corrects.

    Raises:
        ValueError: `beta1` is set: it would keep a first moment of the size of the weights.
    """

    def __init__(self, params: Any, **options: Any) -> None:
        if options.get("beta1") is not None:
            raise ValueError("BlockAdafactor keeps no first moment: expected beta1=None")
        super().__init__(params, **options)
        self.found_inf: Tensor | None = None

    def take_back(self, parameter: Tensor) -> None:
        """Corrects the number of steps after one with `found_inf`."""
        state = self.state[parameter]
        state["step"] -= 1
        if state["step"] == 0:
            del self.state[parameter]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        restore_dtypes(self, state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, self.state[parameter], group)

    def _update(self, weight: Tensor, grad: Tensor, state: dict, group: dict) -> None:
        if not state:
            state.update(adafactor_state(weight))
        step = AdafactorStep(weight, grad, state, group, self._get_lr)
        step.finish(step.sums, None if self.found_inf is None else self.found_inf > 0)


class AdafactorStep:
    """A step of `BlockAdafactor` on one parameter, in two halves: what the second one has to know
    of the whole parameter are the `sums` of the first one.

    Where the parameter is a shard of several processes', `sums` are to be added up over them: of a
    matrix that is cut by rows 2·C + 1 numbers, of other shards one (and one more for RMS(W)).

    Args:
        weight, grad: the parameter, or this process's shard of it (cut along the first dimension).
        state: of the parameter; its tensors, shards too, are written by `finish`.
        rate: transformers' `_get_lr`.
        whole: the shape of the parameter that this is a shard of.
    """

    sums: Tensor  # (n,)

    def __init__(
        self,
        weight: Tensor,
        grad: Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        rate: Callable[[dict, dict], Any],
        whole: torch.Size | None = None,
    ) -> None:
        shape = weight.shape if whole is None else whole
        self._weight, self._state, self._group, self._rate = weight, state, group, rate
        self._exact, self._numel = _exact(weight), shape.numel()
        state["step"] += 1
        self._new = math.pow(state["step"], group["decay_rate"])  # the new gradient's share: 1 - β₂
        # a stack of matrices (experts) is worked on matrix by matrix, factors and all
        sizes = (1, 1, weight.numel()) if weight.dim() < 2 else weight.shape
        stack = (math.prod(sizes[:-2]), *sizes[-2:])
        self._w, self._g = weight.view(stack), grad.reshape(stack)
        self._columns = 0  # whose sums are to come from other shards
        if weight.dim() < 2:
            total = self._measure_vector()
        else:
            self._row, squares, ratios = self._measure()
            self._rows = shape[-2]
            if whole is not None and weight.dim() == 2:
                self._columns = stack[-1]
                total = torch.cat([squares[0], ratios[0], self._row.sum(1)])
            else:
                total = self._factors(squares, ratios, self._row.sum(1))
        own = [total.view(-1)]
        if group["scale_parameter"]:
            norm = torch.linalg.vector_norm(weight, dtype=self._exact)
            own.append(norm.square().view(1))
        self.sums = torch.cat(own)

    def _old(self, name: str) -> Tensor:
        return local_shard(self._state[name])

    def _measure_vector(self) -> Tensor:
        """() sum of U²; `_square` becomes the mean of G²."""
        square = self._g[0, 0].to(self._exact).square()
        mean = self._old("exp_avg_sq") * (1 - self._new)
        self._square = mean.add_(square + self._group["eps"][0], alpha=self._new)
        return (square / self._square).sum()

    def _measure(self) -> tuple[Tensor, Tensor, Tensor]:
        """R (L, R) after the step; sums (L, C) by column of G² and of G²/R."""
        matrices, rows, columns = self._g.shape
        row = self._old("exp_avg_sq_row").view(matrices, rows) * (1 - self._new)
        squares = row.new_zeros(matrices, columns)
        ratios = row.new_zeros(matrices, columns)
        for matrix, part in _blocks(self._g):
            square = self._g[matrix, part].to(row.dtype).square()
            row[matrix, part] += square.mean(1).add_(self._group["eps"][0]).mul_(self._new)
            squares[matrix] += square.sum(0)
            ratios[matrix] += square.div_(row[matrix, part, None]).sum(0)
        return row, squares, ratios

    def _factors(self, squares: Tensor, ratios: Tensor, totals: Tensor) -> Tensor:
        """() sum of U², whose factors 1/sqrt(R/mean(R)) (L, R) and 1/sqrt(C) (L, C) are kept, from
        sums over all rows."""
        old = self._old("exp_avg_sq_col").view(squares.shape) * (1 - self._new)
        means = totals / self._rows
        self._column = old + (squares / self._rows + self._group["eps"][0]) * self._new
        self._scales = (self._row / means[:, None]).rsqrt_(), self._column.rsqrt()
        return ((ratios / self._column).sum(1) * means).sum()

    @torch.no_grad()
    def finish(
        self,
        sums: Tensor,  # (n,) of all shards
        skip: Tensor | None,  # () bool: change nothing
        generator: torch.Generator | None = None,
    ) -> None:
        """Writes weight and state. `generator`: of the random bits; None: the device's default."""
        group, state = self._group, self._state
        if group["scale_parameter"]:
            sums, square = sums[:-1], sums[-1]
            self._keep("RMS", (square / self._numel).sqrt_(), skip)
        if self._columns:
            squares, ratios, totals = sums.split([self._columns, self._columns, 1])
            sums = self._factors(squares[None], ratios[None], totals)
        if self._weight.dim() < 2:
            self._scales = self._square.new_ones((1, 1)), self._square.rsqrt()[None]
            self._keep("exp_avg_sq", self._square, skip)
        else:
            self._keep("exp_avg_sq_row", self._row, skip)
            self._keep("exp_avg_sq_col", self._column, skip)
        rms = sums.view(()).div(self._numel).sqrt_()
        lr = self._rate(group, state)
        size = lr / (rms / group["clip_threshold"]).clamp_(min=1.0)
        keep: Any = 1 - group["weight_decay"] * lr
        if skip is not None:
            keep = torch.where(skip, 1.0, torch.as_tensor(keep, device=rms.device))
        for index in _blocks(self._g):
            self._move(index, size, keep, skip, generator)

    def _move(self, index, size, keep, skip, generator) -> None:
        weight, w = self._weight, self._w
        moved = w[index].to(self._exact)
        if self._group["weight_decay"]:
            moved.mul_(keep)
        step = _scaled(self._g, self._scales, index).mul_(size)
        moved.sub_(step if skip is None else step.masked_fill_(skip, 0.0))
        if weight.dtype in (torch.bfloat16, torch.float16):
            noise = torch.empty_like(moved, dtype=torch.int32)
            noise.random_(1 << 16, generator=generator)
            # at the largest finite number bad luck would be infinity
            noise.masked_fill_(moved.abs() >= torch.finfo(weight.dtype).max, 0)
            round_stochastically_(moved, weight.dtype, noise)
        if weight.dtype != self._exact:  # else `moved` is the weight itself
            w[index].copy_(moved)

    def _keep(self, name: str, value: Tensor, skip: Tensor | None) -> None:
        if not isinstance(self._state[name], Tensor):  # RMS before the first step
            self._state[name] = value
            return
        old = self._old(name)
        value = value.view(old.shape)
        old.copy_(value if skip is None else torch.where(skip, old, value))


def _exact(weight: Tensor) -> torch.dtype:
    """The dtype of states and arithmetic."""
    return torch.promote_types(weight.dtype, torch.float32)


def _scaled(grad: Tensor, factors: tuple[Tensor, Tensor], index: tuple[int, slice]) -> Tensor:
    """A block of U, in the dtype of the factors."""
    matrix, part = index
    row, column = factors
    return (row[matrix, part, None] * column[matrix]).mul_(grad[matrix, part])


def _blocks(stack: Tensor) -> Iterator[tuple[int, slice]]:
    """(matrix, rows) over an (L, R, C) stack, about `_BLOCK` elements at a time."""
    matrices, rows, columns = stack.shape
    step = max(1, _BLOCK // max(1, columns))
    parts = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
    return ((matrix, part) for matrix in range(matrices) for part in parts)
