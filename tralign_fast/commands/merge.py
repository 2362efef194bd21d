"""`tralign-fast merge ADAPTER --output FOLDER`: an adapter and its base as one model."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors import SafetensorError

from tralign_fast.command_line import PositionalParser
from tralign_fast.commands.models import (
    ADAPTER,
    base_of,
    check_model,
    is_adapter,
    load_model,
    load_tokenizer,
)
from tralign_fast.training.train_options import DTYPES


def run_merge(arguments: list[str]) -> int:
    """Adds an adapter's weights to its base's, and writes the model that needs no PEFT.

    Raises:
        ValueError: no adapter, no base, or a folder that cannot be written.
    """
    parser = PositionalParser(prog="tralign-fast merge", description=run_merge.__doc__)
    parser.add_argument("adapter", metavar="ADAPTER", help="Folder of a run with use_peft.")
    parser.add_argument("--output", required=True, help="Folder of the merged model.")
    parser.add_argument("--base", help="The base. Default: the one that the adapter names.")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="Default: the base's.")
    given = parser.parse_args(arguments)
    check_model(given.adapter)
    if not is_adapter(given.adapter):
        raise ValueError(f"{given.adapter}: no adapter: expected {ADAPTER}; it is a whole model")
    output = Path(given.output)
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f"--output {output}: holds files; expected a new folder")
    model = load_model(given.adapter, base=given.base, dtype=given.dtype)
    tokenizer = load_tokenizer(given.adapter, given.base or base_of(given.adapter))
    try:
        output.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(output, ignore_errors=True)  # it was new, and what is in it is not a model
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"--output {output} cannot be written ({reason})") from error
    print(f"{output}/: {given.adapter} merged into {given.base or base_of(given.adapter)}")
    return 0
