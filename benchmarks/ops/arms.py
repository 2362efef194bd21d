"""What is compared: one shape's inputs, and every arm as a function of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BETA = 0.1
SEQUENCES = 4
LEAN_MB = 4  # too little to keep the logits: they are computed again
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One shape; everything an arm is told."""

    tokens: int  # N
    hidden: int  # H
    vocab: int  # V
    dtype: str
    device: str


@dataclass
class Inputs:
    hidden: Tensor  # (S, L, H)
    weight: Tensor  # (V, H)
    ref_hidden: Tensor  # (S, L, H)
    ref_weight: Tensor  # (V, H)
    targets: Tensor  # (S, L)
    mask: Tensor  # (S, L) bool: the second half of every sequence
    labels: Tensor  # (S, L): targets, or -100
    index: Tensor  # (N,) positions of the scored rows in (S·L,)

    @property
    def scored_targets(self) -> Tensor:
        return self.targets.flatten()[self.index]


def make_inputs(case: Case) -> Inputs:
    """The same numbers for a case whatever the arm: logits of standard deviation one."""
    length = 2 * case.tokens // SEQUENCES
    dtype, device = DTYPES[case.dtype], case.device
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    hidden = normal(SEQUENCES, length, case.hidden)
    ref_hidden = (hidden + 0.1 * normal(*hidden.shape)).to(dtype)
    weight = (normal(case.vocab, case.hidden) / case.hidden**0.5).to(dtype)
    targets = torch.randint(0, case.vocab, (SEQUENCES, length), generator=generator, device=device)
    mask = torch.zeros(SEQUENCES, length, dtype=torch.bool, device=device)
    mask[:, length // 2 :] = True
    return Inputs(
        hidden.to(dtype).requires_grad_(),
        weight.clone().requires_grad_(),
        ref_hidden,
        weight,
        targets,
        mask,
        torch.where(mask, targets, -100),
        mask.flatten().nonzero()[:, 0],
    )


def dpo(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """DPO's loss of (S,) summed log-probs, the chosen half first."""
    (c, r), (ref_c, ref_r) = logps.chunk(2), ref_logps.chunk(2)
    return -F.logsigmoid(BETA * ((c - r) - (ref_c - ref_r))).mean()


# --- the arms: from inputs to a loss --------------------------------------------------------------


def _both(inputs: Inputs, score: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The loss, of a function from hidden states (S, L, H) and weight to (S,) log-probs."""
    logps = score(inputs.hidden, inputs.weight)
    with torch.no_grad():
        ref_logps = score(inputs.ref_hidden, inputs.ref_weight)
    return dpo(logps, ref_logps)


def _of_scored(inputs: Inputs, score: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """As `_both`, of a function from rows (N, H), weight and targets (N,) to log-probs (N,)."""

    def score_sequences(hidden: Tensor, weight: Tensor) -> Tensor:
        rows = hidden.flatten(0, 1)[inputs.index]
        # as many scored rows in every sequence
        return score(rows, weight, inputs.scored_targets).view(SEQUENCES, -1).sum(1)

    return _both(inputs, score_sequences)


def make_bare(inputs: Inputs) -> Callable[[], Tensor]:
    rows = inputs.hidden.detach().flatten(0, 1)[inputs.index]
    ref_rows = inputs.ref_hidden.flatten(0, 1)[inputs.index]
    weight = inputs.weight.detach()

    def products() -> Tensor:
        logits = rows.new_empty(len(rows), len(weight))
        torch.mm(ref_rows, inputs.ref_weight.t(), out=logits)
        torch.mm(rows, weight.t(), out=logits)
        gradients = logits @ weight, logits.t() @ rows
        return gradients[0].new_zeros(())

    return products


def make_tralign_fast(inputs: Inputs) -> Callable[[], Tensor]:
    from tralign_fast import linear_logprobs

    return lambda: _of_scored(inputs, linear_logprobs)


def _with_budget(inputs: Inputs, megabytes: int) -> Callable[[], Tensor]:
    from tralign_fast import linear_logprobs

    score = functools.partial(linear_logprobs, logits_budget_mb=megabytes)
    return lambda: _of_scored(inputs, score)


def make_tralign_fast_lean(inputs: Inputs) -> Callable[[], Tensor]:
    return _with_budget(inputs, LEAN_MB)


def make_tralign_fast_1_gib(inputs: Inputs) -> Callable[[], Tensor]:
    return _with_budget(inputs, 1024)


def make_tralign_fast_node(inputs: Inputs, **options: Any) -> Callable[[], Tensor]:
    from tralign_fast import linear_logprobs, linear_preference_loss

    count, device = len(inputs.index), inputs.hidden.device
    offsets = torch.arange(SEQUENCES + 1, device=device) * (count // SEQUENCES)

    def call() -> Tensor:
        rows, ref_rows = (h.flatten(0, 1)[inputs.index] for h in (inputs.hidden, inputs.ref_hidden))
        with torch.no_grad():
            ref_logps = linear_logprobs(ref_rows, inputs.ref_weight, inputs.scored_targets)
        return linear_preference_loss(
            rows, inputs.weight, inputs.scored_targets, offsets,
            ref_logps.view(SEQUENCES, -1).sum(1), loss="dpo", beta=BETA, **options,
        ).loss  # fmt: skip

    return call


def make_tralign_fast_powers(inputs: Inputs) -> Callable[[], Tensor]:
    _check_powers(inputs)
    return make_tralign_fast_node(inputs, kept="powers")


def _check_powers(inputs: Inputs) -> None:
    if not (inputs.hidden.is_cuda and inputs.hidden.dtype == torch.bfloat16):
        raise ValueError("powers are kept by Triton, in bf16; elsewhere this would be another arm")


def make_tralign_fast_logged(inputs: Inputs, kept: str = "logits") -> Callable[[], Tensor]:
    from tralign_fast.ops.logprobs import linear_logprobs_and_statistics

    # what a step of the trainer's DPO asks for: the reference's log-probs have no statistics
    names = ("entropy", "mean_logits", "is_top1")

    def score(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        wanted = names if torch.is_grad_enabled() else ()
        return linear_logprobs_and_statistics(hidden, weight, targets, wanted, kept=kept)[0]

    return lambda: _of_scored(inputs, score)


def make_tralign_fast_powers_logged(inputs: Inputs) -> Callable[[], Tensor]:
    _check_powers(inputs)
    return make_tralign_fast_logged(inputs, kept="powers")


def _log_softmax(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = (hidden @ weight.t()).float()
    return logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]


def make_eager(inputs: Inputs) -> Callable[[], Tensor]:
    def score(hidden: Tensor, weight: Tensor) -> Tensor:
        return (_log_softmax(hidden, weight, inputs.targets) * inputs.mask).sum(-1)

    return lambda: _both(inputs, score)


def make_eager_scored(inputs: Inputs) -> Callable[[], Tensor]:
    return lambda: _of_scored(inputs, _log_softmax)


def make_compiled(inputs: Inputs) -> Callable[[], Tensor]:
    compiled = torch.compile(_log_softmax)
    return lambda: _of_scored(inputs, compiled)


def make_torch(inputs: Inputs) -> Callable[[], Tensor]:
    options = torch.nn.LinearCrossEntropyOptions()

    def score(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)

    return lambda: _of_scored(inputs, score)


def make_cce(inputs: Inputs) -> Callable[[], Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if inputs.hidden.is_cuda else "torch_compile"

    def score(hidden: Tensor, weight: Tensor) -> Tensor:
        nll = linear_cross_entropy(
            hidden, weight, inputs.labels, ignore_index=-100, reduction="none", impl=impl
        )
        return -(nll * inputs.mask).sum(-1)  # a sum's gradient alone is expanded: its kernel fails

    return lambda: _both(inputs, score)


def make_liger(inputs: Inputs) -> Callable[[], Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(
        ignore_index=-100,
        beta=BETA,
        use_ref_model=True,
        average_log_prob=False,
        compiled=inputs.hidden.is_cuda,
        compute_nll_loss=False,
    )
    arguments = (inputs.weight, inputs.hidden, inputs.labels, None)
    return lambda: loss(*arguments, inputs.ref_hidden, inputs.ref_weight)[0]


def make_liger_scaled(inputs: Inputs) -> Callable[[], Tensor]:
    # a kernel on Hopper, which needs liger-kernel[cutedsl]; elsewhere chunks in torch
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Liger

    def score(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        nll: Any = Liger.apply(hidden, weight, targets)
        return -nll

    return lambda: _of_scored(inputs, score)


def make_quack(inputs: Inputs) -> Callable[[], Tensor]:
    # it has no log-probs of tokens: the same products and the same rows, to a mean
    from quack.linear_cross_entropy import (  # pyright: ignore[reportMissingImports]
        chunked_linear_cross_entropy,
    )

    def call() -> Tensor:
        rows, ref_rows = (h.flatten(0, 1)[inputs.index] for h in (inputs.hidden, inputs.ref_hidden))
        with torch.no_grad():
            reference = chunked_linear_cross_entropy(
                ref_rows, inputs.ref_weight, inputs.scored_targets
            )
        return chunked_linear_cross_entropy(rows, inputs.weight, inputs.scored_targets) - reference

    return call


def make_trl(inputs: Inputs) -> Callable[[], Tensor]:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    targets, width = inputs.targets.flatten(), inputs.hidden.shape[-1]

    def score(hidden: Tensor, weight: Tensor) -> Tensor:
        logps: Any = ChunkedLogProbFunction.apply(
            hidden.reshape(-1, width), weight, None, targets, 1.0, 8192, None, 1.0, ()
        )
        return (logps[0].view_as(inputs.mask) * inputs.mask).sum(-1)

    return lambda: _both(inputs, score)


# name: (label, from inputs to a function that gives the loss)
ARMS: dict[str, tuple[str, Callable[[Inputs], Callable[[], Tensor]]]] = {
    "bare": ("the bare matrix products", make_bare),
    "tralign_fast": ("tralign-fast", make_tralign_fast),
    "tralign_fast_lean": (f"tralign-fast, logits_budget_mb={LEAN_MB}", make_tralign_fast_lean),
    "tralign_fast_1_gib": ("tralign-fast, logits_budget_mb=1024", make_tralign_fast_1_gib),
    "tralign_fast_node": ("tralign-fast, linear_preference_loss", make_tralign_fast_node),
    "tralign_fast_powers": ("tralign-fast, the same, powers kept", make_tralign_fast_powers),
    "tralign_fast_logged": ("tralign-fast, statistics too", make_tralign_fast_logged),
    "tralign_fast_powers_logged": (
        "tralign-fast, statistics too, powers kept",
        make_tralign_fast_powers_logged,
    ),
    "cce": ("cut-cross-entropy", make_cce),
    "compiled": ("eager, torch.compile, scored rows", make_compiled),
    "eager_scored": ("eager, scored rows", make_eager_scored),
    "eager": ("eager, full logits", make_eager),
    "liger": ("Liger", make_liger),
    "liger_scaled": ("Liger, per token", make_liger_scaled),
    "quack": ("quack, the mean instead of DPO", make_quack),
    "trl": ("TRL", make_trl),
    "torch": ("F.linear_cross_entropy", make_torch),
}
# what differs from another arm on a GPU alone
GPU_ARMS = ("tralign_fast_1_gib", "tralign_fast_powers", "tralign_fast_powers_logged")
# whose result is not the loss that is checked
UNCHECKED = ("bare", "quack")
