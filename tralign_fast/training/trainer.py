"""`transformers.Trainer` for TR-DPO, TR-IPO and TR-KTO.

The loop, optimizers, checkpoints and distribution are transformers'. Here, in the order of a run:
what is set up, a step (a window of batches scored by the reference, log-probs, loss, the
reference's move), evaluation and metrics, and what a checkpoint holds besides.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Adafactor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
)
from transformers.integrations.liger import apply_liger_kernel
from transformers.trainer_pt_utils import LengthGroupedSampler

from tralign_fast.data.columns import one_dataset
from tralign_fast.data.packing import PackedBatch, PreferenceCollator, SplitBatch
from tralign_fast.data.sampling import EpochLengthSampler
from tralign_fast.data.tokenization import add_lengths, tokenize_pairs, tokenize_unpaired
from tralign_fast.model.prepare import compile_layers
from tralign_fast.model.scoring import hidden_kl, sequence_logps
from tralign_fast.ops.losses import PreferenceLoss
from tralign_fast.reference import build_reference, choose_reference
from tralign_fast.reference.base import ReferencePolicy
from tralign_fast.reference.lora import trained_adapters
from tralign_fast.reference.sharding import gathered, reshard
from tralign_fast.reference.window import WindowedReference
from tralign_fast.training.checkpoints import (
    REFERENCE_FOLDER,
    check_output_dir,
    check_whole,
    digest,
    newest_checkpoint,
)
from tralign_fast.training.config import TRConfig
from tralign_fast.training.distribution import (
    check_distribution,
    distribute_frozen,
    even_parts,
    prepare_on_all,
    take_over_compilation,
)
from tralign_fast.training.gradient_release import BlockAdafactor, GradientRelease
from tralign_fast.training.lookahead import Lookahead
from tralign_fast.training.metrics import PreferenceMetrics
from tralign_fast.training.model_card import add_trust_region
from tralign_fast.training.pretrained import (
    disable_dropout,
    load_model,
    load_tokenizer,
    vocabulary_size,
)


class TRTrainer(Trainer):
    """Preference alignment with a moving reference.

    Args:
        model: a causal LM of transformers, a PEFT model around one, or its name or folder.
        ref_model: the first reference; None: a copy of `model` as it is.
        args: a `TRConfig`.
        train_dataset, eval_dataset: rows with TRL's columns (`prompt, chosen, rejected` or `prompt,
            completion, label`), text or conversational; `eval_dataset` may be a dict of them.
        processing_class: the tokenizer; None: the one of `model`.
        callbacks, optimizers: as in `transformers.Trainer`.

    Metrics are TRL's: `rewards/chosen`, `rewards/rejected`, `rewards/accuracies`,
    `rewards/margins`, `logps/chosen`, `logps/rejected`, `kl` (KTO), `num_tokens`; and `tr/syncs`,
    and in evaluation `kl/initial` with `log_kl_initial=True`.

    Raises:
        ValueError: unusable rows, options or models; the message names them and what was expected.
    """

    args: TRConfig
    model: PreTrainedModel

    def __init__(
        self,
        model: str | PreTrainedModel | None = None,
        ref_model: PreTrainedModel | None = None,
        args: TRConfig | None = None,
        data_collator: Callable[..., PackedBatch] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        if model is None:
            raise ValueError(
                "TRTrainer needs a model: a transformers causal LM, its name or its folder"
            )
        if ref_model is model:
            raise ValueError("ref_model is the model itself; leave it out and a copy is made")
        args = args if args is not None else TRConfig("tr-output")
        tokenizer = load_tokenizer(processing_class, model)
        policy = load_model(model, args)
        if args.disable_dropout:
            disable_dropout(policy)
            if ref_model is not None:
                disable_dropout(ref_model)
        place, why = choose_reference(
            args.reference,
            args.trust_region,
            own_start=ref_model is not None,
            lora=next(trained_adapters(policy), None) is not None,
        )
        train_dataset = _tokenize(train_dataset, tokenizer, args, "train", training=True)
        # accelerate would cut up the batches of a stream, of training or of evaluation
        args.accelerator_config.dispatch_batches = False  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
        collator = data_collator or PreferenceCollator(
            paired=args.loss_spec.paired,
            max_length=args.max_length,
            token_budget=args.token_budget,
            pad_token_id=tokenizer.pad_token_id or 0,  # pyright: ignore[reportArgumentType]
            vocab_size=vocabulary_size(policy),
        )
        super().__init__(
            model=policy,
            args=args,
            data_collator=collator,  # pyright: ignore[reportArgumentType]
            train_dataset=train_dataset,
            eval_dataset=_tokenize(eval_dataset, tokenizer, args, "eval"),
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # the mean over a micro-batch is the loss; Trainer divides it by the accumulation steps
        self.model_accepts_loss_kwargs = False
        check_distribution(self.accelerator, place)
        self._compile_options = take_over_compilation(self.accelerator, args)
        # copies of the policy are made before it is prepared
        start: Any = ref_model
        if place == "resident" and start is None:
            start = _copy(policy)
        self._initial = _copy(policy).eval() if args.log_kl_initial else None
        packs = self._prepare(policy)
        if isinstance(collator, PreferenceCollator):
            collator.layout = ("shared" if args.prefix_sharing else "packed") if packs else "padded"
        if place == "resident":
            start = self._prepare_frozen(start)
        self.reference = build_reference(place, policy, start, args)
        self.reference.run = {"data": digest(train_dataset)}
        self.accelerator.print(f"reference: {place} ({why})", file=sys.stderr)
        if self._initial is not None:
            self._prepare(self._initial)
        self._lookahead = Lookahead(self)
        self.add_callback(_SyncReference(self.reference))
        self._means = {"train": PreferenceMetrics(), "eval": PreferenceMetrics()}

    def _prepare(self, model: PreTrainedModel) -> bool:
        """Lets the model return log-probs; whether it can take packed rows."""
        options = ("packing", "logits_budget_mb", "vocab_filter")
        packs = prepare_on_all(
            self.accelerator, model, **{name: getattr(self.args, name) for name in options}
        )
        if self._compile_options is not None:
            compile_layers(model, **self._compile_options)
        return packs

    def _prepare_frozen(self, model: PreTrainedModel) -> nn.Module:
        """A second model that runs beside the policy, and as the policy does."""
        self._prepare(model)
        if self.args.use_liger_kernel:  # Trainer gives them to the policy when training starts
            apply_liger_kernel(model, self.args.liger_kernel_config)
        return distribute_frozen(self.accelerator, model)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if not self.args.gradient_release or isinstance(self.optimizer, GradientRelease):
            return super().create_optimizer(model)
        if self.optimizer is None:
            factory, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            factory = BlockAdafactor if factory is Adafactor else factory
            self.optimizer_cls_and_kwargs = factory, options
        self.optimizer = GradientRelease(super().create_optimizer(model))
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
            return EpochLengthSampler(sampler, seed)
        return sampler

    # --- a step -----------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of a step; before the first of a window, all of the window are scored."""
        if isinstance(self.reference, WindowedReference) and self.reference.needs_window:
            self._lookahead.score_window(epoch_iterator)
        return self._lookahead.take(epoch_iterator, num_batches), None

    def training_step(
        self,
        model: nn.Module,
        inputs: PackedBatch | SplitBatch,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """Forward and backward of a micro-batch, part after part where it is split."""
        parts = self._with_common_kl(model, inputs)
        losses = []
        state = self.accelerator.gradient_state
        steps = state.sync_gradients
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            state._set_sync_gradients(steps and last)  # DeepSpeed's backward steps if it is set
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                loss = super().training_step(model, part, num_items_in_batch)  # pyright: ignore[reportArgumentType]
                losses.append(loss)
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def parts_of(self, batch: PackedBatch | SplitBatch) -> tuple[PackedBatch, ...]:
        """The parts of a batch that run one after the other, as many on every process."""
        if self.args.token_budget is None:
            return batch.parts
        return even_parts(self.accelerator, batch)

    @torch.no_grad()
    def _with_common_kl(
        self, model: nn.Module, inputs: PackedBatch | SplitBatch
    ) -> tuple[PackedBatch, ...]:
        """The parts of a batch. KTO's KL term is the whole batch's: split, it is computed first."""
        parts = self.parts_of(inputs)
        if self.args.loss_spec.paired or len(parts) == 1:
            return parts
        total = 0.0
        with self.compute_loss_context_manager():
            for part in (part.to(self.args.device) for part in parts):
                gap = sequence_logps(model, part) - self.reference.logps(part)
                total = total + part.share * gap.chunk(2)[1].mean()
        return tuple(dataclasses.replace(part, kl=total) for part in parts)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: PackedBatch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of a batch: policy and reference log-probs, then one function of `LOSSES`.

        Raises:
            ValueError: a log-prob is NaN or infinite; nothing is trained on it.
        """
        batch = inputs
        ref_logps = self.reference.logps(batch)
        logps = sequence_logps(model, batch)
        self._check_finite(batch, logps, ref_logps)
        result, kl = self._loss(batch, logps, ref_logps)
        if batch.share > 0:
            mode = "train" if self.model.training else "eval"
            self._means[mode].record(batch, logps.detach(), result, kl)
            if mode == "train":  # in the state, so that a resumed run goes on counting
                self.state.num_input_tokens_seen += batch.num_tokens
        loss = result.loss * batch.share
        return (loss, {"logps": logps}) if return_outputs else loss

    def _loss(
        self, batch: PackedBatch, logps: Tensor, ref_logps: Tensor
    ) -> tuple[PreferenceLoss, Tensor | None]:
        spec = self.args.loss_spec
        options = {name: getattr(self.args, name) for name in spec.options}
        lengths = batch.completion_lengths if self.args.normalizes_length else None
        if lengths is not None:
            logps, ref_logps = logps / lengths, ref_logps / lengths
        if not spec.paired:
            (own, mismatched), (ref_own, ref_mismatched) = logps.chunk(2), ref_logps.chunk(2)
            kl = batch.kl
            if kl is None:
                kl = (mismatched.detach() - ref_mismatched).mean()
            kl = self.accelerator.reduce(kl, reduction="mean")
            kl = kl.clamp(min=0)  # pyright: ignore[reportAttributeAccessIssue]
            return spec.function(own, ref_own, batch.is_desirable, kl, **options), kl
        result = spec.function(*logps.chunk(2), *ref_logps.chunk(2), **options)
        if lengths is not None:  # rewards are reported for whole completions, as TRL does
            chosen, rejected = lengths.chunk(2)
            result = PreferenceLoss(
                result.loss, result.chosen_rewards * chosen, result.rejected_rewards * rejected
            )
        return result, None

    def _check_finite(self, batch: PackedBatch, logps: Tensor, ref_logps: Tensor) -> None:
        finite = torch.isfinite(logps.detach()) & torch.isfinite(ref_logps)
        if bool(finite.all()):
            return
        examples = (~finite).view(2, -1).any(0).nonzero()[:, 0].tolist()
        rows = ", ".join(str(batch.rows[i]) for i in examples[:5])
        who = "policy" if not bool(torch.isfinite(logps).all()) else "reference"
        raise ValueError(
            f"step {self.state.global_step + 1}: the {who}'s log-probs of row {rows} are NaN or "
            "infinite; expected finite numbers (check the model's weights, the learning rate, or "
            "fp16 overflow)"
        )

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs.to(self.args.device)

    def floating_point_ops(self, inputs: PackedBatch | SplitBatch) -> int:
        # 2 for the forward, 4 for the backward, per parameter and token
        return 6 * inputs.num_tokens * self.model.num_parameters(exclude_embeddings=True)

    # --- evaluation and metrics -------------------------------------------------------------------

    def evaluate(self, eval_dataset: Any = None, ignore_keys=None, metric_key_prefix: str = "eval"):
        if eval_dataset is not None and not isinstance(eval_dataset, (str, dict)):
            tokenizer: Any = self.processing_class
            eval_dataset = _tokenize(eval_dataset, tokenizer, self.args, metric_key_prefix)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)  # pyright: ignore[reportArgumentType]

    def predict(self, test_dataset: Any, ignore_keys=None, metric_key_prefix: str = "test"):
        """The metrics of rows as `evaluate` takes them; there are no predictions."""
        tokenizer: Any = self.processing_class
        test_dataset = one_dataset(test_dataset, metric_key_prefix)
        rows = _tokenize(test_dataset, tokenizer, self.args, metric_key_prefix)
        return super().predict(rows, ignore_keys, metric_key_prefix)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: PackedBatch | SplitBatch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        loss = torch.zeros((), device=self.args.device)
        for part in self._with_common_kl(model, inputs):
            batch = self._prepare_inputs(part)
            with torch.no_grad(), self.compute_loss_context_manager():
                loss += self.compute_loss(model, batch)
                if self._initial is not None:
                    initial = self._initial.to(self.args.device)  # pyright: ignore[reportArgumentType]
                    kl = hidden_kl(model, initial, batch)
                    self._means["eval"].add("kl/initial", kl, batch.grad_tokens)
        return loss, None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._means["train"].pop(self.accelerator))
            tokens = torch.tensor(float(self.state.num_input_tokens_seen), device=self.args.device)
            total = self.accelerator.reduce(tokens, reduction="sum")
            logs["num_tokens"] = float(total)  # pyright: ignore[reportArgumentType]
            schedule = self.reference.schedule
            logs["tr/syncs"] = 0 if schedule.is_frozen else self.state.global_step // schedule.every
        super().log(logs, start_time)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        averages = self._means["eval"].pop(self.accelerator)
        prefixed = {f"{metric_key_prefix}_{k}": v for k, v in averages.items()}
        output.metrics.update(prefixed)  # pyright: ignore[reportOptionalMemberAccess]
        return output

    # --- runs and checkpoints ---------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        if not resume_from_checkpoint and not self.args.overwrite_output_dir:
            check_output_dir(self.args.output_dir)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(newest_checkpoint(self.args.output_dir))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        reshard(self.model)  # an evaluation leaves the head's weights gathered, under other names
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model, trial) -> None:
        if not self.args.save_only_model:
            run = Path(self._get_output_dir(trial))
            self.reference.save(run / f"checkpoint-{self.state.global_step}" / REFERENCE_FOLDER)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir) -> None:
        super()._save_rng_state(output_dir)
        # next comes trainer_state.json, by which a whole checkpoint is known, and the old one goes
        self.accelerator.wait_for_everyone()

    def create_model_card(self, *args, **kwargs) -> None:
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            card = Path(self.args.output_dir or ".") / "README.md"
            add_trust_region(card, self.args, self.reference.name)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        self._load_reference(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.is_deepspeed_enabled:
            self._load_reference(checkpoint)  # its engine has loaded weights and optimizer
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_reference(self, checkpoint: str) -> None:
        check_whole(Path(checkpoint))
        self.reference.load(Path(checkpoint) / REFERENCE_FOLDER)


class _SyncReference(TrainerCallback):
    """Moves the reference after the optimizer step, as TRL's `SyncRefModelCallback` does."""

    def __init__(self, reference: ReferencePolicy) -> None:
        self.reference = reference

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.reference.schedule.should_sync(state.global_step):
            self.reference.sync()


def _tokenize(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    args: TRConfig,
    name: str,
    training: bool = False,
) -> Any:
    """The rows as token ids; to evaluate, those of each dataset in a dict."""
    if isinstance(dataset, dict) and not training:
        return {key: _tokenize(part, tokenizer, args, key) for key, part in dataset.items()}
    if dataset is None:
        return None
    paired = args.loss_spec.paired
    tokenize: Any = tokenize_pairs if paired else tokenize_unpaired
    rows = tokenize(
        dataset,
        tokenizer,
        max_length=args.max_length,
        name=name,
        on_bad_rows=args.on_bad_rows,
        num_proc=args.dataset_num_proc,
        **({} if paired else {"one_label": not training}),
    )
    if args.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
        rows = add_lengths(rows, args.length_column_name)
    return rows


def _copy(model: PreTrainedModel) -> PreTrainedModel:
    with gathered(model):
        return copy.deepcopy(model)
