"""What the experiment with people's preferences compares: one table of arms, and its settings.

Every arm has the settings of the run and differs in loss, schedule of the reference, β, seed and
pairs alone. Nothing is tuned for any arm: one learning rate, one batch, one number of steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

# β of the frozen arms; every moving one has MOVING's. IPO's log-probs are per token, as TRL's are.
FROZEN: dict[str, tuple[float, ...]] = {
    "dpo": (0.3, 0.1, 0.03, 0.01),
    "ipo": (1.0, 0.3, 0.1, 0.03),
    "kto": (0.3, 0.1, 0.03, 0.01),
}
MOVING = {"dpo": 0.1, "ipo": 0.3, "kto": 0.1}


@dataclass(frozen=True)
class Settings:
    """The same for all arms of a run; as they stand, those of a GPU."""

    # the policy, and the gold reward model of the same backbone
    layers: int = 30
    vocabulary: int = 49152
    prompt_tokens: int = 160  # a longer prompt keeps its last ones
    new_tokens: int = 64  # of an answer, people's or sampled
    bf16: bool = True  # autocast; weights and optimizer are float32
    sft_steps: int = 300
    sft_rate: float = 2e-5
    gold: str = "model"  # which one ranks: model (trained whole), backbone (a head), words
    check: str = "words"  # the second one: words, or tokens
    gold_steps: int = 300
    gold_rate: float = 2e-5
    model_batch: int = 16  # rows of the SFT, pairs of the gold
    # the parts of the pairs; the gold has the rest
    policy_rows: int = 1000
    test_rows: int = 128
    gold_test_rows: int = 300
    flipped: float = 0.2  # share of the proxy's labels that are turned around
    # the arms
    steps: int = 1000
    pairs: int = 8  # in an optimizer step; KTO takes the same answers, unpaired
    learning_rate: float = 2e-5
    warmup_steps: int = 20
    every: tuple[int, ...] = (8, 64, 512)  # τ of the hard arms; hybrid has the middle one
    # what is measured
    measure_every: int = 50
    save_every: int = 250  # a multiple: a killed arm goes on from there
    prompts: int = 128
    held_out: int = 128  # pairs of every kind
    sample_batch: int = 128
    samples_shown: int = 16  # kept as text

    @property
    def max_length(self) -> int:
        return self.prompt_tokens + self.new_tokens


GPU = Settings()
# Two busy cores: the first and the last two layers, the first 4,096 tokens, few pairs many times.
CPU = Settings(
    layers=3, vocabulary=4096, prompt_tokens=32, new_tokens=16, bf16=False, sft_steps=100,
    sft_rate=1e-3, gold="words", check="tokens", gold_steps=0, policy_rows=120, test_rows=48,
    gold_test_rows=300, steps=120, pairs=2, learning_rate=2e-4, warmup_steps=4, every=(4, 16, 64),
    measure_every=20, save_every=40, prompts=48, held_out=48, sample_batch=48,
)  # fmt: skip
# The whole model on two busy cores: short arms, a reward model of which the head alone is trained.
WHOLE = Settings(
    prompt_tokens=32, new_tokens=20, sft_steps=24, sft_rate=5e-5, gold="backbone", gold_steps=0,
    model_batch=8, policy_rows=48, test_rows=32, gold_test_rows=300, steps=96, pairs=2,
    learning_rate=1e-4, warmup_steps=4, every=(4, 12, 48), measure_every=16, save_every=64,
    prompts=24, held_out=8, sample_batch=32, samples_shown=24,
)  # fmt: skip
# Minutes on either.
QUICK = replace(CPU, sft_steps=10, steps=40, measure_every=10, prompts=16, held_out=16)


def with_steps(settings: Settings, steps: int) -> Settings:
    """Arms of another length, measured and saved as often; τ stay what they are."""
    if steps == settings.steps:
        return settings
    share = steps / settings.steps
    every = max(1, round(settings.measure_every * share))
    saves = max(1, round(settings.save_every / settings.measure_every))
    return replace(settings, steps=steps, measure_every=every, save_every=saves * every)


@dataclass(frozen=True)
class Arm:
    loss: str
    beta: float
    alpha: float  # 0: frozen
    every: int
    seed: int
    pairs: str = "proxy"  # or people

    @property
    def schedule(self) -> str:
        if self.alpha == 0:
            return "frozen"
        if self.alpha == 1:
            return "hard"
        return "soft" if self.every == 1 else "hybrid"

    @property
    def name(self) -> str:
        """What it is, its seed left out."""
        moves = "" if self.alpha == 0 else f" α={self.alpha:g} τ={self.every}"
        people = " people" if self.pairs == "people" else ""
        return f"{self.loss} {self.schedule}{moves} β={self.beta:g}{people}"

    def __str__(self) -> str:
        return f"{self.name} seed {self.seed}"

    def reference(self) -> dict[str, Any]:
        """Fields of `TRConfig`."""
        if self.alpha == 0:
            return {"sync_ref_model": False}
        return {"ref_model_mixup_alpha": self.alpha, "ref_model_sync_steps": self.every}


def _curves(loss: str, settings: Settings, pairs: str = "proxy") -> Iterator[Arm]:
    """Frozen at every β, soft, hard with every τ, hybrid."""
    beta, taus = MOVING[loss], settings.every
    for frozen in FROZEN[loss]:
        yield Arm(loss, frozen, 0.0, 0, 0, pairs)
    yield Arm(loss, beta, 0.6, 1, 0, pairs)
    for every in taus:
        yield Arm(loss, beta, 1.0, every, 0, pairs)
    yield Arm(loss, beta, 0.6, taus[len(taus) // 2], 0, pairs)


def _core(settings: Settings) -> Iterator[Arm]:
    """The least that compares a moving reference with a small β: what a slow machine does first."""
    taus = settings.every
    yield Arm("dpo", 0.1, 0.0, 0, 0)
    yield Arm("dpo", 0.01, 0.0, 0, 0)
    yield Arm("dpo", 0.1, 0.6, 1, 0)
    yield Arm("dpo", 0.1, 1.0, taus[len(taus) // 2], 0)


def _losses(settings: Settings) -> Iterator[Arm]:
    """The same of IPO and KTO."""
    taus = settings.every
    for loss in ("ipo", "kto"):
        beta = MOVING[loss]
        yield Arm(loss, beta, 0.0, 0, 0)
        yield Arm(loss, beta / 10, 0.0, 0, 0)
        yield Arm(loss, beta, 0.6, 1, 0)
        yield Arm(loss, beta, 1.0, taus[len(taus) // 2], 0)


def _interval(settings: Settings) -> Iterator[Arm]:
    """τ in powers of two at α = 1; α from 0.1 to 1 at one τ."""
    taus = settings.every
    every = 1
    while every <= taus[-1]:
        yield Arm("dpo", 0.1, 1.0, every, 0)
        every *= 2
    for alpha in (0.1, 0.3, 0.6, 1.0):
        yield Arm("dpo", 0.1, alpha, taus[0], 0)


def _stages(settings: Settings) -> Iterator[Arm]:
    """i stages at β (a reset between two) beside frozen at β/i."""
    for stages in STAGES:
        yield Arm("dpo", STAGE_BETA, 1.0, settings.steps // stages, 0)
        yield Arm("dpo", STAGE_BETA / stages, 0.0, 0, 0)


def _literature(settings: Settings) -> Iterator[Arm]:
    """HyPO (arXiv 2602.11902) with a frozen and a moving reference; an anchor that trails far."""
    yield Arm("hypo", 0.1, 0.0, 0, 0)
    yield Arm("hypo", 0.1, 0.6, 1, 0)
    yield Arm("dpo", 0.1, 0.05, 1, 0)


STAGES, STAGE_BETA = (2, 4), 0.3

# What --arms takes. `all` is their union in this order: what matters most comes first.
EXPERIMENTS = {
    "core": _core,
    "losses": _losses,
    "dpo": lambda s: _curves("dpo", s),
    "ipo": lambda s: _curves("ipo", s),
    "kto": lambda s: _curves("kto", s),
    "people": lambda s: _curves("dpo", s, "people"),
    "interval": _interval,
    "stages": _stages,
    "literature": _literature,
}


def in_figure(arm: Arm, settings: Settings) -> bool:
    """Whether the figure of the curves has a line for it; the others have tables of their own."""
    apart = {replace(a, seed=arm.seed) for name in _APART for a in EXPERIMENTS[name](settings)}
    drawn = {
        replace(a, seed=arm.seed)
        for name, experiment in EXPERIMENTS.items()
        if name not in _APART
        for a in experiment(settings)
    }
    return arm in drawn or arm not in apart


_APART = ("interval", "stages")


def arms_of(experiments: list[str], settings: Settings, seeds: int) -> list[Arm]:
    """Experiment by experiment, within it seed by seed, none twice: whole comparisons come first.

    Raises:
        ValueError: an unknown experiment.
    """
    names = list(EXPERIMENTS) if experiments == ["all"] else experiments
    unknown = [name for name in names if name not in EXPERIMENTS]
    if unknown:
        raise ValueError(
            f"--arms: no experiment {', '.join(unknown)}; expected all or some of "
            f"{', '.join(EXPERIMENTS)}"
        )
    found = [
        replace(arm, seed=seed)
        for name in names
        for seed in range(seeds)
        for arm in EXPERIMENTS[name](settings)
    ]
    return list(dict.fromkeys(found))
