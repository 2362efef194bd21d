"""Peak memory of a real training step, traced without the memory.

The trainer itself runs, `TRTrainer.train()` from the dataloader to the optimizer and the update of
the reference, under `FakeTensorMode`: tensors have shapes and storages but no data. A dispatch mode
counts the storages that are alive. What it sees is tensors: not the allocator's fragmentation, nor
the workspaces of kernels, nor the CUDA context (about 0.5 GiB).

The machine that traces needs no GPU. Fake tensors of a device that torch was not built for cannot
run a backward, so the tensors say "cpu" and the few places where this library, torch and TRL look
at the device are told that it is a GPU (`_as_on_gpu`): variable-length attention, one logits tile
of `logits_budget_mb`, Triton's in-place tile operations (which allocate nothing), foreach
optimizers.

    with LiveTensors() as live:      # of real tensors too: how the tracer is checked
        ...
    live.report().peak
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.optim.optimizer as torch_optimizer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import TrainerCallback

from tralign_fast import attention, ema, logprobs, modeling

CATEGORIES = (
    "parameters", "gradients", "optimizer", "reference", "activations", "logits tile",
)  # fmt: skip
_HOST = "host"  # counted nowhere
_aten = torch.ops.aten


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of tensors at the moment of the peak, by what they are for; they add up to `peak`."""

    parameters: int
    gradients: int
    optimizer: int  # states, and temporaries of its step
    reference: int
    activations: int  # and everything else
    logits_tile: int
    peak: int


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all storages that come from an operator inside, until they are freed.

    Args:
        fake: the tensors are fake. What the program reads of their data (`.item()`, a bool mask as
            index, `nonzero`) is answered with 1 and "all of them".
    """

    def __init__(self, *, fake: bool = False) -> None:
        super().__init__()
        self.fake = fake
        self.tag_now = "activations"  # what is allocated is tagged so, until `tag` says better
        self.weight_shapes: set[tuple[int, ...]] = set()
        self._events: list[tuple[int, int]] = []  # (serial number, ± bytes)
        self._tags: dict[int, str] = {}
        self._live: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._start = 0

    def add(self, tensor: Tensor) -> int:
        """Counts a tensor's storage, once; returns its serial number."""
        if tensor.layout != torch.strided:  # a tied embedding's gradient on a CPU
            self.add(tensor._indices())
            return self.add(tensor._values())
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._live.get(key)
        if known is not None and known[0]() is storage:
            return known[1]
        size, serial = storage.nbytes(), len(self._tags)

        def freed(reference: weakref.ref[Any]) -> None:
            self._events.append((serial, -size))
            entry = self._live.get(key)
            if entry is not None and entry[0] is reference:
                del self._live[key]

        self._live[key] = (weakref.ref(storage, freed), serial)
        self._events.append((serial, size))
        tag = self.tag_now
        if tag == "logits tile" and tuple(tensor.shape) in self.weight_shapes:
            tag = "gradients"  # of the LM head, or TRL's fp32 sum of it
        self._tags[serial] = tag
        return serial

    def tag(self, tensors: Any, tag: str) -> None:
        """Says what storages are for, from their beginning."""
        for tensor in tree_iter(tensors):
            if isinstance(tensor, Tensor):
                self._tags[self.add(tensor)] = tag

    @contextlib.contextmanager
    def tagging(self, tag: str) -> Iterator[None]:
        before, self.tag_now = self.tag_now, tag
        try:
            yield
        finally:
            self.tag_now = before

    def start(self) -> None:
        """The peak is looked for from here on."""
        self._start = len(self._events)

    def report(self) -> MemoryReport:
        sums: dict[str, int] = dict.fromkeys((*CATEGORIES, _HOST), 0)
        peak, at_peak = -1, sums
        for index, (serial, size) in enumerate(self._events):
            sums[self._tags[serial]] += size
            total = sum(sums.values()) - sums[_HOST]
            if index >= self._start - 1 and total > peak:
                peak, at_peak = total, sums.copy()
        return MemoryReport(
            **{name.replace(" ", "_"): at_peak[name] for name in CATEGORIES}, peak=peak
        )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        body = _BODIES.get(func)
        if body is not None:
            # the operator's own code, so that what it allocates inside is seen
            with self, self.tagging("logits tile"), torch.no_grad():
                return body(*args, **kwargs)
        if self.fake:
            if func in (_aten.item.default, _aten._local_scalar_dense.default):
                return _one(args[0].dtype)
            if func is _aten.nonzero.default:
                func, args = _aten.new_zeros.default, (args[0], [args[0].numel(), args[0].dim()])
                kwargs = {"dtype": torch.int64}
            if func is _aten.index.Tensor and args[1][0].dtype == torch.bool:
                func, args = _aten.clone.default, (args[0].flatten(0, args[1][0].dim() - 1),)
        output = func(*args, **kwargs)
        for tensor in tree_iter(output):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return output


