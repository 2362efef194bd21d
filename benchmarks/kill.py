"""SIGKILL in the middle of a tiny run, resume, and the losses of a run that nobody killed.

    python -m benchmarks.kill --trials 200

Every trial starts a run in a folder of its own, kills it after a random time or before a random
touch of a file of the run (every other trial), with some chance kills what resumes it, too, and
lets it end. What starts again does what a scheduler's script would: `resume_from_checkpoint=True`,
and from the beginning (`overwrite_output_dir`) if no checkpoint is whole. The loss of every step
then has to be that of the unkilled run, to 1e-6.

Trainers run in forks of one process that has imported everything: a trial takes some two seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

STEPS = 8
TOLERANCE = 1e-6
SOFT = {"ref_model_mixup_alpha": 0.4, "ref_model_sync_steps": 3}
HARD = {"ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 3}
BF16 = {"optim": "adafactor", "model_dtype": "bfloat16", "learning_rate": 2e-2}
RELEASE = {**BF16, "gradient_release": True, "max_grad_norm": 0.0}


@dataclass
class Case:
    """A tiny run."""

    method: str
    options: dict[str, Any]
    lora: bool = False
    processes: int = 1


CASES = {
    "resident, DPO": Case("dpo", {"reference": "resident", **SOFT}),
    "resident, KTO": Case("kto", {"reference": "resident", **SOFT}),
    "snapshot, DPO": Case("dpo", {"reference": "snapshot", **HARD}),
    "snapshot, KTO": Case("kto", {"reference": "snapshot", **HARD}),
    "frozen snapshot, DPO": Case("dpo", {"reference": "snapshot", "sync_ref_model": False}),
    "precomputed, DPO": Case("dpo", {"reference": "precomputed"}),
    "precomputed, KTO": Case("kto", {"reference": "precomputed"}),
    "offloaded, DPO": Case("dpo", {"reference": "offloaded", **SOFT}),
    "offloaded, KTO": Case("kto", {"reference": "offloaded", **SOFT}),
    "adapter, DPO, LoRA": Case("dpo", {"reference": "adapter", **SOFT}, lora=True),
    "adapter, KTO, LoRA": Case("kto", {"reference": "adapter", **SOFT}, lora=True),
    "snapshot, DPO, LoRA": Case("dpo", {"reference": "snapshot", **HARD}, lora=True),
    "resident, DPO, bf16 Adafactor": Case("dpo", {"reference": "resident", **SOFT, **BF16}),
    "resident, DPO, bf16 Adafactor, release": Case(
        "dpo", {"reference": "resident", **SOFT, **RELEASE}
    ),
    "offloaded, KTO, bf16 Adafactor, release": Case(
        "kto", {"reference": "offloaded", **SOFT, **RELEASE}
    ),
    "snapshot, DPO, bf16 Adafactor, release": Case(
        "dpo", {"reference": "snapshot", **HARD, **RELEASE}
    ),
    "resident, DPO, async_save": Case("dpo", {"reference": "resident", "async_save": True, **SOFT}),
    "offloaded, KTO, async_save": Case(
        "kto", {"reference": "offloaded", "async_save": True, **SOFT}
    ),
    "resident, DPO, two processes": Case("dpo", {"reference": "resident", **SOFT}, processes=2),
    "snapshot, KTO, two processes": Case("kto", {"reference": "snapshot", **HARD}, processes=2),
    "resident, DPO, async_save, two processes": Case(
        "dpo", {"reference": "resident", "async_save": True, **SOFT}, processes=2
    ),
}


@dataclass
class Result:
    """Trials of a case."""

    trials: int = 0
    kills: int = 0
    during: Counter = field(default_factory=Counter)  # where a kill fell
    worst: float = 0.0
    faults: list[str] = field(default_factory=list)


class Whole(NamedTuple):
    """The run that nobody kills."""

    losses: list[float]
    seconds: float
    touches: int


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<start>", "<end>", "<unk>"])}
    vocabulary |= {f"w{i}": i + 4 for i in range(60)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<start>", eos_token="<end>"
    )


def make_rows(method: str) -> Any:
    """Rows of one and a half epochs of `STEPS` steps."""
    from datasets import Dataset

    chance = random.Random(0)

    def words() -> str:
        return " ".join(f"w{chance.randrange(60)}" for _ in range(chance.randint(2, 9)))

    rows = [
        {"prompt": words(), "completion": f" {words()}", "label": i % 3 != 0}
        if method == "kto"
        else {"prompt": words(), "chosen": f" {words()}", "rejected": f" {words()}"}
        for i in range(22)
    ]
    return Dataset.from_list(rows)


def make_trainer(case: Case, folder: Path, **extra: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    from tralign_fast import TRConfig, TRTrainer

    torch.manual_seed(0)
    options = {**case.options, **extra}
    dtype = options.pop("model_dtype", "float32")
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).to(getattr(torch, dtype))
    if case.lora:
        import peft

        lora = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        model = peft.get_peft_model(model, lora)
    args = TRConfig(
        **{
            "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1, "learning_rate": 5e-3, "logging_steps": 1,
            "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "report_to": [],
            "use_cpu": True, "bf16": False, "disable_tqdm": True, "max_length": 32,
            "gradient_checkpointing": False, "loss_type": case.method,
            "train_sampling_strategy": "random", **options,
        }
    )  # fmt: skip
    return TRTrainer(
        model, args=args, train_dataset=make_rows(case.method), processing_class=make_tokenizer()
    )


def train(case: Case, folder: Path, resume: bool) -> None:
    """Trains as a script would that does not know what came before; writes `losses.json`."""
    trainer = make_trainer(case, folder / "run", overwrite_output_dir=True)
    try:
        trainer.train(resume_from_checkpoint=resume)
    except ValueError as error:
        if not resume or "no whole checkpoint" not in str(error):
            raise
        trainer.train()
    if trainer.is_world_process_zero():
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        (folder / "losses.json").write_text(json.dumps(losses))


def count_touches(folder: Path, die_at: int | None) -> list[int]:
    """A list with how often the run's files were opened for writing, renamed, linked or deleted by
    this process, which kills itself before number `die_at`."""
    names = {"os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}
    seen, run = [0], str(folder / "run")

    def hook(event: str, arguments: tuple) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_ACCMODE
        if (writes or event in names) and str(arguments[0]).startswith(run):
            seen[0] += 1
            if seen[0] == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return seen


def start(case: Case, folder: Path, resume: bool, die_at: int | None = None) -> list[int]:
    """The ids of forks that train; the first one kills itself before a touch of its files."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    children = []
    for rank in range(case.processes):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        try:
            log = os.open(folder / f"log-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if case.processes > 1:
                os.environ |= {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                    "WORLD_SIZE": str(case.processes), "MASTER_PORT": str(port),
                    "LOCAL_WORLD_SIZE": str(case.processes), "ACCELERATE_USE_CPU": "true",
                }  # fmt: skip
            touches = count_touches(folder, die_at if rank == 0 else None)
            train(case, folder, resume)
            if rank == 0:
                (folder / "touches.json").write_text(str(touches[0]))
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return children


def wait(children: Sequence[int], seconds: float | None = None) -> list[int] | None:
    """Exit codes (negative: signals); None if any still runs after `seconds`."""
    end = None if seconds is None else time.monotonic() + seconds
    codes: dict[int, int] = {}
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    codes[child] = os.waitstatus_to_exitcode(status)
                    if codes[child]:  # the others would wait for it
                        for other in children:
                            if other not in codes:
                                os.kill(other, signal.SIGKILL)
        if len(codes) < len(children):
            if end is not None and time.monotonic() >= end:
                return None
            time.sleep(0.005)
    return [codes[child] for child in children]


def kill(children: Sequence[int]) -> None:
    for child in children:
        os.kill(child, signal.SIGKILL)
    wait(children)


def where(folder: Path) -> str:
    """What a run was at when it was killed."""
    run = folder / "run"
    if (run / ".writing").exists() or (run / ".deleting").exists():
        return "writing"
    return "later" if list(run.glob("checkpoint-*")) else "before the first"


def try_once(
    case: Case, folder: Path, whole: Whole, chance: random.Random, by_touch: bool
) -> tuple[list[str], float, str | None]:
    """(where kills fell, the worst relative difference of a loss, a fault or None)."""
    folder.mkdir(parents=True)
    fell: list[str] = []
    expected = whole.losses
    for attempt in range(4):
        last = attempt == 3 or (attempt > 0 and chance.random() < 0.6)
        die_at = chance.randint(1, whole.touches) if by_touch and not last else None
        children = start(case, folder, attempt > 0, die_at)
        codes = wait(children, None if last or by_touch else chance.uniform(0.0, whole.seconds))
        if codes is None or -signal.SIGKILL in codes:
            if codes is None:
                kill(children)
            fell.append(where(folder))
            continue
        if any(codes):
            return fell, float("inf"), f"exit codes {codes}: {_last_lines(folder)}"
        if attempt > 0:
            break  # else it ended before it was killed: it is resumed at its end
    losses = json.loads((folder / "losses.json").read_text())
    if len(losses) != len(expected):
        return fell, float("inf"), f"{len(losses)} losses, expected {len(expected)}"
    worst = max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))
    return fell, worst, None if worst <= TOLERANCE else f"losses differ by {worst:.1e}"


