"""A moving reference for any `transformers.Trainer`, TRL's included."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tralign_fast.extras import explained
from tralign_fast.ops.backend import warn_once
from tralign_fast.ops.ema import ema_update_, is_quantised, local_shard
from tralign_fast.reference import TrustRegion
from tralign_fast.reference.merged import follow_merged_, has_adapters, merged_weights
from tralign_fast.reference.second import refuse_shared
from tralign_fast.reference.sharding import is_sharded, reshard

try:
    from safetensors import SafetensorError
    from transformers import TrainerCallback, TrainerState, TrainingArguments

    from tralign_fast.reference.adapter import AdapterReference
    from tralign_fast.reference.base import load_generator, save_generator
    from tralign_fast.reference.offloaded import OffloadedReference
    from tralign_fast.reference.shard_files import load_tensors, save_tensors
except ModuleNotFoundError as error:
    raise explained("TrustRegionCallback", error) from None

# Inside a checkpoint, beside the policy: TRL forgets where its reference was.
FOLDER = "reference"
_FILE = "model.safetensors"
# What activation checkpointing and torch.compile put into the names of parameters.
_WRAPPER_NAMES = ("_checkpoint_wrapped_module.", "_orig_mod.")


# model -> (the state of the run, the callback) that moves it: two in a run would move it twice
_movers: weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref, weakref.ref]] = (
    weakref.WeakKeyDictionary()
)


class HoldingTrainer(Protocol):
    """What the callback asks of a trainer; a `ref_model`, if it has one, is its reference."""

    args: Any
    model: Any
    callback_handler: Any


class TrustRegionCallback(TrainerCallback):
    """`π_ref ← α·π_θ + (1-α)·π_ref` after every `every` optimizer steps.

        trainer.add_callback(TrustRegionCallback(0.6, 512, trainer=trainer))

    does what TRL's `sync_ref_model=True` does, in one fused pass over the weights, and

    - in bf16 without bias: rounded to nearest, as TRL has it, a bf16 reference makes a third of its
      way or less at α = 0.01 (`benchmarks.ema`);
    - for PEFT policies, which TRL refuses. Their reference is the base with the adapter switched
      off; from here on `disable_adapter` of this model means the moved reference instead
      (`AdapterReference`: exact, LoRA factors only; α = 1 follows any kind of adapter). With a
      `ref_model`, a whole model, this follows the policy's merged weights `W + s·B·A` instead, a
      layer at a time, and B·A is never in memory (`lora_merge_`: plain LoRA, on experts too,
      `modules_to_save`);
    - for FSDP2: each process moves its own shards, nothing is communicated. TRL shards its
      reference itself; elsewhere shard yours as the policy is, before training:
      `accelerate.utils.fsdp_utils.fsdp2_prepare_model(trainer.accelerator, ref_model)`;
    - through checkpoints: the reference is saved in them, and found again on a resume (its shards
      are written by `torch.distributed.checkpoint`, and read by any number of processes). Which
      checkpoint `train` is given is told to nobody but `train`: with `trainer=` this stands before
      it and listens, until `detach()`.

    Args:
        alpha, every: α in [0, 1] and τ, as in `TrustRegion` (α = 1 is the hard update; τ under 1 is
            a share of the run).
        trainer: whose `ref_model` (or, without one, whose PEFT policy's reference) moves.
        ref_model: the reference itself, for a trainer that does not call it `ref_model`.
        rounding, seed: of bf16 and fp16 references, as in `ema_update_`. The seed is the same on
            all processes, so that replicas stay equal.
        save: whether checkpoints hold the reference (the size of its weights).

    Raises:
        ValueError: there is no reference that could move, it is the policy itself, another callback
            moves it, or (when training starts) it is not sharded as the policy is, or a resumed
            checkpoint holds a part of a reference or (with `ref_model=`) is in
            a folder that neither `args.output_dir` nor `args.resume_from_checkpoint` names.
    """

    def __init__(
        self,
        alpha: float = 0.6,
        every: float = 512,
        *,
        trainer: HoldingTrainer | None = None,
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
        self._resumed_from: Path | None = None  # as train() was told
        self._noting_train: Any = None
        if trainer is not None:
            self._check_trainer()
            ref_model = getattr(trainer, "ref_model", None)
        self._reference: _ModelReference | _PeftReference
        if ref_model is not None:
            self._reference = _ModelReference(ref_model, self.schedule.alpha, **options)
            # on meta outside the first process until FSDP fills it: looked at when training starts
            if trainer is not None and not _will_be_sharded(trainer):
                self._reference.check(trainer.model)
        elif trainer is not None and hasattr(trainer.model, "peft_config"):
            self._reference = _PeftReference(trainer, self.schedule, **options)
        else:
            raise ValueError(
                f"{type(trainer).__name__} has no reference model to move: give the trainer a "
                "ref_model, or TrustRegionCallback ref_model="
            )
        if trainer is not None:
            self._listen_to_train()

    def _listen_to_train(self) -> None:
        """Notes which checkpoint `trainer.train` is given: no event of a callback tells it."""
        train = getattr(self._trainer, "train", None)
        if train is None:
            return

        @functools.wraps(train)
        def noting_train(*args: Any, **kwargs: Any) -> Any:
            given = kwargs.get("resume_from_checkpoint", args[0] if args else None)
            self._resumed_from = Path(given) if isinstance(given, str | os.PathLike) else None
            return train(*args, **kwargs)

        self._noting_train = vars(self._trainer)["train"] = noting_train

    def _check_trainer(self) -> None:
        self._refuse_second_mover()
        assert self._trainer is not None
        args, name = self._trainer.args, type(self._trainer).__name__
        plugin = getattr(getattr(self._trainer, "accelerator", None), "state", None)
        plugin = getattr(plugin, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version == 1:
            raise ValueError(
                f'{name}: FSDP version 1 is not supported: set fsdp_config={{"version": 2}}'
            )
        if getattr(args, "precompute_ref_log_probs", False):
            raise ValueError(
                f"{name}: precompute_ref_log_probs=True scores a reference that never moves; set "
                "it to False"
            )
        if getattr(args, "beta", None) == 0.0:
            raise ValueError(f"{name}: beta=0 uses no reference; set beta > 0 to move one")

    def _refuse_second_mover(self) -> None:
        assert self._trainer is not None
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
        self.schedule = self.schedule.of_run(state.max_steps)
        if self.schedule.is_frozen:
            return
        self._claim(args, state)
        self._reference.check(model)
        if state.global_step == 0:
            return
        folder = self._resumed_folder(args, state)
        if folder.is_dir():
            self._reference.load(folder)
            return
        warn_once(
            f"{folder} holds no reference: the run goes on from the one that the trainer was built "
            "with"
        )

    def _resumed_folder(self, args: Any, state: Any) -> Path:
        """Where the checkpoint that is resumed has its reference, if it has one."""
        if self._resumed_from is not None:
            return self._resumed_from / FOLDER
        folders = [_folder(args, state)]
        if isinstance(named := getattr(args, "resume_from_checkpoint", None), str):
            folders.append(Path(named) / FOLDER)  # another run's, perhaps
        # train()'s argument may name a third; the state is that of its file
        own = [folder for folder in folders if _is_of(folder.parent, state)]
        if not own and self._save:
            raise ValueError(
                f"TrustRegionCallback: train() resumes step {state.global_step} from a checkpoint "
                f"that is not {' or '.join(str(f.parent) for f in folders)}, so its reference is "
                "not found: pass trainer=, or name it in args.resume_from_checkpoint"
            )
        return next((folder for folder in own if folder.is_dir()), (own or folders)[0])

    def _claim(self, args: Any, state: Any) -> None:
        """Makes this the one that moves the reference in the run of `state`."""
        if getattr(args, "sync_ref_model", False):
            raise ValueError(
                "TrustRegionCallback: the trainer moves a reference itself: set "
                "sync_ref_model=False"
            )
        run, other = (ref() for ref in _movers.get(self._reference.model, (lambda: None,) * 2))
        if run is state and other is not None and other is not self:
            raise ValueError(
                "another TrustRegionCallback moves this reference already: keep one of them"
            )
        _movers[self._reference.model] = weakref.ref(state), weakref.ref(self)

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if self.schedule.should_sync(state.global_step):
            assert model is not None
            self._reference.move(model)
            self.syncs += 1

    def on_save(self, args, state, control, **kwargs) -> None:
        writes = args.should_save or self._reference.is_sharded  # each process its own shards
        if self._save and writes and not self.schedule.is_frozen:
            self._reference.save(_folder(args, state))

    def detach(self) -> None:
        """Gives a PEFT policy its own `disable_adapter` back, and a trainer its own `train`."""
        self._reference.detach()
        if self._trainer is not None and vars(self._trainer).get("train") is self._noting_train:
            vars(self._trainer).pop("train", None)


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / FOLDER


def _is_of(checkpoint: Path, state: TrainerState) -> bool:
    """Whether a state was read from that checkpoint: of its step, with its history."""
    try:
        saved = json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    keys = ("global_step", "log_history")
    here = {key: getattr(state, key) for key in keys}
    # as text: NaN equals itself
    return json.dumps({key: saved.get(key) for key in keys}) == json.dumps(here)


class _ModelReference:
    """A second model, whole: it follows the policy's weights, those of a LoRA policy merged."""

    def __init__(self, model: nn.Module, alpha: float, *, rounding: str, seed: int) -> None:
        _refuse_unmovable(model)
        self.model = model
        self.alpha = alpha
        self.rounding: Any = rounding
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def is_sharded(self) -> bool:
        return is_sharded(self.model)

    def check(self, policy: Any) -> None:
        refuse_shared(self.model, policy)
        if not self._merges(policy):
            matching_parameters(self.model, policy)
            return
        if is_sharded(policy):
            raise ValueError(
                "TrustRegionCallback: a ref_model follows a LoRA policy whose factors are whole: "
                "train it with DDP or ZeRO-2"
            )
        merged_weights(list(_named(self.model)), policy)

    def move(self, policy: Any) -> None:
        options = {"rounding": self.rounding, "generator": self.generator}
        if self._merges(policy):
            follow_merged_(list(_named(self.model)), policy, self.alpha, **options)
            return
        refs, thetas = matching_parameters(self.model, policy)
        ema_update_(refs, thetas, self.alpha, **options)

    def _merges(self, policy: Any) -> bool:
        if not has_adapters(policy):
            return False
        if not has_adapters(self.model):
            return True
        if self.alpha < 1.0:
            raise ValueError(
                f"TrustRegionCallback: alpha={self.alpha} would mix the factors of two adapters, "
                "not their weights: pass a ref_model without an adapter, or leave it out"
            )
        return False

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = dict(_named(self.model))
        save_tensors(folder / _FILE, tensors, tensors)
        save_generator(self.generator, folder)

    def load(self, folder: Path) -> None:
        named = dict(_named(self.model))
        try:
            saved = load_tensors(folder / _FILE, named)
            if missing := min(named.keys() - saved.keys(), default=None):
                raise ValueError(f"it has no {missing}")
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"{folder} holds no whole reference ({str(error).splitlines()[0]}): resume from "
                "another checkpoint"
            ) from error
        with torch.no_grad():
            for name, parameter in named.items():
                local_shard(parameter).copy_(saved[name])
        load_generator(self.generator, folder)

    def detach(self) -> None:
        pass


