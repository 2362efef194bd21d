"""What past adapters of one LoRA layer add up to: `Σ_k w_k·B_k A_k`, put in the policy's place.

A class for each kind of layer says what its factors are and where the layer reads them: linear
layers (aLoRA's too, which adapts some tokens alone), DoRA, stacked experts, embeddings.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tralign_fast.model.fused_lora import STAND_IN
from tralign_fast.ops.lora import LoraFactors


class Room:
    """Memory on the host that past adapters give back and take again, pinned beside a GPU.

    Pinning new memory at every move takes most of its time. Of each size that a move has asked for
    at most one tensor waits: layers move one after the other.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[Any, ...], Tensor] = {}

    def take(self, shape: Sequence[int], dtype: torch.dtype, pinned: bool) -> Tensor:
        """A tensor without content."""
        found = self._free.pop((tuple(shape), dtype), None)
        return torch.empty(*shape, dtype=dtype, pin_memory=pinned) if found is None else found

    def give(self, tensor: Tensor) -> None:
        if tensor.is_contiguous():
            self._free[tuple(tensor.shape), tensor.dtype] = tensor

    def keep_only(self, tensors: Iterable[Tensor]) -> None:
        """Lets go of sizes that none of these has."""
        wanted = {(tuple(t.shape), t.dtype) for t in tensors}
        self._free = {key: t for key, t in self._free.items() if key in wanted}


