"""What past adapters of one LoRA layer add up to: `Σ_k w_k·B_k A_k`, put in the policy's place.

A class for each kind of layer says what its factors are and where the layer reads them: linear
layers (aLoRA's too, which adapts some tokens alone), DoRA, stacked experts, embeddings.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tralign_fast.model.fused_lora import STAND_IN
from tralign_fast.ops.lora import LoraFactors
from tralign_fast.reference.room import Room, Stage


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
        self.whole: tuple[Tensor, Tensor] | None = None  # the factors, where shards were gathered
        self.stage: Stage | None = None  # in a sweep, of all layers
        self._home = home
        self._room = room or Room()
        self._coming: tuple[Tensor, Tensor] | None = None  # the policy's factors, at a move
        # (…, r, in) and (…, out, r) of each adapter, newest first; none: `_matrix` is all of them
        self._sets: list[tuple[Tensor, Tensor]] = [self._kept(self._current())]
        self._weights = [1.0]
        self._matrix: Tensor | None = None  # (…, out, in) float32

    @property
    def factors(self) -> tuple[nn.Parameter, ...]:
        """What of the policy this stands for, and nobody else moves; FSDP2 makes others of them."""
        return tuple(module.weight for module in self._modules())

    def _modules(self) -> tuple[Any, Any]:
        return self.layer.lora_A[self.adapter], self.layer.lora_B[self.adapter]

    def _current(self) -> tuple[Tensor, Tensor]:
        """The policy's factors: (…, r, in) and (…, out, r)."""
        if self.whole is not None:
            return self.whole
        down, up = (module.weight.detach() for module in self._modules())
        return down, up

    @property
    def is_apart(self) -> bool:
        return self.factors[0].is_cuda

    @property
    def is_matrix(self) -> bool:
        return self._matrix is not None

    def becomes_matrix(self, terms: int) -> bool:
        """Whether so many adapters are held as one matrix; its sums are the host's."""
        if self.is_matrix or terms == 1:
            return self.is_matrix
        down, up = self._sets[0]
        factors = terms * (up.numel() + down.numel())
        return factors > up[..., :1].numel() * down.shape[-1]

    def fetch(self, terms: int) -> None:
        """Before a move to so many adapters: starts the copies of the policy's factors. Where those
        lie on a GPU, nobody may read this from the host before they are done."""
        if self._matrix is None and not self.becomes_matrix(terms):
            self._forget(self._sets[terms - 1 :])  # first: the new ones come in their place
            del self._sets[terms - 1 :]
        self._coming = self._kept(self._current())

    def move(self, weights: list[float]) -> None:
        """Puts the policy's factors in front; `weights`: theirs, then those of the kept ones."""
        assert self._coming is not None
        (down, up), self._coming = self._coming, None
        if self.becomes_matrix(len(weights)):
            if self._matrix is None:
                old_down, old_up = self._joined()
                assert old_down is not None
                self._matrix = self._parked(self._weighted(old_up.float()) @ old_down.float())
                self._forget(self._sets)
                self._sets = []
            add_ = self._matrix.addmm_ if self._matrix.dim() == 2 else self._matrix.baddbmm_
            add_(up.float(), down.float(), beta=1 - weights[0], alpha=weights[0])
            self._forget([(down, up)])
        else:
            self._sets.insert(0, (down, up))
        self._weights = weights

    def held(self) -> list[Tensor]:
        if self._matrix is not None:
            return [self._matrix]
        return [factor for factors in self._sets for factor in factors]

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
        down, up = self._on(device)
        coefficients = self._coefficients(device)
        return LoraFactors(down, up, self.layer.scaling[adapter], own.dtype, coefficients)

    def _on(self, device: torch.device) -> tuple[Tensor | None, Tensor]:
        """(R, in), or None for the identity, and (out, R) there."""
        if self.stage is None:
            return self._join([t.to(device, non_blocking=True) for t in self.held()])
        return self.stage.get(self, device, LayerDelta._join)

    def _joined(self) -> tuple[Tensor | None, Tensor]:
        return self._join(self.held())

    def _join(self, held: list[Tensor]) -> tuple[Tensor | None, Tensor]:
        """`held`, wherever it is, concatenated along the rank."""
        if self._matrix is not None:
            return None, held[0]
        if len(held) == 2:
            return held[0], held[1]
        return torch.cat(held[::2], -2), torch.cat(held[1::2], -1)

    def _coefficients(self, device: torch.device) -> Tensor | None:
        """(R,) float32; None: all are 1."""
        if self._matrix is not None or len(self._weights) == 1:
            return None
        return self._room.coefficients(self._weights, self._sets[0][0].shape[-2], device)

    def _project_down(self, x: Tensor) -> Tensor:
        down = self._on(x.device)[0]
        return x if down is None else F.linear(x, down)

    def _project_up(self, h: Tensor) -> Tensor:
        up = self._on(h.device)[1]
        # the bias of `lora_bias=True` is a plain parameter: here it holds the reference's value
        return F.linear(self._weighted(h), up.to(h.dtype), self._modules()[1].bias)

    def _weighted(self, h: Tensor) -> Tensor:
        """(…, R) times the w_k, in h's dtype."""
        coefficients = self._coefficients(h.device)
        return h if coefficients is None else (h * coefficients).to(h.dtype)

    def _parked(self, tensor: Tensor) -> Tensor:
        if self._home is None:
            return tensor
        tensor = tensor.to(self._home)
        return tensor.pin_memory() if self.is_apart else tensor

    def _kept(self, factors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Copies of the factors, where they are kept; on the way there from a GPU."""
        if self._home is None:
            return factors[0].clone(), factors[1].clone()
        down, up = (self._room.take(f.shape, f.dtype, self.is_apart) for f in factors)
        return down.copy_(factors[0], non_blocking=True), up.copy_(factors[1], non_blocking=True)

    def _forget(self, sets: list[tuple[Tensor, Tensor]]) -> None:
        if self._home is not None:
            for factors in sets:
                self._room.give(factors)

    def state(self) -> dict[str, Tensor]:
        down, up = self._joined()
        return {"up": up} if down is None else {"down": down, "up": up}

    def load(self, saved: dict[str, Tensor], weights: list[float]) -> None:
        device = self.held()[0].device
        self._forget(self._sets)
        self._sets, self._matrix, self._weights = [], None, weights
        if "down" not in saved:
            self._matrix = self._parked(saved["up"].to(device))
            return
        downs, ups = saved["down"].chunk(len(weights), -2), saved["up"].chunk(len(weights), -1)
        for down, up in zip(downs, ups, strict=True):
            self._sets.append(self._kept((down.to(device), up.to(device))))


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

    @property
    def factors(self) -> tuple[nn.Parameter, ...]:
        return *super().factors, self._magnitude.weight

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
        self._scale.lerp_(self._scales().to(self._scale.device), weights[0])

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
        down = self._on(x.device)[0]
        return x if down is None else F.linear(x, down.to(x.dtype))

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
        down, up = self._on(parameter.device)
        up = self._weighted(up)
        if down is None:  # a view: no memory
            down = torch.eye(up.shape[-1], dtype=up.dtype, device=up.device).expand(len(up), -1, -1)
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

    @property
    def factors(self) -> tuple[nn.Parameter, ...]:
        layer = self.layer
        return layer.lora_embedding_A[self.adapter], layer.lora_embedding_B[self.adapter]

    def _current(self) -> tuple[Tensor, Tensor]:
        down, up = (factor.detach() for factor in self.factors)
        return down, up  # (r, V) and (H, r)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        held = self.factors
        before = [parameter.data for parameter in held]
        down, up = self._on(held[0].device)
        up = self._weighted(up)
        down = torch.eye(len(up), dtype=up.dtype, device=up.device) if down is None else down
        if self._matrix is not None:  # (H, V): the larger side is read by rows
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
