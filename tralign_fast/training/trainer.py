"""`transformers.Trainer` for TR-DPO, TR-IPO and TR-KTO.

The loop, optimizers and distribution are transformers', runs and checkpoints are those of
`resumable.py`. Here, in the order of a run: what is set up, a step (a window of batches scored by
the reference, log-probs, loss, the reference's move), evaluation and metrics.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    Adafactor,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from tralign_fast.data.columns import one_dataset
from tralign_fast.data.packing import PackedBatch, SplitBatch
from tralign_fast.data.sampling import EpochLengthSampler
from tralign_fast.distributed.alike import check_versions, told_to_all
from tralign_fast.distributed.context_parallel import check_division, dividing, dividing_processes
from tralign_fast.distributed.levelling import CountWeights, level_tokens
from tralign_fast.distributed.pace import Pace
from tralign_fast.distributed.processes import even_parts, take_off_autocast
from tralign_fast.distributed.tensor_parallel import gather_once, sharing_processes
from tralign_fast.model.router import asked, router_coefficient
from tralign_fast.model.scoring import (
    hidden_kl,
    token_logps_and_statistics,
)
from tralign_fast.ops.preference import preference_loss
from tralign_fast.ops.segments import pair_weights
from tralign_fast.reference import choose_reference
from tralign_fast.reference.base import ReferencePolicy
from tralign_fast.reference.lora import trained_adapters
from tralign_fast.training.arguments import run_arguments
from tralign_fast.training.batch_terms import mean_kl, whole_batch_terms
from tralign_fast.training.block_adafactor import BlockAdafactor
from tralign_fast.training.checkpoints import check_writable, digest
from tralign_fast.training.config import TRConfig
from tralign_fast.training.finite import FiniteSteps, check_weights
from tralign_fast.training.follow import FollowOptions
from tralign_fast.training.gradient_release import GradientRelease, releases
from tralign_fast.training.inputs import collator_of, held_out, parts_of, tokenized
from tralign_fast.training.load_balance import add_balance
from tralign_fast.training.lookahead import Lookahead
from tralign_fast.training.method import settle_method
from tralign_fast.training.metrics import (
    PreferenceMetrics,
    outputs_of,
    statistics_of,
    token_totals,
)
from tralign_fast.training.model_card import add_trust_region
from tralign_fast.training.models import RunModels, activation_offloading
from tralign_fast.training.once import OncePerRun
from tralign_fast.training.out_of_memory import out_of_memory_explained
from tralign_fast.training.pretrained import given_models, vocabulary_size
from tralign_fast.training.processing import processing_of
from tralign_fast.training.resumable import ResumableTrainer
from tralign_fast.training.resume import keep_own_intervals
from tralign_fast.training.sharded_release import ShardedRelease


class TRTrainer(ResumableTrainer):
    """Preference alignment with a moving reference.

    Args:
        model: a causal LM of transformers, a PEFT model around one, or its name or folder.
        ref_model: the first reference, or its name; None: a copy of `model` as it is.
        args: a `TRConfig`; TRL's `DPOConfig` and `KTOConfig` and transformers' `TrainingArguments`
            are taken over as one.
        train_dataset, eval_dataset: rows with TRL's columns (`prompt, chosen, rejected` or `prompt,
            completion, label`), text or conversational; `eval_dataset` may be a dict of them.
        processing_class: the tokenizer or processor; None: the one of `model`.
        compute_metrics: gets an `EvalPrediction` of evaluation rows: `predictions` are float32
            rewards, (rows, 2) of chosen and rejected or (rows,) of unpaired completions, and
            `label_ids` the column of the chosen one, or the label. (TRL's trainers compute logits
            for it in a forward of their own, and deprecate that.)
        callbacks, optimizers, preprocess_logits_for_metrics: as in `transformers.Trainer`.
        quantization_config: of transformers, for a model given by its name.
        peft_config: of PEFT; the model is trained through a new adapter.

    `ref_model` is the model that the reference keeps, or None. Metrics are TRL's, in training and,
    with `eval_` before them, in evaluation: `rewards/chosen`, `rewards/rejected`,
    `rewards/accuracies` (pairs), `rewards/margins`, `logps/chosen`, `logps/rejected`, `kl` (KTO),
    `aux_loss` (mixtures of experts); over the completions' tokens `entropy` (nats), `logits/chosen`
    and `logits/rejected` (the mean over the vocabulary of what the softmax takes) and
    `mean_token_accuracy` (pairs: how often a chosen token is the likeliest); `num_tokens`, trained
    on so far, prompts counted with each completion, without padding. Each is a mean over the
    batches since the last log of a batch's mean on all processes. Besides, `tr/syncs`, and in
    evaluation `kl/initial` with `log_kl_initial=True`.

    Raises:
        ValueError: unusable rows, options or models; the message names them and what was expected.
    """

    args: TRConfig
    model: PreTrainedModel
    method: ClassVar[str | None] = None  # dpo or kto, where a subclass trains nothing else

    def __init__(
        self,
        model: str | PreTrainedModel | None = None,
        ref_model: str | PreTrainedModel | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[..., PackedBatch] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        if model is None:
            raise ValueError(
                "TRTrainer needs a model: a transformers causal LM, its name or its folder"
            )
        if train_dataset is None and eval_dataset is None:
            raise ValueError("`train_dataset` is required: rows to train on, or eval_dataset alone")
        args = run_arguments(args)
        check_versions()
        settle_method(args, self.method, train_dataset, eval_dataset)
        if args.should_save:
            check_writable(args.output_dir)
        tokenizer = processing_of(processing_class, model, args)
        with told_to_all():
            policy, first = given_models(model, ref_model, args, quantization_config, peft_config)
        found = router_coefficient(policy, args.router_aux_loss_coef)
        self.router_aux_loss_coef, self.aux_loss_enabled = found
        place, why = choose_reference(
            args.reference,
            args.trust_region,
            own_start=first is not None,
            lora=next(trained_adapters(policy), None) is not None,
            precompute=args.precompute_ref_log_probs,
        )
        with told_to_all():
            train_dataset = tokenized(train_dataset, tokenizer, args, "train", training=True)
        # accelerate would cut up the batches of a stream, of training or of evaluation
        args.accelerator_config.dispatch_batches = False  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
        collator = collator_of(args, tokenizer, vocabulary_size(policy, first), data_collator)
        super().__init__(
            model=policy,
            args=args,
            data_collator=collator,  # pyright: ignore[reportArgumentType]
            train_dataset=train_dataset,
            eval_dataset=held_out(eval_dataset, train_dataset, tokenizer, args),
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        check_division(self.accelerator, self.data_collator)
        self._objective = args.objective
        # the mean over a micro-batch is the loss; Trainer divides it by the accumulation steps
        self.model_accepts_loss_kwargs = False
        self._models = RunModels(self.accelerator, args, policy, first, place, self.data_collator)
        # a trainer that is dropped gives its models back; the stack holds neither it nor them
        self._undo = weakref.finalize(self, self._models.prepared.close)
        self._undo.atexit = False
        self.reference = self._models.reference
        self._offloading = activation_offloading(policy, args)
        # those of TRL's trainers among them, by which the Hub finds models of a method
        kind = "dpo" if self._objective.paired else "kto"
        policy.add_model_tags(["tralign-fast", "trl", kind])
        self.reference.run = {"data": digest(train_dataset)}
        self.accelerator.print(f"reference: {place} ({why})", file=sys.stderr)
        self._lookahead = Lookahead(self)
        self._finite = FiniteSteps()
        self._once = OncePerRun()
        unequal = args.train_sampling_strategy == "batch_rebalance"
        self._counts = CountWeights(self.accelerator, unequal)
        # what is not finite shows in the logs, and asking each loss would wait for the device
        args.logging_nan_inf_filter = False
        self._pace = Pace(self.accelerator)
        self.add_callback(self._pace)
        self.add_callback(self._finite)
        self.add_callback(_SyncReference(self.reference, self._lookahead))
        self._follow = FollowOptions(self)
        self.add_callback(self._follow)
        self._means = {"train": PreferenceMetrics(), "eval": PreferenceMetrics()}

    @property
    def ref_model(self) -> PreTrainedModel | None:
        """The model whose weights the reference has; None where it keeps no whole model."""
        return self.reference.as_model()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if not self.args.gradient_release or releases(self.optimizer):  # of an earlier training
            return super().create_optimizer(model)
        if self.optimizer is None:
            factory, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            factory = BlockAdafactor if factory is Adafactor else factory
            self.optimizer_cls_and_kwargs = factory, options
        kind = ShardedRelease if self.is_fsdp_enabled else GradientRelease
        self.optimizer = kind(super().create_optimizer(model))
        return self.optimizer

    def release_model(self) -> PreTrainedModel:
        """The policy as it was given, with the weights that it has by now.

        Its forward and attention are its own again, compiled layers are not, and the hooks of
        gradient release and accelerate's autocast are off; so are a `ref_model`'s. The trainer
        cannot train or evaluate afterwards. A trainer that is dropped gives them back too, once
        Python has collected it, but for the autocast, which transformers' trainers leave there.
        """
        if not self._undo.alive:
            return self.model
        optimizer: Any = self.optimizer
        while optimizer is not None and not isinstance(optimizer, GradientRelease):
            optimizer = getattr(optimizer, "optimizer", None)  # accelerate's wrapper
        if optimizer is not None:
            optimizer.remove()
        take_off_autocast(self.model)
        self._undo()
        return self.model

    def _check_not_released(self) -> None:
        if not self._undo.alive:
            raise RuntimeError("release_model() has given the model back: make a new TRTrainer")

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
            return EpochLengthSampler(sampler, seed, self.args.world_size)
        return sampler

    def _get_dataloader(self, dataset: Any, *args, is_training: bool = False, **kwargs) -> Any:
        loader = super()._get_dataloader(dataset, *args, is_training=is_training, **kwargs)
        if is_training and not self._objective.needs_kl:  # whose rows borrow from their batch
            level_tokens(loader, dataset, self.accelerator)
        return loader

    # --- a step -----------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of a step; before the first of a window, all of the window are scored."""
        if self.control.should_training_stop:  # a run that is resumed at its end
            return [], None
        if self.reference.must_score(self.state.global_step):
            self._lookahead.score_window(epoch_iterator)
        with self._pace.loading():
            batches = self._lookahead.take(epoch_iterator, num_batches)
        self._counts.start(batches)
        return batches, None

    def training_step(
        self,
        model: nn.Module,
        inputs: PackedBatch | SplitBatch,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """Forward and backward of a micro-batch, part after part where it is split."""
        tokens = (part.num_tokens for part in parts_of(inputs))
        self.largest_batch = max(self.largest_batch, *tokens)
        parts = whole_batch_terms(self, model, inputs)
        losses = []
        state = self.accelerator.gradient_state
        steps = state.sync_gradients
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            state._set_sync_gradients(steps and last)  # DeepSpeed's backward steps if it is set
            alone = contextlib.nullcontext() if last else self.accelerator.no_sync(model)
            with alone, self._offloading, self._once.training_mode(model, self.model):
                loss = super().training_step(model, part, num_items_in_batch)  # pyright: ignore[reportArgumentType]
                losses.append(loss)
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def parts_of(self, batch: PackedBatch | SplitBatch) -> tuple[PackedBatch, ...]:
        """The parts of a batch that run one after the other, as many on every process."""
        if self.args.token_budget is None:
            return parts_of(batch)
        return even_parts(self.accelerator, batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: PackedBatch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of a batch: log-probs of policy and reference, then `preference_loss`.

        Raises:
            ValueError: a log-prob is NaN or infinite; nothing is trained on it.
        """
        ref_logps = self.reference.logps(inputs)
        batch = asked(inputs) if self.aux_loss_enabled else inputs
        wanted = statistics_of(batch, self.args.use_weighting)
        with self._pace.forward(self.model):
            logps, found = token_logps_and_statistics(model, batch, wanted)
        weights = None
        if self.args.use_weighting:
            weights = pair_weights(logps, found["log_sum_sq_probs"], batch.offsets)
        result = preference_loss(
            logps, ref_logps, batch.offsets, loss=self._objective,
            is_desirable=batch.is_desirable, kl=mean_kl(self, batch, logps, ref_logps),
            lengths=batch.completion_lengths, token_weights=batch.token_weights,
            example_weights=weights, nll_tokens=batch.nll_tokens,
        )  # fmt: skip
        if batch.share > 0:
            mode = "train" if self.model.training else "eval"
            totals, tokens = result.totals, token_totals(found, batch)
            if batch.weight == 0:  # its examples are another process's
                totals, tokens = torch.zeros_like(totals), torch.zeros_like(tokens)
            self._means[mode].record(totals, tokens, batch.share)
            # in the state, so that a resumed run goes on counting
            if mode == "train" and batch.weight > 0:
                self.state.num_input_tokens_seen += batch.sequence_tokens
        step = self.state.global_step + 1
        loss = add_balance(self, result.loss, batch)
        loss = self._finite.guarded(loss, result.logps, ref_logps, batch.rows, step)
        loss = self._counts.weigh(loss, batch, self.model.training)
        if self.is_deepspeed_enabled:  # its backward steps
            self._finite.check()
        return (loss, outputs_of(result, batch)) if return_outputs else loss

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs.to(self.args.device)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """`compute_loss` has counted them, whatever `include_num_input_tokens_seen` is."""

    def _prepare_context_parallel_inputs(self, model: nn.Module, inputs: Any) -> Any:
        return contextlib.nullcontext, inputs  # batches come divided, and long rows cut

    def get_train_dataloader(self) -> Any:
        with dividing(self):
            return super().get_train_dataloader()

    def floating_point_ops(self, inputs: PackedBatch | SplitBatch) -> int:
        # 2 for the forward, 4 for the backward, per parameter and token
        return 6 * inputs.num_tokens * self._once.num_parameters(self.model)

    # --- evaluation and metrics -------------------------------------------------------------------

    def evaluate(self, eval_dataset: Any = None, ignore_keys=None, metric_key_prefix: str = "eval"):
        if eval_dataset is not None and not isinstance(eval_dataset, (str, dict)):
            tokenizer: Any = self.processing_class
            eval_dataset = tokenized(eval_dataset, tokenizer, self.args, metric_key_prefix)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)  # pyright: ignore[reportArgumentType]

    def predict(self, test_dataset: Any, ignore_keys=None, metric_key_prefix: str = "test"):
        """The metrics of rows as `evaluate` takes them; there are no predictions."""
        tokenizer: Any = self.processing_class
        test_dataset = one_dataset(test_dataset, metric_key_prefix)
        rows = tokenized(test_dataset, tokenizer, self.args, metric_key_prefix)
        return super().predict(rows, ignore_keys, metric_key_prefix)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: PackedBatch | SplitBatch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        loss = torch.zeros((), dtype=torch.float32, device=self.args.device)
        rewards, labels = [], []
        for part in whole_batch_terms(self, model, inputs):
            batch = self._prepare_inputs(part)
            with torch.no_grad(), self.compute_loss_context_manager():
                part_loss, outputs = self.compute_loss(model, batch, return_outputs=True)
                loss += part_loss
                if batch.share > 0:
                    rewards.append(outputs["predictions"])
                    labels.append(outputs["labels"])
                if self._models.initial is not None:
                    initial = self._models.initial.to(self.args.device)  # pyright: ignore[reportArgumentType]
                    kl = hidden_kl(model, initial, batch)
                    self._means["eval"].add("kl/initial", kl, batch.grad_tokens)
        if prediction_loss_only:
            return loss, None, None
        return loss, torch.cat(rewards), torch.cat(labels)

    def _get_grad_norm(self, model, grad_norm=None):
        if self.args.gradient_release:  # all gradients are used up: a norm of 0 would be logged
            return None
        self._finite.grad_norm = norm = super()._get_grad_norm(model, grad_norm)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._finite.check()
        if "loss" in logs:
            if self._finite.skipped:
                logs["tr/skipped_steps"] = self._finite.skipped
            logs.update(self._means["train"].pop(self.accelerator))
            logs["num_tokens"] = self._tokens_seen()
            schedule = self.reference.schedule
            logs["tr/syncs"] = 0 if schedule.is_frozen else self.state.global_step // schedule.every
        elif "train_loss" in logs:  # the end: what no log has had, as TRL says it there
            logs.update(self._means["train"].pop(self.accelerator))
        super().log(logs, start_time)

    def _tokens_seen(self) -> float:
        """Tokens trained on, of all processes; those that share layers see the same ones."""
        tokens = self.state.num_input_tokens_seen / sharing_processes(self.model)
        tokens = torch.tensor(tokens, dtype=torch.float32, device=self.args.device)
        return float(self.accelerator.reduce(tokens, reduction="sum"))  # pyright: ignore[reportArgumentType]

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        self._check_not_released()
        self._follow()
        sharing = sharing_processes(self.model) * dividing_processes(self.accelerator)
        if sharing > 1:
            self.gather_function = gather_once(self.accelerator, sharing)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        self._finite.check()
        averages = self._means["eval"].pop(self.accelerator)
        averages["num_tokens"] = self._tokens_seen()
        prefixed = {f"{metric_key_prefix}_{k}": v for k, v in averages.items()}
        output.metrics.update(prefixed)  # pyright: ignore[reportOptionalMemberAccess]
        return output

    # --- runs and checkpoints ---------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        self._check_not_released()
        self._once.restart()
        self.largest_batch = 0  # tokens
        with out_of_memory_explained(self):
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self._writes:  # a checkpoint, which has checked them
            self._finite.check()
            check_weights(self.model)
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model, trial) -> None:
        self._finite.check()
        check_weights(self.model)
        super()._save_checkpoint(model, trial)

    def create_model_card(self, *args, **kwargs) -> None:
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            card = Path(self.args.output_dir or ".") / "README.md"
            add_trust_region(card, self.args, self.reference.name)

    def _load_best_model(self) -> None:
        if self.reference.is_policy:  # the weights that go are the reference of evaluations
            self._lookahead.score_held_out()
        super()._load_best_model()


class _SyncReference(TrainerCallback):
    """Moves the reference after the optimizer step, as TRL's `SyncRefModelCallback` does."""

    def __init__(self, reference: ReferencePolicy, lookahead: Lookahead) -> None:
        self.reference = reference
        self.lookahead = lookahead
        self._unmoved = True  # the policy has made no step since the reference's update

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.lookahead.restart()
        if state.global_step == 0:  # also once more, with a smaller batch (auto_find_batch_size)
            self.reference.restart(self._unmoved)
        self.reference.settle(state.max_steps)
        keep_own_intervals(args, state, self.reference)

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        self.lookahead.begin_epoch()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._unmoved = self.reference.schedule.should_sync(state.global_step)
        if self._unmoved:
            self.reference.sync()
            keep_own_intervals(args, state, self.reference)
