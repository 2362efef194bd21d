"""The models of a run: the policy made ready, the second model of its reference, and their undo."""

from __future__ import annotations

import contextlib
import copy
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from tralign_fast.data.packing import PreferenceCollator
from tralign_fast.distributed.processes import (
    check_distribution,
    distribute_frozen,
    prepare_on_all,
    take_over_compilation,
)
from tralign_fast.distributed.shards import check_release
from tralign_fast.distributed.tensor_parallel import (
    check_layers,
    copy_sharded,
    is_sharded_by_transformers,
)
from tralign_fast.model.patching import causal_lm_of, lm_head_of
from tralign_fast.ops.backend import pick_backend, warn_once
from tralign_fast.ops.logprobs import is_cut
from tralign_fast.ops.powers import keeps_powers
from tralign_fast.ops.transform import LogitTransform
from tralign_fast.reference import build_reference, reference_class
from tralign_fast.reference.base import ReferencePolicy
from tralign_fast.reference.sharding import gathered
from tralign_fast.training.config import TRConfig
from tralign_fast.training.once import quick_parameters
from tralign_fast.training.option_conflicts import UNGRAPHED


class RunModels:
    """What a run makes of the models that it was given.

    Args:
        policy: the model to train.
        start: the first reference, a model of its own; None: the policy as it is.
        place: where the reference lives, a name of `REFERENCES`.
        collator: a `PreferenceCollator` gets the layout that the policy can run.

    Attributes:
        reference: the reference, of that place.
        initial: a copy of the policy as it was, for `log_kl_initial`; else None.
        prepared: closing it gives the models back as they were. It holds none of them alive.
    """

    reference: ReferencePolicy

    def __init__(
        self,
        accelerator: Accelerator,
        args: TRConfig,
        policy: PreTrainedModel,
        start: PreTrainedModel | None,
        place: str,
        collator: Any,
    ) -> None:
        self._accelerator = accelerator
        self._args = args
        self.prepared = contextlib.ExitStack()
        kind = reference_class(place)
        check_distribution(accelerator, kind, policy)
        if args.gradient_release:
            check_release(accelerator, args.optim)
        check_layers(policy, start, args)
        self._compile_options = take_over_compilation(accelerator, args)
        # copies of the policy are made before it is prepared
        if kind.needs_second_model and start is None:
            start = _copy(policy)
        self.initial = _copy(policy).eval() if args.log_kl_initial else None
        checkpointed = args.gradient_checkpointing_layers if args.gradient_checkpointing else None
        packs = self._prepare(policy, checkpointed)
        self.prepared.callback(quick_parameters(policy))
        if isinstance(collator, PreferenceCollator):
            shared = "shared" if args.prefix_sharing else "packed"
            collator.layout = shared if packs else "padded"
            if args.packing and not packs and args.token_budget is not None:
                warn_once(
                    f"token_budget={args.token_budget} counts tokens without padding, and the rows "
                    "of this model are padded: they are longer"
                )
        wrapped: nn.Module | None = start
        if start is not None and (kind.needs_second_model or kind.runs_start):
            wrapped = self._prepare_frozen(start, kept=kind.needs_second_model)
        if self.initial is not None:
            self._prepare(self.initial)
        self.reference = build_reference(place, policy, wrapped, args)

    def _prepare(self, model: PreTrainedModel, checkpointed: float | None = None) -> bool:
        """Lets the model return log-probs; whether it can take packed rows."""
        names = ("packing", "logits_budget_mb", "vocab_filter")
        options = {name: getattr(self._args, name) for name in names}
        options["cuda_graphs"] = _cuda_graphs(self._accelerator, self._args)
        options["layer_kernels"] = self._args.kinds_of_layer_kernels
        options["kept"] = _kept(self._args, model)
        options["checkpointed_layers"] = checkpointed
        prepared = prepare_on_all(self._accelerator, model, **options)
        self.prepared.callback(prepared.undo)
        if self._compile_options is not None:
            prepared.compile_layers(**self._compile_options)
        return prepared.packs

    def _prepare_frozen(self, model: PreTrainedModel, kept: bool) -> nn.Module:
        """A second model that runs beside the policy, and as the policy does."""
        self._prepare(model)
        return distribute_frozen(self._accelerator, model, kept)


def _kept(args: TRConfig, model: PreTrainedModel) -> str:
    """`prepare_model`'s option: as asked, or logits, with the notice at the start of the run."""
    weight = getattr(lm_head_of(causal_lm_of(model)), "weight", None)
    if args.kept == "logits" or weight is None:  # a head that is refused when it is prepared
        return args.kept
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else model.dtype
    keeps = keeps_powers(
        args.kept, True, pick_backend("auto", args.device), dtype, weight,
        LogitTransform.of_config(model.config),
        {"vocab_filter": args.vocab_filter, "a head cut up": is_cut(weight)},
    )  # fmt: skip
    return "powers" if keeps else "logits"


def _cuda_graphs(accelerator: Accelerator, args: TRConfig) -> bool | None:
    """`prepare_model`'s option: no graph holds what others do to gradients or saved tensors."""
    if any(getattr(args, name) for name in UNGRAPHED):
        return False
    if accelerator.num_processes == 1 and accelerator.distributed_type.value in ("NO", "MULTI_GPU"):
        return args.cuda_graphs
    if args.cuda_graphs:
        warn_once("cuda_graphs=True has no effect: graphs are of one process without DeepSpeed")
    return False


def activation_offloading(model: nn.Module, args: TRConfig) -> AbstractContextManager[Any]:
    """What a forward and its backward run in, so that saved tensors wait in the host's memory.

    TRL's, which leaves out parameters and the LM head, and copies beside the computation.

    Raises:
        ValueError: TRL is not installed.
    """
    if not args.activation_offloading:
        return contextlib.nullcontext()
    if args.device.type == "cpu":
        warn_once("activation_offloading does nothing on a CPU, whose activations are there anyway")
        return contextlib.nullcontext()
    try:
        from trl.models import get_act_offloading_ctx_manager
    except ImportError as error:
        raise ValueError("activation_offloading needs TRL: pip install trl") from error
    return get_act_offloading_ctx_manager(model=model)


def _copy(model: PreTrainedModel) -> PreTrainedModel:
    if is_sharded_by_transformers(model):
        return copy_sharded(model)
    with gathered(model):
        return copy.deepcopy(model)
