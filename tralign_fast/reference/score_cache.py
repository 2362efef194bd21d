"""Log-probs of sequences by their contents: a table in memory, and a file that other runs find.

A file belongs to one reference, told by its weights and by the options that change what it
computes. In it every sequence stands for itself (`PackedBatch.keys`), so that runs with other rows,
another order, loss or batch size use what they have in common.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy
import torch
import xxhash
from datasets import config
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from tralign_fast.model.patching import unwrapped
from tralign_fast.ops.backend import warn_once
from tralign_fast.reference.sharding import from_main, gathered, process_index

FOLDER = "tralign-reference"  # in the cache of `datasets`, where tokenised rows lie too
_FORMAT = 1
# entries of a model's config by which no log-prob changes
_NAMES = ("_name_or_path", "transformers_version", "use_cache", "base_model_name_or_path")


class Scores:
    """float32 log-probs by 64-bit keys: 12 bytes a sequence."""

    def __init__(self) -> None:
        self.keys = numpy.empty(0, numpy.int64)  # sorted, each once
        self.values = numpy.empty(0, numpy.float32)

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, keys: Sequence[int]) -> tuple[numpy.ndarray, numpy.ndarray]:
        """(S,) float32 values, and (S,) bool whether they are known; those that are not are 0."""
        asked = numpy.array(keys, numpy.int64)
        if not len(self):
            return numpy.zeros(len(asked), numpy.float32), numpy.zeros(len(asked), bool)
        places = numpy.minimum(numpy.searchsorted(self.keys, asked), len(self) - 1)
        known = self.keys[places] == asked
        return numpy.where(known, self.values[places], numpy.float32(0)), known

    def add(self, keys: Any, values: Any) -> None:
        """Takes in what it does not know yet."""
        keys = numpy.concatenate([self.keys, numpy.asarray(keys, numpy.int64)])
        values = numpy.concatenate([self.values, numpy.asarray(values, numpy.float32)])
        self.keys, first = numpy.unique(keys, return_index=True)
        self.values = values[first]

    def save(self, path: Path, of: str = "") -> None:
        content = {"keys": torch.from_numpy(self.keys), "logps": torch.from_numpy(self.values)}
        save_file(content, path, metadata={"of": of, "checksum": self._checksum(of)})

    @classmethod
    def load(cls, path: Path, of: str = "") -> Scores:
        """Raises ValueError for a file that is damaged, or of another reference."""
        scores = cls()
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            scores.keys, scores.values = file.get_tensor("keys"), file.get_tensor("logps")
        if metadata.get("of") != of:
            raise ValueError("it is of another reference")
        if metadata.get("checksum") != scores._checksum(of):
            raise ValueError("it differs from its checksum")
        return scores

    def _checksum(self, of: str) -> str:
        return xxhash.xxh3_128_hexdigest(of.encode() + self.keys.tobytes() + self.values.tobytes())


class ScoreCache:
    """The file of one reference, which several runs may write."""

    def __init__(self, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        folder = Path(config.HF_DATASETS_CACHE) / FOLDER
        self.path = folder / f"{fingerprint}.safetensors"

    def read(self) -> Scores:
        """What the file holds, the same in every process; nothing where there is none."""
        return from_main(self._read() if process_index() == 0 else None)

    def _read(self) -> Scores:
        try:
            return Scores.load(self.path, self.fingerprint)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            warn_once(
                f"{self.path} cannot be used ({str(error).splitlines()[0]}): the reference's "
                "log-probs are computed anew"
            )
        return Scores()

    def write(self, scores: Scores) -> None:
        """Adds to the file, which is there as a whole or as it was; the first process writes."""
        if process_index() != 0:
            return
        held = self._read()  # another run may have written since
        finite = numpy.isfinite(scores.values)
        held.add(scores.keys[finite], scores.values[finite])
        partial = self.path.with_name(f".{uuid.uuid4().hex}.partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            held.save(partial, self.fingerprint)
            os.replace(partial, self.path)
        except (OSError, SafetensorError) as error:
            warn_once(
                f"{self.path} cannot be written ({str(error).splitlines()[0]}): the next run "
                "computes the reference's log-probs anew"
            )
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def score_cache_of(model: nn.Module, **options: Any) -> ScoreCache | None:
    """The file of a reference, the same in every process, all of which must ask.

    Args:
        model: its weights as they are, wrapped or sharded or not.
        options: of the run, that change log-probs.

    Returns:
        None: the weights have no numbers (a memory trace), or caching of datasets is disabled.
    """
    model = unwrapped(model)
    own: Any = getattr(model, "config", None)
    described = {
        "format": _FORMAT,
        "model": type(model).__name__,
        "config": _numbers(own.to_dict()) if own is not None else None,
        "adapters": {n: _numbers(c.to_dict()) for n, c in _adapters(model).items()},
        "active": getattr(model, "active_adapters", None) if _adapters(model) else None,
        **options,
    }
    state = xxhash.xxh3_128(json.dumps(described, sort_keys=True, default=_text).encode())
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if not datasets.is_caching_enabled() or any(map(_is_empty, (t for _, t in tensors))):
        return None
    for name, tensor in sorted(tensors, key=lambda named: named[0]):
        with gathered(tensor):
            for part in _plain_tensors(tensor):
                if process_index() == 0:
                    state.update(f"{name} {part.dtype} {tuple(part.shape)}".encode())
                    state.update(part.reshape(-1).view(torch.uint8).cpu().numpy().data)
    return ScoreCache(from_main(state.hexdigest()))


def _adapters(model: nn.Module) -> dict[str, Any]:
    found: Any = getattr(model, "peft_config", None)
    return found if isinstance(found, dict) else {}


def _numbers(config: dict[str, Any]) -> dict[str, Any]:
    """Without names, ids of special tokens, and probabilities that a sweep leaves out."""
    left_out = {name for name in config if name.endswith("_token_id") or "drop" in name}
    return {k: v for k, v in config.items() if k not in left_out and k not in _NAMES}


def _text(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def _is_empty(tensor: Tensor) -> bool:
    """Whether it has no numbers: on meta, or a fake one."""
    return tensor.device.type == "meta" or isinstance(tensor, FakeTensor)


def _plain_tensors(tensor: Any) -> Iterator[Tensor]:
    """What a tensor is made of: a DTensor of its shards, a quantised one of codes and scales."""
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain_tensors(getattr(tensor, name))
    else:
        yield tensor.contiguous()
