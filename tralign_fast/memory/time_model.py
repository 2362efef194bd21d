"""Seconds of a training step on one card to a thousand, as a sum of terms; `docs/scaling.md`.

Compute is operations over the rate that matrix products reach, and bytes of small kernels and of
the optimizer over the bandwidth that a copy reaches. Communication is NCCL's own model of a ring
(`src/graph/tuning.cc`: latency a hop, bytes over the slowest link). FSDP2 gathers a layer's weights
in each pass and overlaps that with the layer before it; what does not fit under it is exposed.

One card was measured. Several were not: their terms are arithmetic on data sheets.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from tralign_fast.memory.step_flops import Sizes, flops_of, small_kernel_bytes
from tralign_fast.memory.workload import Workload
from tralign_fast.model.checkpointed_layers import how_many

# Shares of the data sheets' rates. The first two were fitted to seven steps of an H200
# (docs/scaling.md); the third is assumed: nothing here was run on several cards.
PRODUCTS, MEMORY, LINKS = 0.63, 0.7, 0.8
# NCCL's constants of the ring with its Simple protocol, in seconds: a collective, a hop inside of a
# node, a hop between nodes; of the tree, a hop each.
_BASE, _INSIDE, _BETWEEN = 8.4e-6, 3.4e-6, 9.6e-6
_TREE_INSIDE, _TREE_BETWEEN = 28e-6, 50e-6


@dataclass(frozen=True)
class Card:
    """Rates of a data sheet: dense bf16, memory, NVLink and network, of a GPU in one direction."""

    name: str
    tflops: float
    memory_gbs: float
    nvlink_gbs: float
    interconnect_gbs: float
    a_node: int = 8


CARDS = {
    card.name: card
    for card in (
        Card("a100", 312, 2039, 300, 25),
        Card("h100", 989, 3350, 450, 50),
        Card("h200", 989, 4800, 450, 50),
    )
}
DEFAULT_CARD = "h100"


@dataclass(frozen=True)
class Rates:
    """What is reached, a second: operations, bytes of memory, of NVLink, of the network a GPU."""

    products: float
    memory: float
    nvlink: float
    interconnect: float


@dataclass(frozen=True)
class Layout:
    """How the work is spread: `gpus` in all, on `nodes`; `tensor` of them share a batch."""

    gpus: int = 1
    nodes: int = 1
    parallel: str = "fsdp2"
    tensor: int = 1


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by what they go to; communication is what it would take alone, and
    `exposed` is what of it nothing hides. They add up to `total` without the hidden part."""

    reference: float
    forward: float
    backward: float
    recomputation: float
    small_kernels: float
    optimizer: float
    gathering: float  # weights, by FSDP2
    reducing: float  # gradients
    tensor: float  # activations between the ranks of a tensor-parallel group; never hidden
    exposed: float
    of_reference: float  # all that the moving reference takes of the step
    total: float


def rates_of(
    card: str,
    tflops: float | None = None,
    nvlink_gbs: float | None = None,
    interconnect_gbs: float | None = None,
) -> Rates:
    """What a card reaches, where it is not given.

    Raises:
        ValueError: a card that is not known, or a rate that is none.
    """
    if card not in CARDS:
        raise ValueError(f"--card: expected one of {', '.join(CARDS)}, got {card!r}")
    sheet = CARDS[card]
    given = {"tflops": tflops, "nvlink_gbs": nvlink_gbs, "interconnect_gbs": interconnect_gbs}
    for name, value in given.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name}: expected a number > 0, got {value:g}")
    return Rates(
        1e12 * (tflops or PRODUCTS * sheet.tflops),
        1e9 * MEMORY * sheet.memory_gbs,
        1e9 * (nvlink_gbs or LINKS * sheet.nvlink_gbs),
        1e9 * (interconnect_gbs or LINKS * sheet.interconnect_gbs),
    )


def step_time(
    work: Workload,
    sizes: Sizes,
    rates: Rates,
    layout: Layout = Layout(),
    past_adapters: int | None = None,
) -> StepTime:
    """Seconds of a step of that work on every GPU (of every tensor-parallel group).

    Args:
        past_adapters: that the reference of a PEFT policy adds up; None: as many as a long run has.
    """
    return _Step(work, sizes, rates, layout, past_adapters).time()


