"""What `transformers.Trainer` offers, through TRTrainer: trackers, cards, Liger, attention."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch
from huggingface_hub import ModelCard

from tests.training.test_trl_parity import kto_rows, options, pair_rows
from tralign_fast import TRConfig, TRTrainer
from tralign_fast.model.patching import has_forward
from tralign_fast.ops.backend import warn_once


@pytest.fixture
def build(tiny_llama, small_tokenizer, tmp_path):
    def one(model=tiny_llama, callbacks=None, rows=None, eval_rows=None, **extra):
        return TRTrainer(
            model, args=TRConfig(**options(tmp_path, **{"max_steps": 4, **extra})),
            train_dataset=rows or pair_rows(16), eval_dataset=eval_rows,
            processing_class=small_tokenizer, callbacks=callbacks,
        )  # fmt: skip

    return one


class Writer:
    """The interface of torch.utils.tensorboard.SummaryWriter."""

    def __init__(self):
        self.scalars: dict[str, list[float]] = {}
        self.texts: dict[str, str] = {}

    def add_scalar(self, tag, value, step):
        self.scalars.setdefault(tag, []).append(value)

    def add_text(self, tag, text):
        self.texts[tag] = text

    def add_hparams(self, *args, **kwargs):
        pass

    def flush(self):
        pass

    def close(self):
        pass


def test_a_tracker_gets_the_metrics_and_the_options(build, monkeypatch):
    """transformers' own callback; only the writer behind it is not tensorboard's."""
    from transformers.integrations import integration_utils

    writer = Writer()
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    tensorboard = types.SimpleNamespace(SummaryWriter=lambda log_dir: writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    trainer = build(
        report_to=["tensorboard"], eval_rows=pair_rows(8), eval_strategy="steps", eval_steps=2,
        ref_model_sync_steps=2,
    )  # fmt: skip
    trainer.train()
    expected = {
        "loss",
        "grad_norm",
        "rewards/chosen",
        "rewards/margins",
        "logps/chosen",
        "tr/syncs",
    }
    assert {f"train/{name}" for name in expected} <= writer.scalars.keys()
    assert {"eval/loss", "eval/rewards/accuracies", "eval/logps/rejected"} <= writer.scalars.keys()
    assert writer.scalars["train/tr/syncs"] == [0, 1, 1, 2]
    sent = json.loads(writer.texts["args"])
    assert (sent["ref_model_mixup_alpha"], sent["ref_model_sync_steps"]) == (0.6, 2)


@pytest.mark.parametrize(
    ("extra", "lines"),
    [
        (
            {"ref_model_mixup_alpha": 0.3, "ref_model_sync_steps": 4, "label_smoothing": 0.1},
            ["| method | TR-DPO |", "α = 0.3, every τ = 4 steps (held: offloaded)", "| β | 0.1 |",
             "| label_smoothing | 0.1 |", "| log-probs | summed |"],
        ),
        (
            {"loss_type": "ipo", "ref_model_mixup_alpha": 1.0},
            ["| method | TR-IPO |", "(held: snapshot)", "| log-probs | divided by length |"],
        ),
        (
            {"loss_type": "kto", "sync_ref_model": False, "beta": 0.2},
            ["| method | KTO |", "| reference | frozen", "| β | 0.2 |", "| desirable_weight |"],
        ),
    ],
)  # fmt: skip
def test_the_model_card_says_how_the_reference_moved(extra, lines, build, tmp_path):
    trainer = build(rows=kto_rows(16) if extra.get("loss_type") == "kto" else None, **extra)
    for _ in range(2):  # a second card does not repeat the section
        trainer.create_model_card(model_name="a model", tags="mine")
    card = ModelCard.load(tmp_path / "README.md")
    for line in [*lines, "2404.09656", "Gorbatovski"]:
        assert line in card.text, line
    assert card.text.count("## Trust region") == 1
    method = lines[0].split("| ")[2].removesuffix(" |").lower()
    assert {"tralign-fast", method, "mine"} <= {*card.data.tags}


def test_transformers_option_for_liger_is_layer_kernels(build):
    """On a CPU: one line, and the model trains by its own code. transformers' Trainer, which would
    change classes, is left with nothing to do."""
    from transformers.models.llama import modeling_llama

    rotary = modeling_llama.apply_rotary_pos_emb
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match="Liger's kernels run on a GPU, and the model is on cpu"):
        trainer = build(
            use_liger_kernel=True, liger_kernel_config={"rope": False}, reference="resident"
        )
    assert trainer.args.layer_kernels == "liger"
    assert trainer.args.kinds_of_layer_kernels == ("norm", "mlp")
    trainer.train()
    assert modeling_llama.apply_rotary_pos_emb is rotary
    assert has_forward(trainer.model, "log-probs")  # the head is ours


def test_nothing_is_said_of_layer_kernels_on_a_cpu(build, recwarn):
    warn_once.cache_clear()
    build()
    assert not [w for w in recwarn if "Liger" in str(w.message)]


def test_liger_head_is_refused(build):
    with pytest.raises(ValueError, match="would replace the LM head of tralign-fast"):
        build(use_liger_kernel=True, liger_kernel_config={"fused_linear_cross_entropy": True})


def test_flash_attention_is_used_where_it_is_asked_for(build, tiny_llama, monkeypatch):
    """A stand-in for flash-attn: what runs is what the model's config names."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    calls = []

    def flash(module, query, key, value, attention_mask, **kwargs):
        calls.append(torch.is_grad_enabled())
        # flash-attn's mask is (rows, T); padding on the right changes nothing in front of it
        return sdpa_attention_forward(module, query, key, value, None, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", flash)
    for module in tiny_llama.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "flash_attention_2"
    trainer = build(packing=False)
    assert trainer.model.config._attn_implementation == "flash_attention_2"
    trainer.train()
    assert calls.count(True) > 0
    packed = build()
    assert packed.model.config._attn_implementation == "tralign_flash_attention_2"


def test_flash_attention_that_is_not_installed_is_one_line(build, tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "model")
    with pytest.raises(
        ValueError, match=r"attn_implementation='flash_attention_2'.*installed"
    ) as e:
        build(
            model=str(tmp_path / "model"),
            model_init_kwargs={"attn_implementation": "flash_attention_2"},
        )
    assert "\n" not in str(e.value)
