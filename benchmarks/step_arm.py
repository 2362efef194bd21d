"""An arm of the step benchmark: one trainer in a process of its own, a step for each turn."""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import random
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

SYNC_EVERY = 2
MAX_LENGTH = 2048
SEED = 0
MODELS = {
    "smollm2": "SmolLM2-135M-Instruct",
    "llama-3.2-1b": "random weights of Llama-3.2-1B's shape",
    "tiny": "two random layers",
}


@dataclass(frozen=True)
class Distribution:
    """Words of prompts and completions, each drawn uniformly, both ends included."""

    prompt: tuple[int, int]
    completion: tuple[int, int]


DISTRIBUTIONS = {
    "chat": Distribution((100, 200), (30, 70)),
    "summarisation": Distribution((300, 500), (20, 50)),
    "long": Distribution((20, 60), (200, 300)),
}


@dataclass(frozen=True)
class Arm:
    label: str
    is_trl: bool = False
    options: dict[str, Any] = field(default_factory=dict)  # of TRConfig or DPOConfig
    reference: str = "resident"
    patch: str | None = None  # a function of this module, called in the arm's process
    fast_logprobs: bool = False  # TRL's head runs on `linear_logprobs`


HARD = {"ref_model_mixup_alpha": 1.0}
ARMS = {
    "trl": Arm("TRL", is_trl=True),
    "trl_compact": Arm("TRL, head on completions only", is_trl=True, patch="_let_trl_compact"),
    "drop_in": Arm("TRL with use_fast_logprobs", is_trl=True, fast_logprobs=True),
    # each of ours adds one part to the one before it: compact head, no padding, prompts shared
    "full_logits": Arm(
        "ours: padded, full logits", options={"packing": False}, patch="_score_with_full_logits"
    ),
    "padded": Arm("ours: padded, compact head", options={"packing": False}),
    "packed": Arm("ours: packed", options={"prefix_sharing": False}),
    "mkl": Arm("ours: packed, shared, without oneDNN", patch="_leave_products_to_mkl"),
    "tralign_fast": Arm("tralign-fast: packed, prompts shared"),
    # hard updates, for which all places of the reference are exact
    "resident": Arm("resident", options=HARD),
    "snapshot": Arm("snapshot", options=HARD, reference="snapshot"),
    "offloaded": Arm("offloaded", options=HARD, reference="offloaded"),
}
# What one run compares, by the name of its results: arms that run side by side, the first of which
# is what the others are measured against. The parts are added one to the other, a pair at a time:
# all arms at once would take 40 GB.
COMPARISONS = {
    "step": {"": ("trl", "tralign_fast")},
    "step_ablations": {
        "TRL's head on completions": ("trl", "trl_compact"),
        "our trainer": ("trl", "full_logits"),
        "compact head": ("full_logits", "padded"),
        "no padding": ("padded", "packed"),
        "prompts shared": ("packed", "tralign_fast"),
        "oneDNN": ("mkl", "tralign_fast"),
    },
    "step_references": {"": ("resident", "snapshot", "offloaded")},
    "step_drop_in": {"": ("trl", "drop_in")},
}


@dataclass(frozen=True)
class Job:
    """What an arm's process is told."""

    arm: str
    distribution: str
    steps: int  # the warm-up included
    pairs: int
    dtype: str
    model: str
    device: str = "cpu"
    part: str = ""  # what sets the arms of a comparison apart, where there are several


def run_arm(job: Job, pipe: Any) -> None:
    """Trains, one step for each word of the parent, and tells it what it took."""
    _quieten()
    import torch
    from transformers import PrinterCallback

    if (patch := ARMS[job.arm].patch) is not None:
        globals()[patch]()
    model, tokenizer = load_model(job.model, getattr(torch, TORCH_DTYPES[job.dtype]))
    # where the reference holds no weights, there is no second model
    reference = copy.deepcopy(model) if ARMS[job.arm].reference == "resident" else None
    loaded_mb = _resident_mb()  # on a CPU before the trainer's own, on a GPU with all weights there
    with tempfile.TemporaryDirectory() as folder:
        trainer = _make_trainer(job, model, reference, tokenizer, folder)
        on_gpu = trainer.args.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            loaded_mb = torch.cuda.memory_allocated() / 2**20
        trainer.data_collator = counter = _CountingCollator(trainer.data_collator)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_make_turns(pipe, counter))  # the last one: after the sync
        trainer.train()
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    peak_mb = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else peak_mb
    config = model.config
    shape = f"layers={config.num_hidden_layers} H={config.hidden_size} V={config.vocab_size}"
    facts = {"loaded_mb": loaded_mb, "peak_mb": peak_mb, "model": shape}
    pipe.send(("done", {**facts, "threads": torch.get_num_threads()}))


