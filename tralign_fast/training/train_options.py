"""What `tralign-fast train` takes beside the options of `TRConfig`: TRL's `ModelConfig` and
`ScriptArguments` by their names, and what is of a command line alone."""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import dataclass, field
from typing import Annotated, Any

from tralign_fast.ops.objective import Range
from tralign_fast.training.option_types import (
    AT_LEAST_ONE,
    NOT_NEGATIVE,
    UNDER_ONE,
    NotEmpty,
    OneOf,
    nearest,
    shown,
)

DTYPES = ("auto", "bfloat16", "float16", "float32")
PARALLEL = ("ddp", "fsdp2", "zero3")


def _option(default: Any, help: str, *aliases: str) -> Any:
    metadata = {"help": help, "aliases": [*aliases]} if aliases else {"help": help}
    return field(default=default, metadata=metadata)


@dataclass
class TrainOptions:
    """What to train on what."""

    model: str = field(
        metadata={"help": "Hub id or folder of the policy.", "aliases": ["--model_name_or_path"]}
    )
    dataset: str = field(
        metadata={
            "help": "File (jsonl, parquet, csv), folder or hub id.",
            "aliases": ["--dataset_name"],
        }
    )
    dataset_config: Annotated[str | None, NotEmpty()] = _option(
        None, "Configuration of a hub dataset that has several."
    )
    dataset_split: str = _option("train", "Split of the dataset.", "--dataset_train_split")
    eval_dataset: Annotated[str | None, NotEmpty()] = _option(
        None,
        "As dataset. Where one is given, it is evaluated on ten times a run, unless eval_strategy "
        "or eval_steps say otherwise. None: none, or with eval_split the dataset's own.",
    )
    eval_split: str = _option("test", "Split of the eval dataset.", "--dataset_test_split")
    columns: dict[str, Any] | str | None = _option(
        None,
        "What the dataset calls its columns: a table, or on a command line "
        "prompt=question,chosen=good,rejected=bad.",
    )
    resume: bool = _option(False, "Go on from the last checkpoint in output_dir.")

    # the model
    model_revision: Annotated[str | None, NotEmpty()] = _option(
        None, "Branch, tag or commit of a hub model."
    )
    dtype: Annotated[str | None, OneOf(*DTYPES)] = _option(
        None, "Of the weights. None: bfloat16 where they are quantised, else float32, as in TRL."
    )
    attn_implementation: Annotated[str | None, NotEmpty()] = _option(
        None, "Attention: sdpa, flash_attention_2, … None: transformers' choice."
    )

    # adapters and few bits
    use_peft: bool = _option(False, "Train a LoRA adapter instead of the weights.")
    lora_r: Annotated[int | None, AT_LEAST_ONE] = _option(None, "Rank. None: 16.")
    lora_alpha: Annotated[float | None, NOT_NEGATIVE] = _option(None, "α of LoRA. None: 32.")
    lora_dropout: Annotated[float | None, UNDER_ONE] = _option(
        None, "Dropout before the adapter; needs disable_dropout false. None: 0."
    )
    lora_target_modules: list[str] | None = _option(
        None, "Layers that get an adapter, by the ends of their names. None: all-linear."
    )
    lora_modules_to_save: list[str] | None = _option(
        None, "Layers that are trained whole beside the adapter."
    )
    use_rslora: bool = _option(False, "Scale by α/√r instead of α/r (arXiv 2312.03732).")
    use_dora: bool = _option(False, "DoRA: a magnitude beside the adapter (arXiv 2402.09353).")
    load_in_4bit: bool = _option(False, "QLoRA: quantise the base to 4 bits; needs use_peft.")
    load_in_8bit: bool = _option(False, "Quantise the base to 8 bits; needs use_peft.")
    bnb_4bit_quant_type: Annotated[str | None, OneOf("nf4", "fp4")] = _option(
        None, "The 4-bit numbers. None: nf4."
    )
    use_bnb_nested_quant: bool | None = _option(
        None, "Quantise the 4-bit scales, too. None: with load_in_4bit."
    )
    peft_config: dict[str, Any] | str | None = _option(
        None, "Any other adapter: a table of PEFT's LoraConfig, on a command line JSON."
    )
    quantization_config: dict[str, Any] | str | None = _option(
        None, "Any other quantisation: a table of BitsAndBytesConfig."
    )

    # the run
    num_processes: Annotated[int | None, AT_LEAST_ONE] = _option(
        None, "Processes on this machine, one a GPU, started through accelerate. None: this one."
    )
    parallel: Annotated[str | None, OneOf(*PARALLEL)] = _option(
        None,
        "How several processes share the work: ddp (a copy each), fsdp2 (sharded), zero3 "
        "(DeepSpeed). None: ddp.",
    )
    sample_prompts: Annotated[int, Range(0, math.inf)] = _option(
        0, "Prompts that are completed before and after, for the report."
    )
    sample_tokens: Annotated[int, AT_LEAST_ONE] = _option(64, "Tokens of such a completion.")

    # names that were given, in a recipe or on the command line
    given: frozenset[str] = field(default=frozenset(), init=False)


