"""The reference of a LoRA policy: past adapters beside the base weights that both share."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tralign_fast.reference.base import ReferenceOptions, ReferencePolicy
from tralign_fast.reference.lora import refusal, trained_adapters
from tralign_fast.reference.offloaded import OffloadedReference
from tralign_fast.reference.sharding import process_index
from tralign_fast.reference.trust_region import TrustRegion


class AdapterReference(OffloadedReference):
    """Weights: LoRA factors only. Exact for every schedule, in weight space.

    After n updates the reference's weight is

        W_ref = W + s·Σ_k w_k·B_k A_k,    w_k = α(1-α)^k, and (1-α)^n for the first reference,

    newest first. The products are one: the factors lie concatenated along the rank, and the w_k are
    multiplied between them, so that the factors keep the policy's bits and dtype. The oldest is
    dropped once its weight is at most `tolerance`, and that weight goes to the next one: the w_k
    always sum to 1 and `W_ref` is off by `tolerance·s·(B_k A_k - B_{k+1} A_{k+1})` at most.

    Cost, for rank r: ⌈log(tolerance) / log(1-α)⌉ sets of factors (16 for α = 0.6 and 1e-6; one for
    hard updates), and a sweep's adapter products have that many times the rank. A layer whose
    concatenated factors would outgrow its weight (out, in) holds `Σ_k w_k B_k A_k` as that one fp32
    matrix instead, cut nowhere; so do small α. With τ > 1 all of it lies on the host (pinned beside
    a GPU), and a sweep brings in one layer at a time.

    Whatever else the policy trains (biases, `modules_to_save`, layers unfrozen by hand) moves as in
    `OffloadedReference`. Scores are swept for a window, as there, and for τ = 1 at every step.

    Args:
        policy: a PEFT LoRA model; the base may be quantised. Its adapter, as it is, is the first
            reference: the base model, for one that starts at B = 0.
        tolerance: in [0, 1), the weight under which a past adapter is dropped.
        rounding, seed: as in `ema_update_`, for what is not a LoRA factor.

    Raises:
        ValueError: PEFT is not installed, the policy trains no LoRA layer, or one whose weight is
            not `W + s·B·A` (DoRA), or one that is not linear (embeddings, convolutions, experts).
    """

    name = "adapter"
    can_be_sharded = frozenset()
    grows = True

    def __init__(
        self,
        policy: nn.Module,
        schedule: TrustRegion,
        *,
        tolerance: float = 1e-6,
        rounding: str = "stochastic",
        seed: int = 0,
    ) -> None:
        if not 0.0 <= tolerance < 1.0:
            raise ValueError(f"adapter_tolerance must lie in [0, 1), got {tolerance}")
        self.tolerance = tolerance
        self._moves_always = schedule.every == 1 and not schedule.is_frozen
        home = None if self._moves_always else torch.device("cpu")
        self._deltas = {
            f"{name}.{adapter}": _LayerDelta(layer, adapter, home)
            for name, adapter, layer in _lora_layers(policy)
        }
        self._weights = [1.0]  # w_k, newest first
        super().__init__(policy, schedule, rounding=rounding, seed=seed)

    @classmethod
    def build(
        cls, policy: nn.Module, start: nn.Module | None, args: ReferenceOptions
    ) -> ReferencePolicy:
        rounding = {"rounding": args.ema_rounding, "seed": args.seed}
        return cls(policy, args.trust_region, tolerance=args.adapter_tolerance, **rounding)

    @classmethod
    def starts_from_policy(cls, lora: bool) -> bool:
        return True

    @property
    def on_device(self) -> bool:
        return self._moves_always

    def mixed_parameters(self) -> dict[str, Tensor]:
        factors = {id(p) for delta in self._deltas.values() for p in delta.factors}
        trained = {name: p for name, p in self.policy.named_parameters() if p.requires_grad}
        return {name: p for name, p in trained.items() if id(p) not in factors}

    @contextlib.contextmanager
    def weights(self) -> Iterator[None]:
        if self._inside:
            yield
            return
        with super().weights(), contextlib.ExitStack() as stack:
            for delta in self._deltas.values():
                stack.enter_context(delta.in_place())
            yield

    @torch.no_grad()
    def move(self) -> None:
        super().move()
        alpha = self.schedule.alpha
        weights = [alpha, *((1 - alpha) * w for w in self._weights)]
        while len(weights) > 1 and weights[-1] <= self.tolerance:
            dropped = weights.pop()
            weights[-1] += dropped
        for delta in self._deltas.values():
            delta.move(weights)
        self._weights = weights

    def save_weights(self, folder: Path) -> None:
        super().save_weights(folder)
        tensors = {
            f"{name}.{part}": tensor
            for name, delta in self._deltas.items()
            for part, tensor in delta.state().items()
        }
        self._save_tensors(folder, "adapters.safetensors", tensors)
        if process_index() == 0:
            (folder / "adapters.json").write_text(json.dumps({"weights": self._weights}) + "\n")

    def load_weights(self, folder: Path) -> None:
        super().load_weights(folder)
        self._weights = json.loads((folder / "adapters.json").read_text())["weights"]
        tensors = self._load_tensors(folder, "adapters.safetensors")
        for name, delta in self._deltas.items():
            delta.load(tensors.get(f"{name}.down"), tensors[f"{name}.up"], self._weights)

    def _identity(self) -> dict:
        return {**super()._identity(), "tolerance": self.tolerance}


class _LayerDelta:
    """`Σ_k w_k·B_k A_k` of one LoRA layer: as factors, or as one matrix where that is smaller."""

    def __init__(self, layer: Any, adapter: str, home: torch.device | None) -> None:
        self._down_layer: nn.Linear = layer.lora_A[adapter]
        self._up_layer: nn.Linear = layer.lora_B[adapter]
        self.factors = (self._down_layer.weight, self._up_layer.weight)
        self._home = home  # None: where the policy's factors are
        down, up = (factor.detach().clone() for factor in self.factors)
        self._down: Tensor | None = self._parked(down)  # (R, in); None: `_up` is (out, in)
        self._up: Tensor = self._parked(up)  # (out, R)
        self._coefficients: Tensor | None = None  # (R,) float32; None: all are 1

    def move(self, weights: list[float]) -> None:
        """Puts the policy's factors in front; `weights`: theirs, then those of the kept ones."""
        down, up = (factor.detach().to(self._up.device) for factor in self.factors)
        rank, terms, size = down.shape[0], len(weights), up.shape[0] * down.shape[1]
        factors_size = terms * (up.numel() + down.numel())
        if self._down is not None and terms > 1 and factors_size > size:
            self._up = self._parked(self._weighted(self._up.float()) @ self._down.float())
            self._down = self._coefficients = None
        if self._down is None:
            self._up.addmm_(up.float(), down.float(), beta=1 - weights[0], alpha=weights[0])
            return
        kept = (terms - 1) * rank
        self._down = self._parked(torch.cat([down, self._down[:kept]]))
        self._up = self._parked(torch.cat([up, self._up[:, :kept]], dim=1))
        self._weigh(weights)

    def _weigh(self, weights: list[float]) -> None:
        rank = self.factors[0].shape[0]
        weighted = len(weights) > 1 and self._down is not None
        self._coefficients = (
            torch.tensor(weights).repeat_interleave(rank).to(self._up.device) if weighted else None
        )

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the layer's adapter is this one, for forwards without gradient. Its modules,
        parameters and their hooks stay: only what the two modules compute is replaced."""
        swapped = {self._down_layer: self._project_down, self._up_layer: self._project_up}
        before = {module: module.__dict__.get("forward") for module in swapped}
        for module, forward in swapped.items():
            module.forward = forward
        try:
            yield
        finally:
            for module, forward in before.items():
                del module.forward
                if forward is not None:  # accelerate's, on a dispatched model
                    module.forward = forward

    def _project_down(self, x: Tensor) -> Tensor:
        if self._down is None:
            return x
        return F.linear(x, self._down.to(x.device, non_blocking=True))

    def _project_up(self, h: Tensor) -> Tensor:
        up = self._up.to(h.device, non_blocking=True)
        # the bias of `lora_bias=True` is a plain parameter: here it holds the reference's value
        return F.linear(self._weighted(h), up.to(h.dtype), self._up_layer.bias)

    def _weighted(self, h: Tensor) -> Tensor:
        """(…, R) times the w_k, in h's dtype."""
        if self._coefficients is None:
            return h
        return (h * self._coefficients.to(h.device, non_blocking=True)).to(h.dtype)

    def _parked(self, tensor: Tensor) -> Tensor:
        if self._home is None:
            return tensor
        tensor = tensor.to(self._home)
        return tensor.pin_memory() if self.factors[0].is_cuda else tensor

    def state(self) -> dict[str, Tensor]:
        return {"up": self._up} if self._down is None else {"down": self._down, "up": self._up}

    def load(self, down: Tensor | None, up: Tensor, weights: list[float]) -> None:
        device = self._up.device
        self._up = self._parked(up.to(device))
        self._down = None if down is None else self._parked(down.to(device))
        self._weigh(weights)


def _lora_layers(policy: nn.Module) -> list[tuple[str, str, Any]]:
    """The LoRA layers that the policy trains; raises on what this reference cannot hold."""
    found = list(trained_adapters(policy))
    if not found:
        missing = "" if find_spec("peft") else " (pip install 'tralign-fast[peft]')"
        raise ValueError(
            f'reference="adapter" needs a policy with a trained PEFT LoRA adapter{missing}, got '
            f"{type(policy).__name__}: wrap it with peft.get_peft_model(model, LoraConfig(...)), "
            'or use reference="auto"'
        )
    for name, adapter, layer in found:
        if why := refusal(layer, adapter, 'ref_model_mixup_alpha=1 with reference="snapshot"'):
            raise ValueError(f'reference="adapter": {name} is {why}')
    return found
