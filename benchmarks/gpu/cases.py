"""What is measured: names of cases, in order of importance, and what a step of each must compute.

A case is `MODEL/SHAPE/CHECKPOINTING/ARM`, as `8b-lora64/2p4k/ckpt/ours`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

WINDOW = 4  # steps between two moves of the reference, and of a timed window
SCHEDULE = 512  # τ of TRL's default, whose share of a move is reported too


@dataclass(frozen=True)
class Model:
    preset: str
    label: str
    size: int  # billions of weights
    lora_rank: int | None = None
    base_bits: int = 16
    released: bool = False  # Adafactor, whose gradients ours releases

    @property
    def alpha(self) -> float:
        """Full models move by hard updates, which need no second model; adapters as TRL moves."""
        return 1.0 if self.lora_rank is None else 0.6


@dataclass(frozen=True)
class Shape:
    """A pair is half prompt; each completion is a quarter."""

    pairs: int
    tokens: int  # packed: the prompt counted once

    @property
    def completion(self) -> int:
        return self.tokens // self.pairs // 4

    @property
    def prompt(self) -> int:
        return self.tokens // self.pairs - 2 * self.completion

    @property
    def useful(self) -> int:
        """Prompt + chosen and prompt + rejected of every pair."""
        return self.pairs * 2 * (self.prompt + self.completion)


MODELS = {
    "1b-full": Model("llama-3.2-1b", "Llama-3.2-1B full, AdamW", 1),
    "8b-full": Model("llama-3.1-8b", "Llama-3.1-8B full, AdamW", 8),
    "8b-lora16": Model("llama-3.1-8b", "Llama-3.1-8B LoRA 16", 8, 16),
    "8b-lora64": Model("llama-3.1-8b", "Llama-3.1-8B LoRA 64", 8, 64),
    "8b-qlora64": Model("llama-3.1-8b", "Llama-3.1-8B 4-bit LoRA 64", 8, 64, 4),
    "8b-release": Model("llama-3.1-8b", "Llama-3.1-8B full, Adafactor", 8, released=True),
    "70b-qlora64": Model("llama-3.1-70b", "Llama-3.1-70B 4-bit LoRA 64", 70, 64, 4),
}
SHAPES = {
    "2p4k": Shape(2, 4096),
    "8p4k": Shape(8, 4096),
    "8p16k": Shape(8, 16384),
    "2p32k": Shape(2, 32768),
    "2p64k": Shape(2, 65536),
}
CHECKPOINTING = {"ckpt": True, "nockpt": False}
ARMS = {
    "trl": "TRL",
    "trl_liger": "TRL, Liger's layer kernels",
    "trl_liger_loss": "TRL, Liger's loss",
    "ours": "tralign-fast",
    "ours_plain": "tralign-fast without layer kernels and CUDA graphs",
    "ours_frozen": "tralign-fast, reference frozen, precomputed",
    "ours_powers": "tralign-fast, powers kept by the head",
    "ours_half": "tralign-fast, half of the layers checkpointed",
}


@dataclass(frozen=True)
class Case:
    model_name: str
    shape_name: str
    checkpointing: bool
    arm: str

    @property
    def name(self) -> str:
        return f"{self.work}/{self.arm}"

    @property
    def work(self) -> str:
        """What arms are compared on."""
        checkpointing = "ckpt" if self.checkpointing else "nockpt"
        return f"{self.model_name}/{self.shape_name}/{checkpointing}"

    @property
    def model(self) -> Model:
        return MODELS[self.model_name]

    @property
    def shape(self) -> Shape:
        return SHAPES[self.shape_name]

    @property
    def usual_s(self) -> float:
        """Roughly what it takes on an H100: no time to start it in if less is left."""
        return 25.0 + 0.75 * self.model.size * self.shape.tokens / 4096

    @property
    def is_trl(self) -> bool:
        return self.arm.startswith("trl")

    @property
    def reference(self) -> str:
        """What the reference does in this arm."""
        if self.is_trl and self.model.lora_rank is not None:
            return "frozen: TRL refuses to move it with PEFT"
        if self.arm == "ours_frozen":
            return "frozen, precomputed"
        return f"moves every {WINDOW}, alpha={self.model.alpha:g}"


def parse(name: str) -> Case:
    model, shape, checkpointing, arm = name.split("/")
    return Case(model, shape, CHECKPOINTING[checkpointing], arm)


def is_case(name: str) -> bool:
    parts = name.split("/")
    rooms = (MODELS, SHAPES, CHECKPOINTING, ARMS)
    return len(parts) == 4 and all(p in room for p, room in zip(parts, rooms, strict=True))


_DEFAULT = [
    ("8b-lora64/2p4k/ckpt", "trl ours"),
    ("8b-lora64/2p4k/nockpt", "trl ours"),
    ("1b-full/2p4k/nockpt", "trl ours"),
    ("1b-full/2p4k/ckpt", "trl ours"),
    ("8b-full/2p4k/ckpt", "trl ours"),
    ("8b-release/2p4k/ckpt", "trl ours"),
    ("8b-lora64/8p16k/ckpt", "trl ours"),
    ("8b-lora64/2p4k/ckpt", "trl_liger ours_frozen ours_plain ours_powers ours_half"),
    ("8b-full/2p4k/ckpt", "trl_liger ours_frozen"),
    ("1b-full/2p4k/nockpt", "trl_liger ours_frozen ours_plain ours_powers"),
    ("8b-lora64/2p4k/nockpt", "trl_liger"),
    ("8b-lora16/2p4k/ckpt", "trl ours"),
    ("8b-qlora64/2p4k/ckpt", "trl ours"),
    ("8b-lora64/8p4k/ckpt", "trl ours"),
    ("1b-full/8p4k/nockpt", "trl ours"),
    ("8b-full/2p4k/nockpt", "trl ours"),
    ("8b-lora64/2p4k/ckpt", "trl_liger_loss"),
    ("1b-full/2p4k/nockpt", "trl_liger_loss"),
    ("70b-qlora64/2p4k/ckpt", "ours trl"),
    ("8b-lora64/2p32k/ckpt", "ours trl"),
    ("8b-lora64/2p64k/ckpt", "ours"),
]
DEFAULT = [parse(f"{work}/{arm}") for work, arms in _DEFAULT for arm in arms.split()]


def choose(patterns: Sequence[str]) -> list[Case]:
    """The cases of the whole product that match any of the patterns, those of the default list in
    its order and first; without patterns the default list.

    Raises:
        ValueError: a pattern that no case matches.
    """
    if not patterns:
        return DEFAULT
    product = list(dict.fromkeys([*DEFAULT, *_product()]))
    for pattern in patterns:
        if not any(fnmatchcase(case.name, pattern) for case in product):
            raise ValueError(
                f"--cases {pattern}: matches no case; expected MODEL/SHAPE/CHECKPOINTING/ARM of "
                f"{', '.join(MODELS)} / {', '.join(SHAPES)} / {', '.join(CHECKPOINTING)} / "
                f"{', '.join(ARMS)}"
            )
    return [case for case in product if any(fnmatchcase(case.name, p) for p in patterns)]


def _product() -> Iterator[Case]:
    for model, shape, checkpointing in itertools.product(MODELS, SHAPES, CHECKPOINTING.values()):
        for arm in ARMS:
            yield Case(model, shape, checkpointing, arm)


# --- floating-point operations --------------------------------------------------------------------


@dataclass(frozen=True)
class Flops:
    """Of one step: the reference's forward, the policy's forward and backward."""

    needed: float
    recomputed: float  # a forward of the layers that checkpointing repeats

    def limit(self, rate: float) -> float:
        """Seconds at so many operations a second."""
        return self.needed / rate


def flops_of(config: Any, shape: Shape, lora_rank: int | None) -> Flops:
    """What a step must compute of a Llama: matrix products and causal attention, 2 a multiply-add.

    Prompts are computed once for both completions, and the head at completions alone. A full model
    has its products three times (output, gradient of the input, gradient of the weight), one that
    trains adapters twice, and its adapters' three times. The reference is the base alone: adapters
    of a reference could be merged into it.
    """
    from tralign_fast.memory import step_flops

    sizes = step_flops.sizes_of(config)
    flops = step_flops.flops_of(sizes, shape.pairs, shape.tokens, lora_rank)
    return Flops(flops.needed, flops.recomputed)
