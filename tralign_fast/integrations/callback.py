"""A moving reference for any `transformers.Trainer`, TRL's included."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers import TrainerCallback

from tralign_fast._backend import warn_once
from tralign_fast.ema import ema_update_
from tralign_fast.reference import TrustRegion
from tralign_fast.reference.adapter import AdapterReference
from tralign_fast.reference.offloaded import OffloadedReference

# Inside a checkpoint, beside the policy: TRL forgets where its reference was.
FOLDER = "reference"
# What FSDP1, activation checkpointing and torch.compile put into the names of parameters.
_WRAPPER_NAMES = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


class TrustRegionCallback(TrainerCallback):
    """`π_ref ← α·π_θ + (1-α)·π_ref` after every `every` optimizer steps.

        trainer.add_callback(TrustRegionCallback(0.6, 512, trainer=trainer))

    does what TRL's `sync_ref_model=True` does, in one fused pass over the weights, and

    - in bf16 without bias: rounded to nearest, as TRL has it, a bf16 reference makes about a tenth
      of its way at α = 0.01 (`ema_update_`);
    - for PEFT policies, which TRL refuses. Their reference is the base with the adapter switched
      off; from here on `disable_adapter` of this model means the moved reference instead
      (`AdapterReference`: exact, LoRA factors only; α = 1 follows any kind of adapter);
    - for FSDP2: each process moves its own shards, nothing is communicated;
    - through checkpoints: the reference is saved in them, and found again on a resume.

    Args:
        alpha, every: α in [0, 1] and τ, as in `TrustRegion` (α = 1 is the hard update).
        trainer: whose `ref_model` (or, without one, whose PEFT policy's reference) moves.
        ref_model: the reference itself, for a trainer that does not call it `ref_model`.
        rounding, seed: of bf16 and fp16 references, as in `ema_update_`. The seed is the same on
            all processes, so that replicas stay equal.
        save: whether checkpoints hold the reference (the size of its weights).

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
        save: bool = True,
    ) -> None:
        if (trainer is None) == (ref_model is None):
            raise ValueError(
                "TrustRegionCallback: pass trainer= (whose reference moves) or ref_model=, one of "
                "the two"
            )
        if rounding not in ("nearest", "stochastic"):
            raise ValueError(f"rounding must be nearest or stochastic, got {rounding!r}")
        self.schedule = TrustRegion(alpha, every)
        self.syncs = 0
        self._save = save
        self._trainer = trainer
        options = {"rounding": rounding, "seed": seed}
        if trainer is not None:
            self._check_trainer()
            ref_model = getattr(trainer, "ref_model", None)
        self._reference: _ModelReference | _PeftReference
        if ref_model is not None:
            self._reference = _ModelReference(ref_model, self.schedule.alpha, **options)
            if trainer is not None and not _is_sharded(trainer):  # else the policy is not yet
                matching_parameters(ref_model, trainer.model)
        elif trainer is not None and hasattr(trainer.model, "peft_config"):
            self._reference = _PeftReference(trainer, self.schedule, **options)
        else:
            raise ValueError(
                f"{type(trainer).__name__} has no reference model to move: give the trainer a "
                "ref_model, or TrustRegionCallback ref_model="
            )

    def _check_trainer(self) -> None:
        self._refuse_second_mover()
        args, name = self._trainer.args, type(self._trainer).__name__
        if getattr(args, "precompute_ref_log_probs", False):
            raise ValueError(
                f"{name}: precompute_ref_log_probs=True scores a reference that never moves; set "
                "it to False"
            )
        if getattr(args, "beta", None) == 0.0:
            raise ValueError(f"{name}: beta=0 uses no reference; set beta > 0 to move one")

    def _refuse_second_mover(self) -> None:
        for other in self._trainer.callback_handler.callbacks:
            # TRL's is known by its name: TRL need not be installed
            is_trl = type(other).__name__ == "SyncRefModelCallback"
            if other is not self and (is_trl or isinstance(other, TrustRegionCallback)):
                raise ValueError(
                    f"{type(other).__name__} moves this trainer's reference already: "
                    + ("set sync_ref_model=False" if is_trl else "keep one TrustRegionCallback")
                )

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        if self._trainer is not None:
            self._refuse_second_mover()
        if state.global_step == 0 or self.schedule.is_frozen:
            return
        folder = _folder(args, state)
        if folder.is_dir():
            self._reference.load(folder)
        else:
            warn_once(
                f"{folder} holds no reference: the run goes on from the reference that the trainer "
                "was built with"
            )

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if self.schedule.should_sync(state.global_step):
            assert model is not None
            self._reference.move(model)
            self.syncs += 1

    def on_save(self, args, state, control, **kwargs) -> None:
        if self._save and args.should_save and not self.schedule.is_frozen:
            self._reference.save(_folder(args, state))

    def detach(self) -> None:
        """Gives a PEFT policy its own `disable_adapter` back."""
        self._reference.detach()


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / FOLDER


