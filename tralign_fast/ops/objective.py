"""What is known of a loss besides its equation, and what a run minimises: a sum of losses.

`ops.losses` holds the equations and the registry `LOSSES`; every check of a loss's name, weights
and options is here, so that the config, the command line and the ops refuse the same things in the
same words.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple, cast

from torch import Tensor

DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


_TINY, _HUGE = 1e-37, 1e37


class Range(NamedTuple):
    """An interval of real numbers, finite ones; "[0, 0.5)" as text."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, Real):
            return False
        value = cast("float", value)
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        # losses are computed in fp32
        return above and below and (value == 0 or _TINY < abs(value) < _HUGE)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'>' if self.open_low else '≥'} {self.low:g} and finite"
        left, right = "(" if self.open_low else "[", ")" if self.open_high else "]"
        high = f"{self.high:.0f}" if self.high == int(self.high) else f"{self.high:g}"
        return f"in {left}{self.low:g}, {high}{right}"


class LossOption(NamedTuple):
    """A number that a loss takes as a keyword."""

    name: str
    default: float
    range: Range
    help: str


class Paper(NamedTuple):
    """Where a loss comes from; `bibtex` is what a model card cites."""

    authors: str  # "Rafailov, Rafael and others"
    title: str
    year: int
    arxiv: str

    @property
    def bibtex(self) -> str:
        key = self.authors.split(",")[0].lower().replace(" ", "").replace("'", "")
        return (
            f"@misc{{{key}{self.year},\n"
            f"    title         = {{{self.title}}},\n"
            f"    author        = {{{self.authors}}},\n"
            f"    year          = {{{self.year}}},\n"
            f"    eprint        = {{{self.arxiv}}},\n"
            "    archivePrefix = {arXiv},\n}"
        )


@dataclass(frozen=True)
class LossSpec:
    """All that anyone asks of a loss.

    `function` takes log-ratios `log π_θ - log π_ref` in fp32 and gives one loss an example:
    `(chosen (B,), rejected (B,), **options) -> (B,)` for pairs, `(ratio (S,), is_desirable (S,)
    bool, **options) -> (S,)` for unpaired completions.
    """

    function: Callable[..., Tensor]
    paired: bool
    title: str  # as a model card names the method: "DPO", with a moving reference "TR-DPO"
    paper: Paper
    options: tuple[LossOption, ...] = ()
    length_normalized: bool = False  # log-ratios are divided by the completion's tokens first
    # what the function takes by name besides its options: "kl" (), the KL term of KTO;
    # "ref_margin" (B,), the reference's log-prob of the chosen less that of the rejected; "nll" (),
    # the mean negative log-likelihood of the chosen completions' tokens
    inputs: tuple[str, ...] = ()
    f_divergence: bool = False  # a function of the difference of scores: f-divergences apply
    couples_examples: bool = False  # an example's loss depends on the others of its batch
    kernel: bool = False  # `tralign_kernels.preference` has it

    def option(self, name: str) -> LossOption | None:
        return next((o for o in self.options if o.name == name), None)


@dataclass(frozen=True)
class Objective:
    """A sum of losses with weights and options, all of them checked (`objective_of`)."""

    names: tuple[str, ...]
    specs: tuple[LossSpec, ...]
    weights: tuple[float, ...]
    options: Mapping[str, float]
    f_divergence: str = "reverse_kl"
    f_alpha: float = 0.5
    length_normalized: bool | None = None  # of all losses; None: as each is defined

    @property
    def paired(self) -> bool:
        return self.specs[0].paired

    @property
    def beta(self) -> float:
        return self.options["beta"]

    @property
    def needs_kl(self) -> bool:
        return any("kl" in spec.inputs for spec in self.specs)

    @property
    def couples_examples(self) -> bool:
        return any(spec.couples_examples for spec in self.specs)

    @property
    def sums_tokens(self) -> bool:
        """Whether a term is a mean over the tokens of a batch."""
        return any("nll" in spec.inputs for spec in self.specs)

    @property
    def weighs_examples(self) -> bool:
        """Whether the loss of each example may have a factor of its own."""
        return not self.couples_examples and not self.sums_tokens

    def normalizes(self, spec: LossSpec) -> bool:
        """Whether the log-ratios of this loss are divided by the completion's tokens."""
        if self.length_normalized is None or "nll" in spec.inputs:
            return spec.length_normalized
        return self.length_normalized

    def options_of(self, spec: LossSpec) -> dict[str, float]:
        return {o.name: self.options[o.name] for o in spec.options}

    @property
    def title(self) -> str:
        """The method, as a model card names it: "DPO", or "DPO + 0.2 SFT"."""
        parts = [
            spec.title if weight == 1.0 else f"{weight:g} {spec.title}"
            for spec, weight in zip(self.specs, self.weights, strict=True)
        ]
        return " + ".join(parts)


