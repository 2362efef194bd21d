"""Preference losses: equations of log-ratios, in fp32, and the registry of them.

Letters: B pairs, S unpaired completions, β the strength of the pull towards the reference; chosen
and rejected are the log-ratios `log π_θ(y|x) - log π_ref(y|x)` of a pair's completions (or their
scores under another f-divergence), Δ their difference.

To add a loss, write one function here and name it in `LOSSES`: the trainer, the command line, the
model card, the integrations and the benchmarks read it from there.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tralign_fast.ops.objective import LossOption, LossSpec, Paper, Range

# --- pairs: (chosen (B,), rejected (B,)) -> (B,) --------------------------------------------------


def sigmoid(chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """`-(1-ε)·log σ(β·Δ) - ε·log σ(-β·Δ)`, ε the share of labels that are flipped.

    DPO, arXiv 2305.18290, eq. 7; ε > 0 is conservative DPO (E. Mitchell, "A note on DPO with noisy
    preferences"), which the sigmoid loss of TRL 1.16 does not have.
    """
    delta = beta * (chosen - rejected)
    loss = -(1 - label_smoothing) * F.logsigmoid(delta)
    return loss - label_smoothing * F.logsigmoid(-delta) if label_smoothing else loss


def robust(chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """`(ε·log σ(-β·Δ) - (1-ε)·log σ(β·Δ)) / (1 - 2ε)`: unbiased if a share ε of labels is flipped.

    arXiv 2403.00409, eq. 12.
    """
    delta = beta * (chosen - rejected)
    flipped = label_smoothing * F.logsigmoid(-delta)
    return (flipped - (1 - label_smoothing) * F.logsigmoid(delta)) / (1 - 2 * label_smoothing)


def hinge(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """`max(0, 1 - β·Δ)`. SLiC-HF, arXiv 2305.10425, on log-ratios as in arXiv 2309.06657."""
    return F.relu(1 - beta * (chosen - rejected))


def ipo(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """`(Δ - 1/(2β))²`. arXiv 2310.12036, eq. 17, which calls β τ."""
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def exo_pair(chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """`KL(σ(±β·Δ) || (1-ε, ε))`. arXiv 2402.00856, eq. 16."""
    delta = beta * (chosen - rejected)
    log_win, log_lose = F.logsigmoid(delta), F.logsigmoid(-delta)
    win = log_win.exp() * (log_win - math.log1p(-label_smoothing))
    return win + log_lose.exp() * (log_lose - math.log(label_smoothing))


def nca_pair(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """`-log σ(r_w) - ½·log σ(-r_w) - ½·log σ(-r_l)`, r = β · log-ratio. arXiv 2402.05369."""
    win, lose = beta * chosen, beta * rejected
    return -F.logsigmoid(win) - 0.5 * (F.logsigmoid(-win) + F.logsigmoid(-lose))


def bco_pair(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """`-log σ(r_w) - log σ(-r_l)`. arXiv 2404.04656, without the reward shift, as TRL 1.16."""
    return -F.logsigmoid(beta * chosen) - F.logsigmoid(-beta * rejected)


def sppo_hard(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """`(ρ_w - ½/β)² + (ρ_l + ½/β)²`, ρ log-ratios. arXiv 2405.00675, eq. 4.7, with P = 1 and 0."""
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


def apo_zero(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """`1 - σ(r_w) + σ(r_l)`. arXiv 2408.06266, eq. 7."""
    return 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """`σ(r_w) + 1 - σ(r_w - r_l)`. arXiv 2408.06266, eq. 8."""
    return torch.sigmoid(beta * chosen) + 1 - torch.sigmoid(beta * (chosen - rejected))


def discopop(chosen: Tensor, rejected: Tensor, *, beta: float, discopop_tau: float) -> Tensor:
    """`-(1-m)·log σ(β·Δ) + m·exp(-β·Δ)`, m = σ(β·Δ/τ). arXiv 2406.08414, eq. 5."""
    delta = beta * (chosen - rejected)
    modulation = delta / discopop_tau
    # m·exp(-β·Δ) as one power: where Δ is far below 0 the first factor is 0, the other infinite
    blended = torch.exp(F.logsigmoid(modulation) - delta)
    return blended - torch.sigmoid(-modulation) * F.logsigmoid(delta)


def aot(
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: float,
    label_smoothing: float,
    ref_margin: Tensor,  # (B,) of the reference: log-prob of the chosen less that of the rejected
) -> Tensor:
    """`sigmoid` of the policy's margins, sorted, less the reference's, sorted. arXiv 2406.05882."""
    margin = (chosen - rejected + ref_margin).sort().values
    delta = margin - ref_margin.sort().values
    return sigmoid(delta, torch.zeros_like(delta), beta=beta, label_smoothing=label_smoothing)


def hypo(chosen: Tensor, rejected: Tensor, *, beta: float, ref_margin: Tensor) -> Tensor:
    """`-log σ(β·(Δ_θ - max(0, Δ_ref)))`, Δ_θ and Δ_ref the margins of policy and reference.

    DPO where the reference prefers the chosen; where it prefers the rejected, as if it had no
    preference. HyPO, arXiv 2602.11902.
    """
    return -F.logsigmoid(beta * (chosen - rejected + ref_margin.clamp(max=0)))


def aot_unpaired(
    chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float
) -> Tensor:
    """`sigmoid` of the chosen's log-ratios, sorted, less the rejected's. arXiv 2406.05882."""
    return sigmoid(
        chosen.sort().values, rejected.sort().values, beta=beta, label_smoothing=label_smoothing
    )


def sft(chosen: Tensor, rejected: Tensor, *, beta: float, nll: Tensor) -> Tensor:
    """The mean negative log-likelihood of the chosen completions' tokens, whatever β.

    A term beside another loss: Llama 3 adds 0.2 of it to DPO (arXiv 2407.21783, section 4.1.4).
    """
    return nll.expand(chosen.shape)


# --- unpaired: (ratio (S,), is_desirable (S,) bool) -> (S,) ---------------------------------------


def kto(
    ratio: Tensor,
    is_desirable: Tensor,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
    kl: Tensor,  # ()
) -> Tensor:
    """`λ - λ·σ(±β·(ρ - max(KL, 0)))`, + for desirable completions. arXiv 2402.01306, eq. 7-8."""
    sign, weight = _labels(is_desirable, desirable_weight, undesirable_weight)
    return weight * torch.sigmoid(-beta * sign * (ratio - kl.clamp(min=0)))


def apo_zero_unpaired(
    ratio: Tensor,
    is_desirable: Tensor,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """`λ·(1 - σ(r))` of the desirable, `λ·σ(r)` of the undesirable. arXiv 2408.06266, eq. 7."""
    sign, weight = _labels(is_desirable, desirable_weight, undesirable_weight)
    return weight * torch.sigmoid(-beta * sign * ratio)


def _labels(
    is_desirable: Tensor, desirable_weight: float, undesirable_weight: float
) -> tuple[Tensor, Tensor]:
    good = is_desirable.float()
    return 2 * good - 1, desirable_weight * good + undesirable_weight * (1 - good)


# --- the registry ---------------------------------------------------------------------------------

_BETA = LossOption(
    "beta", 0.1, Range(0, math.inf, open_low=True), "β, the pull towards the reference (IPO's τ)."
)
_DISCOPOP_TAU = LossOption(
    "discopop_tau", 0.05, Range(0, math.inf, open_low=True), "τ of discopop's blend."
)
_WEIGHTS = tuple(
    LossOption(f"{label}_weight", 1.0, Range(0, math.inf), f"Weight of {label} completions.")
    for label in ("desirable", "undesirable")
)


def _smoothing(default: float, range: Range) -> LossOption:
    return LossOption("label_smoothing", default, range, "ε, the share of labels that are flipped.")


_UNDER_HALF = _smoothing(0.0, Range(0, 0.5, open_high=True))
_DPO = Paper(
    "Rafailov, Rafael and others",
    "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
    2023,
    "2305.18290",
)
_APO = Paper(
    "D'Oosterlinck, Karel and others",
    "Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in "
    "Alignment",
    2024,
    "2408.06266",
)
_AOT = Paper(
    "Melnyk, Igor and others",
    "Distributional Preference Alignment of LLMs via Optimal Transport",
    2024,
    "2406.05882",
)

LOSSES: dict[str, LossSpec] = {
    "sigmoid": LossSpec(
        sigmoid, True, "DPO", _DPO, (_BETA, _UNDER_HALF), f_divergence=True, kernel=True
    ),
    "ipo": LossSpec(
        ipo, True, "IPO",
        Paper(
            "Azar, Mohammad Gheshlaghi and others",
            "A General Theoretical Paradigm to Understand Learning from Human Preferences",
            2023, "2310.12036",
        ),
        (_BETA,), length_normalized=True, f_divergence=True, kernel=True,
    ),
    "kto": LossSpec(
        kto, False, "KTO",
        Paper(
            "Ethayarajh, Kawin and others",
            "KTO: Model Alignment as Prospect Theoretic Optimization", 2024, "2402.01306",
        ),
        (_BETA, *_WEIGHTS), inputs=("kl",), kernel=True,
    ),
    "robust": LossSpec(
        robust, True, "robust DPO",
        Paper(
            "Chowdhury, Sayak Ray and Kini, Anush and Natarajan, Nagarajan",
            "Provably Robust DPO: Aligning Language Models with Noisy Feedback",
            2024, "2403.00409",
        ),
        (_BETA, _UNDER_HALF), f_divergence=True, kernel=True,
    ),
    "hinge": LossSpec(
        hinge, True, "SLiC",
        Paper(
            "Zhao, Yao and others",
            "SLiC-HF: Sequence Likelihood Calibration with Human Feedback", 2023, "2305.10425",
        ),
        (_BETA,), f_divergence=True, kernel=True,
    ),
    "exo_pair": LossSpec(
        exo_pair, True, "EXO",
        Paper(
            "Ji, Haozhe and others",
            "Towards Efficient Exact Optimization of Language Model Alignment", 2024, "2402.00856",
        ),
        (_BETA, _smoothing(1e-3, Range(0, 1, open_low=True, open_high=True))),
        f_divergence=True, kernel=True,
    ),
    "nca_pair": LossSpec(
        nca_pair, True, "NCA",
        Paper(
            "Chen, Huayu and others",
            "Noise Contrastive Alignment of Language Models with Explicit Rewards",
            2024, "2402.05369",
        ),
        (_BETA,), kernel=True,
    ),
    "bco_pair": LossSpec(
        bco_pair, True, "BCO",
        Paper(
            "Jung, Seungjae and others",
            "Binary Classifier Optimization for Large Language Model Alignment",
            2024, "2404.04656",
        ),
        (_BETA,), kernel=True,
    ),
    "sppo_hard": LossSpec(
        sppo_hard, True, "SPPO",
        Paper(
            "Wu, Yue and others",
            "Self-Play Preference Optimization for Language Model Alignment", 2024, "2405.00675",
        ),
        (_BETA,), kernel=True,
    ),
    "aot": LossSpec(
        aot, True, "AOT", _AOT, (_BETA, _smoothing(0.0, Range(0, 1))),
        inputs=("ref_margin",), couples_examples=True,
    ),
    "aot_unpaired": LossSpec(
        aot_unpaired, True, "AOT unpaired", _AOT, (_BETA, _smoothing(0.0, Range(0, 1))),
        couples_examples=True,
    ),
    "hypo": LossSpec(
        hypo, True, "HyPO",
        Paper(
            "Yuan, Suqin and others",
            "Mitigating Mismatch within Reference-based Preference Optimization",
            2026, "2602.11902",
        ),
        (_BETA,), inputs=("ref_margin",),
    ),
    "apo_zero": LossSpec(apo_zero, True, "APO-zero", _APO, (_BETA,), kernel=True),
    "apo_down": LossSpec(apo_down, True, "APO-down", _APO, (_BETA,), kernel=True),
    "apo_zero_unpaired": LossSpec(
        apo_zero_unpaired, False, "APO-zero unpaired", _APO, (_BETA, *_WEIGHTS), kernel=True
    ),
    "discopop": LossSpec(
        discopop, True, "DiscoPOP",
        Paper(
            "Lu, Chris and others",
            "Discovering Preference Optimization Algorithms with and for Large Language Models",
            2024, "2406.08414",
        ),
        (_BETA, _DISCOPOP_TAU), f_divergence=True, kernel=True,
    ),
    "sigmoid_norm": LossSpec(
        sigmoid, True, "length-normalized DPO",
        Paper(
            "Lambert, Nathan and others",
            "Tulu 3: Pushing Frontiers in Open Language Model Post-Training", 2024, "2411.15124",
        ),
        (_BETA, _UNDER_HALF), length_normalized=True, f_divergence=True, kernel=True,
    ),
    "sft": LossSpec(
        sft, True, "SFT",
        Paper("Grattafiori, Aaron and others", "The Llama 3 Herd of Models", 2024, "2407.21783"),
        (_BETA,), inputs=("nll",), f_divergence=True, kernel=True,
    ),
}  # fmt: skip
LOSSES = {"dpo": LOSSES["sigmoid"], **LOSSES}  # two names of one loss, the second TRL's
