"""The logs of TRL 1.16's trainers: the same names, and the same values to 1e-5 in fp32."""

from __future__ import annotations

import pytest

from tests.training.test_trl_parity import STEPS, kto_rows, pair_rows, run_both

OWN = {"tr/syncs"}
# of the machine, and of the whole run
TIMES = ("runtime", "per_second", "total_flos")

LAYOUTS = {
    "shared": {},
    "packed": {"prefix_sharing": False},
    "padded": {"packing": False},
    "split": {"token_budget": 60},
}


def logs_of(trainer) -> list[dict[str, float]]:
    return [
        {key: value for key, value in log.items() if not key.endswith(TIMES)}
        for log in trainer.state.log_history
    ]


def compare(theirs, mine) -> set[str]:
    """The names of all that was logged."""
    for trainer in (theirs, mine):
        trainer.train()
    expected, logs, names = logs_of(theirs), logs_of(mine), set()
    assert len(logs) == len(expected)
    for a, b in zip(logs, expected, strict=True):
        assert a.keys() - OWN == b.keys(), (a.keys() ^ b.keys(), b["step"])
        names |= b.keys()
        for key in b:
            rel = 1e-4 if key == "grad_norm" else 1e-5  # sums of many more numbers
            assert a[key] == pytest.approx(b[key], rel=rel, abs=1e-5), (key, b["step"])
    return names


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_every_log_equals_trls(method, layout, tiny_llama, small_tokenizer, tmp_path):
    """Logs of single steps, of two micro-batches each, and evaluations in between."""
    make = kto_rows if method == "kto" else pair_rows
    extra = {
        "learning_rate": 5e-4,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "eval_strategy": "steps",
        "eval_steps": 4,
        # TRL lends KTO's mismatched completions within batches of training's size, once for all
        "per_device_eval_batch_size": 2 if method == "kto" else 4,
        "ref_model_sync_steps": 3,
    }
    theirs, mine = run_both(
        method, tiny_llama, small_tokenizer, tmp_path, make(), held_out=make(10),
        ours={"reference": "resident", **LAYOUTS[layout]}, **extra,
    )  # fmt: skip
    names = compare(theirs, mine)
    own = {"entropy", "logits/chosen", "logits/rejected", "num_tokens"}
    own |= {"mean_token_accuracy"} if method == "dpo" else {"kl"}
    assert own | {f"eval_{name}" for name in own} <= names


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_logs_are_means_of_the_batches_means(method, tiny_llama, small_tokenizer, tmp_path):
    """Batches of two have as many tokens as chance gives them, and of KTO's some have one label."""
    make = kto_rows if method == "kto" else pair_rows
    extra = {"learning_rate": 5e-4, "logging_steps": STEPS // 2, "per_device_train_batch_size": 2}
    theirs, mine = run_both(method, tiny_llama, small_tokenizer, tmp_path, make(), **extra)
    compare(theirs, mine)


def test_weighted_pairs_log_the_same(tiny_llama, small_tokenizer, tmp_path):
    """WPO's sums of squares come from the same tiles."""
    extra = {"learning_rate": 5e-4, "use_weighting": True}
    theirs, mine = run_both("dpo", tiny_llama, small_tokenizer, tmp_path, pair_rows(), **extra)
    compare(theirs, mine)
