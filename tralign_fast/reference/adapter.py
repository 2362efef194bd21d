"""The reference of a LoRA policy: past adapters beside the base weights that both share."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tralign_fast.model.graphs import without_graphs
from tralign_fast.ops.backend import device_kind, is_pretending
from tralign_fast.reference.base import ReferenceOptions, ReferencePolicy
from tralign_fast.reference.deltas import (
    DoraDelta,
    EmbeddingDelta,
    ExpertsDelta,
    LayerDelta,
)
from tralign_fast.reference.lora import mixes_by_tensor, refusal, trained_adapters
from tralign_fast.reference.offloaded import OffloadedReference
from tralign_fast.reference.room import CHUNK, Room, Stage
from tralign_fast.reference.sharding import (
    broadcast_from_main,
    is_sharded,
    named_parameters,
    process_index,
    reshard,
    whole_tensors,
)
from tralign_fast.reference.trust_region import TrustRegion

_FILE = "adapters.safetensors"


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

    A DoRA layer's `diag(d_k)` goes into `B_k`, and their mean on `W` is a vector (`DoraDelta`).
    Where FSDP2 or ZeRO-3 shards the policy, every process holds past adapters whole: a move gathers
    the policy's factors, as many bytes as the adapter has, in few collectives, and a sweep adds
    none to those of the forward.

    What else the policy trains (biases, `modules_to_save`, tokens, layers unfrozen by hand,
    adapters whose weight is affine in what they train, as IA3's) moves as in `OffloadedReference`.
    Scores are swept for a window, as there, and for τ = 1 at every step.

    Args:
        policy: a PEFT LoRA model; the base may be quantised. Its adapter, as it is, is the first
            reference: the base model, for one that starts at B = 0.
        tolerance: in [0, 1), the weight under which a past adapter is dropped.
        rounding, seed: as in `ema_update_`, for what is not a LoRA factor.

    Raises:
        ValueError: PEFT is not installed, the policy trains no adapter, one whose weights' mean
            this cannot hold (`lora.refusal`), or LoRA on convolutions.
    """

    name = "adapter"
    can_be_sharded = frozenset({"FSDP2", "ZeRO-3"})

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
        layers = _lora_layers(policy)
        trained = sum(p.nbytes for p in policy.parameters() if p.requires_grad)
        self._room = Room(min(CHUNK, 1 << trained.bit_length()))
        self._deltas = {
            f"{name}.{adapter}": _delta_of(layer, adapter, home, self._room)
            for name, adapter, layer in layers
        }
        self._weights = [1.0]  # w_k, newest first
        self._is_common = False  # whether all processes have agreed on the first adapter
        super().__init__(policy, schedule, rounding=rounding, seed=seed)
        self._make_room()

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

    @property
    def grows(self) -> bool:
        more = len(self._moved(self._weights)) > len(self._weights)
        moves = not self.schedule.is_frozen
        return moves and more and not all(delta.is_matrix for delta in self._deltas.values())

    def mixed_parameters(self) -> dict[str, Tensor]:
        factors = {id(p) for delta in self._deltas.values() for p in delta.factors}
        trained = {n: p for n, p in named_parameters(self.policy).items() if p.requires_grad}
        return {name: p for name, p in trained.items() if id(p) not in factors}

    @contextlib.contextmanager
    def weights(self) -> Iterator[None]:
        if self._inside:
            yield
            return
        self._agree()
        # the factors' addresses change with every sweep
        with super().weights(), without_graphs(), contextlib.ExitStack() as stack:
            stage = self._stage()
            for delta in self._deltas.values():
                delta.stage = stage
                stack.callback(setattr, delta, "stage", None)
                stack.enter_context(delta.in_place())
            yield

    def _stage(self) -> Stage:
        """Held beside a GPU: all for the whole sweep where it is no more than the gradients, which
        a sweep has none of; else a few layers at a time."""
        deltas = self._deltas.values()
        held = {delta: delta.held() for delta in deltas}
        own = sum(p.nbytes for delta in deltas for p in delta.factors)
        total = sum(t.nbytes for tensors in held.values() for t in tensors)
        tensors = (t for d in deltas for t in (*d.factors, *held[d]))
        on_host = all(device_kind(t.device) != "cuda" for t in tensors)
        stage = Stage(
            math.inf if on_host else own if total <= own else own // 8,
            copies=is_pretending() and not self._moves_always,
        )
        for delta, tensors in held.items():
            stage.add(delta, tensors)
        return stage

    def _agree(self) -> None:
        """The first adapter is that of the first process: FSDP2 fills the others' weights later
        than it was kept.

        Raises:
            ValueError: a sharded policy with an adapter whose factors cannot be gathered.
        """
        if self._is_common or not is_sharded(self.policy):
            return
        self._is_common = True
        for name, delta in self._deltas.items():
            if type(delta) is not LayerDelta:
                raise ValueError(
                    f'reference="adapter": {name} is no plain LoRA on a linear layer, and a '
                    "sharded policy's reference holds no other; use ref_model_mixup_alpha=1 with "
                    'reference="snapshot", or DDP'
                )
        held = [tensor for delta in self._deltas.values() for tensor in delta.held()]
        broadcast_from_main(held, self._deltas[next(iter(self._deltas))].factors[0].device)

    @contextlib.contextmanager
    def _gathered(self) -> Iterator[None]:
        """Inside, every delta has the policy's factors whole."""
        if not is_sharded(self.policy):
            yield
            return
        self._agree()
        reshard(self.policy)
        deltas = self._deltas.values()
        whole = iter(whole_tensors([factor for delta in deltas for factor in delta.factors]))
        for delta in deltas:
            delta.whole = (next(whole), next(whole))
        try:
            yield
        finally:
            for delta in deltas:
                delta.whole = None

    @torch.no_grad()
    def move(self) -> None:
        super().move()
        weights = self._moved(self._weights)
        with self._gathered():
            for delta in self._deltas.values():
                delta.fetch(len(weights))
        if any(delta.becomes_matrix(len(weights)) for delta in self._deltas.values()):
            self._wait()  # once, not for each factor
        for delta in self._deltas.values():
            delta.move(weights)
        self._weights = weights
        self._make_room()

    def _moved(self, weights: list[float]) -> list[float]:
        """The w_k after a move."""
        alpha = self.schedule.alpha
        weights = [alpha, *((1 - alpha) * w for w in weights)]
        while len(weights) > 1 and weights[-1] <= self.tolerance:
            dropped = weights.pop()
            weights[-1] += dropped
        return weights

    def _make_room(self) -> None:
        """Beside a GPU, starts to pin what one more adapter takes, if the next move keeps one."""
        if self.grows and not self._moves_always:
            terms, deltas = len(self._moved(self._weights)), self._deltas.values()
            more = [d for d in deltas if d.is_apart and not d.becomes_matrix(terms)]
            self._room.reserve(sum(t.nbytes for d in more for t in d.held()[:2]))

    def _wait(self) -> None:
        """For the copies of the last move: before the host reads what is held."""
        for device in {delta.factors[0].device for delta in self._deltas.values()}:
            if device.type == "cuda" and not self._moves_always:
                torch.cuda.current_stream(device).synchronize()

    def save_weights(self, folder: Path) -> None:
        super().save_weights(folder)
        self._wait()
        tensors = {
            f"{name}.{part}": tensor
            for name, delta in self._deltas.items()
            for part, tensor in delta.state().items()
        }
        if process_index() == 0:  # all hold the same
            tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(tensors, folder / _FILE)
            (folder / "adapters.json").write_text(json.dumps({"weights": self._weights}) + "\n")

    def load_weights(self, folder: Path) -> None:
        super().load_weights(folder)
        self._wait()
        self._weights = json.loads((folder / "adapters.json").read_text())["weights"]
        tensors = load_file(folder / _FILE)
        self._is_common = True
        for name, delta in self._deltas.items():
            prefix = f"{name}."
            own = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            delta.load({k: t for k, t in own.items() if "." not in k}, self._weights)
        self._make_room()

    def _identity(self) -> dict:
        return {**super()._identity(), "tolerance": self.tolerance}


def _delta_of(layer: Any, adapter: str, home: torch.device | None, room: Room) -> LayerDelta:
    if adapter in getattr(layer, "lora_embedding_A", ()):
        return EmbeddingDelta(layer, adapter, home, room)
    if hasattr(layer, "num_experts"):
        return ExpertsDelta(layer, adapter, home, room)
    if adapter in (getattr(layer, "lora_magnitude_vector", None) or ()):
        return DoraDelta(layer, adapter, home, room)
    return LayerDelta(layer, adapter, home, room)


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
    found = [(name, adapter, layer) for name, adapter, layer in found if not mixes_by_tensor(layer)]
    for name, adapter, layer in found:
        if why := refusal(layer, adapter, 'ref_model_mixup_alpha=1 with reference="snapshot"'):
            raise ValueError(f'reference="adapter": {name} is {why}')
    return found
