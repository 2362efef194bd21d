"""Nothing that is not finite is trained on, at no device sync.

A loss whose log-probs are not all finite is multiplied by NaN on the device: the gradients of the
step, on every process, then say so in their norm, which the trainer computes anyway. A step with
such a norm does not happen. Optimizers with fused kernels are told on the device, as torch's
`GradScaler` tells them: weights and states keep their bits. For others the norm is read, and their
gradients are taken away. What happened is read where the trainer logs, saves or evaluates.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback

from tralign_fast.ops.backend import warn_once
from tralign_fast.training.gradient_release import GradientRelease, takes_found_inf

# Steps in a row without a finite gradient after which a run ends: GradScaler needs 17 to halve its
# first scale of 65,536 to one half, but it looks after its own steps.
PATIENCE = 10
# Batches whose log-probs wait to be looked at: a few bytes each, 512 on a GPU.
_WAITING = 4096


class FiniteSteps(TrainerCallback):
    """Leaves out the optimizer steps whose loss, log-probs or gradients are not finite.

    Under a `GradScaler` (fp16) the scaler leaves steps out; under DeepSpeed, whose backward steps,
    log-probs are to be looked at before it (`check`).
    """

    def __init__(self) -> None:
        self.grad_norm: Any = None  # of the step that comes next, as the trainer has it
        self.skipped = 0  # steps that were left out, as far as is known
        self._scores: list[tuple[int, tuple[int, ...], Tensor, Tensor]] = []
        self._flags: list[tuple[int, Tensor]] = []  # (step, () float32: 1 where it was left out)
        self._in_a_row = 0
        self._stays = "weights"

    def guarded(
        self,
        loss: Tensor,  # ()
        logps: Tensor,  # (S,)
        ref_logps: Tensor,  # (S,)
        rows: tuple[int, ...],  # B, S = B or 2·B
        step: int,
    ) -> Tensor:
        """The loss, or NaN with gradients of NaN where it or a log-prob is not finite."""
        if len(self._scores) >= _WAITING:
            self.check()
        self._scores.append((step, rows, logps.detach(), ref_logps))
        doubt = logps.detach().sum() + ref_logps.sum() + loss.detach()
        return loss * (1.0 + 0.0 * doubt)

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        self._scores, self._flags, self.skipped, self._in_a_row = [], [], 0, 0
        self._first = state.global_step
        own = optimizer
        while isinstance(own, AcceleratedOptimizer):
            own = own.optimizer
        if isinstance(own, GradientRelease):
            assert model is not None
            own.attach(model)

    def on_pre_optimizer_step(
        self, args, state, control, model=None, optimizer=None, **kwargs
    ) -> None:
        norm, self.grad_norm = self.grad_norm, None
        own = optimizer
        while isinstance(own, AcceleratedOptimizer):
            own = own.optimizer
        if getattr(optimizer, "scaler", None) is not None or not isinstance(own, Optimizer):
            return
        if isinstance(own, GradientRelease):  # its steps have happened, or not
            self._stays = "from that gradient on towards the embedding, weights"
            self._flags.append((state.global_step + 1, own.found_inf))
            return
        assert model is not None
        flag = _not_finite(norm if norm is not None else _norm(model))
        if flag is None:
            return
        self._flags.append((state.global_step + 1, flag))
        if takes_found_inf(own):
            own.found_inf = flag  # pyright: ignore[reportAttributeAccessIssue]
        elif not bool(flag == 0):  # asked so that a traced run, which answers "yes", trains
            own.zero_grad(set_to_none=True)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.check()
        if self.skipped and self.skipped == state.global_step - self._first:
            raise ValueError(_nothing_trained(self._first + 1, state.global_step))

    def check(self) -> None:
        """Reads what the steps since the last call found.

        Raises:
            ValueError: a log-prob was not finite (it names the row), or no gradient of the last
                `PATIENCE` steps was.
        """
        scores, self._scores = self._scores, []
        if scores:
            both = torch.stack(
                [torch.cat([s[2] for s in scores]), torch.cat([s[3] for s in scores])]
            )
            finite = torch.isfinite(both).cpu()
            if not bool(finite.all()):
                raise ValueError(_bad_scores(scores, finite))
        flags, self._flags = self._flags, []
        if not flags:
            return
        happened = (torch.stack([flag for _, flag in flags]) == 0).tolist()
        for (step, _), good in zip(flags, happened, strict=True):
            self._in_a_row = 0 if good else self._in_a_row + 1
            self.skipped += not good
            if not good and self.skipped == 1:
                warn_once(
                    f"step {step}: the gradient was NaN or infinite. Such steps are left out: "
                    f"{self._stays}, optimizer and reference stay as they were (counted in "
                    "tr/skipped_steps)"
                )
            if self._in_a_row == PATIENCE:
                raise ValueError(_nothing_trained(step - PATIENCE + 1, step))


def check_weights(model: nn.Module) -> None:
    """Raises ValueError where a trained weight is NaN or infinite: finite gradients may overflow a
    weight, and no checkpoint is to hold it."""
    # a process may have no row of a small weight that is sharded
    trained = ((n, _local(p)) for n, p in model.named_parameters() if p.requires_grad)
    named = [(name, own) for name, own in trained if own.numel()]
    if not named:
        return
    norms = [torch.linalg.vector_norm(own, float("inf")).float() for _, own in named]
    device = norms[0].device
    finite = torch.isfinite(torch.stack([norm.to(device) for norm in norms])).tolist()
    if not all(finite):
        name = named[finite.index(False)][0]
        raise ValueError(
            f"the weight {name} is NaN or infinite, nothing was saved: resume from the last "
            "checkpoint with a lower learning rate"
        )


def _local(parameter: Any) -> Tensor:
    return (parameter.to_local() if hasattr(parameter, "to_local") else parameter).detach()


def _norm(model: Any) -> Tensor:
    """For a trainer that computes no norm."""
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


def _not_finite(norm: Any) -> Tensor | None:
    """() float32 on the norm's device: 1 for NaN and infinity."""
    if not isinstance(norm, Tensor):
        return None
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()  # pyright: ignore[reportAttributeAccessIssue]
    return torch.isfinite(norm.detach()).logical_not().float()


def _bad_scores(
    scores: list[tuple[int, tuple[int, ...], Tensor, Tensor]],
    finite: Tensor,  # (2, every S) bool
) -> str:
    first = 0
    for step, rows, logps, _ in scores:
        own = finite[:, first : first + len(logps)]
        first += len(logps)
        if not bool(own.all()):
            who = "reference" if bool(own[0].all()) else "policy"
            examples = (~own.all(0)).view(-1, len(rows)).any(0).nonzero()[:, 0].tolist()
            named = ", ".join(str(rows[i]) for i in examples[:5])
            return (
                f"step {step}: the {who}'s log-probs of row {named} are NaN or infinite; expected "
                "finite numbers (check the model's weights, the learning rate, or fp16 overflow)"
            )
    raise AssertionError("all finite")


def _nothing_trained(first: int, last: int) -> str:
    return (
        f"steps {first} to {last}: no gradient was finite, and nothing was trained; lower the "
        "learning rate, or check the data and the options of the loss"
    )