_BODIES: dict[Any, Callable[..., Any]] = {
    torch.ops.tralign_fast.linear_logprobs.default: logprobs._linear_logprobs_op._init_fn,
    torch.ops.tralign_fast.linear_logprobs_backward.default: (
        logprobs._linear_logprobs_backward_op._init_fn
    ),
}


def _one(dtype: torch.dtype) -> Any:
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1


# --- what is trained ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """A model and what it is trained on, in the form that both trainers can be given.

    Args:
        model: config of a transformers causal LM.
        pairs: preference pairs of a batch (KTO: rows).
        tokens: of the packed row in all. A pair is `[prompt | chosen | rejected]`, half of it
            prompt, a quarter each completion: an unshared padded batch has 1.5 times as many.
        dtype: of the weights, "bfloat16" or "float32" (then under bf16 autocast).
        lora_rank: adapters on every linear layer but the head (PEFT's "all-linear"); None: full
            fine-tuning.
        lora_dtype: of the adapters; PEFT's own default beside bf16 weights is "float32".
        base_bits: 16, or 4: the linear layers of the base are bitsandbytes' NF4.
        options: of `TRConfig`.
    """

    model: Any
    pairs: int = 2
    tokens: int = 4096
    dtype: str = "bfloat16"
    lora_rank: int | None = None
    lora_dtype: str = "bfloat16"
    base_bits: int = 16
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.pairs < 1 or self.tokens < 4 * self.pairs:
            raise ValueError(
                f"tokens={self.tokens}, pairs={self.pairs}: expected at least 4 tokens a pair"
            )
        for name in ("dtype", "lora_dtype"):
            if getattr(self, name) not in ("bfloat16", "float32"):
                raise ValueError(
                    f"{name}: expected bfloat16 or float32, got {getattr(self, name)!r}"
                )
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"lora_rank must be at least 1, got {self.lora_rank}")
        if self.base_bits not in (4, 16):
            raise ValueError(f"base_bits: expected 16 or 4, got {self.base_bits}")
        if self.base_bits == 4 and self.lora_rank is None:
            raise ValueError("base_bits=4: a quantised base cannot be trained; set lora_rank")

    @property
    def paired(self) -> bool:
        return self.options.get("loss_type", "dpo") != "kto"

    def rows(self) -> list[dict[str, Any]]:
        """Tokenised rows of two batches."""
        pair = self.tokens // self.pairs
        completion = pair // 4
        prompt = [0] * (pair - 2 * completion)
        ids = [0] * completion
        rows = []
        for row in range(2 * self.pairs):
            own = {"chosen_ids": ids, "rejected_ids": ids}
            if not self.paired:
                # TRL's name for the completion of another prompt, which it takes ready made
                own = {"completion_ids": ids, "KL_completion_ids": ids, "label": row % 2 == 0}
            rows.append({"row": row, "prompt_ids": prompt, **own})
        return rows

    def build(self) -> Any:
        """The policy, on fake tensors inside `FakeTensorMode`."""
        from transformers import AutoModelForCausalLM

        dtype = getattr(torch, self.dtype)
        model = AutoModelForCausalLM.from_config(
            self.model, dtype=dtype, attn_implementation="sdpa"
        )
        if self.base_bits == 4:
            _quantise(model)
        if self.lora_rank is not None:
            from peft import LoraConfig, get_peft_model

            config = LoraConfig(
                r=self.lora_rank, lora_alpha=self.lora_rank, target_modules="all-linear",
                task_type="CAUSAL_LM",
            )  # fmt: skip
            model = get_peft_model(model, config)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(getattr(torch, self.lora_dtype))
        return model

    def arguments(self, folder: str) -> dict[str, Any]:
        """Options that `TRConfig` and TRL's configs share: two steps, and nothing written."""
        return {
            "output_dir": folder,
            "max_steps": 2,
            "per_device_train_batch_size": self.pairs,
            "gradient_checkpointing": True,
            "use_cpu": True,
            "bf16": self.dtype == "float32",
            "max_length": None,
            "train_sampling_strategy": "sequential",
            "dataloader_pin_memory": False,
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            **self.options,
        }


def trace(work: Workload, *, as_on_gpu: bool = True, fake: bool = True) -> MemoryReport:
    """Two steps of `TRTrainer.train()` on fake tensors, with an update of the reference between.

    The second step has all that a long run has: the optimizer's states, and a reference that was
    updated and has scored its window.

    Args:
        work: what is trained, and how.
        as_on_gpu: follow the code paths of a GPU; False: those of this machine's CPU.
        fake: False runs the same on real tensors, to check the tracer.

    Raises:
        ValueError: as `TRConfig` and `TRTrainer` do.
    """
    from datasets import Dataset

    from tralign_fast.config import TRConfig
    from tralign_fast.trainer import TRTrainer

    class Traced(TRTrainer):
        def _tokenize(self, dataset, args, name):
            return dataset  # it is

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.enter_context(_quietly())
        config = TRConfig(**work.arguments(folder))
        rows = Dataset.from_list(work.rows())
        if as_on_gpu:
            stack.enter_context(_as_on_gpu())
        live = _enter(stack, fake)
        trainer = Traced(
            work.build(), args=config, train_dataset=rows, processing_class=_tokenizer()
        )
        trainer.add_callback(_TagReference(trainer.reference, live))
        return _count_training(live, trainer)


class _TagReference(TrainerCallback):
    """Says what the reference holds, and makes it move after every step, whatever its τ."""

    def __init__(self, reference: Any, live: LiveTensors) -> None:
        self.reference, self.live = reference, live
        schedule = reference.schedule
        on_device = reference.name == "adapter" and schedule.every == 1
        self.place = "reference" if on_device or reference.name == "resident" else _HOST
        if not schedule.is_frozen:
            reference.schedule = dataclasses.replace(schedule, every=1)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        held = -1
        # past adapters on the device pile up until their weight is negligible
        while held < (held := self._tag()) and self.reference.name == "adapter":
            self.reference.sync()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._tag()

    def _tag(self) -> int:
        """Bytes that the reference holds itself."""
        shared = {id(p) for p in self.reference.policy.parameters()}
        held = [t for t in _tensors_of(self.reference) if id(t) not in shared]
        self.live.tag(held, self.place)
        return sum(
            {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in held}.values()
        )


def _tensors_of(owner: Any) -> Iterator[Tensor]:
    """All tensors that an object of this package holds, in containers, models and parts of it."""
    for value in tree_iter(list(vars(owner).values())):
        if isinstance(value, nn.Module):
            yield from value.parameters()
        elif isinstance(value, Tensor):
            yield value
        elif type(value).__module__.startswith("tralign_fast.reference."):
            yield from _tensors_of(value) if hasattr(value, "__dict__") else ()


def trace_trl(work: Workload) -> MemoryReport:
    """Two steps of TRL's trainer on the same rows: padded, the reference resident, its own head.

    Raises:
        ImportError: TRL is not installed.
    """
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

    config_class: Any = DPOConfig if work.paired else KTOConfig
    base: Any = DPOTrainer if work.paired else KTOTrainer

    class Traced(base):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.enter_context(_quietly())
        arguments = work.arguments(folder)
        ours = ("reference", "gradient_release", "logits_budget_mb", "adapter_tolerance")
        arguments = {k: v for k, v in arguments.items() if k not in ours}
        # TRL refuses a moving reference with PEFT: its reference is the base then
        arguments["sync_ref_model"] = work.lora_rank is None
        arguments["loss_type"] = {"dpo": "sigmoid"}.get(
            arguments.get("loss_type", "dpo"), arguments.get("loss_type")
        )
        rows = Dataset.from_list(work.rows())
        stack.enter_context(_as_on_gpu())
        stack.enter_context(_trl_as_on_gpu())
        live = _enter(stack, True)
        trainer = Traced(
            work.build(),
            ref_model=work.build() if work.lora_rank is None else None,
            args=config_class(**arguments),
            train_dataset=rows,
            processing_class=_tokenizer(),
        )
        held = [p for name, p in trainer.model.named_parameters() if ".ref." in name]  # PEFT
        held += [] if trainer.ref_model is None else trainer.ref_model.parameters()
        return _count_training(live, trainer, held)


def _enter(stack: contextlib.ExitStack, fake: bool) -> LiveTensors:
    if fake:
        stack.enter_context(FakeTensorMode())
        stack.enter_context(mock.patch.object(nn.Module, "_apply", _apply))
        # a copied model stays in this mode
        same = mock.patch.object(FakeTensorMode, "__deepcopy__", lambda m, _: m, create=True)
        stack.enter_context(same)
    return stack.enter_context(LiveTensors(fake=fake))


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """`Module.to` for fake parameters: torch's swaps objects, and refuses where a weak reference
    is held, as fake tensors hold one."""
    for child in module.children() if recurse else ():
        child._apply(function)
    for parameter in module._parameters.values():
        if parameter is not None:
            with torch.no_grad():
                parameter.data = function(parameter)
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else function(buffer)
    return module


def _count_training(
    live: LiveTensors, trainer: Any, reference: Sequence[Tensor] = ()
) -> MemoryReport:
    model = trainer.model
    live.tag([*model.parameters(), *model.buffers()], "parameters")
    live.tag(reference, "reference")
    for parameter in model.parameters():
        live.weight_shapes.add(tuple(parameter.shape))
        if parameter.requires_grad:  # before gradient release puts its own hook behind this one
            parameter.register_post_accumulate_grad_hook(lambda p: live.tag(p.grad, "gradients"))
    gc.collect()
    live.start()

    def tags(tag: str) -> Callable[..., None]:
        return lambda *_: setattr(live, "tag_now", tag)

    handles = [
        torch_optimizer.register_optimizer_step_pre_hook(tags("optimizer")),
        torch_optimizer.register_optimizer_step_post_hook(tags("activations")),
    ]
    try:
        trainer.train()
    finally:
        for handle in handles:
            handle.remove()
    return live.report()


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<pad>", bos_token="<pad>"
    )


