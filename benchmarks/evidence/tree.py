"""A tree of actions, small enough that every trajectory's probability is known exactly.

A policy starts at the root and takes L actions of A; its trajectories are the A^L leaves. Some are
the chosen of a preference pair, some the rejected, and all others are out of the distribution of
the pairs. As in Rafailov et al. 2024 (arXiv 2406.02900), the policy is a recurrent network: a table
of every node's probabilities would share nothing between trajectories, so that pushing one down
could not drag others along.

Seeds are independent replicas that train side by side: every tensor has them in front.

Letters: E seeds, A actions, L depth, Y = A^L trajectories, B pairs, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

ACTIONS, DEPTH, PAIRS, HIDDEN = 3, 5, 8, 32


class Groups(NamedTuple):
    """Trajectories by their number, (E, B) int64 each; all the others are out of distribution."""

    chosen: Tensor
    rejected: Tensor


def draw_pairs(seeds: Sequence[int], pairs: int = PAIRS) -> Groups:
    """For every seed B pairs of 2B different trajectories."""
    picks = [
        torch.randperm(ACTIONS**DEPTH, generator=torch.Generator().manual_seed(seed))[: 2 * pairs]
        for seed in seeds
    ]
    return Groups(*torch.stack(picks).chunk(2, 1))


class RecurrentPolicies(nn.Module):
    """An Elman network over the actions taken so far, one for each seed."""

    def __init__(self, seeds: Sequence[int]) -> None:
        super().__init__()
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def draw(*shape: int) -> nn.Parameter:
            draws = [torch.randn(shape, generator=g) / HIDDEN**0.5 for g in generators]
            return nn.Parameter(torch.stack(draws))

        self.embed = draw(ACTIONS + 1, HIDDEN)  # the last one: no action yet
        self.recur = draw(HIDDEN, HIDDEN)
        self.recur_bias = draw(1, HIDDEN)
        self.head = draw(HIDDEN, ACTIONS)

    def forward(self) -> Tensor:
        """(E, Y) log-probs of all trajectories, nats, in the order of their actions.

        Level by level: a node's state is computed once for all the trajectories through it.
        """
        seeds = len(self.embed)
        moves = self.embed + self.recur_bias  # (E, A + 1, H), what an action adds to the state
        states = torch.tanh(moves[:, ACTIONS:])  # (E, nodes of the level, H)
        logps = states.new_zeros(seeds, 1)
        for level in range(DEPTH):
            choice = torch.bmm(states, self.head).log_softmax(-1)  # (E, nodes, A)
            logps = (logps[:, :, None] + choice).view(seeds, -1)
            if level < DEPTH - 1:
                carried = torch.bmm(states, self.recur)
                after = torch.tanh(carried[:, :, None] + moves[:, None, :ACTIONS])
                states = after.view(seeds, -1, HIDDEN)
        return logps


def fit_initial_policies(
    groups: Groups,
    seeds: Sequence[int],
    *,
    in_distribution: float = 0.8,
    steps: int = 500,
) -> RecurrentPolicies:
    """The policies that training starts from, and the first references: supervised, as a language
    model is before it is aligned.

    They are fitted to the mixture of the pairs' trajectories (chosen and rejected alike, weight
    `in_distribution`) and of all trajectories.
    """
    both = torch.cat(groups, 1)
    count = ACTIONS**DEPTH
    target = torch.full((len(seeds), count), (1 - in_distribution) / count)
    target.scatter_add_(1, both, torch.full(both.shape, in_distribution / both.shape[1]))
    policies = RecurrentPolicies(seeds)
    optimizer = torch.optim.Adam(policies.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = -(target * policies()).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policies
