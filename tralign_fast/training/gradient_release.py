"""Gradients that die young: each is used by its parameter's optimizer step as soon as it is there.

Without it, a step's peak holds every gradient, as many bytes as the weights; with it, the largest
one. What costs memory then is the optimizer's own work on the largest weight (the embedding, the LM
head): `BlockAdafactor` does that work in blocks.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import Adafactor

from tralign_fast.ops.ema import round_stochastically_
from tralign_fast.training.optimizer_kernels import KernelSteps, adafactor_state, kernel_steps
from tralign_fast.training.optimizer_state import restore_dtypes

# Names of `TrainingArguments.optim` whose update of a parameter looks at that parameter alone.
RELEASABLE = (
    "adamw_torch", "adamw_torch_fused", "adafactor", "adamw_8bit", "adamw_bnb_8bit",
    "paged_adamw_8bit",
)  # fmt: skip
# The same by class, for an optimizer that the user made.
_CLASSES = {"AdamW", "Adam", "SGD", "Adafactor", "BlockAdafactor", "AdamW8bit", "Adam8bit"}
# Elements of a block: 64 MB in fp32, three of which live at a time.
_BLOCK = 1 << 24


class GradientRelease(Optimizer):
    """An optimizer whose `step` has happened, parameter by parameter, when the backward ends.

    Everything but `step` is the wrapped optimizer's: groups, state and checkpoints, which therefore
    also go on in a run without gradient release, and the other way round. A tied weight is updated
    once, by the sum of its gradients: autograd completes that before it calls the hook.

    On a GPU AdamW and `BlockAdafactor` step in kernels of this library, a few launches a parameter,
    which round bf16 and fp16 weights (and AdamW's states of such weights) stochastically. Others
    step as they do without release; those that cannot be told of a bad gradient on the device
    (8-bit AdamW, SGD without fused kernels) wait for it once a parameter.

    Args:
        optimizer: AdamW, Adam, SGD or Adafactor of torch, `BlockAdafactor`, transformers' Adafactor
            or bitsandbytes' 8-bit AdamW, over all trained parameters.

    Memory: the largest gradient (two, for a tied weight) instead of all.

    Raises:
        ValueError: an optimizer that is not known to update every parameter on its own.
        RuntimeError: in a backward, a second gradient of a parameter before `step` (accumulation).
    """

    def __init__(self, optimizer: Optimizer) -> None:
        # Optimizer.__init__ is left out: it would make groups and state of its own
        if type(optimizer).__name__ not in _CLASSES:
            raise ValueError(
                f"gradient_release: {type(optimizer).__name__} is not known to update every "
                f"parameter on its own; expected one of {', '.join(sorted(_CLASSES))}"
            )
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        devices = sorted({str(parameter.device) for parameter in parameters})
        if len(devices) > 1:  # each has a thread of the backward: hooks would run at the same time
            raise ValueError(
                f"gradient_release: the model lies on several devices ({', '.join(devices)}); load "
                "it on one, or leave gradient_release out"
            )
        self.optimizer = optimizer
        self._stepped: set[Tensor] = set()
        # () float32 on the device: 1 once a gradient of this backward was NaN or infinite
        self.found_inf = torch.zeros((), device=parameters[0].device if parameters else "cpu")
        self._flags: dict[Tensor, Tensor] = {}  # the same after each parameter
        self._kernels: KernelSteps | None = None
        self._chosen = False  # at the first gradient, for the model may still move
        release = weakref.WeakMethod(self._release)

        def hook(parameter: Tensor) -> None:
            # autograd holds the hook where Python's collector does not look: a strong reference
            # would keep optimizer, states and weights alive for good
            if (own := release()) is not None:
                own(parameter)

        self._handles = [p.register_post_accumulate_grad_hook(hook) for p in parameters]
        weakref.finalize(self, _remove, self._handles)

    def _release(self, parameter: Tensor) -> None:
        if parameter in self._stepped:
            raise RuntimeError(
                "gradient_release: a parameter got a second gradient before the optimizer's step; "
                "one backward a step is possible (and gradient checkpointing with "
                "use_reentrant=False)"
            )
        assert parameter.grad is not None
        self._stepped.add(parameter)
        if not self._chosen:
            self._kernels, self._chosen = kernel_steps(self.optimizer), True
        if self._kernels is not None:
            self._kernels.step(parameter, parameter.grad, self.found_inf)
            parameter.grad = None
            return
        # its largest element, or NaN: a sum of squares might overflow
        largest = torch.linalg.vector_norm(parameter.grad, float("inf"))
        bad = torch.isfinite(largest).logical_not()
        self.found_inf = torch.maximum(self.found_inf, bad.to(self.found_inf))
        if takes_found_inf(self.optimizer):
            self.optimizer.found_inf = self.found_inf  # pyright: ignore[reportAttributeAccessIssue]
            self._flags[parameter] = self.found_inf
        elif not bool(self.found_inf == 0):
            parameter.grad = None
            return
        self.optimizer.step()  # passes over every parameter that has no gradient: all others
        parameter.grad = None

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Nothing is left to do, but to count steps right and to take gradients again."""
        assert closure is None
        self._stepped.clear()
        flags, self._flags = self._flags, {}
        if self._kernels is not None:
            self._kernels.next_step()
        elif isinstance(self.optimizer, BlockAdafactor) and not bool(self.found_inf == 0):
            for parameter, flag in flags.items():
                if bool(flag):
                    self.optimizer.take_back(parameter)
        self.found_inf = torch.zeros_like(self.found_inf)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def remove(self) -> Optimizer:
        """Takes the hooks off, as its end does; returns the wrapped optimizer."""
        _remove(self._handles)
        self._settle()
        return self.optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @property
    def state(self) -> dict[Tensor, Any]:
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:
        return self.optimizer.defaults

    def state_dict(self) -> dict[str, Any]:
        self._settle()
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._settle()
        self.optimizer.load_state_dict(state_dict)
        restore_dtypes(self.optimizer, state_dict)
        self._chosen = False  # the options may be others

    def _settle(self) -> None:
        if self._kernels is not None:
            self._kernels.settle()


def releases(optimizer: Any) -> bool:
    """Whether gradients are released, also inside what accelerate wraps an optimizer in."""
    while optimizer is not None and not isinstance(optimizer, GradientRelease):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer is not None


def takes_found_inf(optimizer: Optimizer) -> bool:
    """Whether an optimizer leaves out a step where its `found_inf`, a tensor on the device, is 1:
    weights and states keep their bits. torch's fused kernels do, for `GradScaler`."""
    if isinstance(optimizer, BlockAdafactor):
        return True
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    return fused and all(group.get("fused") for group in optimizer.param_groups)


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


class BlockAdafactor(Adafactor):
    """`transformers.Adafactor` without a temporary of the size of a weight.

    What runs on a CPU, and what the kernels are compared with. The same update from the same states
    (Shazeer and Stern 2018, arXiv 1804.04235, algorithm 4),
    fp32 inside (fp64 for fp64 weights), block of rows after block of rows, in three passes over the
    gradient:

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
        factored = weight.dim() >= 2
        exact = _exact(weight)
        if not state:
            state.update(adafactor_state(weight))
        skip = None if self.found_inf is None else self.found_inf > 0
        before = {n: v.clone() for n, v in state.items() if isinstance(v, Tensor)}
        state["step"] += 1
        if group["scale_parameter"]:
            state["RMS"] = torch.linalg.vector_norm(weight, dtype=exact) / math.sqrt(weight.numel())
        new = math.pow(state["step"], group["decay_rate"])  # the new gradient's share: 1 - β₂
        lr, eps = self._get_lr(group, state), group["eps"][0]
        if factored:
            # a stack of matrices (experts) is worked on matrix by matrix, factors and all
            w, g = weight.view(-1, *weight.shape[-2:]), grad.reshape(-1, *weight.shape[-2:])
            factors = _factors(g, state, new, eps)
        else:
            w, g = weight.view(1, 1, -1), grad.reshape(1, 1, -1)
            mean_square = state["exp_avg_sq"]
            mean_square.mul_(1 - new).add_(grad.to(exact).square().add_(eps), alpha=new)
            factors = mean_square.new_ones((1, 1)), mean_square.rsqrt()[None]
        total = torch.zeros((), dtype=exact, device=weight.device)
        for index in _blocks(g):
            total += _scaled(g, factors, index).square_().sum()
        rms = total.div_(weight.numel()).sqrt_()
        size = lr / (rms / group["clip_threshold"]).clamp_(min=1.0)
        keep = 1 - group["weight_decay"] * lr
        if skip is not None:
            keep = torch.where(skip, 1.0, torch.as_tensor(keep, device=weight.device))
            state.update({name: torch.where(skip, v, state[name]) for name, v in before.items()})
        for index in _blocks(g):
            moved = w[index].to(exact)
            if group["weight_decay"]:
                moved.mul_(keep)
            step = _scaled(g, factors, index).mul_(size)
            moved.sub_(step if skip is None else step.masked_fill_(skip, 0.0))
            if weight.dtype in (torch.bfloat16, torch.float16):
                noise = torch.empty_like(moved, dtype=torch.int32).random_(1 << 16)
                # at the largest finite number bad luck would be infinity
                noise.masked_fill_(moved.abs() >= torch.finfo(weight.dtype).max, 0)
                round_stochastically_(moved, weight.dtype, noise)
            if weight.dtype != exact:  # else `moved` is the weight itself
                w[index].copy_(moved)


def _exact(weight: Tensor) -> torch.dtype:
    """The dtype of states and arithmetic."""
    return torch.promote_types(weight.dtype, torch.float32)


def _factors(grad: Tensor, state: dict, new: float, eps: float) -> tuple[Tensor, Tensor]:
    """Updates the running means; returns `1/sqrt(R/mean(R))` (L, R) and `1/sqrt(C)` (L, C)."""
    matrices, rows, columns = grad.shape
    row = state["exp_avg_sq_row"].mul_(1 - new).view(matrices, rows)
    column = state["exp_avg_sq_col"].mul_(1 - new).view(matrices, columns)
    for matrix, part in _blocks(grad):
        square = grad[matrix, part].to(row.dtype).square().add_(eps)
        row[matrix, part] += square.mean(1).mul_(new)
        column[matrix] += square.sum(0).mul_(new / rows)
    return (row / row.mean(1, keepdim=True)).rsqrt_(), column.rsqrt()


def _scaled(grad: Tensor, factors: tuple[Tensor, Tensor], index: tuple[int, slice]) -> Tensor:
    """A block of U, in the dtype of the factors."""
    matrix, part = index
    row, column = factors
    return (row[matrix, part, None] * column[matrix]).mul_(grad[matrix, part])


def _blocks(stack: Tensor) -> Iterator[tuple[int, slice]]:
    """(matrix, rows) over an (L, R, C) stack, about `_BLOCK` elements at a time."""
    matrices, rows, columns = stack.shape
    step = max(1, _BLOCK // columns)
    parts = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
    return ((matrix, part) for matrix in range(matrices) for part in parts)


class ReleaseOptions(Protocol):
    """What decides whether gradients can be released."""

    max_grad_norm: float
    gradient_accumulation_steps: int
    token_budget: int | None
    fp16: bool
    optim: Any

    @property
    def world_size(self) -> int: ...


def check_releasable(args: ReleaseOptions) -> None:
    """What gradient release excludes.

    Raises:
        ValueError: naming the option and what to set.
    """
    if args.max_grad_norm:
        raise ValueError(
            f"gradient_release=True: max_grad_norm={args.max_grad_norm} needs every gradient at "
            "once; set max_grad_norm=0 (Adafactor clips each parameter's update by itself)"
        )
    if args.gradient_accumulation_steps != 1:
        raise ValueError(
            "gradient_release=True: a gradient is used up by its one backward; expected "
            f"gradient_accumulation_steps=1, got {args.gradient_accumulation_steps} (a packed row "
            "may hold more pairs: raise per_device_train_batch_size)"
        )
    if args.token_budget is not None:
        raise ValueError(
            "gradient_release=True: token_budget splits a batch into several backward passes; "
            "leave it out and lower per_device_train_batch_size"
        )
    if args.fp16:
        raise ValueError("gradient_release=True: fp16 scales its gradients afterwards; use bf16")
    if args.world_size > 1:
        raise ValueError(
            f"gradient_release=True runs in one process, this run has {args.world_size}: gradients "
            "of several are averaged after the backward"
        )
    if args.optim not in RELEASABLE:
        raise ValueError(
            f"gradient_release=True: expected optim to be one of {', '.join(RELEASABLE)}, got "
            f"{getattr(args.optim, 'value', args.optim)!r}"
        )
