"""Models that `merge`, `generate` and `eval` are given: a folder of a run, an adapter, a hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tralign_fast.commands.record import CONFIG
from tralign_fast.training.option_types import shown
from tralign_fast.training.pretrained import load_pretrained

ADAPTER = "adapter_config.json"


def is_adapter(name: str) -> bool:
    return (Path(name) / ADAPTER).is_file()


def check_model(name: str) -> None:
    """Raises ValueError for a path where there is nothing to load."""
    path = Path(name)
    if path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", ADAPTER)):
            raise ValueError(
                f"{name}: holds no model; expected config.json or {ADAPTER}, as a run's end writes"
            )
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"{name}: no such folder; expected a model's folder or a hub id")


def base_of(name: str) -> str | None:
    """The model from which a run, or the adapter in its folder, started."""
    if is_adapter(name):
        return adapter_config(name).base_model_name_or_path
    return _config_of(name).get("model")


def dtype_of(name: str) -> str:
    """Of the weights that a run trained, or its adapter's base; "auto" of what is no run."""
    config = _config_of(name)
    if not config:
        return "auto"
    few = any(config.get(bits) for bits in ("load_in_4bit", "load_in_8bit", "quantization_config"))
    return config.get("dtype") or ("bfloat16" if few else "float32")


def _config_of(name: str) -> dict[str, Any]:
    for folder in (Path(name), Path(name).parent):  # a checkpoint's run
        if (folder / CONFIG).is_file():
            return yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8")) or {}
    return {}


def adapter_config(name: str) -> Any:
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise ValueError(
            f"{name} is an adapter: PEFT is not installed: pip install peft"
        ) from error
    try:
        return PeftConfig.from_pretrained(name)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ValueError(f"{name}: {ADAPTER} cannot be read ({shown(str(error))})") from error


def load_model(
    name: str,
    *,
    base: str | None = None,
    dtype: str = "auto",
    device: Any = None,
    merged: bool = True,
) -> Any:
    """The model of a folder or a hub id, an adapter with its base, in evaluation mode.

    Args:
        base: of an adapter; None: the one that it names.
        dtype: of the weights, "auto": as they were saved.
        device: None: where transformers puts it.
        merged: the adapter is added to its base's weights; False: it stays PEFT's model.

    Raises:
        ValueError: there is none, or PEFT is not installed.
    """
    from transformers import AutoModelForCausalLM

    check_model(name)
    if not is_adapter(name):
        model = load_pretrained(AutoModelForCausalLM, name, dtype=dtype)
    else:
        from peft import PeftModel

        start = base or base_of(name)
        if not start:
            raise ValueError(f"{name}: names no base model; expected --base")
        check_model(start)
        plain = load_pretrained(AutoModelForCausalLM, start, dtype=dtype)
        try:
            wrapped: Any = PeftModel.from_pretrained(plain, name)
        except (RuntimeError, ValueError, KeyError) as error:  # of another model
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{name} does not fit its base {start}: {reason}") from error
        # merged, it is as a model that is loaded
        model = wrapped.merge_and_unload().requires_grad_(True) if merged else wrapped
    return (model if device is None else model.to(device)).eval()


def load_tokenizer(name: str, base: str | None = None) -> Any:
    """The tokenizer beside a model, or else its base's."""
    from transformers import AutoTokenizer

    beside = Path(name) / "tokenizer_config.json"
    source = base if Path(name).is_dir() and not beside.is_file() and base else name
    tokenizer = load_pretrained(AutoTokenizer, source)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def best_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
