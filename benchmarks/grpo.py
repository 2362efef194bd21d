"""The log-prob passes of a GRPO step: TRL's fused head beside `use_fast_logprobs`.

    python -m benchmarks.grpo [--rounds 5] [--rows 8] [--prompt 64] [--completion 64]
                              [--layers 1] [--hidden 576] [--vocab 49152] [--dtype fp32 | bf16]
                              [--output_dir benchmarks/results]

One trainer of TRL (`GRPOTrainer`), whose model has one layer of SmolLM2's width and all of its
vocabulary, so that the head is what counts (`--layers 30` is the shape of SmolLM2-135M). Nothing is
generated. A round is what a step does with completions that are there: the reference's pass without
gradient, then the policy's with entropy, TRL's own loss with its KL term, and the backward.

**Arms**, in turn, one round each: whole logits (as TRL had it before its fused head), TRL, TRL with
its head on completions alone (as it is on a GPU; there it is no arm of its own), and TRL with
`use_fast_logprobs`.

**The gate.** Loss, entropy and gradient norm of every round agree.

**Memory**: the peak of all tensors that a round makes, gradients of the weights included, counted
in a round of its own; not the allocator's fragmentation, not kernels' workspaces.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.common import device_name, environment, format_table, summarize, write_csv
from tralign_fast.memory.live import LiveTensors

ARMS = {
    "logits": "whole logits",
    "trl": "TRL",
    "trl_compact": "TRL, head on completions",
    "drop_in": "TRL with use_fast_logprobs",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
TEMPERATURE, BETA = 0.9, 0.04


class Disagreement(Exception):
    """Two arms did not compute the same thing."""


def make_trainer(options: argparse.Namespace, device: str, folder: str) -> Any:
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    torch.manual_seed(0)
    heads = max(1, options.hidden // 64)
    config = LlamaConfig(
        vocab_size=options.vocab, hidden_size=options.hidden, num_attention_heads=heads,
        num_key_value_heads=heads, num_hidden_layers=options.layers,
        intermediate_size=options.hidden * 8 // 3, tie_word_embeddings=True,
        initializer_range=0.1,  # the softmax of random weights has something to tell
    )  # fmt: skip
    words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1, "word": 2}, unk_token="word"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
    )
    args = GRPOConfig(
        folder, temperature=TEMPERATURE, beta=0.0, num_generations=2, report_to=[],
        per_device_train_batch_size=options.rows, use_cpu=device == "cpu", bf16=False,
        gradient_checkpointing=False, dataloader_pin_memory=False,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    model.to(DTYPES[options.dtype]).train()
    trainer = GRPOTrainer(
        model,
        lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_list([{"prompt": "word"}] * options.rows),
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = 1  # `train` would say so
    trainer.beta = BETA  # set late: with a beta TRL reads a second model, from a folder
    return trainer


def make_inputs(options: argparse.Namespace, device: str) -> dict[str, Any]:
    """Completions of a quarter of the length to all of it, prompts padded on the left alike."""
    draw = torch.Generator().manual_seed(1)

    def part(length: int, on_left: bool) -> tuple[Tensor, Tensor]:
        ids = torch.randint(2, options.vocab, (options.rows, length), generator=draw)
        sizes = torch.randint(length // 4 + 1, length + 1, (options.rows, 1), generator=draw)
        place = torch.arange(length)
        mask = (length - 1 - place if on_left else place) < sizes
        return ids.masked_fill(~mask, 0).to(device), mask.long().to(device)

    (prompt, prompt_mask), (completion, mask) = (
        part(options.prompt, on_left=True), part(options.completion, on_left=False),
    )  # fmt: skip
    return {
        "prompt_ids": prompt, "prompt_mask": prompt_mask,
        "completion_ids": completion, "completion_mask": mask,
        "advantages": torch.linspace(-1, 1, options.rows, device=device),
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip


def one_round(trainer: Any, inputs: dict[str, Any]) -> Callable[[], tuple[float, ...]]:
    """Both passes and the backward; returns what tells loss, entropy and gradient norm."""
    model = trainer.model
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    with torch.no_grad():
        reference, _, _ = trainer._get_per_token_logps_and_entropies(
            model, ids, mask, inputs["completion_ids"].shape[1]
        )
    # a reference that is not the policy, so that the KL term has a gradient
    loss = trainer._compute_loss(model, {**inputs, "ref_per_token_logps": reference - 0.3})
    loss.backward()

    def facts() -> tuple[float, ...]:
        norm = torch.stack([p.grad.float().norm() for p in model.parameters()]).norm()
        return float(loss.detach()), trainer._metrics["train"]["entropy"][-1], float(norm)

    return facts


def _whole_logits(
    model, input_ids, attention_mask, logits_to_keep, *args, compute_entropy=False, **kwargs
) -> Any:
    output = model(
        input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=logits_to_keep + 1
    )
    logps = (output.logits[:, :-1] / TEMPERATURE).float().log_softmax(-1)
    picked = logps.gather(-1, input_ids[:, -logits_to_keep:, None])[..., 0]
    entropy = None
    if compute_entropy:
        with torch.no_grad():
            entropy = -(logps.exp() * logps).sum(-1)
    return picked, entropy, None


@contextlib.contextmanager
def arm_of(name: str, trainer: Any) -> Iterator[None]:
    from trl.trainer import utils

    from tralign_fast.integrations.trl import use_fast_logprobs

    if name == "logits":
        with mock.patch.object(trainer, "_get_per_token_logps_and_entropies", _whole_logits):
            yield
    elif name == "trl_compact":
        with mock.patch.object(utils, "_use_triton", return_value=True):
            yield
    elif name == "drop_in":
        undo = use_fast_logprobs(trainer)
        try:
            yield
        finally:
            undo()
    else:
        yield


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A record an arm. Raises Disagreement if one of them computes something else."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = [name for name in ARMS if device == "cpu" or name != "trl_compact"]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peaks: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(options, device, folder)
        inputs = make_inputs(options, device)
        for count in range(options.rounds + 2):  # a warm-up, and one that counts bytes
            found: dict[str, tuple[float, ...]] = {}
            for name in names:
                trainer.model.zero_grad()
                with arm_of(name, trainer):
                    if count == 1:
                        with LiveTensors() as live:
                            facts = one_round(trainer, inputs)
                        peaks[name] = live.report().peak
                    else:
                        start = _time(device)
                        facts = one_round(trainer, inputs)
                        seconds[name] += [_time(device) - start] if count else []
                found[name] = facts()
            check_agreement(found, TOLERANCE[options.dtype])
    return [_record(name, options, seconds, peaks, device) for name in names]


def _time(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def check_agreement(found: dict[str, tuple[float, ...]], tolerance: float) -> None:
    expected = found["trl"]
    for name, facts in found.items():
        for what, a, b in zip(("loss", "entropy", "norm"), facts, expected, strict=True):
            # written so that NaN fails
            if not abs(a - b) <= tolerance * max(abs(b), 1e-3):
                raise Disagreement(f"{name}: {what} {a:.7g}, TRL's {b:.7g}")


def _record(
    name: str,
    options: argparse.Namespace,
    seconds: dict[str, list[float]],
    peaks: dict[str, int],
    device: str,
) -> dict[str, Any]:
    own = summarize(seconds[name])
    pairs = zip(seconds["trl"], seconds[name], strict=True)
    return {
        "arm": name,
        "rounds": len(seconds[name]),
        "median_s": own.median, "p20_s": own.p20, "p80_s": own.p80,
        "ratio_to_trl": summarize(seconds["trl"]).median / own.median,
        "pairwise_ratio_to_trl": summarize([a / b for a, b in pairs]).median,
        "peak_mb": peaks[name] / 2**20,
        "dtype": options.dtype,
        "shapes": f"rows={options.rows} prompt={options.prompt} completion={options.completion} "
        f"layers={options.layers} H={options.hidden} V={options.vocab}",
        "device": device_name(device),
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if the arms disagree, and writes nothing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grpo")
    for name, default in (
        ("rounds", 5), ("rows", 8), ("prompt", 64), ("completion", 64),
        ("layers", 1), ("hidden", 576), ("vocab", 49152),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--output_dir", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(arguments)
    try:
        records = run(options)
    except Disagreement as error:
        print(error, file=sys.stderr)
        return 1
    rows = [
        [
            ARMS[r["arm"]],
            *(f"{r[key]:.3f}" for key in ("median_s", "p20_s", "p80_s")),
            f"{r['ratio_to_trl']:.2f}x",
            f"{r['pairwise_ratio_to_trl']:.2f}x",
            f"{r['peak_mb']:,.0f}",
        ]
        for r in records
    ]
    print(format_table(["", "s/round", "p20", "p80", "speed-up", "pairwise", "peak MiB"], rows))
    system = environment()
    name = ("gpu_" if torch.cuda.is_available() else "") + "grpo.csv"
    write_csv(options.output_dir / name, [{**record, **system} for record in records])
    return 0


if __name__ == "__main__":
    sys.exit(main())