class _ModelReference:
    """A second model."""

    def __init__(self, model: nn.Module, alpha: float, *, rounding: str, seed: int) -> None:
        _refuse_unmovable(model)
        self.model = model
        self.alpha = alpha
        self.rounding: Any = rounding
        self.generator = torch.Generator().manual_seed(seed)

    def move(self, policy: nn.Module) -> None:
        refs, thetas = matching_parameters(self.model, policy)
        ema_update_(refs, thetas, self.alpha, rounding=self.rounding, generator=self.generator)

    def save(self, folder: Path) -> None:
        if any(hasattr(p, "to_local") for p in self.model.parameters()):
            warn_once("the reference is sharded: checkpoints do not hold it")
            return
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.model, str(folder / "model.safetensors"))
        torch.save(self.generator.get_state(), folder / "rounding_rng.pt")

    def load(self, folder: Path) -> None:
        load_model(self.model, folder / "model.safetensors")
        self.generator.set_state(torch.load(folder / "rounding_rng.pt", weights_only=True))

    def detach(self) -> None:
        pass


class _PeftReference:
    """What a trainer finds when it switches the policy's adapter off."""

    def __init__(self, trainer: Any, schedule: TrustRegion, **options: Any) -> None:
        if _is_sharded(trainer):
            raise ValueError(
                "TrustRegionCallback: a PEFT policy's factors are sharded under FSDP and DeepSpeed "
                "ZeRO-3; train it with DDP or ZeRO-2"
            )
        self.model = trainer.model
        at_every_step = TrustRegion(schedule.alpha, 1)  # the trainer asks for it at every step
        try:
            self.held = AdapterReference(self.model, at_every_step, **options)
        except ValueError as error:
            if 0.0 < schedule.alpha < 1.0:
                raise ValueError(
                    f"alpha={schedule.alpha} mixes plain LoRA on linear layers only ({error}); "
                    "TrustRegionCallback(alpha=1) follows any adapter"
                ) from error
            self.held = OffloadedReference(self.model, TrustRegion(1.0, 1), **options)
        # TRL copies a pretrained adapter to "ref" and prefers it: the same start as ours
        if "ref" in self.model.peft_config:
            self.model.delete_adapter("ref")
        self.model.disable_adapter = self.held.weights

    def move(self, policy: nn.Module) -> None:
        self.held.move()

    def save(self, folder: Path) -> None:
        self.held.save(folder)

    def load(self, folder: Path) -> None:
        self.held.load(folder)

    def detach(self) -> None:
        self.model.__dict__.pop("disable_adapter", None)


def matching_parameters(ref: nn.Module, policy: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters of two models of one architecture, wrapped or not, in one order.

    Raises:
        ValueError: the models differ, or a pair lies on two devices.
    """
    theirs, ours = dict(_named(ref)), dict(_named(policy))
    if theirs.keys() != ours.keys():
        odd = sorted(theirs.keys() ^ ours.keys())[0]
        where = "reference" if odd in theirs else "policy"
        raise ValueError(
            f"policy and reference are different models (only the {where} has {odd}): expected one "
            "architecture; a PEFT policy takes no ref_model"
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
        yield name.removeprefix("module."), parameter.detach()  # DDP, DeepSpeed


def _refuse_unmovable(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"reference weight {name} is on meta: load the model first")
        if hasattr(parameter, "ds_id"):
            raise ValueError(
                "TrustRegionCallback does not gather the shards of DeepSpeed ZeRO-3: use ZeRO-2 or "
                "FSDP2, or TRL's sync_ref_model=True"
            )
        if not parameter.is_floating_point():
            raise ValueError(
                f"reference weight {name} is {parameter.dtype}: quantised weights cannot move; "
                "train an adapter and leave ref_model out"
            )


def _is_sharded(trainer: Any) -> bool:
    plugin = getattr(trainer.args, "deepspeed_plugin", None)
    zero3 = plugin is not None and getattr(plugin, "zero_stage", 0) == 3
    return bool(getattr(trainer, "is_fsdp_enabled", False)) or zero3
