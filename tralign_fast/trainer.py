"""`transformers.Trainer` for TR-DPO, TR-IPO and TR-KTO.

The loop, optimizers, checkpoints and distribution are transformers'. Here: what goes into a batch,
the loss of a batch, when the reference moves, and what is measured.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from transformers import (
    Adafactor,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
)
from transformers.integrations.liger import apply_liger_kernel

from tralign_fast.checkpoints import (
    REFERENCE_FOLDER,
    check_output_dir,
    check_whole,
    digest,
    newest_checkpoint,
)
from tralign_fast.config import TRConfig
from tralign_fast.data.packing import PackedBatch, PreferenceCollator, SplitBatch
from tralign_fast.data.tokenization import tokenize_pairs, tokenize_unpaired
from tralign_fast.gradient_release import BlockAdafactor, GradientRelease
from tralign_fast.lookahead import Lookahead
from tralign_fast.losses import PreferenceLoss
from tralign_fast.metrics import MeanMetrics
from tralign_fast.model_card import add_trust_region
from tralign_fast.modeling import hidden_kl, prepare_model, sequence_logps
from tralign_fast.reference import cheapest_reference
from tralign_fast.reference.adapter import AdapterReference
from tralign_fast.reference.base import ReferencePolicy
from tralign_fast.reference.lora import trained_adapters
from tralign_fast.reference.offloaded import OffloadedReference
from tralign_fast.reference.resident import ResidentReference
from tralign_fast.reference.sharding import gathered, is_sharded, reshard
from tralign_fast.reference.snapshot import SnapshotReference
from tralign_fast.reference.window import WindowedReference


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
        if processing_class is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            tokenizer: PreTrainedTokenizerBase = _load(AutoTokenizer, name)
        else:
            tokenizer = processing_class
        if isinstance(model, str):
            policy: PreTrainedModel = _load(AutoModelForCausalLM, model, **_init_kwargs(args))
        else:
            policy = model
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self._paired = args.loss_spec.paired
        self._tokenizer = tokenizer
        train_dataset = self._tokenize(train_dataset, args, "train")
        if isinstance(eval_dataset, dict):
            eval_dataset = {k: self._tokenize(d, args, k) for k, d in eval_dataset.items()}
        else:
            eval_dataset = self._tokenize(eval_dataset, args, "eval")
        if hasattr(train_dataset, "_ex_iterable"):
            # IterableDataset: a PackedBatch cannot be cut up
            args.accelerator_config.dispatch_batches = False  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
        collator = data_collator or PreferenceCollator(
            paired=self._paired,
            max_length=args.max_length,
            token_budget=args.token_budget,
            pad_token_id=tokenizer.pad_token_id or 0,  # pyright: ignore[reportArgumentType]
            vocab_size=_input_embeddings(policy).num_embeddings,
        )
        if args.disable_dropout:
            _disable_dropout(policy)
            if ref_model is not None:
                _disable_dropout(ref_model)
        place, why = args.reference, "as asked for"
        lora = next(trained_adapters(policy), None) is not None
        if place == "auto":
            place, why = cheapest_reference(
                args.trust_region, own_start=ref_model is not None, lora=lora
            )
        starts_here = place in ("snapshot", "adapter") or (place == "offloaded" and lora)
        if starts_here and ref_model is not None:
            others = "" if lora else '"offloaded" or '
            raise ValueError(
                f'reference="{place}" starts from the policy: leave ref_model out, or use '
                f'reference={others}"resident"'
            )
        if place == "resident" and ref_model is None:
            with gathered(policy):
                ref_model = copy.deepcopy(policy)
        super().__init__(
            model=policy,
            args=args,
            data_collator=collator,  # pyright: ignore[reportArgumentType]
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # the mean over a micro-batch is the loss; Trainer divides it by the accumulation steps
        self.model_accepts_loss_kwargs = False
        self._check_distribution(place)
        with gathered(policy) if args.log_kl_initial else contextlib.nullcontext():
            self._initial = copy.deepcopy(policy).eval() if args.log_kl_initial else None
        packs = self._prepare(self.model)
        if isinstance(collator, PreferenceCollator):
            collator.layout = ("shared" if args.prefix_sharing else "packed") if packs else "padded"
        self.reference = self._build_reference(place, ref_model)
        self.reference.run = {"data": digest(train_dataset)}
        self.accelerator.print(f"reference: {place} ({why})", file=sys.stderr)
        self._lookahead = Lookahead(self)
        if self._initial is not None:
            self._prepare(self._initial)
        self.add_callback(_SyncReference(self.reference))
        self._means = {"train": MeanMetrics(), "eval": MeanMetrics()}

    # --- data -------------------------------------------------------------------------------------

    def _tokenize(self, dataset: Any, args: TRConfig, name: str) -> Any:
        if dataset is None:
            return None
        tokenize = tokenize_pairs if self._paired else tokenize_unpaired
        return tokenize(
            dataset,
            self._tokenizer,
            max_length=args.max_length,
            name=name,
            on_bad_rows=args.on_bad_rows,
            num_proc=args.dataset_num_proc,
        )

    def evaluate(self, eval_dataset: Any = None, ignore_keys=None, metric_key_prefix: str = "eval"):
        if eval_dataset is not None and not isinstance(eval_dataset, (str, dict)):
            eval_dataset = self._tokenize(eval_dataset, self.args, metric_key_prefix)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)  # pyright: ignore[reportArgumentType]

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs.to(self.args.device)

    def floating_point_ops(self, inputs: PackedBatch | SplitBatch) -> int:
        # 2 for the forward, 4 for the backward, per parameter and token
        return 6 * inputs.num_tokens * self.model.num_parameters(exclude_embeddings=True)

    # --- models -----------------------------------------------------------------------------------

    def _check_distribution(self, place: str) -> None:
        fsdp = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if fsdp is not None and fsdp.fsdp_version != 2:
            raise ValueError('FSDP version 1 is not supported: set fsdp_config={"version": 2}')
        zero3 = self._zero3_plugin is not None
        held = {"adapter": fsdp is not None or zero3, "offloaded": zero3}
        if held.get(place):
            raise ValueError(
                f'reference="{place}" cannot hold weights that {"ZeRO-3" if zero3 else "FSDP2"} '
                'shards: use reference="resident", or hard updates (ref_model_mixup_alpha=1) with '
                'reference="snapshot"'
            )
        if place == "resident" and zero3 and self._zero3_plugin.offload_param_device == "nvme":
            raise ValueError(
                'reference="resident" cannot move weights that ZeRO-3 keeps on a disk: set '
                'offload_param to "cpu" or "none", or use reference="snapshot"'
            )

    @property
    def _zero3_plugin(self) -> Any:
        """accelerate's DeepSpeed plugin where ZeRO-3 shards the weights, else None."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        return plugin if plugin is not None and plugin.zero_stage == 3 else None

    def _prepare(self, model: PreTrainedModel) -> bool:
        """`prepare_model`; the first process tries the model out: where FSDP fills the weights of
        the others later they are empty, and all must use the same layout."""
        names = ("packing", "logits_budget_mb", "vocab_filter")
        options = {name: getattr(self.args, name) for name in names}
        if self.accelerator.num_processes == 1 or is_sharded(model):
            with gathered(model):  # loaded under ZeRO-3: all have its weights, and try them out
                return prepare_model(model, **options)
        packs = [prepare_model(model, **options)] if self.accelerator.is_main_process else [False]
        broadcast_object_list(packs)
        if not self.accelerator.is_main_process:
            prepare_model(model, **{**options, "packing": packs[0]}, probe=False)
        return packs[0]

    def _build_reference(self, place: str, start: PreTrainedModel | None) -> ReferencePolicy:
        schedule = self.args.trust_region
        if place == "snapshot":
            return SnapshotReference(self.model, schedule)
        rounding = {"rounding": self.args.ema_rounding, "seed": self.args.seed}
        if place == "adapter":
            tolerance = self.args.adapter_tolerance
            return AdapterReference(self.model, schedule, tolerance=tolerance, **rounding)
        if place == "offloaded":
            return OffloadedReference(self.model, schedule, start, **rounding)
        assert start is not None
        self._prepare(start)
        if self.args.use_liger_kernel:  # Trainer gives them to the policy when training starts
            apply_liger_kernel(start, self.args.liger_kernel_config)
        if self.is_fsdp_enabled:
            model = fsdp2_prepare_model(self.accelerator, start)
        elif self._zero3_plugin is not None:
            model = self._engine_of(start)
        else:
            model = self.accelerator.prepare_model(start, evaluation_mode=True)
        return ResidentReference(self.model, schedule, model, **rounding)

    def _engine_of(self, model: PreTrainedModel) -> nn.Module:
        """DeepSpeed's engine around a model that only runs forwards, sharded as the policy is."""
        import deepspeed  # pyright: ignore[reportMissingImports]

        plugin: Any = self._zero3_plugin
        plugin.set_moe_leaf_modules(model)
        config = copy.deepcopy(plugin.deepspeed_config)
        for part in ("optimizer", "scheduler"):
            config.pop(part, None)
        config["zero_optimization"].pop("offload_optimizer", None)
        engine, *_ = deepspeed.initialize(model=model, config=config)
        return engine

    # --- the optimizer ----------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if not self.args.gradient_release or isinstance(self.optimizer, GradientRelease):
            return super().create_optimizer(model)
        if self.optimizer is None:
            factory, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            factory = BlockAdafactor if factory is Adafactor else factory
            self.optimizer_cls_and_kwargs = factory, options
        self.optimizer = GradientRelease(super().create_optimizer(model))
        return self.optimizer

    # --- windows ----------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if isinstance(self.reference, WindowedReference) and self.reference.needs_window:
            self._open_window(self.reference, epoch_iterator)
        return self._lookahead.take(epoch_iterator, num_batches), None

    def _open_window(self, reference: WindowedReference, epoch_iterator: Iterator[Any]) -> None:
        """Scores the steps until the next update, and the evaluations that fall between."""
        step, schedule = self.state.global_step, reference.schedule
        left = self.state.max_steps - step
        steps = left if schedule.is_frozen else min(left, schedule.every - step % schedule.every)
        reference.wrapped = self.model_wrapped
        batches = self._lookahead.steps(epoch_iterator, steps)
        total = steps * self.args.gradient_accumulation_steps
        merge = self.args.merged_batches
        # one visit of the reference's weights for all that is scored
        with self.compute_loss_context_manager(), reference.weights():
            # a window of one step is swept at every step: no bar for it
            wanted = self.is_world_process_zero() and not self.args.disable_tqdm and steps > 1
            shown = total if wanted else None
            reference.score_window(map(self._even_parts, batches), shown, merge=merge)
            if self._evaluates_between(step, step + steps):
                for dataset in self._eval_datasets():
                    loader = self.get_eval_dataloader(dataset)
                    shown = shown and len(loader)
                    reference.score_window(map(self._even_parts, loader), shown, merge=merge)

    def _even_parts(self, batch: PackedBatch | SplitBatch) -> tuple[PackedBatch, ...]:
        """The parts of a batch, as many on every process: where weights are sharded all must run
        the model equally often. What is added weighs nothing."""
        parts = batch.parts
        if self.args.token_budget is None or self.accelerator.num_processes == 1:
            return parts
        count = torch.tensor([len(parts)], device=self.args.device)
        most = int(self.accelerator.gather(count).max())  # pyright: ignore[reportAttributeAccessIssue]
        return (*parts, *[dataclasses.replace(parts[-1], share=0.0)] * (most - len(parts)))

    def _evaluates_between(self, first: int, last: int) -> bool:
        """Whether held-out batches are looked at after step `first` and up to `last`."""
        if self.eval_dataset is None:
            return False
        if last == self.state.max_steps or self.args.eval_strategy == "epoch":
            return True
        every = self.state.eval_steps if self.args.eval_strategy == "steps" else 0
        return bool(every) and last // every > first // every

    def _eval_datasets(self) -> list[Any]:
        datasets: Any = self.eval_dataset
        return list(datasets.values()) if isinstance(datasets, dict) else [datasets]

    # --- the loss ---------------------------------------------------------------------------------

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

    @torch.no_grad()
    def _with_common_kl(
        self, model: nn.Module, inputs: PackedBatch | SplitBatch
    ) -> tuple[PackedBatch, ...]:
        """The parts of a batch. KTO's KL term is the whole batch's: split, it is computed first."""
        parts = self._even_parts(inputs)
        if self._paired or len(parts) == 1:
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
            self._record(batch, logps.detach(), result, kl)
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

    # --- metrics ----------------------------------------------------------------------------------

    def _record(
        self, batch: PackedBatch, logps: Tensor, result: PreferenceLoss, kl: Tensor | None
    ) -> None:
        training = self.model.training
        means = self._means["train" if training else "eval"]
        if training:  # in the state, so that a resumed run goes on counting
            self.state.num_input_tokens_seen += batch.num_tokens
        own = logps[: len(batch)] if batch.is_desirable is not None else logps
        if batch.is_desirable is None:
            chosen, rejected = own.chunk(2)
            margins = result.chosen_rewards - result.rejected_rewards
            means.add_mean("rewards/accuracies", (margins > 0).float())
            means.add_mean("rewards/margins", margins)
        else:
            chosen = own.masked_fill(~batch.is_desirable, float("nan"))
            rejected = own.masked_fill(batch.is_desirable, float("nan"))
        means.add_mean("rewards/chosen", result.chosen_rewards)
        means.add_mean("rewards/rejected", result.rejected_rewards)
        means.add_mean("logps/chosen", chosen)
        means.add_mean("logps/rejected", rejected)
        if kl is not None:
            means.add("kl", kl * batch.share, batch.share)

    def _averages(self, mode: str) -> dict[str, float]:
        averages = self._means[mode].pop(self.accelerator)
        if not self._paired and {"rewards/chosen", "rewards/rejected"} <= averages.keys():
            averages["rewards/margins"] = averages["rewards/chosen"] - averages["rewards/rejected"]
        return averages

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._averages("train"))
            tokens = torch.tensor(float(self.state.num_input_tokens_seen), device=self.args.device)
            total = self.accelerator.reduce(tokens, reduction="sum")
            logs["num_tokens"] = float(total)  # pyright: ignore[reportArgumentType]
            schedule = self.reference.schedule
            logs["tr/syncs"] = 0 if schedule.is_frozen else self.state.global_step // schedule.every
        super().log(logs, start_time)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        averages = self._averages("eval")
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


