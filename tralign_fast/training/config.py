"""Options of a training run: TRL's names where TRL has the concept."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import TrainingArguments

from tralign_fast.data.tokenization import ON_BAD_ROWS
from tralign_fast.ops.backend import warn_once
from tralign_fast.ops.losses import LOSSES
from tralign_fast.ops.objective import DIVERGENCES, Objective, Range, objective_of
from tralign_fast.reference import REFERENCES, TrustRegion
from tralign_fast.training.gradient_release import check_releasable
from tralign_fast.training.option_types import check_types

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
    ranges = {str(o.range) for o in found.values()}
    of = [f"{n} ({o.range})" if len(ranges) > 1 else n for n, o in found.items()]
    return f"{text} Of {', '.join(of)}."


# in this order, transformers' parser of command lines makes a list of it
Losses = list[str] | None | str


@dataclass
class TRConfig(TrainingArguments):
    """`transformers.TrainingArguments` and the options of trust-region alignment.

    Names, meanings and defaults are those of TRL 1.16's `DPOConfig` and `KTOConfig` where they have
    the option, with two exceptions: `sync_ref_model` is True, and `bf16` is False on a CPU unless
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

    learning_rate: float = _option(1e-6, "Initial learning rate of the optimizer.")
    logging_steps: float = _option(10, "Optimizer steps between two logs.")
    gradient_checkpointing: bool = _option(
        True, "Compute activations again in the backward instead of keeping them."
    )
    bf16: bool | None = _option(
        None, "bf16 mixed precision. None: on an accelerator, unless fp16 is set."
    )

    # the loss
    loss_type: Losses = _option(
        None,
        f"One loss, or several that are added up: {', '.join(LOSSES)}. dpo and sigmoid are one. "
        "None: as the rows have it, kto for completions with a label, dpo for pairs.",
    )
    loss_weights: list[float] | None = _option(
        None, "A factor for each loss of loss_type, as 0.8 0.2 1.0 of MPO. None: 1 each."
    )
    beta: float = _option(0.1, _help_of("beta"))
    label_smoothing: float | None = _option(
        None,
        f"{_help_of('label_smoothing')} With dpo it is conservative DPO, which TRL's sigmoid loss "
        "does not have (it ignores the option). None: 1e-3 for exo_pair, else 0.",
    )
    discopop_tau: float = _option(0.05, _help_of("discopop_tau"))
    desirable_weight: float = _option(1.0, _help_of("desirable_weight"))
    undesirable_weight: float = _option(1.0, _help_of("undesirable_weight"))
    loss_options: dict[str, Any] | str | None = _option(
        None, "Options of losses of your own that have no field here, by name."
    )
    length_normalized: bool | None = _option(
        None, "Divide log-ratios by the completion's length. None: as each loss does (ipo does)."
    )
    f_divergence_type: str = _option(
        "reverse_kl", f"Divergence from the reference: {', '.join(DIVERGENCES)}."
    )
    f_alpha_divergence_coef: float = _option(0.5, "α of alpha_divergence.")
    ld_alpha: float | None = _option(
        None, "LD-DPO: weight in [0, 1] of tokens beyond the pair's shorter completion. None: 1."
    )
    use_weighting: bool = _option(
        False,
        "WPO: weigh pairs by their probability under the policy; one more product of the head.",
    )

    # the reference
    sync_ref_model: bool = _option(True, "Move the reference; False is the classical frozen one.")
    ref_model_mixup_alpha: float = _option(
        0.6, "α in [0, 1], the policy's weight in the new reference (1: hard update)."
    )
    ref_model_sync_steps: float = _option(
        512, "τ ≥ 1, optimizer steps between two updates; under 1, a share of the run's steps."
    )
    reference: str = _option(
        "auto",
        "Where the reference lives: auto (the cheapest exact one), resident, snapshot, offloaded, "
        "adapter (PEFT LoRA).",
    )
    adapter_tolerance: float = _option(
        1e-6, 'reference="adapter": weight in [0, 1) under which a past adapter is dropped.'
    )
    precompute_ref_batch_size: int | None = _option(
        None,
        "Examples of a no-grad batch when a window is scored. None: two training batches' on an "
        "accelerator, one on a CPU and with a token_budget.",
    )
    ema_rounding: str = _option(
        "stochastic", "How bf16 and fp16 reference weights are rounded: stochastic or nearest."
    )

    # the data
    train_sampling_strategy: str | None = _option(
        None,
        "random, sequential, group_by_length or batch_rebalance. None: sequential for unpaired "
        "losses, as TRL's KTO, else random.",
    )
    max_length: int | None = _option(
        1024, "Tokens of a prompt with its completion; completions are cut to it."
    )
    truncation_mode: str = _option(
        "keep_start",
        "keep_start, or for pairs keep_end, which TRL deprecates: the last max_length tokens of a "
        "prompt with its completion stay, and no row is dropped for the length of its prompt.",
    )
    pad_token: str | None = _option(
        None, "The tokenizer's padding token, one of its vocabulary. None: its own, else its EOS."
    )
    on_bad_rows: str = _option(
        "drop_overlong",
        "Unusable rows: drop_overlong leaves out those that are too long, as TRL does, drop leaves "
        "out all of them, each with one warning; error refuses them.",
    )
    dataset_num_proc: int | None = _option(None, "Processes that tokenise.")
    prefix_sharing: bool = _option(True, "Compute a prompt once for all its completions.")
    packing: bool = _option(True, "One row without padding; False: padded rows as TRL has them.")

    token_budget: int | None = _option(
        None,
        "Tokens of a packed row; a batch that needs more runs in several, one after the other, to "
        "the same loss. None: one row.",
    )

    # the model
    model_init_kwargs: dict[str, Any] | str | None = _option(
        None, "Keywords of from_pretrained, for a model given by its name."
    )
    disable_dropout: bool = _option(True, "Switch dropout off in the policy and the reference.")
    gradient_release: bool = _option(
        False,
        "Use up and free every gradient inside the backward: no memory for gradients. Needs "
        "max_grad_norm=0, one backward a step, and AdamW, adamw_bnb_8bit or adafactor.",
    )
    logits_budget_mb: float = _option(1024, "MiB of logits that may exist at a time.")
    vocab_filter: float | None = _option(
        None, "ε: the head's backward skips tokens less likely than ε everywhere; 3e-5 if in doubt."
    )
    log_kl_initial: bool = _option(
        False, "Evaluation: KL to the initial model (kl/initial); keeps a copy of its weights."
    )

    overwrite_output_dir: bool = _option(False, "Write into an output_dir that holds another run.")

    def __post_init__(self) -> None:
        check_types(self, TRConfig)
        self._check_losses()
        _check_choice("reference", self.reference, ["auto", *REFERENCES])
        _check_choice("ema_rounding", self.ema_rounding, ["nearest", "stochastic"])
        _check_choice("truncation_mode", self.truncation_mode, ["keep_start", "keep_end"])
        _check_choice("on_bad_rows", self.on_bad_rows, ON_BAD_ROWS)
        if self.truncation_mode == "keep_end":
            warnings.warn(
                "truncation_mode='keep_end' is deprecated in TRL, whose 2.0 will not have it",
                FutureWarning,
                stacklevel=3,
            )
        if not 0.0 <= self.ref_model_mixup_alpha <= 1.0:
            raise ValueError(
                f"ref_model_mixup_alpha must lie in [0, 1], got {self.ref_model_mixup_alpha}"
            )
        every = self.ref_model_sync_steps
        if not (0 < every < 1 or (1 <= every < math.inf and every == int(every))):
            raise ValueError(
                "ref_model_sync_steps must be a whole number of optimizer steps ≥ 1, or a share of "
                f"the run in (0, 1), got {every}; sync_ref_model=False freezes the reference"
            )
        self.ref_model_sync_steps = every if every < 1 else int(every)
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length must be at least 2 tokens, got {self.max_length}")
        if self.token_budget is not None and self.token_budget < 1:
            raise ValueError(f"token_budget must be positive, got {self.token_budget}")
        if self.precompute_ref_batch_size is not None and self.precompute_ref_batch_size < 1:
            raise ValueError(
                f"precompute_ref_batch_size must be positive, got {self.precompute_ref_batch_size}"
            )
        if self.logits_budget_mb < 0:
            raise ValueError(f"logits_budget_mb must not be negative, got {self.logits_budget_mb}")
        if self.vocab_filter is not None and not 0.0 <= self.vocab_filter < 1.0:
            raise ValueError(f"vocab_filter must lie in [0, 1), got {self.vocab_filter}")
        if self.use_liger_kernel:
            self.liger_kernel_config = _layer_kernels(self.liger_kernel_config)
        # batches are PackedBatch, made from columns that no model's forward names
        self.remove_unused_columns = False
        self._own_sampling: str | None = None
        if self.train_sampling_strategy is None:
            self._choose_sampling()
        wants_bf16, self.bf16 = self.bf16, bool(self.bf16)
        super().__post_init__()
        if wants_bf16 is None:
            self.bf16 = not self.fp16 and self.device.type != "cpu"
        if self.gradient_release:
            check_releasable(self)

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
        # a CPU's cores are busy with one batch, and its cache holds the activations of no more
        default = size if self.device.type == "cpu" else 2 * size
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

    def _check_losses(self) -> None:
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        if isinstance(self.loss_options, str):  # of the command line
            self.loss_options = _table("loss_options", self.loss_options)
        objective = self.objective
        if self.label_smoothing is None and not objective.options.get("label_smoothing"):
            self.label_smoothing = 0.0  # as TRL has it; exo_pair keeps its own
        if self.label_smoothing and {"dpo", "sigmoid", "sigmoid_norm"} & {*objective.names}:
            warn_once(
                f"label_smoothing={self.label_smoothing:g}: dpo is conservative DPO with it, where "
                "TRL 1.16's sigmoid loss ignores it; loss_type=\"robust\" is TRL's too"
            )
        names = " + ".join(objective.names)
        if self.ld_alpha is not None:
            if self.ld_alpha not in Range(0.0, 1.0):
                raise ValueError(f"ld_alpha: expected a number in [0, 1], got {self.ld_alpha!r}")
            if not objective.paired:
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


def _layer_kernels(liger: dict[str, Any] | None) -> dict[str, Any]:
    """Liger's kernels of the layers; its head would replace the forward that scores tokens."""
    if liger and liger.get("fused_linear_cross_entropy"):
        raise ValueError(
            "liger_kernel_config: fused_linear_cross_entropy=True would replace the LM head of "
            "tralign-fast; leave it out"
        )
    return {**(liger or {}), "fused_linear_cross_entropy": False}


def _table(name: str, text: str) -> dict[str, Any]:
    try:
        table = json.loads(text)
    except json.JSONDecodeError:
        table = None
    if not isinstance(table, dict):
        raise ValueError(f'{name}: expected JSON such as {{"gamma": 2}}, got {text!r}')
    return table


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