class LayerDelta:
    """`Σ_k w_k·B_k A_k` of a linear layer: as factors, or as one matrix where that is smaller.

    Args:
        layer: PEFT's.
        adapter: the name of the adapter in it.
        home: where the factors are kept; None: where the policy's are.
        room: the memory of those that are kept on the host, shared by the layers.
    """

    def __init__(
        self, layer: Any, adapter: str, home: torch.device | None, room: Room | None = None
    ) -> None:
        self.layer, self.adapter = layer, adapter
        self.factors = self._parameters()
        self._home = home
        self._room = room or Room()
        self._staged: tuple[Tensor, ...] = ()  # the policy's factors on the host, at a move
        down, up = (factor.clone() for factor in self._current())
        self._down: Tensor | None = self._parked(down)  # (…, R, in); None: `_up` is (…, out, in)
        self._up: Tensor = self._parked(up)  # (…, out, R)
        self._coefficients: Tensor | None = None  # (R,) float32; None: all are 1

    def _parameters(self) -> tuple[nn.Parameter, ...]:
        """What of the policy this stands for, and nobody else moves."""
        return tuple(module.weight for module in self._modules())

    def _modules(self) -> tuple[Any, Any]:
        return self.layer.lora_A[self.adapter], self.layer.lora_B[self.adapter]

    def _current(self) -> tuple[Tensor, Tensor]:
        """The policy's factors: (…, r, in) and (…, out, r)."""
        down, up = (module.weight.detach() for module in self._modules())
        return down, up

    @torch.no_grad()
    def fetch(self) -> None:
        """Before a move, where the policy lies on a GPU and this on the host: starts the copies of
        its factors, into memory that stays. `move` is called when they are done."""
        if self._home is None or not self._is_apart:
            return
        factors = self._current()
        if not self._staged:
            self._staged = tuple(self._room.take(f.shape, f.dtype, True) for f in factors)
        for staged, factor in zip(self._staged, factors, strict=True):
            staged.copy_(factor, non_blocking=True)

    @property
    def _is_apart(self) -> bool:
        return self.factors[0].is_cuda

    @torch.no_grad()
    def move(self, weights: list[float]) -> None:
        """Puts the policy's factors in front; `weights`: theirs, then those of the kept ones."""
        down, up = self._staged or (factor.to(self._up.device) for factor in self._current())
        rank, terms, size = down.shape[-2], len(weights), up[..., :1].numel() * down.shape[-1]
        factors_size = terms * (up.numel() + down.numel())
        if self._down is not None and terms > 1 and factors_size > size:
            self._up = self._parked(self._weighted(self._up.float()) @ self._down.float())
            self._down = self._coefficients = None
        if self._down is None:
            add_ = self._up.addmm_ if self._up.dim() == 2 else self._up.baddbmm_
            add_(up.float(), down.float(), beta=1 - weights[0], alpha=weights[0])
            return
        kept = (terms - 1) * rank
        self._down = self._in_front(down, self._down, kept, -2)
        self._up = self._in_front(up, self._up, kept, -1)
        self._weigh(weights, rank)

    def held(self) -> tuple[Tensor, ...]:
        return (self._up,) if self._down is None else (self._down, self._up)

    def _in_front(self, new: Tensor, old: Tensor, kept: int, dim: int) -> Tensor:
        """`new` and the first `kept` ranks of `old`, whose memory the next layer may have."""
        if self._home is None:
            return torch.cat([new, old.narrow(dim, 0, kept)], dim)
        if kept == 0 and self._staged and _are_alike(new, old):  # they change places
            self._staged = tuple(old if t is new else t for t in self._staged)
            return new
        shape, rank = list(new.shape), new.shape[dim]
        shape[dim] += kept
        dtype = torch.promote_types(new.dtype, old.dtype)
        joined = self._room.take(shape, dtype, self._is_apart)
        joined.narrow(dim, 0, rank).copy_(new)
        joined.narrow(dim, rank, kept).copy_(old.narrow(dim, 0, kept))
        self._room.give(old)
        return joined

    def _weigh(self, weights: list[float], rank: int) -> None:
        weighted = len(weights) > 1 and self._down is not None
        self._coefficients = (
            torch.tensor(weights).repeat_interleave(rank).to(self._up.device) if weighted else None
        )

    def in_place(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the layer's adapter is this one, for forwards without gradient. Its modules,
        parameters and their hooks stay: only what the modules compute is replaced."""
        down, up = self._modules()
        swapped = {(down, "forward"): self._project_down, (up, "forward"): self._project_up}
        return _replaced({**swapped, **self._further()})

    def _further(self) -> dict[tuple[Any, str], Callable[..., Any]]:
        return {(self.layer, STAND_IN): self._factors}

    def _factors(self, adapter: str) -> LoraFactors | None:
        """The same for a layer that is one node of autograd; None: another adapter is meant."""
        if adapter != self.adapter:
            return None
        own, device = self._modules()[0].weight, self.layer.base_layer.weight.device
        down, up, coefficients = (
            None if tensor is None else tensor.to(device, non_blocking=True)
            for tensor in (self._down, self._up, self._coefficients)
        )
        assert up is not None
        return LoraFactors(down, up, self.layer.scaling[adapter], own.dtype, coefficients)

    def _project_down(self, x: Tensor) -> Tensor:
        if self._down is None:
            return x
        return F.linear(x, self._down.to(x.device, non_blocking=True))

    def _project_up(self, h: Tensor) -> Tensor:
        up = self._up.to(h.device, non_blocking=True)
        # the bias of `lora_bias=True` is a plain parameter: here it holds the reference's value
        return F.linear(self._weighted(h), up.to(h.dtype), self._modules()[1].bias)

    def _weighted(self, h: Tensor) -> Tensor:
        """(…, R) times the w_k, in h's dtype."""
        if self._coefficients is None:
            return h
        return (h * self._coefficients.to(h.device, non_blocking=True)).to(h.dtype)

    def _parked(self, tensor: Tensor) -> Tensor:
        if self._home is None:
            return tensor
        tensor = tensor.to(self._home)
        return tensor.pin_memory() if self._is_apart else tensor

    def state(self) -> dict[str, Tensor]:
        return {"up": self._up} if self._down is None else {"down": self._down, "up": self._up}

    def load(self, saved: dict[str, Tensor], weights: list[float]) -> None:
        device, down = self._up.device, saved.get("down")
        self._up = self._parked(saved["up"].to(device))
        self._down = None if down is None else self._parked(down.to(device))
        self._weigh(weights, self._current()[0].shape[-2])


def _are_alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and b.is_contiguous()


class DoraDelta(LayerDelta):
    """A DoRA layer's weight is `diag(d)·(W + s·B·A)`, with d = magnitude / row norms. The mean is

        Σ_k w_k·diag(d_k)·(W + s·B_k A_k) = diag(Σ_k w_k d_k)·W + s·Σ_k w_k·(diag(d_k) B_k) A_k

    so that factors `diag(d_k) B_k` and one vector hold it.
    """

    def __init__(self, layer: Any, adapter: str, home: Any, room: Room | None = None) -> None:
        super().__init__(layer, adapter, home, room)
        self._scale = self._parked(self._scales())  # (out,) float32: Σ_k w_k d_k

    @property
    def _magnitude(self) -> Any:
        return self.layer.lora_magnitude_vector[self.adapter]

    def _parameters(self) -> tuple[nn.Parameter, ...]:
        return *super()._parameters(), self._magnitude.weight

    @torch.no_grad()
    def _scales(self) -> Tensor:
        """(out,) float32: the policy's d, computed as its forward computes it."""
        down, up = super()._current()
        # PEFT's function, so that a hard update gives the policy's own numbers
        norms = self._magnitude.get_weight_norm(
            _dense_weight(self.layer).to(down), up @ down, self.layer.scaling[self.adapter]
        )
        return self._magnitude.weight.detach().float() / norms.float()

    def _current(self) -> tuple[Tensor, Tensor]:
        down, up = super()._current()
        return down.float(), up.float() * self._scales()[:, None]

    def move(self, weights: list[float]) -> None:
        super().move(weights)
        self._scale = self._parked(
            torch.lerp(self._scale, self._scales().to(self._scale.device), weights[0])
        )

    def _further(self) -> dict[tuple[Any, str], Callable[..., Any]]:
        return {(self._magnitude, "forward"): self._forward}

    def _forward(
        self, x: Tensor, *, scaling: float, base_layer: Any, base_result: Any = None, **_: Any
    ) -> Tensor:
        """What DoRA adds to the base layer's output, as its own module returns it."""
        base_result = base_layer(x) if base_result is None else base_result
        if base_layer.bias is not None:
            base_result = base_result - base_layer.bias
        scale = (self._scale.to(x.device, non_blocking=True) - 1).to(base_result.dtype)
        return scale * base_result + scaling * self._project_up(self._project_down(x))

    def _project_down(self, x: Tensor) -> Tensor:
        if self._down is None:
            return x
        return F.linear(x, self._down.to(x.device, non_blocking=True).to(x.dtype))

    def state(self) -> dict[str, Tensor]:
        return {**super().state(), "scale": self._scale}

    def load(self, saved: dict[str, Tensor], weights: list[float]) -> None:
        super().load(saved, weights)
        self._scale = self._parked(saved["scale"].to(self._scale.device))


class ExpertsDelta(LayerDelta):
    """A parameter (E, ·, ·) of stacked experts (`target_parameters`): E pairs of factors in one.

    PEFT's layer adds up the whole delta and reads its factors by two methods, which are replaced.
    """

    def _current(self) -> tuple[Tensor, Tensor]:
        return expert_factors(self.layer, self.adapter)

    def in_place(self) -> contextlib.AbstractContextManager[None]:
        of_others = {name: getattr(self.layer, name, None) for name in _DELTA_METHODS}

        def factors(adapter: str) -> tuple[Tensor, Tensor, float]:
            if adapter != self.adapter:
                return of_others["get_delta_factors"](adapter)  # pyright: ignore[reportOptionalCall]
            return self._as_stored()

        def weight(adapter: str, *args: Any, **kwargs: Any) -> Tensor:
            if adapter != self.adapter:
                return of_others["get_delta_weight"](adapter, *args, **kwargs)  # pyright: ignore[reportOptionalCall]
            left, right, scaling = self._as_stored()
            delta = (left @ right) * scaling
            return delta if self.layer.num_experts > 1 else delta[0]

        return _replaced(
            {
                (self.layer, name): own
                for name, own in zip(_DELTA_METHODS, (factors, weight), strict=True)
                if of_others[name] is not None
            }
        )

    def _as_stored(self) -> tuple[Tensor, Tensor, float]:
        """Two factors of the delta (E, ·, ·) as the parameter has it, and its scaling."""
        parameter = self.layer.get_param()
        up = self._weighted(self._up.to(parameter.device, non_blocking=True))
        down = self._down
        if down is None:  # a view: no memory
            down = torch.eye(up.shape[-1], device=up.device).expand(len(up), -1, -1)
        down = down.to(parameter.device, non_blocking=True)
        left, right = (up, down) if is_out_first(self.layer) else (down.mT, up.mT)
        scaling = self.layer.scaling[self.adapter]
        return left.to(parameter.dtype), right.to(parameter.dtype), scaling


def expert_factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """(E, r, in) and (E, out, r), however the layer stores the parameter that they belong to."""
    down, up = (part[adapter].weight.detach() for part in (layer.lora_A, layer.lora_B))
    experts = layer.num_experts
    down = down.reshape(experts, -1, down.shape[-1])
    return down, up.reshape(up.shape[0], -1, experts).permute(2, 0, 1)


def is_out_first(layer: Any) -> bool:
    """Whether that parameter is (E, out, in); a matrix of one "expert" is a linear layer's."""
    return layer.num_experts == 1 or getattr(layer, "_did_swap_in_out_features", False)


_DELTA_METHODS = ("get_delta_factors", "get_delta_weight")


class EmbeddingDelta(LayerDelta):
    """An embedding's factors are parameters that its forward reads: they are replaced, whole."""

    def _parameters(self) -> tuple[nn.Parameter, ...]:
        layer = self.layer
        return layer.lora_embedding_A[self.adapter], layer.lora_embedding_B[self.adapter]

    def _current(self) -> tuple[Tensor, Tensor]:
        down, up = (factor.detach() for factor in self._parameters())
        return down, up  # (r, V) and (H, r)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        held = self._parameters()
        before = [parameter.data for parameter in held]
        up, down = self._weighted(self._up), self._down
        down = torch.eye(len(up), device=up.device) if down is None else down
        if self._down is None:  # (H, V): the larger side is read by rows
            up, down = down, up
        for parameter, tensor in zip(held, (down, up), strict=True):
            parameter.data = tensor.to(parameter)
        try:
            yield
        finally:
            for parameter, tensor in zip(held, before, strict=True):
                parameter.data = tensor


def _dense_weight(layer: Any) -> Tensor:
    """(out, in): the base weight, of a quantised layer too."""
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(layer.get_base_layer()).detach()


@contextlib.contextmanager
def _replaced(methods: dict[tuple[Any, str], Callable[..., Any]]) -> Iterator[None]:
    """Inside, these methods of these objects are other functions."""
    before = {(owner, name): owner.__dict__.get(name) for owner, name in methods}
    for (owner, name), method in methods.items():
        owner.__dict__[name] = method
    try:
        yield
    finally:
        for (owner, name), method in before.items():
            del owner.__dict__[name]
            if method is not None:  # accelerate's, on a dispatched model
                owner.__dict__[name] = method
