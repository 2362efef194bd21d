"""A moving reference for any `transformers.Trainer`, TRL's included."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from tralign_fast.ema import ema_update_
from tralign_fast.integrations.peft import ReferenceAdapter
from tralign_fast.reference import TrustRegion

# What FSDP1, activation checkpointing and torch.compile put into the names of parameters.
_WRAPPER_NAMES = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", "module.")


class TrustRegionCallback(TrainerCallback):
    """`π_ref ← α·π_θ + (1-α)·π_ref` after every `every` optimizer steps.

        trainer.add_callback(TrustRegionCallback(0.6, 512, trainer=trainer))

    does what TRL's `sync_ref_model=True` does, in one fused pass over the weights, and

    - in bf16 without bias: with nearest rounding, as TRL has it, a bf16 reference makes about a
      tenth of its way at α = 0.01 (`ema_update_`);
    - for PEFT policies, which TRL refuses: the reference is an adapter called "ref", the one that
      TRL's trainers look for (`integrations.peft.ReferenceAdapter`);
    - for FSDP2: each process moves its own shards, nothing is communicated.

    Args:
        alpha, every: α in [0, 1] and τ, as in `TrustRegion` (α = 1 is the hard update).
        trainer: whose `ref_model`, or whose PEFT policy's "ref" adapter, moves.
        ref_model: the reference itself, for a trainer that does not call it `ref_model`.
        rounding, seed: of bf16 and fp16 references, as in `ema_update_`. The seed is the same on
            all processes, so replicas stay equal.

    Raises:
        ValueError: there is no reference that could move, or another callback moves it.
    """

    def __init__(
        self,
        alpha: float = 0.6,
        every: int = 512,
        *,
        trainer: Any = None,
        ref_model: nn.Module | None = None,
        rounding: str = "stochastic",
        seed: int = 0,
    ) -> None:
        if (trainer is None) == (ref_model is None):
            raise ValueError(
                "TrustRegionCallback: pass trainer= (whose ref_model or PEFT adapter moves) or "
                "ref_model=, one of the two"
            )
        if rounding not in ("nearest", "stochastic"):
            raise ValueError(
                f"TrustRegionCallback: rounding must be nearest or stochastic, got {rounding!r}"
            )
        self.schedule = TrustRegion(alpha, every)
        self.rounding = rounding
        self.syncs = 0
        self._trainer = trainer
        self._generator = torch.Generator().manual_seed(seed)
        self._adapter: ReferenceAdapter | None = None
        self.ref_model = ref_model if trainer is None else self._reference_of(trainer)
        if self.ref_model is not None:
            _refuse_unmovable(self.ref_model)

    def _reference_of(self, trainer: Any) -> nn.Module | None:
        """The trainer's reference model; None where it is an adapter of the policy."""
        _refuse_second_mover(trainer, self)
        args, name = trainer.args, type(trainer).__name__
        if getattr(args, "precompute_ref_log_probs", False):
            raise ValueError(
                f"{name}: precompute_ref_log_probs=True scores a reference that never moves; set "
                "it to False to move the reference"
            )
        if getattr(args, "beta", None) == 0.0:
            raise ValueError(f"{name}: beta=0 uses no reference; set beta > 0 to move one")
        ref_model = getattr(trainer, "ref_model", None)
        if ref_model is not None:
            return ref_model
        if hasattr(trainer.model, "peft_config"):
            self._adapter = ReferenceAdapter(trainer.model)
            return None
        raise ValueError(
            f"{name} has no reference model to move: give it a ref_model, or pass ref_model= to "
            "TrustRegionCallback"
        )

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if self._trainer is not None:
            _refuse_second_mover(self._trainer, self)

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if self.schedule.should_sync(state.global_step):
            self.sync(model)

    def sync(self, model: nn.Module) -> None:
        """Moves the reference towards `model` as it is now."""
        if self._adapter is not None:
            self._adapter.move_(self.schedule.alpha)
        else:
            assert self.ref_model is not None
            refs, thetas = matching_parameters(self.ref_model, model)
            ema_update_(
                refs, thetas, self.schedule.alpha,
                rounding=self.rounding, generator=self._generator,  # pyright: ignore[reportArgumentType]
            )  # fmt: skip
        self.syncs += 1


def matching_parameters(ref: nn.Module, policy: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters of two models of one architecture, wrapped or not, in one order.

    Raises:
        ValueError: the models differ, or a pair lies on two devices.
    """
    theirs, ours = dict(_named(ref)), dict(_named(policy))
    if theirs.keys() != ours.keys():
        odd = sorted(theirs.keys() ^ ours.keys())[0]
        raise ValueError(
            f"policy and reference are different models ({odd} is only in the "
            f"{'reference' if odd in theirs else 'policy'}): expected one architecture"
        )
    for name, tensor in ours.items():
        if tensor.device != theirs[name].device:
            raise ValueError(
                f"{name} is on {tensor.device}, its reference on {theirs[name].device}: put both "
                "models on one device"
            )
    return list(theirs.values()), [ours[name] for name in theirs]


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        for wrapper in _WRAPPER_NAMES:
            name = name.replace(wrapper, "")
        yield name, parameter.detach()


def _refuse_unmovable(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"reference weight {name} is on meta: load the model before training")
        if hasattr(parameter, "ds_id"):
            raise ValueError(
                "TrustRegionCallback does not gather the shards of DeepSpeed ZeRO-3: use ZeRO-2 or "
                "FSDP2, or TRL's sync_ref_model=True"
            )
        if not parameter.is_floating_point():
            raise ValueError(
                f"reference weight {name} is {parameter.dtype}: quantised weights cannot move; "
                "train an adapter (the reference is then an adapter too)"
            )


def _refuse_second_mover(trainer: Any, own: TrainerCallback) -> None:
    for other in trainer.callback_handler.callbacks:
        # TRL's is known by its name: TRL need not be installed
        is_trl = type(other).__name__ == "SyncRefModelCallback"
        if other is not own and (is_trl or isinstance(other, TrustRegionCallback)):
            raise ValueError(
                f"{type(other).__name__} moves this trainer's reference already: "
                + ("set sync_ref_model=False" if is_trl else "keep one TrustRegionCallback")
            )