TORCH_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def _quieten() -> None:
    """No progress bars or paths on the parent's terminal; warnings stay, one line each."""
    os.environ.update(TQDM_DISABLE="1", HF_HUB_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
    warnings.formatwarning = lambda message, category, *_: f"{category.__name__}: {message}\n"
    import transformers

    transformers.utils.logging.disable_progress_bar()


def load_model(name: str, dtype: Any) -> tuple[Any, Any]:
    """SmolLM2, or random weights of another shape with SmolLM2's tokenizer; and the tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tralign_fast.demo.smollm2 import load_smollm2, load_smollm2_tokenizer
    from tralign_fast.memory.plan_options import load_config

    if name == "smollm2":
        return load_smollm2(dtype)
    tokenizer: Any = load_smollm2_tokenizer()
    if name == "tiny":
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    else:
        config = load_config(name)
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, token, getattr(tokenizer, token))
    torch.manual_seed(SEED)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    return model.to(dtype), tokenizer


def _make_trainer(job: Job, model: Any, reference: Any, tokenizer: Any, folder: str) -> Any:
    from datasets import Dataset

    arm = ARMS[job.arm]
    rows = make_rows(job.distribution, job.steps * job.pairs)
    options = {
        "output_dir": folder,
        "max_steps": job.steps,
        "per_device_train_batch_size": job.pairs,
        "train_sampling_strategy": "sequential",
        "max_length": MAX_LENGTH,
        "learning_rate": 1e-5,  # 1e-6 moves the loss by 1e-4 in five steps: nothing to compare
        "lr_scheduler_type": "constant",
        "sync_ref_model": True,
        "ref_model_sync_steps": SYNC_EVERY,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": job.device == "cpu",
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "seed": SEED,
        **arm.options,
    }
    if arm.is_trl:
        from trl import DPOConfig, DPOTrainer

        make_trainer, config = DPOTrainer, DPOConfig(**options)
    else:
        from tralign_fast import TRConfig, TRTrainer

        make_trainer, config = TRTrainer, TRConfig(**options, reference=arm.reference)
    trainer = make_trainer(
        model,
        ref_model=reference,
        args=config,  # pyright: ignore[reportArgumentType]
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    if arm.fast_logprobs:
        from tralign_fast.integrations.trl import use_fast_logprobs

        use_fast_logprobs(trainer)
    return trainer


def make_rows(distribution: str, count: int) -> list[dict[str, str]]:
    """Text rows of English from Python's own help; the first n are the same whatever the count."""
    from pydoc_data.topics import topics

    words = " ".join(topics[key] for key in sorted(topics)).split()
    draw, lengths = random.Random(SEED), DISTRIBUTIONS[distribution]

    def text(bounds: tuple[int, int]) -> str:
        length = draw.randint(*bounds)
        start = draw.randrange(len(words) - length)
        return " ".join(words[start : start + length])

    return [
        {
            "prompt": text(lengths.prompt),
            "chosen": " " + text(lengths.completion),
            "rejected": " " + text(lengths.completion),
        }
        for _ in range(count)
    ]


class _CountingCollator:
    """Notes what goes into a batch; runs between steps, outside the timed span."""

    def __init__(self, collator: Callable[[Any], Any]) -> None:
        self.collator = collator
        self.counts: list[tuple[int, list[int]]] = []  # tokens computed, tokens of the sequences

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        batch = self.collator(examples)
        lengths = [
            len(example["prompt_ids"]) + len(example[completion])
            for completion in ("chosen_ids", "rejected_ids")
            for example in examples
        ]
        assert max(lengths) < MAX_LENGTH, "a row was cut; expected max_length to hold every row"
        tokens = batch["input_ids"].numel() if isinstance(batch, dict) else batch.num_tokens
        self.counts.append((2 * tokens, lengths))  # the policy's and the reference's
        return batch


def _make_turns(pipe: Any, counter: _CountingCollator) -> Any:
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        """Waits for the arm's turn before a step, and tells what the step took after it."""

        begin = busy = 0.0

        def on_step_begin(self, args, state, control, **kwargs) -> None:
            # the loader fetches one batch ahead, so the newest count is not this step's
            pipe.send(("ready", (time.monotonic(), *counter.counts[state.global_step])))
            pipe.recv()
            self.busy = _others_seconds()
            self.begin = _device_time()

        def on_step_end(self, args, state, control, **kwargs) -> None:
            end = _device_time()
            others = max(0.0, _others_seconds() - self.busy) / (end - self.begin)
            pipe.send(("step", (self.begin, end, others)))

        def on_log(self, args, state, control, logs=None, **kwargs) -> None:
            if logs and "loss" in logs:
                pipe.send(("log", (logs["loss"], logs["grad_norm"])))

    return Turns()


def _device_time() -> float:
    """The monotonic clock, once a GPU has done what was asked of it."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic()


def _others_seconds() -> float:
    """CPU seconds that all processes but this one have used since the machine started."""
    import psutil

    times = psutil.cpu_times()._asdict()
    idle = sum(times.get(name, 0.0) for name in ("idle", "iowait", "guest", "guest_nice"))
    return sum(times.values()) - idle - time.process_time()


def _resident_mb() -> float:
    """Resident memory now, what the allocator holds back given to the system first."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    import psutil

    return psutil.Process().memory_info().rss / 2**20


# --- what an ablation replaces --------------------------------------------------------------------


def _let_trl_compact() -> None:
    """TRL scores completions alone where it has Triton, every position on a CPU: here as there."""
    import trl.trainer.utils as utils

    assert hasattr(utils, "_use_triton"), "TRL's head has changed: this ablation needs a new patch"
    # in this module it decides which positions are scored; the kernels ask their own module
    utils._use_triton = lambda device: True


def _leave_products_to_mkl() -> None:
    """fp32 products as PyTorch has them; on a CPU that oneDNN is no faster on, nothing changes."""
    from tralign_fast.ops.cpu import onednn

    onednn.is_faster = lambda: False


def _score_with_full_logits() -> None:
    """The head by the book: log_softmax over the logits of every position, padding too."""
    import tralign_fast.reference.resident as resident
    import tralign_fast.training.batch_terms as batch_terms

    def sequence_logps(model: Any, batch: Any) -> Any:
        logits = model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,
        ).logits  # (S, L, V)
        logps = logits.float().log_softmax(-1)
        return batch.sum_per_sequence(logps.flatten(0, 1)[batch.score_index, batch.targets])

    assert hasattr(resident, "sequence_logps")
    assert hasattr(batch_terms, "sequence_logps")
    resident.sequence_logps = batch_terms.sequence_logps = sequence_logps
