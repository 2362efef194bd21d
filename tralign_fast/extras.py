"""What the extras of the installation bring, and the line that names one where it is missing.

`pip install tralign-fast` brings torch, and Triton under Linux: the ops, the losses, the schedule.
Whatever trains or reads rows wants more, and says so in one line.
"""

from __future__ import annotations

from importlib.util import find_spec

# extra -> names of what its packages are imported as; pyproject.toml has their ranges
EXTRAS: dict[str, tuple[str, ...]] = {
    "train": (
        "transformers", "accelerate", "datasets", "huggingface_hub", "safetensors", "numpy",
        "pyarrow", "tokenizers", "packaging", "tqdm", "xxhash", "yaml", "rich", "matplotlib",
    ),
    "demo": ("gguf", "vaderSentiment"),
    "peft": ("peft", "bitsandbytes"),
    "trl": ("trl",),
    "liger": ("liger_kernel",),
    "flash": ("flash_attn",),
}  # fmt: skip


def missing(extra: str) -> list[str]:
    """The names of an extra's packages that are not installed."""
    return [name for name in EXTRAS[extra] if find_spec(name) is None]


def explained(what: str, error: ModuleNotFoundError) -> ModuleNotFoundError:
    """The error that names the extra; the one that was given if no extra brings the module.

        except ModuleNotFoundError as error:
            raise explained("tralign_fast.data", error) from None

    Args:
        what: who needs the module.
        error: of the import that failed.
    """
    name = (error.name or "").partition(".")[0]
    for extra, names in EXTRAS.items():
        if name in names:
            return ModuleNotFoundError(needed(what, [name], extra), name=error.name)
    return error


def require(what: str, extra: str) -> None:
    """Raises the line that names the extra if one of its packages is missing."""
    if names := missing(extra):
        raise ModuleNotFoundError(needed(what, names, extra), name=names[0])


def needed(what: str, names: list[str], extra: str) -> str:
    """One line: who needs what, and how it is installed."""
    return f"{what} needs {', '.join(names)}: pip install 'tralign-fast[{extra}]'"