def _load(factory: Any, name: str, **kwargs: Any) -> Any:
    try:
        return factory.from_pretrained(name, **kwargs)
    except ImportError as error:  # an attn_implementation or a quantisation without its package
        asked = ", ".join(f"{key}={value!r}" for key, value in kwargs.items() if key != "dtype")
        raise ValueError(
            f"cannot load {name!r} with {asked}: {str(error).splitlines()[0]}"
        ) from error
    except (OSError, ValueError) as error:
        what = "tokenizer" if factory is AutoTokenizer else "model"
        raise ValueError(
            f"cannot load {what} {name!r}: expected a hub id or a folder made by save_pretrained "
            f"({str(error).splitlines()[0]})"
        ) from error


def _init_kwargs(args: TRConfig) -> dict[str, Any]:
    # JSON of the command line is a dict by now: TrainingArguments has parsed it
    kwargs = dict(cast("dict[str, Any]", args.model_init_kwargs or {}))
    kwargs.setdefault("dtype", torch.float32)  # TRL's default
    return kwargs


def _input_embeddings(model: PreTrainedModel) -> Any:
    """The `nn.Embedding`, also inside what PEFT wraps it in."""
    embeddings: Any = model.get_input_embeddings()
    embeddings = getattr(embeddings, "original_module", embeddings)
    return getattr(embeddings, "base_layer", embeddings)


def _disable_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout") and isinstance(module.attention_dropout, float):
            module.attention_dropout = 0.0  # pyright: ignore[reportArgumentType]
