"""Where probability goes: DPO, IPO and KTO on a tree, with a frozen and with a moving reference.

The losses, the schedule and the update of the reference are the library's; the policy is small
enough that masses and KL are exact sums over all trajectories. No arm is tuned: one learning rate,
one number of steps, and the same values of β for every schedule.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.evidence.tree import Groups, RecurrentPolicies, draw_pairs, fit_initial_policies
from tralign_fast import LOSSES, TrustRegion, ema_update_
from tralign_fast.ops.objective import objective_of

EVERY = 64
SCHEDULES = {
    "frozen": TrustRegion(alpha=0.0, every=0),
    "soft": TrustRegion(alpha=0.6, every=1),
    "hard": TrustRegion(alpha=1.0, every=EVERY),
    "hybrid": TrustRegion(alpha=0.6, every=EVERY),
}
METHODS = ("dpo", "ipo", "kto")  # the losses of the paper, by their names in `LOSSES`
BETAS = (0.003, 0.03, 0.1, 0.3)


@dataclass(frozen=True)
class Arm:
    """One way to train. What decides its numbers stands here and in `tree`."""

    loss: str
    schedule: str
    beta: float
    steps: int = 2000
    learning_rate: float = 1e-3


def arms(betas: Sequence[float] = BETAS, **options: Any) -> list[Arm]:
    return [Arm(*arm, **options) for arm in product(METHODS, SCHEDULES, betas)]


def log_steps(last: int, per_decade: int = 10) -> list[int]:
    """Steps to look at: 0, and spread evenly over the logarithm up to `last`."""
    count = int(math.log10(last) * per_decade) + 1
    return sorted({0, last, *(int(10 ** (k / per_decade)) for k in range(count))})


def train(
    arm: Arm, start: RecurrentPolicies, groups: Groups
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Trains a copy of `start`, every step on all pairs; yields what `look` finds at `log_steps`.

    The losses of the seeds are summed and Adam works element by element: no seed sees another.
    """
    policy, reference = copy.deepcopy(start), copy.deepcopy(start)
    schedule = SCHEDULES[arm.schedule]
    optimizer = torch.optim.Adam(policy.parameters(), lr=arm.learning_rate)
    with torch.no_grad():
        initial = ref_logps = start()
    looked_at = set(log_steps(arm.steps))
    for step in range(arm.steps + 1):
        logps = policy()
        if step in looked_at:
            yield step, look(arm, groups, logps.detach(), ref_logps, initial)
        optimizer.zero_grad()
        loss_of(arm, groups, logps, ref_logps).backward()
        optimizer.step()
        if schedule.should_sync(step + 1):
            ema_update_(list(reference.parameters()), list(policy.parameters()), schedule.alpha)
            with torch.no_grad():
                ref_logps = reference()


def loss_of(arm: Arm, groups: Groups, logps: Tensor, ref_logps: Tensor) -> Tensor:
    """The library's loss of all pairs, summed over seeds.

    All trajectories are of one length L, so that IPO's sums are its per-token means with β / L;
    these are sums. KTO's reference point is the exact KL(π || π_ref): the trainer estimates it from
    completions of other prompts, of which a tree with one root has none.
    """
    objective = objective_of(LOSSES, arm.loss, options={"beta": arm.beta})
    (spec,) = objective.specs
    ratios = logps - ref_logps
    if spec.paired:
        pairs = [ratios.gather(1, group) for group in groups]
        return spec.function(*pairs, **objective.options).mean(1).sum()
    both = torch.cat(groups, 1)
    desirable = (torch.arange(both.shape[1]) < groups.chosen.shape[1]).expand_as(both)
    kl = exact_kl(logps, ref_logps).detach()[:, None]
    each = spec.function(ratios.gather(1, both), desirable, kl=kl, **objective.options)
    return each.mean(1).sum()


def exact_kl(logps: Tensor, others: Tensor) -> Tensor:  # (E, Y) each -> (E,)
    """KL in nats, the sum over all trajectories."""
    return (logps.exp() * (logps - others)).sum(1)


def look(
    arm: Arm, groups: Groups, logps: Tensor, ref_logps: Tensor, initial: Tensor
) -> dict[str, Tensor]:
    """(E,) each: masses of the three groups, distances, and DPO's curvature.

    `margin` is Δ to the reference as it is now, `curvature` is β²·σ(βΔ)·(1 - σ(βΔ)), the second
    derivative of DPO's loss in Δ; both are means over pairs. (IPO's curvature is 2 everywhere.)
    """
    chosen, rejected = (logps.gather(1, g).exp().sum(1) for g in groups)
    ratio = logps - ref_logps
    margin = ratio.gather(1, groups.chosen) - ratio.gather(1, groups.rejected)
    sigma = torch.sigmoid(arm.beta * margin)
    return {
        "chosen": chosen,
        "rejected": rejected,
        "ood": 1 - chosen - rejected,
        "kl_initial": exact_kl(logps, initial),
        "kl_reference": exact_kl(logps, ref_logps),
        "margin": margin.mean(1),
        "curvature": (arm.beta**2 * sigma * (1 - sigma)).mean(1),
    }


def run(chosen: Sequence[Arm], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """A row for every arm, seed and step that was looked at."""
    groups, rows = draw_pairs(seeds), []
    start = fit_initial_policies(groups, seeds)
    for arm in tqdm(chosen, desc="toy", unit="arm"):
        for step, found in train(arm, start, groups):
            values = zip(*(v.tolist() for v in found.values()), strict=True)
            rows += [
                {**asdict(arm), "seed": seed, "step": step, **dict(zip(found, row, strict=True))}
                for seed, row in zip(seeds, values, strict=True)
            ]
    return rows
