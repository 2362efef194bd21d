"""Options of a training run: TRL's names where TRL has the concept."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import warnings
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from transformers import TrainingArguments

from tralign_fast.data.tokenization import ON_BAD_ROWS
from tralign_fast.model.layer_kernels import LAYER_KERNELS, kinds_of_liger
from tralign_fast.ops.backend import device_kind, warn_once
from tralign_fast.ops.losses import LOSSES
from tralign_fast.ops.objective import DIVERGENCES, Objective, Range, objective_of
from tralign_fast.ops.powers import KEPT
from tralign_fast.reference import REFERENCES, TrustRegion
from tralign_fast.training.gradient_release import check_releasable
from tralign_fast.training.option_conflicts import check_best_model, check_conflicts
from tralign_fast.training.option_types import (
    AT_LEAST_ONE,
    LAYERS,
    NOT_NEGATIVE,
    SHARE,
    UNDER_ONE,
    Checked,
    CountOrShare,
    NotEmpty,
    OneOf,
    bounds_of,
    check_types,
)

ORDERS = ("random", "sequential", "group_by_length", "batch_rebalance")
# fields that are options of losses
_LOSS_FIELDS = (
    "beta", "label_smoothing", "discopop_tau", "desirable_weight", "undesirable_weight",
)  # fmt: skip


def _option(default: Any, help: str) -> Any:
    if callable(default):
        return field(default_factory=default, metadata={"help": help})
    return field(default=default, metadata={"help": help})


def _help_of(option: str) -> str:
    """What the registry says of an option, and the losses that take it."""
    found = {n: o for n, s in LOSSES.items() if (o := s.option(option)) is not None}
    (text,) = {o.help for o in found.values()}
    if len(found) == len(LOSSES):
        return text
    return f"{text} Of {', '.join(found)}."


def _range_of(option: str) -> Checked:
    """Its range, which `objective_of` checks, as losses differ."""
    losses: dict[str, list[str]] = {}
    for name, spec in LOSSES.items():
        if (found := spec.option(option)) is not None:
            losses.setdefault(bounds_of(found.range), []).append(name)
    if len(losses) == 1:
        return Checked(next(iter(losses)))
    return Checked("; ".join(f"{', '.join(names)}: {range}" for range, names in losses.items()))


# in this order, transformers' parser of command lines makes a list of it
Losses = list[str] | None | str


@dataclass
class TRConfig(TrainingArguments):
    """`transformers.TrainingArguments` and the options of trust-region alignment.

    Names, meanings and defaults are those of TRL 1.16's `DPOConfig` and `KTOConfig` where they have
    the option, with two exceptions: `sync_ref_model` is True (unless log-probs of the reference are
    to be computed once, `precompute_ref_log_probs`), and `bf16` is False on a CPU unless
    asked for. Beside those of `TrainingArguments`, the defaults that differ are `learning_rate`
    1e-6, `logging_steps` 10 and `gradient_checkpointing` True, as in TRL.

    Raises:
        ValueError: an option out of range; the message names it and what was expected.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "loss_options",
    ]

    learning_rate: Annotated[float, NOT_NEGATIVE] = _option(
        1e-6, "Initial learning rate of the optimizer."
    )
    logging_steps: Annotated[float, CountOrShare()] = _option(
        10, "Optimizer steps between two logs."
    )
    gradient_checkpointing: bool = _option(
        True, "Compute activations again in the backward, and keep none."
    )
    gradient_checkpointing_layers: Annotated[float | None, LAYERS] = _option(
        None, "Checkpoint the first decoder layers alone. None: all."
    )
    bf16: bool | None = _option(
        None, "bf16 mixed precision. None: on an accelerator, unless fp16 is set."
    )

    # the loss
    loss_type: Annotated[Losses, Checked(f"of {', '.join(LOSSES)}")] = _option(
        None,
        "One loss, or several that are added up; dpo and sigmoid are one. None: as the rows have "
        "it, kto for completions with a label, dpo for pairs.",
    )
    loss_weights: Annotated[list[float] | None, Checked("≥ 0 each")] = _option(
        None, "A factor for each loss of loss_type, as 0.8 0.2 1.0 of MPO. None: 1 each."
    )
    beta: Annotated[float, _range_of("beta")] = _option(0.1, _help_of("beta"))
    label_smoothing: Annotated[float | None, _range_of("label_smoothing")] = _option(
        None,
        f"{_help_of('label_smoothing')} With dpo it is conservative DPO, which TRL's sigmoid loss "
        "does not have (it ignores the option). None: 1e-3 for exo_pair, else 0.",
    )
    discopop_tau: Annotated[float, _range_of("discopop_tau")] = _option(
        0.05, _help_of("discopop_tau")
    )
    desirable_weight: Annotated[float, _range_of("desirable_weight")] = _option(
        1.0, _help_of("desirable_weight")
    )
    undesirable_weight: Annotated[float, _range_of("undesirable_weight")] = _option(
        1.0, _help_of("undesirable_weight")
    )
    loss_options: dict[str, Any] | str | None = _option(
        None, "Options of losses of your own that have no field here, by name."
    )
    length_normalized: bool | None = _option(
        None, "Divide log-ratios by the completion's length. None: as each loss does (ipo does)."
    )
    f_divergence_type: Annotated[str, OneOf(*DIVERGENCES)] = _option(
        "reverse_kl", "Divergence from the reference."
    )
    f_alpha_divergence_coef: float = _option(0.5, "α of alpha_divergence.")
    ld_alpha: Annotated[float | None, SHARE] = _option(
        None, "LD-DPO: weight of tokens beyond the pair's shorter completion. None: 1."
    )
    use_weighting: bool = _option(
        False,
        "WPO: weigh pairs by their probability under the policy; one more product of the head.",
    )
    router_aux_loss_coef: Annotated[float | None, NOT_NEGATIVE] = _option(
        None,
        "Weight of the load-balancing loss of a mixture of experts. None: what the model's "
        "config says.",
    )

    # the reference
    sync_ref_model: bool | None = _option(
        None,
        "Move the reference; False is the classical frozen one. None: True, but False with "
        "precompute_ref_log_probs.",
    )
    ref_model_mixup_alpha: Annotated[float, SHARE] = _option(
        0.6, "α, the policy's weight in the new reference (1: hard update)."
    )
    ref_model_sync_steps: Annotated[float, CountOrShare()] = _option(
        512, "τ, optimizer steps between two updates."
    )
    reference: Annotated[str, OneOf("auto", registry=REFERENCES)] = _option(
        "auto",
        "Where the reference lives: auto is the cheapest exact place; adapter is of PEFT LoRA, "
        "precomputed is frozen.",
    )
    adapter_tolerance: Annotated[float, UNDER_ONE] = _option(
        1e-6, 'reference="adapter": weight under which a past adapter is dropped.'
    )
    precompute_ref_log_probs: bool = _option(
        False,
        "Score all rows before the first step and keep no reference; log-probs are found again on "
        "the disk. With sync_ref_model: as far ahead as the reference stands still.",
    )
    precompute_ref_batch_size: Annotated[int | None, AT_LEAST_ONE] = _option(
        None,
        "Examples of a no-grad batch when rows or a window are scored. None: as many as have the "
        "tokens of four training batches on an accelerator, one batch's on a CPU and with a "
        "token_budget.",
    )
    ema_rounding: Annotated[str, OneOf("nearest", "stochastic")] = _option(
        "stochastic", "How bf16 and fp16 reference weights are rounded."
    )

    # the data
    train_sampling_strategy: Annotated[str | None, OneOf(*ORDERS)] = _option(
        None,
        "Order of the rows. None: sequential for unpaired losses, as TRL's KTO, else random.",
    )
    max_length: Annotated[int | None, Range(2, math.inf)] = _option(
        1024, "Tokens of a prompt with its completion; completions are cut to it."
    )
    truncation_mode: Annotated[str, OneOf("keep_start", "keep_end")] = _option(
        "keep_start",
        "keep_start, or for pairs keep_end, which TRL deprecates: the last max_length tokens of a "
        "prompt with its completion stay, and no row is dropped for the length of its prompt.",
    )
    pad_token: Annotated[str | None, NotEmpty()] = _option(
        None, "The tokenizer's padding token, one of its vocabulary. None: its own, else its EOS."
    )
    on_bad_rows: Annotated[str, OneOf(*ON_BAD_ROWS)] = _option(
        "drop_overlong",
        "Unusable rows: drop_overlong leaves out those that are too long, as TRL does, drop leaves "
        "out all of them, each with one warning; error refuses them.",
    )
    dataset_num_proc: Annotated[int | None, AT_LEAST_ONE] = _option(
        None, "Processes that tokenise."
    )
    prefix_sharing: bool = _option(True, "Compute a prompt once for all its completions.")
    packing: bool = _option(True, "One row without padding; False: padded rows as TRL has them.")

    padding_free: bool = _option(False, "TRL's name of packing; accepted, as packing is on.")
    pad_to_multiple_of: Annotated[int | str | None, Checked("≥ 1, or auto")] = _option(
        "auto",
        "Rows are filled up to a multiple of so many tokens, packed ones too. auto and None: not.",
    )
    token_budget: Annotated[int | None, AT_LEAST_ONE] = _option(
        None,
        "Tokens of a packed row; a batch that needs more runs in several, one after the other, to "
        "the same loss. None: one row.",
    )

    # the model
    model_init_kwargs: dict[str, Any] | str | None = _option(
        None, "Keywords of from_pretrained, for a model given by its name."
    )
    trust_remote_code: bool = _option(
        False, "Run the code that a model or tokenizer, given by its name, brings along."
    )
    activation_offloading: bool = _option(
        False, "Keep what the layers save for the backward in the host's memory; needs TRL."
    )
    disable_dropout: bool = _option(True, "Switch dropout off in the policy and the reference.")
    gradient_release: bool = _option(
        False,
        "Use up and free every gradient inside the backward: no memory for gradients. Needs "
        "max_grad_norm=0, one backward a step, and AdamW, adamw_bnb_8bit or adafactor.",
    )
    layer_kernels: Annotated[str, OneOf(*LAYER_KERNELS)] = _option(
        "auto",
        "Kernels for norms, gated MLPs and rotary embeddings: auto takes Liger's on a GPU, each "
        "that is as good as the model's own code, without Liger PyTorch's for norms; liger says so "
        "where it cannot.",
    )
    logits_budget_mb: Annotated[float | None, NOT_NEGATIVE] = _option(
        None,
        "MiB of logits that may exist at a time. None: 1024; on a GPU, for larger batches, up to "
        "4096 and half of the memory that is free.",
    )
    vocab_filter: Annotated[float | None, UNDER_ONE] = _option(
        None, "ε: the head's backward skips tokens less likely than ε everywhere; 3e-5 if in doubt."
    )
    kept: Annotated[str, OneOf(*KEPT)] = _option(
        "logits",
        "What the head keeps for its backward: logits, or powers of them, which its products take "
        "as they are. powers is of bf16 on a GPU, without a softcap and vocab_filter; not timed.",
    )
    cuda_graphs: bool | None = _option(
        None,
        "Replay the decoder of packed rows as CUDA graphs, on one GPU. None: where launching takes "
        "the host longer than computing takes the GPU.",
    )
    log_kl_initial: bool = _option(
        False, "Evaluation: KL to the initial model (kl/initial); keeps a copy of its weights."
    )

    async_save: bool = _option(
        False,
        "Write checkpoints while training goes on, from a copy on the host; the last one is waited "
        "for. Not with DeepSpeed.",
    )
    overwrite_output_dir: bool = _option(False, "Write into an output_dir that holds another run.")

    def __post_init__(self) -> None:
        check_types(self, TRConfig)
        self._check_tables()
        self._check_losses()
        check_best_model(self)
        if self.truncation_mode == "keep_end":
            warnings.warn(
                "truncation_mode='keep_end' is deprecated in TRL, whose 2.0 will not have it",
                FutureWarning,
                stacklevel=3,
            )
        self.precompute_ref_log_probs |= self.reference == "precomputed"
        if self.sync_ref_model is None:  # TRL's precomputed reference stands still
            self.sync_ref_model = not self.precompute_ref_log_probs
        every = self.ref_model_sync_steps
        self.ref_model_sync_steps = every if every < 1 else int(every)
        self.max_grad_norm = self.max_grad_norm or 0.0  # transformers compares it with a number
        layers = self.gradient_checkpointing_layers
        if layers is not None and (layers == 0 or layers >= 1):
            self.gradient_checkpointing_layers = int(layers)
        self.pad_to_multiple_of = _multiple(self.pad_to_multiple_of)
        if self.use_liger_kernel:
            self._take_over_liger()
        # batches are PackedBatch, made from columns that no model's forward names
        self.remove_unused_columns = False
        self._own_sampling: str | None = None
        if self.train_sampling_strategy is None:
            self._choose_sampling()
        # newer transformers warns of these names, which are TRL's, where its own say nothing
        for name in ("checkpointing", "checkpointing_kwargs"):
            if getattr(self, f"activation_{name}", False) is None:
                setattr(self, f"activation_{name}", getattr(self, f"gradient_{name}"))
        wants_bf16, self.bf16 = self.bf16, bool(self.bf16)
        super().__post_init__()
        if self.layer_kernels == "liger":
            kinds_of_liger(self.liger_kernel_config)  # which refuses
        if wants_bf16 is None:
            self.bf16 = not self.fp16 and self.device.type != "cpu"
        if self.device.type == "cpu":  # torch would warn that there is nothing to pin memory for
            self.dataloader_pin_memory = False
        if self.gradient_release:
            check_releasable(self)
        check_conflicts(self)

    def to_dict(self) -> dict[str, Any]:
        # TrainingArguments masks what is called a token; this one is no secret
        return {**super().to_dict(), "pad_token": self.pad_token}

    @property
    def trust_region(self) -> TrustRegion:
        """The schedule of the reference."""
        if not self.sync_ref_model:
            return TrustRegion(alpha=0.0, every=0)
        return TrustRegion(self.ref_model_mixup_alpha, self.ref_model_sync_steps)

    @property
    def merged_batches(self) -> int:
        """Training batches that are scored as one: without a gradient nothing is kept of them."""
        if self.token_budget is not None:
            return 1
        size = self.per_device_train_batch_size
        # a CPU's cores are busy with one batch, and its cache holds the activations of no more; a
        # step of training holds more of a batch than a forward of four does (traced)
        default = size if device_kind(self.device) == "cpu" else 4 * size
        return max(1, (self.precompute_ref_batch_size or default) // size)

    @property
    def loss_is_open(self) -> bool:
        """Whether the rows may say which loss is meant, also where those of a run have done so."""
        return self.loss_type is None or self.loss_type == getattr(self, "_settled", None)

    def settle_loss(self, name: str) -> None:
        """Sets the loss where it is open, and what depends on it.

        Raises:
            ValueError: an option that this loss does not take.
        """
        self.loss_type = self._settled = [name]
        self._check_losses()
        if self._own_sampling == self.train_sampling_strategy:
            self._choose_sampling()

    @property
    def kinds_of_layer_kernels(self) -> str | tuple[str, ...]:
        """`layer_kernels` as `prepare_model` takes it: without what `liger_kernel_config` leaves
        out."""
        if self.layer_kernels != "liger":
            return self.layer_kernels
        return kinds_of_liger(self.liger_kernel_config)

    def _take_over_liger(self) -> None:
        """transformers' name of layer_kernels="liger"; its Trainer would change classes."""
        if self.layer_kernels == "none":
            raise ValueError(
                'use_liger_kernel=True contradicts layer_kernels="none"; expected one of the two'
            )
        self.layer_kernels, self.use_liger_kernel = "liger", False

    def _choose_sampling(self) -> None:
        self._own_sampling = "random" if self.objective.paired else "sequential"
        self.train_sampling_strategy = self._own_sampling

    @property
    def objective(self) -> Objective:
        """The losses of the run, with their weights and options; where `loss_type` is open, DPO, or
        KTO if only this one takes them."""
        if self.loss_type is not None:
            return self._objective_of(self.loss_type)
        try:
            return self._objective_of("dpo")
        except ValueError as refusal:
            with contextlib.suppress(ValueError):
                return self._objective_of("kto")
            raise refusal

    def _objective_of(self, losses: list[str] | str) -> Objective:
        fields = {f.name: f.default for f in dataclasses.fields(self)}
        names = [losses] if isinstance(losses, str) else losses
        taken = {o.name for name in names if name in LOSSES for o in LOSSES[name].options}
        own: Any = self.loss_options
        options: dict[str, Any] = dict(own or {})
        if twice := sorted({*options} & {*_LOSS_FIELDS}):
            raise ValueError(f"loss_options: {twice[0]} is an option of its own; set it there")
        for name in _LOSS_FIELDS:
            value, default = getattr(self, name), fields[name]
            unset = value is None or (name not in taken and value in (default, default or 0.0))
            if not unset:
                options[name] = value
        return objective_of(
            LOSSES, names, self.loss_weights, options,
            f_divergence=self.f_divergence_type, f_alpha=self.f_alpha_divergence_coef,
            length_normalized=self.length_normalized,
        )  # fmt: skip

    def _check_tables(self) -> None:
        """Those that the command line gives as JSON."""
        for name in self._VALID_DICT_FIELDS:
            value = getattr(self, name)
            own = name in ("loss_options", "model_init_kwargs")
            if isinstance(value, str) and (own or value.startswith("{")):  # else a file's name
                table = _table(name, value)
                if name == "loss_options":  # TrainingArguments reads the others
                    self.loss_options = table

    def _check_losses(self) -> None:
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        objective = self.objective
        if self.label_smoothing is None and not objective.options.get("label_smoothing"):
            self.label_smoothing = 0.0  # as TRL has it; exo_pair keeps its own
        if self.label_smoothing and {"dpo", "sigmoid", "sigmoid_norm"} & {*objective.names}:
            warn_once(
                f"label_smoothing={self.label_smoothing:g}: dpo is conservative DPO with it, where "
                "TRL 1.16's sigmoid loss ignores it; loss_type=\"robust\" is TRL's too"
            )
        names = " + ".join(objective.names)
        if self.ld_alpha is not None and not objective.paired:
            raise ValueError(f"ld_alpha: {names} takes no pairs, got {self.ld_alpha}")
        if self.use_weighting and not (objective.paired and objective.weighs_examples):
            raise ValueError(f"use_weighting: {names} takes no weights of pairs")
        if self.truncation_mode == "keep_end" and not objective.paired:
            raise ValueError(
                f"truncation_mode: {names} cuts completions at their end, as TRL's KTOTrainer; "
                "expected keep_start, got 'keep_end'"
            )
        if self.token_budget is not None and objective.couples_examples:
            raise ValueError(
                f"token_budget: {names} sorts the pairs of a batch, which cannot be split; leave "
                "it out"
            )


def _multiple(value: int | str | None) -> int | None:
    """pad_to_multiple_of as a number; text is what a command line passes on."""
    if value is None or str(value).lower() in ("auto", "none", "null"):
        return None
    number = int(value) if str(value).isdecimal() else 0
    if number < 1:
        raise ValueError(
            f'pad_to_multiple_of: expected a number of tokens ≥ 1, "auto" or None, got {value!r}'
        )
    return number


def _table(name: str, text: str) -> dict[str, Any]:
    try:
        table = json.loads(text)
    except json.JSONDecodeError:
        table = None
    if not isinstance(table, dict):
        raise ValueError(f'{name}: expected JSON such as {{"gamma": 2}}, got {text!r}')
    return table