_LORA = {
    "lora_r": ("r", 16), "lora_alpha": ("lora_alpha", 32), "lora_dropout": ("lora_dropout", 0.0),
    "lora_target_modules": ("target_modules", "all-linear"),
    "lora_modules_to_save": ("modules_to_save", None), "use_rslora": ("use_rslora", False),
    "use_dora": ("use_dora", False),
}  # fmt: skip


def adapter_of(options: TrainOptions) -> Any:
    """PEFT's configuration of the adapter that is asked for, by TRL's names or as a table.

    Raises:
        ValueError: options without `use_peft`, both ways at once, a quantised base without an
            adapter, or as `lora_config`.
    """
    given = {name: getattr(options, name) for name in _LORA}
    asked = [name for name, value in given.items() if value not in (None, False)]
    if options.peft_config is not None:
        if options.use_peft or asked:
            name = asked[0] if asked else "use_peft"
            raise ValueError(f"{name}: expected it or the table peft_config, got both")
        return lora_config(options.peft_config)
    if not options.use_peft:
        if asked:
            raise ValueError(f"{asked[0]}: expected use_peft true beside it; add --use_peft")
        for name in ("load_in_4bit", "load_in_8bit", "quantization_config"):
            if getattr(options, name):
                raise ValueError(
                    f"{name}: quantised weights cannot be trained, an adapter can; add --use_peft"
                )
        return None
    table: dict[str, Any] = dict(_LORA.values())
    table |= {_LORA[name][0]: given[name] for name in asked}
    if table["target_modules"] in (["all-linear"], ("all-linear",)):
        table["target_modules"] = "all-linear"
    return lora_config(table)


def quantization_of(options: TrainOptions) -> Any:
    """transformers' configuration of the quantisation that is asked for; None: there is none.

    Raises:
        ValueError: options that do not go together, or as `bits_config`.
    """
    few = [name for name in ("load_in_4bit", "load_in_8bit") if getattr(options, name)]
    if len(few) > 1 or (few and options.quantization_config is not None):
        other = "quantization_config" if len(few) == 1 else few[1]
        raise ValueError(f"{few[0]}: expected it or {other}, got both")
    for name in ("bnb_4bit_quant_type", "use_bnb_nested_quant"):
        if getattr(options, name) is not None and not options.load_in_4bit:
            raise ValueError(f"{name}: expected load_in_4bit true beside it")
    if options.load_in_8bit:
        return bits_config({"load_in_8bit": True})
    if not options.load_in_4bit:
        return bits_config(options.quantization_config)
    nested = options.use_bnb_nested_quant
    compute = options.dtype if options.dtype not in (None, "auto") else "bfloat16"
    return bits_config({
        "load_in_4bit": True,
        "bnb_4bit_quant_type": options.bnb_4bit_quant_type or "nf4",
        "bnb_4bit_use_double_quant": True if nested is None else nested,
        "bnb_4bit_compute_dtype": compute,
    })  # fmt: skip


def loading_of(options: TrainOptions, config: Any) -> dict[str, Any]:
    """`model_init_kwargs` with what has a name of its own beside them.

    Raises:
        ValueError: one of them is given twice.
    """
    table = _entries("model_init_kwargs", config.model_init_kwargs, '{"dtype": "bfloat16"}')
    names = {
        "revision": "model_revision", "dtype": "dtype", "attn_implementation": "attn_implementation"
    }  # fmt: skip
    made = dict(table or {})
    for theirs, ours in names.items():
        if (value := getattr(options, ours)) is None:
            continue
        if made.setdefault(theirs, value) != value:
            raise ValueError(f"{ours}: expected it or {theirs} in model_init_kwargs, got both")
    few = options.load_in_4bit or options.load_in_8bit
    if few and "dtype" not in made:
        made["dtype"] = "bfloat16"
    return made


def columns_given(columns: dict[str, Any] | str | None) -> dict[str, str]:
    """{the library's name: the dataset's} of a table, of its JSON or of `a=b,c=d`.

    Raises:
        ValueError: none of these.
    """
    example = "prompt=question,chosen=good"
    if isinstance(columns, str) and not columns.lstrip().startswith("{"):
        pairs = [word.partition("=")[::2] for word in columns.split(",")]
        if not all(ours.strip() and theirs.strip() for ours, theirs in pairs):
            raise ValueError(f"columns: expected a table such as {example}, got {shown(columns)}")
        return {ours.strip(): theirs.strip() for ours, theirs in pairs}
    table = _entries("columns", columns, example) or {}
    for ours, theirs in table.items():
        if not isinstance(ours, str) or not isinstance(theirs, str):
            raise ValueError(f"columns: expected names such as {example}, got {shown(table)}")
    return table


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