class _PeftReference:
    """What a trainer finds when it switches the policy's adapter off."""

    is_sharded = False

    def __init__(self, trainer: HoldingTrainer, schedule: TrustRegion, **options: Any) -> None:
        if _will_be_sharded(trainer):
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
                    f"alpha={schedule.alpha} mixes LoRA and its like only ({error}); "
                    "TrustRegionCallback(alpha=1) follows any adapter"
                ) from error
            self.held = OffloadedReference(self.model, TrustRegion(1.0, 1), **options)
        # TRL copies a pretrained adapter to "ref" and prefers it: the same start as ours
        if "ref" in self.model.peft_config:
            self.model.delete_adapter("ref")
        self._layers = _adapted_layers(self.model)
        self.model.disable_adapter = self._as_reference

    @contextlib.contextmanager
    def _as_reference(self) -> Iterator[None]:
        """Inside, the policy's modules compute the reference. An adapter that PEFT merges into the
        base would be in both."""
        if any(layer.merged for layer in self._layers):
            raise ValueError(
                "disable_adapter: the policy's adapter is merged into the base weights, which the "
                "reference shares: call unmerge_adapter() first"
            )
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.held.weights())
            for layer in self._layers:
                outer = layer.__dict__.get("merge")  # a context inside another
                layer.merge = _refuse_merge
                stack.callback(_give_back, layer, outer)
            yield

    def check(self, policy: Any) -> None:
        pass

    def move(self, policy: Any) -> None:
        self.held.move()

    def save(self, folder: Path) -> None:
        self.held.save(folder)

    def load(self, folder: Path) -> None:
        self.held.load(folder)

    def detach(self) -> None:
        self.model.__dict__.pop("disable_adapter", None)