# --- as on a GPU ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _as_on_gpu() -> Iterator[None]:
    """Inside, tensors on the CPU take the code paths of tensors on a GPU."""

    def varlen(query: Tensor, softcap: float | None, dropout: float) -> Any:
        return None if query.dtype == torch.float32 else attention._torch_varlen

    def nothing(*args: Any, **kwargs: Any) -> None:
        """Triton's operations on tiles and reference weights: in place, no allocation."""

    def tile_operations(backend: str) -> Any:
        return nothing, nothing

    def devices() -> list[str]:
        return ["cpu", "cuda"]

    with (
        mock.patch.object(attention, "_varlen_function", varlen),
        mock.patch.object(logprobs, "_CPU_TILE_BYTES", 1 << 62),
        mock.patch.object(logprobs, "_tile_ops", tile_operations),
        mock.patch.object(ema, "_foreach_update_", nothing),
        mock.patch.object(modeling, "_lighten_tied_embedding", nothing),
        mock.patch.object(torch_optimizer, "_get_foreach_kernels_supported_devices", devices),
    ):
        yield


@contextlib.contextmanager
def _trl_as_on_gpu() -> Iterator[None]:
    """TRL's chunked LM head: Triton tile operations, and cuBLAS products with an fp32 sum."""
    from trl.kernels import chunked_logprob

    def nothing(*args: Any, **kwargs: Any) -> None:
        """Triton's tile operations, and a product added to its sum by cuBLAS."""

    def yes(device: torch.device) -> bool:
        return True

    class Kernel:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return nothing

    function = chunked_logprob.ChunkedLogProbFunction

    def tagged(method: Callable[..., Any]) -> Any:
        def call(*args: Any) -> Any:
            live = _innermost_counter()
            with live.tagging("logits tile"):
                return method(*args)

        return staticmethod(call)

    with (
        mock.patch.object(chunked_logprob, "_use_triton", yes),
        mock.patch.object(chunked_logprob, "_forward_kernel", Kernel()),
        mock.patch.object(chunked_logprob, "_backward_kernel", Kernel()),
        mock.patch.object(chunked_logprob, "_addmm_fp32", nothing),
        mock.patch.object(function, "forward", tagged(function.forward)),
        mock.patch.object(function, "backward", tagged(function.backward)),
    ):
        yield


