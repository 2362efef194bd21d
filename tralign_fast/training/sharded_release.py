"""Gradient release on FSDP2's shards: a layer's step right after its gradients are reduced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tralign_fast.distributed.shards import ShardGroup, shard_groups, shard_of
from tralign_fast.ops.ema import local_shard
from tralign_fast.reference.sharding import process_index
from tralign_fast.training.block_adafactor import AdafactorStep, BlockAdafactor
from tralign_fast.training.gradient_release import GradientRelease
from tralign_fast.training.optimizer_kernels import adafactor_state

# Optimizers whose step on a shard is that of the whole parameter there, and `BlockAdafactor`.
_ELEMENTWISE = ("AdamW", "Adam", "SGD")
_Halves = tuple[Tensor, Callable[[Tensor, Tensor], None]]


class ShardedRelease(GradientRelease):
    """`GradientRelease` of parameters that FSDP2 shards.

    FSDP2 runs the hooks of a sharded parameter when the parameter's gradient has been reduced, in
    the stream that reduces it: what a hook launches comes after the reduction, without a wait of
    the host, and FSDP2 lets the stream of the forward wait for all of it when the backward ends.
    The steps of a group (a layer) are made at its last hook: until then its shards of gradients,
    1/P of a layer's, are kept.

    Traffic: one all-reduce a group. Of AdamW it is one number, whether a gradient of any process
    was NaN or infinite; of Adafactor also, for every matrix (R, C) that is cut by rows, 2·C + 1
    numbers (its columns' sums, and one sum over rows), and one for other parameters.

    Raises:
        ValueError: an optimizer whose step on shards would be another one.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        name = type(optimizer).__name__
        if name not in (*_ELEMENTWISE, "BlockAdafactor"):
            raise ValueError(
                f"gradient_release: {name} has no step on FSDP2's shards; expected one of "
                f"{', '.join((*_ELEMENTWISE, 'BlockAdafactor'))}"
            )
        super().__init__(optimizer)
        self._group_of: dict[Tensor, ShardGroup] = {}
        self._open: ShardGroup | None = None
        self._seed: int | None = None

    def _hook(self, parameters: list[Tensor]) -> None:
        """None yet: FSDP2 will put other parameters in their place."""

    def attach(self, model: nn.Module) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        groups = shard_groups(model)
        self._group_of = {p: group for group in groups for p in group.parameters}
        self._open, self._chosen = None, False
        own = [p for group in self.param_groups for p in group["params"] if p in self._group_of]
        self.found_inf = torch.zeros((), dtype=torch.float32, device=own[0].device)
        super()._hook(own)

    def _release(self, parameter: Tensor) -> None:
        self._count(parameter)
        group = self._group_of.get(parameter)
        if group is None:  # states are made for a checkpoint that will be read
            self._step_group(ShardGroup([parameter], None, parameter.device, [parameter]))
            return
        if self._open is not group:
            self._close()  # a group of which a parameter has no gradient
        self._open = group
        group.arrived.append(parameter)
        if len(group.arrived) == len(group.parameters):
            self._close()

    def _close(self) -> None:
        group, self._open = self._open, None
        if group is not None:
            self._step_group(group)

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        self._close()
        super().step(closure)
        self._seed = None

    @torch.no_grad()
    def _step_group(self, group: ShardGroup) -> None:
        parameters, group.arrived = group.arrived, []
        grads = [local_shard(p.grad) for p in parameters]  # pyright: ignore[reportArgumentType]
        bad = _not_finite(grads)
        if isinstance(self.optimizer, BlockAdafactor):
            begin = self._begin if self._kernels is None else self._begin_kernel
            steps = [begin(p, g, bad) for p, g in zip(parameters, grads, strict=True)]
            (bad, *sums) = group.add_up([bad.view(1), *[own for own, _ in steps]])
            self._note(bad)
            for (_, finish), own in zip(steps, sums, strict=True):
                finish(own, self.found_inf)
        else:
            self._note(group.add_up([bad.view(1)])[0])
            for parameter, grad in zip(parameters, grads, strict=True):
                if self._kernels is None:
                    self._step_alone(parameter)
                else:
                    self._kernels.step(parameter, grad, self.found_inf)
        for parameter in parameters:
            parameter.grad = None

    def _note(self, bad: Tensor) -> None:
        found = self.found_inf.to(bad.device)  # where states are made it is still on the host
        self.found_inf = torch.maximum(found, (bad.view(()) > 0).to(found))

    def _begin(self, parameter: Any, grad: Tensor, bad: Tensor) -> _Halves:
        """The sums of a step's first half, and its second half."""
        group = self._options_of(parameter)
        assert group is not None
        step = AdafactorStep(
            local_shard(parameter), grad, self._state_of(parameter), group,
            BlockAdafactor._get_lr, parameter.shape,
        )  # fmt: skip

        def finish(sums: Tensor, found_inf: Tensor) -> None:
            step.finish(sums, found_inf > 0, self._generator(parameter.device))
            self._flags[parameter] = found_inf

        return step.sums, finish

    def _begin_kernel(self, parameter: Any, grad: Tensor, bad: Tensor) -> _Halves:
        assert self._kernels is not None
        self._state_of(parameter)
        return self._kernels.begin_adafactor(parameter, grad, bad)

    def _state_of(self, parameter: Any) -> dict[str, Any]:
        state = self.optimizer.state[parameter]
        if not state:
            state.update(_sharded_state(adafactor_state(local_shard(parameter)), parameter))
        return state

    def _generator(self, device: torch.device) -> torch.Generator:
        """Of a step's random bits, other ones on every process. The default generator moves on by
        one number whatever the shards' sizes, so that all processes keep drawing alike from it."""
        if self._seed is None:
            self._seed = int(torch.randint(0, 2**31 - 1, ()).item())
            self._bits = torch.Generator(device).manual_seed(self._seed + process_index())
        return self._bits


def _not_finite(grads: list[Tensor]) -> Tensor:
    """() float32: 1 if any is NaN or infinite. A process may have no element of a parameter."""
    held = [grad for grad in grads if grad.numel()]
    if not held:
        return torch.zeros((), dtype=torch.float32, device=grads[0].device)
    largest = torch.stack(torch._foreach_norm(held, float("inf")))
    return torch.isfinite(largest).all().logical_not().float()


def _sharded_state(state: dict[str, Any], parameter: Any) -> dict[str, Any]:
    """Statistics of this process's rows as shards; those of columns are the same on all, but for
    a stack of matrices, which is cut matrix by matrix."""
    shape = parameter.shape
    whole = {"exp_avg_sq": shape, "exp_avg_sq_row": shape[:-1]}
    if len(shape) > 2:
        whole["exp_avg_sq_col"] = shape[:-2] + shape[-1:]
    return {
        name: shard_of(value, parameter, whole[name]) if name in whole else value
        for name, value in state.items()
    }