class _Step:
    def __init__(
        self, work: Workload, sizes: Sizes, rates: Rates, layout: Layout, past: int | None
    ) -> None:
        self.work, self.sizes, self.rates, self.layout = work, sizes, rates, layout
        self.past = _past_adapters(work) if past is None else past
        self.width = 2 if work.dtype == "bfloat16" else 4
        few = 4.13 / 8 if work.base_bits == 4 else self.width
        self.layer_bytes = sizes.layer * few / layout.tensor
        self.outside_bytes = sizes.outside * self.width / layout.tensor
        self.moves = bool(work.options.get("sync_ref_model", True))
        self.again = _share_computed_again(work, sizes.layers)
        self.full = work.lora_rank is None

    def time(self) -> StepTime:
        work, rates, share = self.work, self.rates, self.layout.tensor
        past = self.past if not self.full else 0
        flops = flops_of(self.sizes, work.pairs, work.tokens, work.lora_rank, past)
        small = small_kernel_bytes(self.sizes, work.tokens, 2, not self.full) / rates.memory / share
        again = self.again
        compute = {
            "reference": self.moves * flops.reference / rates.products / share,
            "forward": flops.forward / rates.products / share,
            "backward": flops.backward / rates.products / share,
            "recomputation": again * flops.recomputed / rates.products / share,
        }
        passes = {"reference": self.moves * 1.0, "forward": 1.0, "backward": 2.0 + again}
        # of a layer: its two outputs; the gradients of the inputs of q, k, v, gate and up, which
        # transformers adds up each by itself; attention's output where it is computed again
        reduces = {"reference": self.moves * 2, "forward": 2, "backward": 5 + again}
        tensor = {name: count * self._tensor() for name, count in reduces.items()}
        hideable = {n: compute[n] + passes[n] * small for n in passes}
        hideable["backward"] += compute["recomputation"]
        gather, reduce = self._layers_and_rest()
        exposed = {
            name: self._exposed(hideable[name] + tensor[name], gather, reduce, name)
            for name in passes
            if passes[name]
        }
        small_kernels, optimizer = small * sum(passes.values()), self._optimizer()
        parts = (*compute.values(), small_kernels, optimizer, *tensor.values(), *exposed.values())
        of_reference = hideable["reference"] + tensor["reference"] + exposed.get("reference", 0.0)
        return StepTime(
            **compute,
            small_kernels=small_kernels,
            optimizer=optimizer,
            gathering=len(exposed) * (self.sizes.layers * gather[0] + gather[1]),
            reducing=self.sizes.layers * reduce[0] + reduce[1],
            tensor=sum(tensor.values()),
            exposed=sum(exposed.values()),
            of_reference=of_reference,
            total=sum(parts),
        )

    def _layers_and_rest(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Seconds of gathering and of reducing: (a layer, what is outside of the layers)."""
        layout = self.layout
        ranks = layout.gpus // layout.tensor
        if ranks == 1:
            return (0.0, 0.0), (0.0, 0.0)
        if self.full:
            gradients = (self.layer_bytes, self.outside_bytes)
        else:
            adapter = 2 if self.work.lora_dtype == "bfloat16" else 4
            gradients = (
                (self.work.lora_rank or 0) * sum(self.sizes.fan) * adapter / layout.tensor,
                0.0,
            )
        if layout.parallel == "ddp":
            a, b = (self._all_reduce(size, ranks) if size else 0.0 for size in gradients)
            return (0.0, 0.0), (a, b)
        weights = (self.layer_bytes, self.outside_bytes)
        gather, reduce = (
            tuple(self._ring(size, ranks, 1) if size else 0.0 for size in sizes)
            for sizes in (weights, gradients)
        )
        return gather, reduce  # pyright: ignore[reportReturnType]

    def _exposed(self, compute: float, gather: Any, reduce: Any, name: str) -> float:
        """What of a pass's communication its layers do not hide: a layer's overlaps with the layer
        before it; the first gathering and, of the backward, the last reduction wait."""
        layers = self.sizes.layers
        each = gather[0] + (reduce[0] if name == "backward" else 0.0)
        first = gather[0] + gather[1]
        last = reduce[0] + reduce[1] if name == "backward" else 0.0
        return (layers - 1) * max(0.0, each - compute / layers) + first + last

    def _ring(self, size: float, ranks: int, times: int) -> float:
        """An all-gather or a reduce-scatter (`times` 1) of so many bytes, an all-reduce (2)."""
        nodes = self._nodes(ranks)
        hops = (ranks - nodes) * _INSIDE + (nodes - 1) * _BETWEEN
        return _BASE + times * (hops + size * (ranks - 1) / ranks / self._link(ranks))

    def _all_reduce(self, size: float, ranks: int) -> float:
        """By the faster of ring and tree, which send each byte twice."""
        nodes = self._nodes(ranks)
        hops = (ranks / nodes - 1) * _TREE_INSIDE + math.log2(nodes) * _TREE_BETWEEN
        tree = 2 * hops + 2 * size / (0.9 * self._link(ranks))
        return min(self._ring(size, ranks, 2), tree)

    def _nodes(self, ranks: int) -> int:
        return min(self.layout.nodes, ranks)

    def _link(self, ranks: int) -> float:
        """Bytes a second through a rank; between nodes each network card carries a ring."""
        if self.layout.nodes == 1:
            return self.rates.nvlink
        there = self.layout.gpus // self.layout.nodes
        return min(self.rates.nvlink, there * self.rates.interconnect) / self.layout.tensor

    def _tensor(self) -> float:
        """An all-reduce of the activations in each layer, over a group inside of a node."""
        ranks = self.layout.tensor
        if ranks == 1:
            return 0.0
        size = self.work.tokens * self.sizes.hidden * 2
        one = _BASE + 2 * (ranks - 1) * (_INSIDE + size / ranks / self.rates.nvlink)
        return self.sizes.layers * one

    def _optimizer(self) -> float:
        """Its bytes: AdamW reads weight, gradient and two states and writes three of them, clipping
        reads gradients twice and writes them; Adafactor's statistics are small."""
        if not self.full:
            return 0.0
        clips = 3 if self.work.options.get("max_grad_norm", 1.0) else 0
        sweeps = 7 if "adamw" in str(self.work.options.get("optim", "adamw")) else 4
        ranks = self.layout.gpus if self.layout.parallel == "fsdp2" else self.layout.tensor
        count = self.sizes.parameters / ranks
        return count * self.width * (sweeps + clips) / self.rates.memory


def _share_computed_again(work: Workload, count: int) -> float:
    """Of the layers, those that gradient checkpointing runs a second time."""
    if not work.options.get("gradient_checkpointing", True):
        return 0.0
    layers = work.options.get("gradient_checkpointing_layers")
    return 1.0 if layers is None else how_many(layers, count, type(work.model).__name__) / count


def _past_adapters(work: Workload) -> int:
    """How many a soft update keeps: their weights fall by 1 - α a move, to the tolerance."""
    alpha = float(work.options.get("ref_model_mixup_alpha", 0.6))
    tolerance = float(work.options.get("adapter_tolerance", 1e-6))
    if alpha >= 1 or alpha <= 0 or tolerance <= 0:
        return 1
    return math.ceil(math.log(tolerance) / math.log(1 - alpha))


def as_text(time: StepTime, layout: Layout, card: str) -> str:
    """A line for every term that is there, and what the moving reference takes."""
    where = f"{layout.gpus} GPUs on {layout.nodes} nodes" if layout.nodes > 1 else (
        f"{layout.gpus} GPUs" if layout.gpus > 1 else "one GPU"
    )  # fmt: skip
    rows = []
    for field in dataclasses.fields(time):
        seconds = getattr(time, field.name)
        if field.name not in ("total", "of_reference") and seconds:
            hidden = field.name in ("gathering", "reducing")
            note = "  hidden but for what is exposed" if hidden else ""
            rows.append(f"{field.name.replace('_', ' '):<14}{seconds:>9.4f}{note}")
    share = time.of_reference / time.total
    rows += ["-" * 23, f"{'a step':<14}{time.total:>9.4f}"]
    measured = "" if layout.gpus == 1 else "; several cards have not been measured"
    return "\n".join([
        f"seconds of a step on {where}, {card} (a model{measured}: docs/scaling.md)", *rows,
        f"the moving reference takes {share:.0%} of it, and no weights" if share else
        "a reference that does not move is scored once, before the training",
    ])  # fmt: skip