def objective_of(
    losses: Mapping[str, LossSpec],
    names: str | Sequence[str],
    weights: Sequence[float] | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    length_normalized: bool | None = None,
) -> Objective:
    """The objective of these losses.

    Args:
        losses: the registry, `LOSSES`.
        names: a name of the registry, or several.
        weights: a factor of each loss, ≥ 0; None: 1 each.
        options: what the losses take; the rest has its default, but for beta, which must be given.
        f_divergence: one of `DIVERGENCES`, for losses of the difference of scores.
        f_alpha: α of "alpha_divergence".
        length_normalized: divide log-ratios by the completion's tokens; None: as each loss does.

    Raises:
        ValueError: an unknown loss, an option that none of the losses takes or that is out of its
            range, weights that do not match, losses of pairs beside unpaired ones. One line, which
            names the option, the value and what was expected.
    """
    names = (names,) if isinstance(names, str) or not isinstance(names, Sequence) else tuple(names)
    if not names:
        raise ValueError(f"loss_type: expected at least one of {', '.join(losses)}, got none")
    specs = tuple(_find(losses, name) for name in names)
    if len({spec.paired for spec in specs}) > 1:
        raise ValueError(
            f"loss_type: {', '.join(names)} cannot be added up: "
            f"{_some(names, specs, paired=False)} takes single completions with a label, "
            f"{_some(names, specs, paired=True)} takes pairs"
        )
    given = _check_options(names, specs, dict(options or {}))
    _check_divergence(names, specs, f_divergence, f_alpha)
    if length_normalized not in (None, True, False):
        raise ValueError(f"length_normalized: expected true or false, got {length_normalized!r}")
    checked = [float(w) for w in _check_weights(names, weights)]
    terms = [term for term in zip(names, specs, checked, strict=True) if term[2]]
    names, specs, checked = zip(*terms, strict=True)  # a weight of 0 leaves a loss out
    return Objective(
        names, specs, checked, given, f_divergence, float(f_alpha), length_normalized
    )  # fmt: skip


def _some(names: Sequence[str], specs: Sequence[LossSpec], paired: bool) -> str:
    found = (n for n, s in zip(names, specs, strict=True) if s.paired is paired)
    return ", ".join(found)


def _find(losses: Mapping[str, LossSpec], name: object) -> LossSpec:
    if isinstance(name, str) and name in losses:
        return losses[name]
    nearest = difflib.get_close_matches(str(name).lower().replace("-", "_"), losses, 1, 0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"loss_type: expected one of {', '.join(losses)}, got {name!r}{hint}")


def _check_options(
    names: Sequence[str], specs: Sequence[LossSpec], given: dict[str, Any]
) -> dict[str, float]:
    options = {o.name: o.default for spec in specs for o in spec.options}
    for name in given:
        if name not in options:
            takes = ", ".join(options) or "no options"
            raise ValueError(
                f"{name}: the loss {' + '.join(names)} does not take it, it takes {takes}"
            )
    if "beta" not in given:
        raise ValueError(f"beta: the loss {' + '.join(names)} needs it, a number > 0")
    for loss, spec in zip(names, specs, strict=True):
        for option in spec.options:
            if option.name not in given and options[option.name] != option.default:
                raise ValueError(
                    f"{option.name}: the losses {', '.join(names)} have other defaults; expected "
                    "one value for all"
                )
            value = given.get(option.name, option.default)
            if value not in option.range:
                raise ValueError(
                    f"{option.name}: expected a number {option.range} for {loss}, got {value!r}"
                )
    return {name: float(given.get(name, default)) for name, default in options.items()}


def _check_divergence(
    names: Sequence[str], specs: Sequence[LossSpec], divergence: str, alpha: float
) -> None:
    if divergence not in DIVERGENCES:
        raise ValueError(
            f"f_divergence_type: expected one of {', '.join(DIVERGENCES)}, got {divergence!r}"
        )
    if alpha not in Range(-math.inf, math.inf):
        raise ValueError(f"f_alpha_divergence_coef: expected a finite number, got {alpha!r}")
    if divergence != "alpha_divergence" and alpha != 0.5:
        raise ValueError(
            f"f_alpha_divergence_coef: f_divergence_type={divergence!r} does not take it, got "
            f"{alpha}"
        )
    if divergence == "reverse_kl":
        return
    without = [n for n, s in zip(names, specs, strict=True) if not s.f_divergence]
    if without:
        raise ValueError(
            f"f_divergence_type: {', '.join(without)} is no function of the difference of scores; "
            f"expected reverse_kl, got {divergence!r}"
        )


def _check_weights(names: Sequence[str], weights: Iterable[Any] | None) -> Sequence[Any]:
    if weights is None:
        return [1.0] * len(names)
    weights = list(weights) if isinstance(weights, Iterable) else [weights]
    if len(weights) != len(names):
        raise ValueError(
            f"loss_weights: expected one weight for each of {', '.join(names)}, got {weights!r}"
        )
    for weight in weights:
        if weight not in Range(0.0, math.inf):
            raise ValueError(f"loss_weights: expected numbers ≥ 0 and finite, got {weights!r}")
    if not any(weights):
        raise ValueError(f"loss_weights: expected one above 0 at least, got {weights!r}")
    return weights