def _innermost_counter() -> LiveTensors:
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    modes = [m for m in _get_current_dispatch_mode_stack() if isinstance(m, LiveTensors)]
    return modes[-1]


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """No lines of the trainers that are only traced."""
    import io
    import warnings

    from transformers.utils import logging

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


def _quantise(model: Any) -> None:
    """Linear layers but the head become bitsandbytes' NF4 with compressed statistics (4.13 bits a
    weight), without data: real quantisation needs some."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit, modules

    # a plain parameter: a subclass of Tensor cannot be fake
    def plain(data: Tensor, **_: Any) -> Any:
        return nn.Parameter(data, requires_grad=False)

    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is not nn.Linear or layer is model.get_output_embeddings():
                continue
            dtype, numel = layer.weight.dtype, layer.weight.numel()
            with mock.patch.object(modules, "Params4bit", plain):
                quantised = Linear4bit(
                    layer.in_features, layer.out_features, bias=False, compute_dtype=dtype,
                    quant_type="nf4",
                )  # fmt: skip
            quantised.bias = layer.bias
            statistics = QuantState(
                torch.empty(-(-numel // (64 * 256))), code=torch.empty(256), blocksize=256,
                dtype=torch.float32,
            )  # fmt: skip
            weight = plain(torch.empty(-(-numel // 2), 1, dtype=torch.uint8))
            weight.quant_state = QuantState(
                torch.empty(-(-numel // 64), dtype=torch.uint8), layer.weight.shape,
                code=torch.empty(16), blocksize=64, quant_type="nf4", dtype=dtype,
                offset=torch.empty(()), state2=statistics,
            )  # fmt: skip
            weight.compress_statistics, weight.quant_type = True, "nf4"
            quantised.weight = weight
            quantised.support_avx512bf16_for_cpu = False
            setattr(parent, name, quantised)
    model.is_loaded_in_4bit = True
