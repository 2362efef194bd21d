"""The main job, cut short: every step of the demo on the real model, two optimizer steps."""

from __future__ import annotations

import json

import pytest

from tests.test_package import run_cli


@pytest.mark.slow
def test_the_demo_trains_measures_and_saves(tmp_path, refused):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "demo"
    options = [
        "--max_steps", "2", "--ref_model_sync_steps", "1", "--per_device_train_batch_size", "1",
        "--samples", "2", "--held_out", "1", "--output_dir", str(folder),
    ]  # fmt: skip
    out = run_cli("demo", *options)
    assert out.returncode == 0, out.stderr
    summary = json.loads((folder / "summary.json").read_text())
    first, *_, last = out.stdout.strip().splitlines()
    assert first.startswith("TR-DPO of SmolLM2-135M-Instruct towards positive sentiment")
    assert "2 steps of 1 pairs in which the reference moves 2 times" in first
    assert "It took" not in first  # with other options than those that were timed
    assert out.stdout.count("  before: ") == out.stdout.count("  after:  ") == 2
    assert last.split()[:2] == ["other", "trainers"]
    assert summary["syncs"] == summary["steps"] == 2
    assert summary["before"]["kl_to_start"] == summary["before"]["reward_margin"] == 0
    assert summary["after"]["reward_margin"] != 0
    assert summary["tokens_per_second"] > 0
    assert f"{summary['after']['gold_reward']:+.3f}" in out.stdout
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert "- after: " in (folder / "samples.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] == ids.shape[1] + 4
    assert "holds another run" in refused("demo", *options).splitlines()[-1]


def test_what_is_said_of_the_time_is_what_was_measured():
    from pathlib import Path

    from tralign_fast.demo.run import DemoOptions, _announcement

    text = _announcement(DemoOptions(output_dir="elsewhere"))
    page = " ".join((Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text().split())
    assert "It took 226 s and 4.5 GiB" in text
    assert "32 steps of 4 pairs with 4 reference updates in 226 s (2026-11-27" in page
    assert "161 tokens/s in training, 4.5 GiB" in page
    assert "32 steps of 4 pairs in which the reference moves 4 times" in text


def test_the_demo_refuses_a_loss_that_its_pairs_cannot_have(tmp_path, refused):
    error = refused("demo", "--loss_type", "kto", "--output_dir", str(tmp_path / "other"))
    assert "the demo's pairs need one of dpo, sigmoid, ipo" in error
