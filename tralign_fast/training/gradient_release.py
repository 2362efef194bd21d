"""Gradients that die young: each is used by its parameter's optimizer step as soon as it is there.

Without it, a step's peak holds every gradient, as many bytes as the weights; with it, the largest
one. What costs memory then is the optimizer's own work on the largest weight (the embedding, the LM
head): `BlockAdafactor` does that work in blocks.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from tralign_fast.distributed.optimizer_state import restore_dtypes
from tralign_fast.training.block_adafactor import BlockAdafactor
from tralign_fast.training.optimizer_kernels import KernelSteps, kernel_steps

# Names of `TrainingArguments.optim` whose update of a parameter looks at that parameter alone.
RELEASABLE = (
    "adamw_torch", "adamw_torch_fused", "adafactor", "adamw_8bit", "adamw_bnb_8bit",
    "paged_adamw_8bit",
)  # fmt: skip
# The same by class, for an optimizer that the user made.
_CLASSES = {"AdamW", "Adam", "SGD", "Adafactor", "BlockAdafactor", "AdamW8bit", "Adam8bit"}


class GradientRelease(Optimizer):
    """An optimizer whose `step` has happened, parameter by parameter, when the backward ends.

    Everything but `step` is the wrapped optimizer's: groups, state and checkpoints, which therefore
    also go on in a run without gradient release, and the other way round. A tied weight is updated
    once, by the sum of its gradients: autograd completes that before it calls the hook.

    From the first gradient that is NaN or infinite on, no parameter of a backward is updated. Those
    before it, nearer to the loss, have been, each by a finite gradient: they cannot be taken back
    without a copy. A loss that is not finite spoils the first gradient already.

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
        device = parameters[0].device if parameters else "cpu"
        self.found_inf = torch.zeros((), dtype=torch.float32, device=device)
        self._flags: dict[Tensor, Tensor] = {}  # the same after each parameter
        self._kernels: KernelSteps | None = None
        self._chosen = False  # at the first gradient, for the model may still move
        self._groups: dict[Tensor, dict[str, Any]] = {}  # of the parameters, while a step is made
        self._handles: list[RemovableHandle] = []
        self._hook(parameters)
        weakref.finalize(self, _remove, self._handles)

    def _hook(self, parameters: list[Tensor]) -> None:
        release = weakref.WeakMethod(self._release)

        def hook(parameter: Tensor) -> None:
            # autograd holds the hook where Python's collector does not look: a strong reference
            # would keep optimizer, states and weights alive for good
            if (own := release()) is not None:
                own(parameter)

        self._handles += [p.register_post_accumulate_grad_hook(hook) for p in parameters]

    def attach(self, model: nn.Module) -> None:
        """Before a training, when the model is as it will be trained."""

    def _count(self, parameter: Tensor) -> None:
        if parameter in self._stepped:
            raise RuntimeError(
                "gradient_release: a parameter got a second gradient before the optimizer's step; "
                "one backward a step is possible (and gradient checkpointing with "
                "use_reentrant=False)"
            )
        self._stepped.add(parameter)
        if not self._chosen:
            self._kernels, self._chosen = kernel_steps(self.optimizer), True

    def _release(self, parameter: Tensor) -> None:
        self._count(parameter)
        assert parameter.grad is not None
        if self._kernels is not None:
            self._kernels.step(parameter, parameter.grad, self.found_inf)
            parameter.grad = None
            return
        # its largest element, or NaN: a sum of squares might overflow
        largest = torch.linalg.vector_norm(parameter.grad, float("inf"))
        bad = torch.isfinite(largest).logical_not()
        self.found_inf = torch.maximum(self.found_inf, bad.to(self.found_inf))
        self._step_alone(parameter)

    def _step_alone(self, parameter: Tensor) -> None:
        """PyTorch's own step, unless a gradient was bad."""
        if takes_found_inf(self.optimizer):
            self.optimizer.found_inf = self.found_inf  # pyright: ignore[reportAttributeAccessIssue]
            self._flags[parameter] = self.found_inf
        elif not bool(self.found_inf == 0):
            parameter.grad = None
            return
        with self._alone(parameter):
            self.optimizer.step()
        parameter.grad = None

    @contextlib.contextmanager
    def _alone(self, parameter: Tensor) -> Iterator[None]:
        """Inside, the optimizer has this parameter only: passing over all others, which have no
        gradient, for each of them takes a square of their number.

        bitsandbytes' optimizers know parameters by their place in all groups, and pass over them.
        """
        own = self.optimizer
        if not type(own).__module__.startswith(("torch.optim.", __name__)):
            yield
            return
        groups, group = own.param_groups, self._options_of(parameter)
        own.param_groups = [] if group is None else [{**group, "params": [parameter]}]
        try:
            yield
        finally:
            own.param_groups = groups

    def _options_of(self, parameter: Tensor) -> dict[str, Any] | None:
        """A parameter's group; None: somebody took it out, and it is not trained."""
        if not self._groups:
            groups = self.optimizer.param_groups
            self._groups = {p: group for group in groups for p in group["params"]}
        return self._groups.get(parameter)  # schedulers write the values of now into the group

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Nothing is left to do, but to count steps right and to take gradients again. Gradients
        that no backward has made are there where states are made for a checkpoint to be read."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._release(parameter)
        self._stepped.clear()
        self._groups.clear()  # somebody may replace them between two steps
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


class ReleaseOptions(Protocol):
    """What decides whether gradients can be released."""

    max_grad_norm: float
    gradient_accumulation_steps: int
    token_budget: int | None
    fp16: bool
    optim: Any


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
    if args.optim not in RELEASABLE:
        raise ValueError(
            f"gradient_release=True: expected optim to be one of {', '.join(RELEASABLE)}, got "
            f"{getattr(args.optim, 'value', args.optim)!r}"
        )
