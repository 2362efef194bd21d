"""A run that goes on with another number of processes: what must stay, and what is dealt out anew.

A step's rows are what all processes' batches of all accumulated passes hold, in the order of the
sampler, whatever their number: 4 processes with a batch of 1, 2 with 2, or 1 with 4. So the product
must stay. What depends on how rows are grouped besides:

| what                                        | on another number of processes                    |
|---------------------------------------------|---------------------------------------------------|
| KTO's KL term, a mean over a pass           | rows of a pass must stay, too                     |
| completions that KTO's rows lend each other | are lent as in the run's first processes          |
| the last pass of an epoch                   | is filled up if the run's first processes filled  |
|                                             | it; a run that began with one process did not     |
| a term that is a mean over tokens; a        | another grouping is another mean: one line        |
| load-balancing loss                         |                                                   |
| shards of DeepSpeed, a stream that is dealt | refused                                           |
| out by its files, batch_rebalance           |                                                   |

Processes that share layers (tensor parallelism) or a batch's groups (context parallelism) get the
same rows, and count once.
"""

from __future__ import annotations

from typing import Any

from accelerate.data_loader import BatchSamplerShard

from tralign_fast.distributed.tensor_parallel import is_sharded_by_transformers, sharing_processes

# what a checkpoint keeps of this beside the options of `resume.py`
SHARES = (
    "train_batch_size", "gradient_accumulation_steps", "world_size", "rows_of_step", "sharding",
    "lenders", "filled", "grouped", "by_file", "uneven",
)  # fmt: skip


def shares_of(trainer: Any, carried: dict[str, Any]) -> dict[str, Any]:
    """How the steps of a run are dealt out to its processes.

    Args:
        carried: the same of the checkpoint that the run goes on from; empty for one that starts.
    """
    args, rows = trainer.args, trainer.train_dataset
    of_step = int(trainer.get_total_train_batch_size(args))
    objective = args.objective
    by_file = getattr(rows, "n_shards", 0) >= args.world_size > 1
    length = len(rows) if hasattr(rows, "__len__") else 0
    return {
        "rows_of_step": of_step,
        "sharding": _sharding(trainer),
        "lenders": carried.get("lenders", args.train_batch_size) if objective.needs_kl else None,
        "filled": carried.get("filled", processes_with_rows(trainer) > 1),
        "grouped": objective.sums_tokens or trainer.aux_loss_enabled,
        "by_file": by_file and not hasattr(rows, "__len__"),
        "uneven": not args.dataloader_drop_last and length % of_step != 0,
    }


def processes_with_rows(trainer: Any) -> int:
    """How many processes get rows of their own, counting those once that get the same ones."""
    args = trainer.args
    passes = args.train_batch_size * args.gradient_accumulation_steps
    return int(trainer.get_total_train_batch_size(args)) // passes


def _sharding(trainer: Any) -> str:
    if trainer.is_deepspeed_enabled:
        return "DeepSpeed"
    if is_sharded_by_transformers(trainer.model):
        tensor = sharing_processes(trainer.model)
        return f"tensor parallelism of {tensor}" if tensor > 1 else "FSDP2 of transformers"
    return "FSDP2" if trainer.is_fsdp_enabled else "none"


def check_shares(saved: dict[str, Any], present: dict[str, Any]) -> tuple[list[str], str | None]:
    """(what cannot go on so, one line for what changes), of a checkpoint and of a run."""
    names = [n for n in SHARES[:5] if n in saved and n in present and saved[n] != present[n]]
    if not names:
        return [], None
    there, here = _shown(saved), _shown(present)
    refused = []
    if saved["rows_of_step"] != present["rows_of_step"]:
        refused.append(f"rows of a step: {there} there, {here} here")
    elif saved["lenders"] is not None:
        passes = [d["rows_of_step"] // d["gradient_accumulation_steps"] for d in (saved, present)]
        if passes[0] != passes[1]:
            refused.append(f"rows that KTO's KL term is a mean over: {there} there, {here} here")
        elif present["train_batch_size"] % saved["lenders"]:
            refused.append(
                f"completions that KTO's rows lend each other: among {saved['lenders']} of a "
                f"process there, per_device_train_batch_size {present['train_batch_size']} here, "
                "which is no multiple"
            )
    if "DeepSpeed" in (saved["sharding"], present["sharding"]):
        whose = {"world_size": "processes whose shards DeepSpeed wrote", "sharding": "sharding"}
        refused += [
            f"{what}: {saved[name]} there, {present[name]} here"
            for name, what in whose.items()
            if saved[name] != present[name]
        ]
    if (saved["by_file"] or present["by_file"]) and saved["world_size"] != present["world_size"]:
        refused.append(
            "processes that a stream's files are dealt out to: "
            f"{saved['world_size']} there, {present['world_size']} here"
        )
    if present.get("train_sampling_strategy") == "batch_rebalance" and not refused:
        refused.append(f"what batch_rebalance deals rows out to: {there} there, {here} here")
    return refused, f"{there} there, from here on {here}{_differs(saved, present)}"


def _shown(shares: dict[str, Any]) -> str:
    """2 processes x per_device_train_batch_size 2 x gradient_accumulation_steps 1 = 4"""
    processes, sharding = shares["world_size"], shares["sharding"]
    alike = processes // _with_rows(shares)
    return (
        f"{processes} process{'es' if processes != 1 else ''}"
        f"{'' if sharding == 'none' else f' of {sharding}'}"
        f"{f' / {alike} with the same rows' if alike > 1 else ''} x "
        f"per_device_train_batch_size {shares['train_batch_size']} x "
        f"gradient_accumulation_steps {shares['gradient_accumulation_steps']} = "
        f"{shares['rows_of_step']}"
    )


def _with_rows(shares: dict[str, Any]) -> int:
    passes = shares["train_batch_size"] * shares["gradient_accumulation_steps"]
    return shares["rows_of_step"] // passes


def _differs(saved: dict[str, Any], present: dict[str, Any]) -> str:
    """What of the losses is not the same then."""
    why = []
    if saved["grouped"]:
        why.append("a term of the loss is a mean over a process's batch")
    same = saved["rows_of_step"] // saved["gradient_accumulation_steps"] == (
        present["rows_of_step"] // present["gradient_accumulation_steps"]
    )
    if saved["uneven"] and (not same or not (saved["filled"] or _with_rows(present) == 1)):
        why.append("the last step of an epoch has fewer rows, which are grouped otherwise")
    return f" (losses differ: {'; '.join(why)})" if why else ""


def deal_batches(loader: Any, filled: bool) -> Any:
    """The batches of accelerate's dataloader, as the run's first processes would share them.

    Args:
        filled: where nobody else has rows of his own, fills the last batch of an epoch with the
            first rows of it, as several processes do.
    """
    sampler = getattr(loader, "batch_sampler", None)
    if filled and sampler is not None and not isinstance(sampler, BatchSamplerShard):
        sampler = BatchSamplerShard(sampler)
        for part in (loader, getattr(loader, "base_dataloader", loader)):
            part.__dict__["batch_sampler"] = sampler  # which a DataLoader lets nobody assign
    if isinstance(sampler, BatchSamplerShard) and not hasattr(sampler, "sampler"):
        # where accelerate looks for whom to tell the epoch, once the first batches are skipped
        sampler.sampler = getattr(sampler.batch_sampler, "sampler", None)  # pyright: ignore[reportAttributeAccessIssue]
    return loader
