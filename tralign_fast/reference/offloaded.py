"""Reference weights on the host; on the device only while they score a window."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tralign_fast.model.patching import unwrapped
from tralign_fast.ops.ema import ema_update_, is_quantised, local_shard
from tralign_fast.reference.base import (
    ReferenceOptions,
    ReferencePolicy,
    load_generator,
    save_generator,
)
from tralign_fast.reference.lora import mixed_parameters
from tralign_fast.reference.second import check_alike
from tralign_fast.reference.sharding import named_parameters, shard_like
from tralign_fast.reference.trust_region import TrustRegion
from tralign_fast.reference.window import WindowedReference


class OffloadedReference(WindowedReference):
    """Weights: one set on the host (pinned beside a GPU), none on the device. Exact for every
    schedule; made for soft updates with τ > 1.

    For a sweep the policy's weights and the reference's change places tensor by tensor, so that the
    device holds one extra tensor at a time.

    Args:
        start: the first reference, a model like the policy; None: the policy as it is.
        rounding, seed: as in `ema_update_`, for weights in bf16 or fp16.

    Raises:
        ValueError: soft updates of a PEFT adapter (`mixed_parameters`).
    """

    name = "offloaded"
    can_be_sharded = frozenset({"FSDP2", "tensor parallelism"})

    def __init__(
        self,
        policy: nn.Module,
        schedule: TrustRegion,
        start: nn.Module | None = None,
        *,
        rounding: str = "stochastic",
        seed: int = 0,
    ) -> None:
        super().__init__(policy, schedule)
        self.rounding = rounding
        self._generator = torch.Generator().manual_seed(seed)
        # another model's frozen weights may differ too
        source = self.mixed_parameters() if start is None else named_parameters(start)
        if start is not None:
            check_alike(source, named_parameters(policy))
        if name := next((name for name, p in source.items() if is_quantised(p)), None):
            raise ValueError(
                f"reference={self.name!r}: {name} of ref_model is quantised, and cannot change "
                'places with the policy\'s: use reference="resident", or leave ref_model out'
            )
        self._host: dict[str, Tensor] = {name: _host_copy(p) for name, p in source.items()}
        self._inside = False
        self._view: Any = None  # of `as_model`

    @classmethod
    def build(
        cls, policy: nn.Module, start: nn.Module | None, args: ReferenceOptions
    ) -> ReferencePolicy:
        rounding = {"rounding": args.ema_rounding, "seed": args.seed}
        return cls(policy, args.trust_region, start, **rounding)

    @classmethod
    def starts_from_policy(cls, lora: bool) -> bool:
        return lora  # another model has no adapter whose weights could come and go

    def mixed_parameters(self) -> dict[str, Tensor]:
        """What moves tensor by tensor, by name."""
        return mixed_parameters(self.policy, self.schedule, self.name)

    def as_model(self) -> Any:
        """A model on the host whose parameters are the reference's own tensors; none where a PEFT
        adapter is trained, or weights are sharded."""
        policy: Any = unwrapped(self.policy)
        sharded = any(hasattr(p, "to_local") for p in policy.parameters())
        if sharded or not isinstance(policy, PreTrainedModel):
            return None
        if self._view is None:
            with torch.device("meta"):
                self._view = type(policy)(copy.deepcopy(policy.config)).eval()
        tensors = {**named_parameters(policy), **self._host}
        _fill(self._view, tensors, dict(policy.named_buffers()))
        return self._view

    @contextlib.contextmanager
    def weights(self) -> Iterator[None]:
        if self._inside:  # a sweep inside a sweep: the weights are there already
            yield
            return
        self._swap()
        self._inside = True
        try:
            yield
        finally:
            self._swap()
            self._inside = False

    def can_score_now(self) -> bool:
        return True

    @torch.no_grad()
    def move(self) -> None:
        if not self._host:  # as in `_swap`
            return
        self._shard_host()
        parameters = named_parameters(self.policy)
        if late := min(self.mixed_parameters().keys() - self._host.keys(), default=None):
            raise ValueError(
                f"reference={self.name!r}: the policy trains {late}, which was frozen when the run "
                "began, and the reference has no copy of it: unfreeze it before the trainer is "
                'made, or use reference="resident"'
            )
        # all that was trained when the run began, also what has been frozen since, and all of
        # another model: its frozen weights may differ, too
        for name, host in self._host.items():
            theta = local_shard(parameters[name])
            ref = host.to(theta.device)  # the tensor itself on a CPU
            ema_update_(
                [ref],
                [theta],
                self.schedule.alpha,
                rounding=self.rounding,  # pyright: ignore[reportArgumentType]
                generator=self._generator,
            )
            if ref is not host:
                host.copy_(ref)

    @torch.no_grad()
    def _swap(self) -> None:
        if not self._host:  # an adapter alone is trained: nothing to walk the model for
            return
        self._shard_host()
        parameters = named_parameters(self.policy)
        for name, host in self._host.items():
            parameter = parameters[name]
            # FSDP2 keeps views of its shards, so that their storage must stay
            if parameter.device == host.device and not hasattr(parameter, "to_local"):
                parameter.data, self._host[name] = host, parameter.data
            else:
                theta = local_shard(parameter)
                held = theta.clone()
                theta.copy_(host, non_blocking=True)
                host.copy_(held)
        torch.clear_autocast_cache()  # it knows a parameter by its address, not by its values

    def _shard_host(self) -> None:
        """Cuts the host's tensors as FSDP2 has cut the policy's since they were copied."""
        if not self._host:
            return
        for name, parameter in named_parameters(self.policy).items():
            host = self._host.get(name)
            if host is not None and host.shape != local_shard(parameter).shape:
                self._host[name] = _host_copy(shard_like(host, parameter))

    def save_weights(self, folder: Path) -> None:
        super().save_weights(folder)
        self._shard_host()
        self._save_tensors(folder, "model.safetensors", self._host)
        save_generator(self._generator, folder)

    def load_weights(self, folder: Path) -> None:
        super().load_weights(folder)
        self._shard_host()
        saved = self._load_tensors(folder, "model.safetensors")
        for name, host in self._host.items():
            host.copy_(saved[name])
        load_generator(self._generator, folder)


def _host_copy(parameter: Tensor) -> Tensor:
    copy = torch.empty_like(parameter, device="cpu", memory_format=torch.contiguous_format)
    copy = copy.pin_memory() if parameter.is_cuda else copy
    return copy.copy_(parameter.detach())


def _fill(model: nn.Module, parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> None:
    """Gives a model these tensors, those that it ties in all their places."""
    names = {id(p): name for name, p in model.named_parameters()}
    made: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = names[id(parameter)]
            if name not in made:
                made[name] = nn.Parameter(parameters[name].detach(), requires_grad=False)
            module._parameters[key] = made[name]
        for key in module._buffers:
            found = buffers.get(f"{path}.{key}".removeprefix("."))
            module._buffers[key] = found if found is None else found.cpu()
