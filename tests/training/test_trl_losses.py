"""Every loss of TRL 1.16, and every option that changes one: TRL's value at each of eight steps."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from trl import DPOTrainer

from tests.diagonal import diagonal
from tests.training.test_trl_parity import STEPS, history, kto_rows, pair_rows, run_both
from tralign_fast import LOSSES

TRLS = sorted(set(re.findall(r'loss_type == "(\w+)"', inspect.getsource(DPOTrainer._compute_loss))))
HYBRID = {"ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 2}
MPO = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
CASES = {
    **{name: {"loss_type": [name]} for name in TRLS if LOSSES[name].paired},
    "exo_pair": {"loss_type": ["exo_pair"], "label_smoothing": 1e-3},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "aot": {"loss_type": ["aot"], "label_smoothing": 0.1},
    "discopop": {"loss_type": ["discopop"], "discopop_tau": 0.5},
    "several": MPO,
    "one of two normalized": {"loss_type": ["ipo", "apo_zero"], "loss_weights": [2.0, 0.5]},
    "llama 3": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
    "ld_alpha": {"loss_type": ["sigmoid"], "ld_alpha": 0.3},
    "ld_alpha of ipo": {"loss_type": ["ipo"], "ld_alpha": 0.0},
    "ld_alpha beside sft": {**MPO, "ld_alpha": 0.5},
    "use_weighting": {"loss_type": ["sigmoid"], "use_weighting": True},
    "use_weighting of several": {"loss_type": ["ipo", "bco_pair"], "use_weighting": True},
    "forward_kl": {"loss_type": ["sigmoid"], "f_divergence_type": "forward_kl"},
    "js_divergence of ipo": {"loss_type": ["ipo"], "f_divergence_type": "js_divergence"},
    "alpha_divergence": {
        "loss_type": ["hinge"], "f_divergence_type": "alpha_divergence",
        "f_alpha_divergence_coef": 0.7,
    },
}  # fmt: skip
KTO_CASES = {
    "kto, weights": {"loss_type": "kto", "desirable_weight": 1.3, "undesirable_weight": 0.7},
    "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired"},
}


@pytest.mark.parametrize("case", [*CASES, *KTO_CASES])
def test_each_loss_equals_trl_at_every_step(case, tiny_llama, small_tokenizer, tmp_path):
    method = "kto" if case in KTO_CASES else "dpo"
    rows = kto_rows() if method == "kto" else pair_rows()
    extra = {**CASES, **KTO_CASES}[case]
    theirs, mine = run_both(method, tiny_llama, small_tokenizer, tmp_path, rows, **HYBRID, **extra)
    expected, losses = history(theirs), history(mine)
    assert len(losses) == len(expected) == STEPS
    assert len(set(losses)) > 2
    assert losses == pytest.approx(expected, rel=1e-5, abs=1e-6)
    for a, b in zip(mine.state.log_history[:-1], theirs.state.log_history[:-1], strict=True):
        for key in ("rewards/chosen", "rewards/rejected", "logps/chosen", "grad_norm"):
            if key in b:
                assert a[key] == pytest.approx(b[key], rel=1e-3, abs=2e-5), key


@pytest.mark.parametrize(
    ("case", "place"),
    diagonal(2, ["several", "ld_alpha beside sft", "use_weighting"], ["snapshot", "offloaded"]),
)
def test_windows_give_what_a_resident_reference_gives(
    case, place, tiny_llama, small_tokenizer, tmp_path
):
    schedule = {"ref_model_mixup_alpha": 1.0 if place == "snapshot" else 0.6}
    extra = {**schedule, "ref_model_sync_steps": 3, **CASES[case]}
    theirs, mine = run_both(
        "dpo",
        tiny_llama,
        small_tokenizer,
        tmp_path,
        pair_rows(),
        ours={"reference": place},
        **extra,
    )
    assert history(mine) == pytest.approx(history(theirs), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("case", ["several", "ld_alpha", "kto, weights"])
def test_split_batches_have_the_losses_of_whole_ones(case, tiny_llama, small_tokenizer, tmp_path):
    method = "kto" if case in KTO_CASES else "dpo"
    rows = kto_rows() if method == "kto" else pair_rows()
    extra = {**HYBRID, **{**CASES, **KTO_CASES}[case]}
    theirs, mine = run_both(
        method, tiny_llama, small_tokenizer, tmp_path, rows, ours={"token_budget": 90}, **extra
    )
    batch = mine.data_collator([mine.train_dataset[i] for i in range(4)])
    assert len(batch.parts) > 1
    assert history(mine) == pytest.approx(history(theirs), rel=1e-5, abs=1e-6)
    assert torch.isfinite(torch.tensor(mine.state.log_history[0]["rewards/chosen"]))