def _adapted_layers(model: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]


def _refuse_merge(*args: Any, **kwargs: Any) -> None:
    raise ValueError(
        "merge_adapter() inside disable_adapter() would put the policy's adapter into the base "
        "weights of the reference: merge outside of it"
    )


def _give_back(layer: Any, merge: Any) -> None:
    del layer.merge
    if merge is not None:
        layer.merge = merge


def matching_parameters(ref: nn.Module, policy: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters of two models of one architecture, wrapped or not, in one order.

    Raises:
        ValueError: the models differ, or a pair lies on two devices or is sharded in two ways.
    """
    theirs, ours = dict(_named(ref)), dict(_named(policy))
    if theirs.keys() != ours.keys():
        odd = sorted(theirs.keys() ^ ours.keys())[0]
        where = "reference" if odd in theirs else "policy"
        raise ValueError(
            f"policy and reference are different models (only the {where} has {odd}): expected one "
            "architecture"
        )
    for name, tensor in ours.items():
        mine, other = (tuple(local_shard(t).shape) for t in (tensor, theirs[name]))
        if mine != other:
            sharded = any(hasattr(t, "to_local") for t in (tensor, theirs[name]))
            raise ValueError(
                f"{name}: this process holds {mine} of the policy and {other} of the reference: "
                + (
                    "shard both alike, with accelerate.utils.fsdp_utils.fsdp2_prepare_model("
                    "trainer.accelerator, ref_model)"
                    if sharded
                    else "expected one architecture"
                )
            )
        if tensor.device != theirs[name].device:
            raise ValueError(
                f"{name} is on {tensor.device}, its reference on {theirs[name].device}: put both "
                "models on one device"
            )
    return list(theirs.values()), [ours[name] for name in theirs]


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Shards where FSDP2 has them: after a forward without backward some are still gathered."""
    reshard(model)
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
        if is_quantised(parameter):
            raise ValueError(
                f"reference weight {name} is {parameter.dtype}: quantised weights cannot move; "
                "train an adapter and leave ref_model out"
            )


def _will_be_sharded(trainer: HoldingTrainer) -> bool:
    plugin = getattr(trainer.args, "deepspeed_plugin", None)
    zero3 = plugin is not None and getattr(plugin, "zero_stage", 0) == 3
    return bool(getattr(trainer, "is_fsdp_enabled", False)) or zero3
