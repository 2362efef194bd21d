"""What `tralign-fast train` takes beside the options of `TRConfig`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from tralign_fast.training.option_types import nearest, shown


@dataclass
class TrainOptions:
    """What to train on what."""

    model: str = field(metadata={"help": "Hub id or folder of the policy."})
    dataset: str = field(metadata={"help": "File (jsonl, parquet, csv), folder or hub id."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset."})
    eval_dataset: str | None = field(default=None, metadata={"help": "As dataset; None: none."})
    eval_split: str = field(default="test", metadata={"help": "Split of the eval dataset."})
    peft_config: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Train an adapter: a table of PEFT's LoraConfig, on a command line JSON."
        },
    )
    quantization_config: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Load the model in few bits: a table of BitsAndBytesConfig."},
    )
    resume: bool = field(
        default=False, metadata={"help": "Go on from the last checkpoint in output_dir."}
    )


def lora_config(table: dict[str, Any] | str | None) -> Any:
    """PEFT's `LoraConfig` of a table, or of its JSON; None: there is none.

    Raises:
        ValueError: PEFT is not installed, no table, or an entry that PEFT has not.
    """
    entries = _entries("peft_config", table, '{"r": 16, "target_modules": "all-linear"}')
    if entries is None:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError("peft_config: PEFT is not installed: pip install peft") from error
    known = {*LoraConfig.__dataclass_fields__}
    return _made("peft_config", LoraConfig, {"task_type": "CAUSAL_LM", **entries}, known)


def bits_config(table: dict[str, Any] | str | None) -> Any:
    """transformers' `BitsAndBytesConfig` of a table, or of its JSON; None: there is none.

    Raises:
        ValueError: no table, or an entry that it has not.
    """
    name = "quantization_config"
    entries = _entries(name, table, '{"load_in_4bit": true}')
    if entries is None:
        return None
    import inspect

    from transformers import BitsAndBytesConfig

    known = {*inspect.signature(BitsAndBytesConfig.__init__).parameters} - {"self", "kwargs"}
    return _made(name, BitsAndBytesConfig, entries, known)


def _entries(name: str, table: Any, example: str) -> dict[str, Any] | None:
    if isinstance(table, str):
        try:
            table = json.loads(table)
        except json.JSONDecodeError:
            raise ValueError(f"{name}: expected JSON such as {example}, got {table!r}") from None
    if table is not None and not isinstance(table, dict):
        raise ValueError(f"{name}: expected a table such as {example}, got {shown(table)}")
    return table


def _made(name: str, kind: Any, entries: dict[str, Any], known: set[str]) -> Any:
    for entry in entries:
        if entry not in known:
            near = nearest(entry, known)
            hint = f"; did you mean {near}?" if near else ""
            raise ValueError(f"{name}: {kind.__name__} has no {shown(entry)}{hint}")
    try:
        return kind(**entries)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{name}: {str(error).splitlines()[0]}") from error
