"""A trainer runs two steps, and the counter watches."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch.optim.optimizer as torch_optimizer
from torch import Tensor, nn
from torch.utils._pytree import tree_iter
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from tralign_fast.memory import as_on_gpu as gpu
from tralign_fast.memory.live import HOST, LiveTensors, MemoryReport
from tralign_fast.memory.probed_once import probed_once
from tralign_fast.memory.trainers import make_trainer, make_trl_trainer
from tralign_fast.memory.workload import Workload
from tralign_fast.reference.base import ReferencePolicy


def trace(work: Workload, *, as_on_gpu: bool = True, fake: bool = True) -> MemoryReport:
    """Two steps of `TRTrainer.train()` on fake tensors, with an update of the reference between.

    Of several GPUs it is the step of the first, whose shards, gathered layers and own batch are
    counted; the others are made up, and need no process.

    The second step has all that a long run has: the optimizer's states, and a reference that was
    updated and has scored its window.

    Args:
        work: what is trained, and how.
        as_on_gpu: follow the code paths of a GPU; False: those of this machine's CPU.
        fake: False runs the same on real tensors, to check the tracer; of several GPUs in as many
            processes, which torchrun starts.

    Raises:
        ValueError: as `TRConfig` and `TRTrainer` do.
        RuntimeError: of several GPUs, on fake tensors: this process is one of several.
    """
    with traced(work, as_on_gpu, fake) as (live, trainer):
        count_training(live, trainer)
        return live.report()


def trace_segments(work: Workload) -> list[tuple[Any, MemoryReport]]:
    """The peaks of `trace` between the moments when a decoder layer begins, ends, or has the
    gradient of its output, or the optimizer steps: (what begins, which layer or None)."""
    with traced(work, True, True) as (live, trainer):
        for index, layer in enumerate(decoder_layers(trainer.model)):
            _mark(live, layer, index)
        count_training(live, trainer)
        return live.segments()


@contextlib.contextmanager
def traced(work: Workload, as_on_gpu: bool, fake: bool) -> Iterator[tuple[LiveTensors, Any]]:
    """Inside, a trainer of that work and what counts its tensors."""
    with (
        tempfile.TemporaryDirectory() as folder,
        quietly(),
        gpu.as_on_gpu() if as_on_gpu else contextlib.nullcontext(),
        gpu.fake_tensors() if fake else contextlib.nullcontext(),
        probed_once() if fake else contextlib.nullcontext(),
        _young_garbage(),
        _one_of(work.gpus, fake),
        LiveTensors(fake=fake) as live,
        _counting_shards(work.gpus, live),
    ):
        trainer = make_trainer(work, folder)
        trainer.add_callback(_TagReference(trainer.reference, live))
        yield live, trainer


# `one_rank` takes FSDP2 apart by names that are PyTorch's own: only where there are several ranks


def _one_of(ranks: int, fake: bool) -> contextlib.AbstractContextManager[None]:
    if ranks == 1:
        return contextlib.nullcontext()
    from tralign_fast.memory.one_rank import rank_of

    return rank_of(ranks, fake=fake)


def _counting_shards(ranks: int, live: LiveTensors) -> contextlib.AbstractContextManager[None]:
    if ranks == 1:
        return contextlib.nullcontext()
    from tralign_fast.memory.one_rank import shards_counted

    return shards_counted(live)


@contextlib.contextmanager
def _young_garbage() -> Iterator[None]:
    """Inside, the collector passes over what was there before: a look at all that PyTorch and
    transformers have imported takes 0.3 s. What somebody else has frozen stays so."""
    frozen = gc.get_freeze_count() > 0
    gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()


def decoder_layers(model: nn.Module) -> Sequence[nn.Module]:
    """The longest list of modules of one type, which a causal LM's decoder layers are."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    return [*max(lists, key=len, default=nn.ModuleList())]


