"""Trainers of TRL on a tiny Llama."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from datasets import Dataset

from tests.training.test_trl_parity import kto_rows, options, pair_rows, trl_classes

pytest.importorskip("trl")


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text))) for text in completions]


@pytest.fixture
def build(tiny_llama, small_tokenizer, tmp_path):
    """build("dpo" | "kto" | "grpo" | "rloo", ref=True, ...) -> one of TRL's trainers."""

    def one(method: str, *, ref: bool = True, model=None, peft_config=None, rows=None, **extra):
        model = copy.deepcopy(model or tiny_llama)
        args = options(tmp_path / f"{method}{len(list(tmp_path.iterdir()))}")
        args |= {"sync_ref_model": False, "max_steps": 6, **extra}
        if method in ("grpo", "rloo"):
            import trl

            config, trainer = (getattr(trl, method.upper() + n) for n in ("Config", "Trainer"))
            del args["max_length"], args["train_sampling_strategy"]
            args = {"beta": 0.2, "num_generations": 2, "max_completion_length": 5, **args}
            # the reference is read from the model's folder
            tiny_llama.save_pretrained(tmp_path / "start")
            model.config._name_or_path = str(tmp_path / "start")
            model.generation_config.eos_token_id = None
            return trainer(
                model, reward, args=config(**args),
                train_dataset=Dataset.from_list([{"prompt": r["prompt"]} for r in pair_rows()]),
                processing_class=small_tokenizer, peft_config=peft_config,
            )  # fmt: skip
        config, trainer = trl_classes(method)
        loss_type = {"dpo": "sigmoid"}.get(method, method)
        return trainer(
            model, ref_model=copy.deepcopy(tiny_llama) if ref and peft_config is None else None,
            args=config(**{"loss_type": loss_type, **args}),
            train_dataset=rows or (kto_rows() if method == "kto" else pair_rows()),
            processing_class=small_tokenizer, peft_config=peft_config,
        )  # fmt: skip

    return one


def logs(trainer: Any, **kwargs: Any) -> list[dict[str, float]]:
    """The step logs of a training run, without timings."""
    trainer.train(**kwargs)
    return [
        {k: v for k, v in log.items() if "time" not in k and "second" not in k}
        for log in trainer.state.log_history
        if "loss" in log
    ]


def same_logs(a: list[dict[str, float]], b: list[dict[str, float]], rel: float = 1e-5) -> None:
    assert len(a) == len(b) > 1
    for step, (x, y) in enumerate(zip(a, b, strict=True)):
        assert x.keys() == y.keys()
        for key in x:
            assert x[key] == pytest.approx(y[key], rel=rel, abs=2 * rel), (step, key)