def _last_lines(folder: Path) -> str:
    texts = [path.read_text().strip().splitlines()[-1:] for path in folder.glob("log-*.txt")]
    return " | ".join(line for lines in texts for line in lines)


def run_whole(case: Case, folder: Path) -> Whole:
    folder.mkdir(parents=True)
    began = time.monotonic()
    if any(wait(start(case, folder, resume=False)) or []):
        raise RuntimeError(f"the run that nobody kills fails: {_last_lines(folder)}")
    seconds = time.monotonic() - began
    touches = int((folder / "touches.json").read_text())
    return Whole(json.loads((folder / "losses.json").read_text()), seconds, touches)


def run_trials(
    names: Sequence[str], trials: int, folder: Path, seed: int = 0, *, touches_only: bool = False
) -> dict[str, Result]:
    """`trials` in turn over the cases."""
    chance = random.Random(seed)
    wholes: dict[str, Whole] = {}
    results = {name: Result() for name in names}
    for index in range(trials):
        name = names[index % len(names)]
        case, place = CASES[name], folder / f"{index}"
        if name not in wholes:
            wholes[name] = run_whole(case, folder / f"whole-{index}")
        by_touch = touches_only or (index // len(names)) % 2 == 1
        fell, worst, fault = try_once(case, place, wholes[name], chance, by_touch)
        result = results[name]
        result.trials += 1
        result.kills += len(fell)
        result.during.update(fell)
        result.worst = max(result.worst, worst)
        if fault is None:
            shutil.rmtree(place)
        else:
            result.faults.append(f"trial {index}: {fault} ({place})")
            print(result.faults[-1], file=sys.stderr)
    return results


def report(results: dict[str, Result]) -> str:
    places = ("before the first", "later", "writing")
    lines = [
        "| case | trials | kills | before one | later | while writing | worst | faults |",
        "|------|-------:|------:|------:|------:|------:|------:|------:|",
    ]
    for name, result in results.items():
        counts = " | ".join(str(result.during[place]) for place in places)
        lines.append(
            f"| {name} | {result.trials} | {result.kills} | {counts} | {result.worst:.0e} | "
            f"{len(result.faults)} |"
        )
    total = sum(r.trials for r in results.values()), sum(r.kills for r in results.values())
    faults = [fault for result in results.values() for fault in result.faults]
    lines += ["", f"{total[0]} trials, {total[1]} kills, {len(faults)} faults", *faults]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kill", description=__doc__)
    parser.add_argument("--trials", type=int, default=len(CASES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--touches", action="store_true", help="kill only where files are touched")
    parser.add_argument("--case", action="append", choices=list(CASES), help="these cases only")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    import peft  # noqa: F401  # what forks share

    import tralign_fast.training.trainer  # noqa: F401

    with tempfile.TemporaryDirectory(prefix="kill-") as folder:
        results = run_trials(
            options.case or list(CASES), options.trials, Path(folder), options.seed,
            touches_only=options.touches,
        )  # fmt: skip
        print(report(results))
        faults = any(result.faults for result in results.values())
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