def _mark(live: LiveTensors, layer: nn.Module, index: int) -> None:
    def ends(module: nn.Module, args: Any, output: Any) -> None:
        live.mark(("ends", index))
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda _: live.mark(("gradient", index)))

    layer.register_forward_pre_hook(lambda *_: live.mark(("begins", index)))
    layer.register_forward_hook(ends)


def trace_trl(work: Workload) -> MemoryReport:
    """Two steps of TRL's trainer on the same rows: padded, the reference resident, its own head.

    Raises:
        ImportError: TRL is not installed.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        quietly(),
        gpu.as_on_gpu(),
        gpu.trl_as_on_gpu(),
        gpu.fake_tensors(),
        LiveTensors(fake=True) as live,
    ):
        trainer = make_trl_trainer(work, folder)
        held = [p for name, p in trainer.model.named_parameters() if ".ref." in name]  # PEFT
        held += [] if trainer.ref_model is None else trainer.ref_model.parameters()
        count_training(live, trainer, held)
        return live.report()


def count_training(live: LiveTensors, trainer: Trainer, reference: Sequence[Tensor] = ()) -> None:
    """Trains, and says what is counted is for. What is sharded is counted once it is."""
    model: Any = trainer.model
    sharded = bool(trainer.args.fsdp)
    live.tag([*model.parameters(), *model.buffers()], "parameters")
    live.tag(reference, "reference")
    for parameter in model.parameters():
        live.weight_shapes.add(tuple(parameter.shape))
        # before gradient release puts its own hook behind this one; of shards FSDP2 makes gradients
        if parameter.requires_grad and not sharded:
            parameter.register_post_accumulate_grad_hook(lambda p: live.tag(p.grad, "gradients"))
    gc.collect()
    live.start()
    if sharded:
        trainer.add_callback(_TagShards(live))

    before: list[str] = []

    def begin(*_: Any) -> None:
        before.append(live.tag_now)
        live.tag_now = "optimizer"
        live.mark(("optimizer", None))

    def end(*_: Any) -> None:
        live.tag_now = before.pop()
        live.mark(("activations", None))

    handles = [
        torch_optimizer.register_optimizer_step_pre_hook(begin),
        torch_optimizer.register_optimizer_step_post_hook(end),
    ]
    try:
        trainer.train()
    finally:
        for handle in handles:
            handle.remove()


class _TagShards(TrainerCallback):
    """Says what the shards of the policy are, once they are made, and starts the count there."""

    def __init__(self, live: LiveTensors) -> None:
        self.live = live

    def on_train_begin(self, args, state, control, model: Any = None, **kwargs) -> None:
        self.live.tag([*model.parameters(), *model.buffers()], "parameters")
        gc.collect()
        self.live.start()


class _TagReference(TrainerCallback):
    """Says what the reference holds, and makes it move after every step, whatever its τ."""

    def __init__(self, reference: ReferencePolicy, live: LiveTensors) -> None:
        self.reference, self.live = reference, live
        schedule = reference.schedule
        self.place = "reference" if reference.on_device else HOST
        if not schedule.is_frozen:
            reference.schedule = dataclasses.replace(schedule, every=1)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._tag()
        # past adapters pile up until their weight is negligible; their bytes do not say when, for
        # they are cut from pieces that one or several of them fill
        while self.reference.grows:
            self.reference.sync()
            self._tag()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._tag()

    def _tag(self) -> None:
        shared = {id(p) for p in self.reference.policy.parameters()}
        held = [t for t in _tensors_of(self.reference) if id(t) not in shared]
        self.live.tag(held, self.place)


def _tensors_of(owner: Any) -> Iterator[Tensor]:
    """All tensors that an object of this package holds, in containers, models and parts of it."""
    for value in tree_iter(list(vars(owner).values())):
        if isinstance(value, nn.Module):
            yield from value.parameters()
        elif isinstance(value, Tensor):
            yield value
        elif type(value).__module__.startswith("tralign_fast.reference."):
            yield from _tensors_of(value) if hasattr(value, "__dict__") else ()


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """No lines of the trainers that are only traced or measured."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
