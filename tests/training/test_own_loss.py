"""A loss of one's own: one function and one entry in `LOSSES`, and everything knows it."""

from __future__ import annotations

import json
import os

import pytest

from tests.processes import fork
from tests.training.test_trl_parity import history, options, pair_rows
from tralign_fast import LOSSES, TRConfig, TRTrainer, cli
from tralign_fast.ops.objective import LossOption, LossSpec, Paper, Range


def power(chosen, rejected, *, beta, gamma):
    """`|1 - β·Δ|^γ`."""
    return (1 - beta * (chosen - rejected)).abs() ** gamma


POWER = LossSpec(
    power, True, "Power PO", Paper("Doe, Jane", "Powers of Preference", 2026, "2601.00001"),
    (
        LossOption("beta", 0.1, Range(0, 10, open_low=True), "β."),
        LossOption("gamma", 2.0, Range(1, 4), "γ, the power."),
    ),
)  # fmt: skip


@pytest.fixture
def power_loss(monkeypatch):
    monkeypatch.setitem(LOSSES, "power", POWER)


@pytest.mark.usefixtures("power_loss")
def test_it_trains_writes_its_card_and_resumes(tiny_llama, small_tokenizer, tmp_path):
    def make(folder, **extra):
        own = {"loss_type": "power", "loss_options": {"gamma": 1.5}, "ref_model_sync_steps": 3}
        schedule = {"ref_model_mixup_alpha": 0.6, "save_strategy": "steps", "save_steps": 4}
        args = TRConfig(**{**options(folder), **own, **schedule, **extra})
        tiny = {"model": tiny_llama, "processing_class": small_tokenizer}
        return TRTrainer(args=args, train_dataset=pair_rows(), **tiny)

    state = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    trainer = make(tmp_path / "run")
    whole = history(trainer)
    assert len(set(whole)) == len(whole)
    assert whole[0] == pytest.approx(1.0)
    trainer.create_model_card()
    card = (tmp_path / "run" / "README.md").read_text()
    for line in ("| method | TR-Power PO |", "| gamma | 1.5 |", "Powers of Preference"):
        assert line in card
    tiny_llama.load_state_dict(state)
    resumed = make(tmp_path / "run")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    losses = [log["loss"] for log in resumed.state.log_history if "loss" in log]
    assert losses[4:] == pytest.approx(whole[4:], rel=1e-6)
    with pytest.raises(ValueError, match=r"gamma: expected a number in \[1, 4\] for power, got 9"):
        make(tmp_path / "other", loss_options={"gamma": 9.0})


@pytest.mark.usefixtures("power_loss")
def test_it_runs_from_the_command_line(tiny_llama, small_tokenizer, tmp_path, capsys):
    tiny_llama.save_pretrained(tmp_path / "model")
    small_tokenizer.save_pretrained(tmp_path / "model")
    pair_rows(8).to_json(tmp_path / "rows.jsonl")
    arguments = [
        "train", "--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "rows.jsonl"),
        "--output_dir", str(tmp_path / "run"), "--loss_type", "power", "--max_steps", "2",
        "--use_cpu", "--report_to", "none", "--max_length", "64", "--disable_tqdm", "true",
    ]  # fmt: skip
    assert cli.main([*arguments, "--gamma", "3"]) == 0
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert "| gamma | 3.0 |" in (tmp_path / "run" / "README.md").read_text()
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    assert "--gamma X" in capsys.readouterr().out
    (tmp_path / "recipe.yaml").write_text("gamma: 9\n")
    capsys.readouterr()
    assert cli.main([*arguments, "--config", str(tmp_path / "recipe.yaml")]) == 2
    assert "gamma: expected a number in [1, 4]" in capsys.readouterr().err


IN_THE_INTERPRETER = """
import json, sys, warnings
import torch
from tests.training.test_own_loss import POWER
from tralign_fast import LOSSES, preference_loss
LOSSES["power"] = POWER
torch.manual_seed(0)
tokens = (-torch.rand(12)).requires_grad_()
given = tokens, torch.full((4,), -1.5), torch.tensor([0, 3, 5, 9, 12])
results = {}
for backend in ("torch", "triton"):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            out = preference_loss(*given, loss="power", beta=0.2, gamma=3.0, backend=backend)
    gradient, = torch.autograd.grad(out.loss, tokens)
    notices = [str(w.message) for w in caught if "preference_loss" in str(w.message)]
    results[backend] = [out.loss.item(), gradient.tolist(), notices]
print(json.dumps(results))
"""


def test_it_runs_in_pytorch_beside_the_kernel_with_one_notice():
    run = fork("-c", IN_THE_INTERPRETER, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout.splitlines()[-1])
    assert results["torch"][:2] == results["triton"][:2]
    assert results["torch"][2] == []
    assert results["triton"][2] == ["preference_loss runs in PyTorch: the kernel has no power"]
