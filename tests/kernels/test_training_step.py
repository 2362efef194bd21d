"""A training step of `TRTrainer` in the interpreter: one launch of the preference kernel."""

import pytest
import torch

from tests.kernels.conftest import INTERPRETED
from tests.training.test_trl_parity import history, kto_rows, options, pair_rows
from tralign_fast import TRConfig, TRTrainer
from tralign_fast.ops import preference

CASES = {
    "dpo": {},
    "ipo": {"loss_type": "ipo"},
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "exo": {"loss_type": "exo_pair", "label_smoothing": 0.6},
    "ld": {"ld_alpha": 0.5},
    "wpo": {"use_weighting": True},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "kto": {"loss_type": "kto", "desirable_weight": 1.3},
    "apo": {"loss_type": "apo_zero_unpaired"},
}


@pytest.mark.skipif(not INTERPRETED, reason="test_interpreter.py runs it interpreted")
@pytest.mark.parametrize("case", CASES)
def test_one_launch_a_step_and_the_losses_of_pytorch(
    case, tiny_llama, small_tokenizer, tmp_path, monkeypatch
):
    from tralign_kernels import preference as kernels

    extra = CASES[case]
    unpaired = extra.get("loss_type") in ("kto", "apo_zero_unpaired")
    rows = kto_rows(12) if unpaired else pair_rows(12)
    start = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    schedule = {"ref_model_sync_steps": 2, "reference": "resident", "max_steps": 3}

    def losses(folder):
        tiny_llama.load_state_dict(start)
        args = TRConfig(**{**options(tmp_path / folder), **schedule, **extra})
        trainer = TRTrainer(
            tiny_llama, args=args, train_dataset=rows, processing_class=small_tokenizer
        )
        return history(trainer), history_of(trainer, "rewards/chosen")

    def history_of(trainer, key):
        return [log[key] for log in trainer.state.log_history if key in log]

    expected, expected_rewards = losses("torch")
    launches = []
    launch = kernels._preference_kernel.run
    monkeypatch.setattr(preference, "pick_backend", lambda backend, device: "triton")
    monkeypatch.setattr(
        kernels._preference_kernel, "run", lambda *a, **k: launches.append(1) or launch(*a, **k)
    )
    found, rewards = losses("triton")
    assert len(launches) == len(found) == 3
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert rewards == pytest.approx(expected_rewards, rel=1e-3, abs=2e-5)
    assert torch.isfinite(torch.tensor(found)).all()


METHODS = {
    "dpo": {},
    "kto": {"loss_type": "kto"},
    "wpo": {"use_weighting": True},
    "dpo in parts": {"token_budget": 60, "logits_budget_mb": 0},
}


@pytest.mark.skipif(not INTERPRETED, reason="test_interpreter.py runs it interpreted")
@pytest.mark.parametrize(
    "method",
    ["dpo", *(pytest.param(m, marks=pytest.mark.matrix) for m in METHODS if m != "dpo")],
)
def test_a_run_that_keeps_powers(method, tiny_llama, small_tokenizer, tmp_path, monkeypatch):
    """Losses and metrics are those of PyTorch's head in bf16, and no logits are made for a step:
    neither for its gradients nor for what it logs."""
    import tralign_kernels
    from tralign_fast.ops import logprobs, tiles
    from tralign_fast.training import models

    extra = METHODS[method]
    rows = kto_rows(12) if method == "kto" else pair_rows(12)
    tiny_llama.resize_token_embeddings(pad_to_multiple_of=16)  # more rows than tokens
    start = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    asked, own = [], tralign_kernels.linear_powers_
    monkeypatch.setattr(
        tralign_kernels, "linear_powers_", lambda *a, **k: asked.append(1) or own(*a, **k)
    )

    def logs(kept):
        tiny_llama.load_state_dict(start)
        args = TRConfig(
            **{**options(tmp_path / kept), "bf16": True, "kept": kept, "max_steps": 2}, **extra,
            ref_model_sync_steps=1, reference="resident", eval_strategy="steps", eval_steps=2,
        )  # fmt: skip
        trainer = TRTrainer(
            tiny_llama, args=args, train_dataset=rows, eval_dataset=rows.select(range(4)),
            processing_class=small_tokenizer,
        )  # fmt: skip
        with monkeypatch.context() as patch:
            if kept == "powers":
                patch.setattr(tiles, "project", None)
            trainer.train()
        trainer.release_model()
        return [log for log in trainer.state.log_history if {"loss", "eval_loss"} & {*log}]

    expected = logs("logits")
    for module in (logprobs, models):
        monkeypatch.setattr(module, "pick_backend", lambda *_: "triton")
    found = logs("powers")
    assert asked
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            if "runtime" not in key and "second" not in key:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=2e-4), key
