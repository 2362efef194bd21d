"""Options that change after a trainer was made: a loss follows its own, others are refused."""

from __future__ import annotations

import pytest
from transformers import TrainerCallback

from tests.training.test_trainer import make
from tests.training.test_trl_parity import history, pair_rows

HARD = {"reference": "snapshot", "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 2}


class Sets(TrainerCallback):
    """Options after a step."""

    def __init__(self, step, **options):
        self.step, self.options = step, options

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            for name, value in self.options.items():
                setattr(args, name, value)


def test_a_loss_follows_its_numbers(tiny_llama, small_tokenizer, tmp_path):
    def trainer(folder, loss="dpo", **extra):
        options = {**HARD, "max_steps": 4, "held_out": pair_rows(4), **extra}
        return make(tiny_llama, small_tokenizer, tmp_path / folder, loss, **options)

    expected = history(trainer("made", "ipo", beta=0.4))
    other = trainer("set")
    other.args.beta, other.args.loss_type = 0.4, "ipo"
    assert history(other) == expected
    # from the second window on, whose first step starts from the reference
    by_callback = trainer("called", "ipo")
    by_callback.add_callback(Sets(2, beta=0.4))
    losses = history(by_callback)
    assert losses[0] == pytest.approx((1 / 0.2) ** 2)
    assert losses[2] == pytest.approx((1 / 0.8) ** 2)
    before = trainer("before", "ipo", beta=0.2)
    before.args.beta = 0.5
    assert before.evaluate()["eval_loss"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ref_model_sync_steps": 3}, "ref_model_sync_steps was 2 when the trainer was made, and"),
        ({"ref_model_mixup_alpha": 0.5}, "ref_model_mixup_alpha was 1.0 when the trainer was made"),
        ({"max_length": 9}, "max_length was 64 when the trainer was made, and is 9"),
        ({"loss_type": "kto"}, "loss_type: the trainer was made for DPO, and KTO takes other rows"),
        ({"beta": -1.0}, "beta: expected a number > 0"),
    ],
)
def test_what_cannot_follow_is_refused(changes, message, tiny_llama, small_tokenizer, tmp_path):
    trainer = make(tiny_llama, small_tokenizer, tmp_path, **HARD)
    trainer.add_callback(Sets(1, **changes))
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 1
