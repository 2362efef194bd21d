"""The steps of released gradients on a GPU: one to three launches a parameter, no wait.

AdamW and `BlockAdafactor` have kernels (`tralign_kernels.adamw`, `.adafactor`). Their states are
those of the PyTorch paths, so that checkpoints of each load in the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tralign_fast.ops.backend import is_pretending, kernel, pick_backend, warn_once
from tralign_fast.ops.ema import local_shard
from tralign_fast.reference.sharding import process_index

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What the kernels do not do, by class.
_LACKING = {
    "AdamW": ("amsgrad", "maximize", "differentiable"),
    "BlockAdafactor": ("relative_step",),
}
_STRIDE = 4  # fp32 numbers from one count to the next: 16 bytes, so that all are aligned alike


def kernel_steps(optimizer: Optimizer) -> KernelSteps | None:
    """The kernels' way to step, or None where there is none: on a CPU, for other optimizers, and,
    with one warning, for options and weights that the kernels do not take."""
    name = type(optimizer).__name__
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if name not in _LACKING or not parameters:
        return None
    if pick_backend("auto", parameters[0].device) != "triton":
        return None
    why = _what_is_lacking(optimizer, parameters)
    if why is not None:
        warn_once(f"gradient_release: {name}'s kernel takes no {why}; PyTorch's own step runs")
        return None
    return KernelSteps(optimizer)


def _what_is_lacking(optimizer: Optimizer, parameters: list[Tensor]) -> str | None:
    for group in optimizer.param_groups:
        for option in _LACKING[type(optimizer).__name__]:
            if group.get(option):
                return f"{option}=True"
        if isinstance(group["lr"], Tensor):
            return "tensor as lr"
    for parameter in parameters:
        if parameter.dtype not in _DTYPES:
            return f"weights in {parameter.dtype}".replace("torch.", "")
        if not local_shard(parameter).is_contiguous():
            return "strided weights"
    return None


def adafactor_state(weight: Tensor) -> dict[str, Any]:
    """transformers' Adafactor's state of a weight before its first step."""
    like = {
        "dtype": torch.promote_types(weight.dtype, torch.float32),
        "device": weight.device,
    }
    if weight.dim() < 2:
        return {"step": 0, "RMS": 0, "exp_avg_sq": torch.zeros(weight.shape, **like)}
    columns = (*weight.shape[:-2], weight.shape[-1])
    return {
        "step": 0,
        "RMS": 0,
        "exp_avg_sq_row": torch.zeros(weight.shape[:-1], **like),
        "exp_avg_sq_col": torch.zeros(columns, **like),
    }


class KernelSteps:
    """Steps of AdamW or BlockAdafactor, parameter by parameter.

    A step is left out where `found_inf` is 1 on the device, and sets it where its gradient is not
    finite. AdamW's number of steps lies on the device, as with `fused=True`; Adafactor's is the
    host's, and the device counts by how much it is too large until `settle`.

    bf16 and fp16 weights (of AdamW also such states) are rounded stochastically, with bits that
    follow from one number of torch's default generator a step, the parameter's place and the
    element's, and on shards from the process's number.

    Shards of FSDP2 step alike, but for Adafactor's, whose step has two halves (`begin_adafactor`).
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.is_adamw = type(optimizer).__name__ == "AdamW"
        self._seed: int | None = None
        groups = [(i, p) for i, g in enumerate(optimizer.param_groups) for p in g["params"]]
        # by number: loading a state makes new groups
        self._groups = {parameter: index for index, parameter in groups}
        needed = [(3 if self.is_adamw else 1) * _counters_of(p) for _, p in groups]
        starts = itertools.accumulate(needed, initial=0)
        self._counters = {p: start for (_, p), start in zip(groups, starts, strict=False)}
        device = groups[0][1].device
        self._counts = torch.zeros(len(groups), _STRIDE, dtype=torch.float32, device=device)
        ones = self._counts[:, :1].unbind()
        self._left_out = {p: one for (_, p), one in zip(groups, ones, strict=True)}

    def step(self, parameter: Tensor, grad: Tensor, found_inf: Tensor) -> None:
        group = self.optimizer.param_groups[self._groups[parameter]]
        state = self.optimizer.state[parameter]
        weight, grad = local_shard(parameter), local_shard(grad).contiguous()
        if self.is_adamw:
            self._step_adamw(parameter, weight, grad, state, group, found_inf)
        else:
            self._step_adafactor(parameter, weight, grad, state, group, found_inf)
        torch.autograd.graph.increment_version(parameter)  # a kernel's writes are not seen

    def begin_adafactor(
        self, parameter: Tensor, grad: Tensor, bad: Tensor
    ) -> tuple[Tensor, Callable[[Tensor, Tensor], None]]:
        """The first half of a step on a shard: what is to be added up over all shards, and the
        second half, which gets the sums and `found_inf`. `bad` is as `AdafactorShard` takes it."""
        group = self.optimizer.param_groups[self._groups[parameter]]
        state = self.optimizer.state[parameter]
        weight, grad = local_shard(parameter), local_shard(grad).contiguous()
        squares, rms, options = self._prepare_adafactor(weight, state, group)
        if is_pretending():
            return bad.view(1), lambda sums, found_inf: None
        left_out = self._left_out[parameter]
        shard = kernel("AdafactorShard")(
            weight, grad, parameter.shape, squares, bad, left_out, rms, options
        )

        def finish(sums: Tensor, found_inf: Tensor) -> None:
            shard.finish(sums, found_inf, **self._random(parameter, weight))
            torch.autograd.graph.increment_version(parameter)

        return shard.sums, finish

    def next_step(self) -> None:
        """Other random bits from here on."""
        self._seed = None

    def settle(self) -> None:
        """Corrects Adafactor's numbers of steps by those that were left out: waits for the device.
        Where there was no other step, the state goes, as if there had been none."""
        if self.is_adamw or is_pretending():
            return
        counts = self._counts[:, 0].tolist()
        for parameter, count in zip(self._groups, counts, strict=True):
            state = self.optimizer.state.get(parameter)
            if count and state:
                state["step"] -= int(count)
                if state["step"] == 0:
                    del self.optimizer.state[parameter]
        self._counts.zero_()

    def _step_adamw(self, parameter, weight, grad, state, group, found_inf) -> None:
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter.detach())
        if state["step"].device != weight.device or state["step"].dtype != torch.float32:
            state["step"] = state["step"].to(weight.device, torch.float32)
        if is_pretending():
            return
        from tralign_kernels import AdamWOptions

        beta1, beta2 = (float(beta) for beta in group["betas"])
        own = AdamWOptions(group["lr"], (beta1, beta2), group["eps"], group["weight_decay"])
        states = *map(local_shard, (state["exp_avg"], state["exp_avg_sq"])), state["step"]
        random = self._random(parameter, weight, states[0])
        kernel("adamw_step_")(weight, grad, *states, found_inf, own, **random)

    def _step_adafactor(self, parameter, weight, grad, state, group, found_inf) -> None:
        if not state:
            state.update(adafactor_state(weight))
        squares, rms, options = self._prepare_adafactor(weight, state, group)
        if is_pretending():
            return
        random = self._random(parameter, weight)
        left_out = self._left_out[parameter]
        kernel("adafactor_step_")(
            weight, grad, squares, found_inf, left_out, rms, options, **random
        )

    def _prepare_adafactor(self, weight, state, group) -> tuple[Any, Any, Any]:
        """Counts the step; squares, RMS(W) and options as the kernels take them."""
        state["step"] += 1
        scale, rms = group["scale_parameter"], None
        if scale:
            if not isinstance(state["RMS"], Tensor):
                state["RMS"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            rms = state["RMS"]
        names = ("exp_avg_sq_row", "exp_avg_sq_col") if weight.dim() >= 2 else ("exp_avg_sq",)
        squares = tuple(local_shard(state[name]) for name in names)
        if is_pretending():
            return squares, rms, None
        from tralign_kernels import AdafactorOptions

        eps, eps_of_scale = group["eps"]
        options = AdafactorOptions(
            group["lr"], state["step"], group["decay_rate"], eps, eps_of_scale,
            group["clip_threshold"], group["weight_decay"], scale,
        )  # fmt: skip
        return squares, rms, options

    def _random(self, parameter: Tensor, *written: Tensor) -> dict[str, int]:
        if all(tensor.dtype == torch.float32 for tensor in written):
            return {}
        if self._seed is None:
            self._seed = int(torch.randint(0, 2**31 - 1, ()).item())
        own = process_index() if hasattr(parameter, "to_local") else 0
        return {"seed": self._seed + own, "first_counter": self._counters[parameter]}


def _counters_of(weight: Tensor) -> int:
    return 0 if is_pretending() else kernel("counters_of")(local_shard(weight))
