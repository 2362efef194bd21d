"""Reference weights on the host; on the device only while they score a window."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tralign_fast.ema import ema_update_
from tralign_fast.reference.lora import mixed_parameters
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
        source = self.mixed_parameters() if start is None else dict(start.named_parameters())
        self._host: dict[str, Tensor] = {name: _host_copy(p) for name, p in source.items()}
        self._inside = False

    def mixed_parameters(self) -> dict[str, Tensor]:
        """What moves tensor by tensor, by name."""
        return mixed_parameters(self.policy, self.schedule, self.name)

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
        for name, parameter in self.mixed_parameters().items():
            host, theta = self._host[name], parameter.detach()
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
        parameters = dict(self.policy.named_parameters())
        for name, host in self._host.items():
            parameter = parameters[name]
            if parameter.device == host.device:
                parameter.data, self._host[name] = host, parameter.data
            else:
                held = parameter.detach().clone()
                parameter.data.copy_(host, non_blocking=True)
                host.copy_(held)
        torch.clear_autocast_cache()  # it knows a parameter by its address, not by its values

    def save_weights(self, folder: Path) -> None:
        super().save_weights(folder)
        save_file(self._host, folder / "model.safetensors")
        torch.save(self._generator.get_state(), folder / "rounding_rng.pt")

    def load_weights(self, folder: Path) -> None:
        super().load_weights(folder)
        for name, tensor in load_file(folder / "model.safetensors").items():
            self._host[name].copy_(tensor)
        self._generator.set_state(torch.load(folder / "rounding_rng.pt", weights_only=True))


def _host_copy(parameter: Tensor) -> Tensor:
    copy = torch.empty_like(parameter, device="cpu", memory_format=torch.contiguous_format)
    copy = copy.pin_memory() if parameter.is_cuda else copy
    return copy.copy_(parameter.detach())
