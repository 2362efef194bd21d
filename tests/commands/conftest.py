"""A run that `train` has written, with all that the report can hold."""

from __future__ import annotations

import json

import pytest

from tests.conftest import make_small_tokenizer, make_tiny_llama
from tralign_fast import cli


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a run of six steps with evaluations, moves of the reference and samples."""
    folder = tmp_path_factory.mktemp("reported")
    tokenizer = make_small_tokenizer()
    make_tiny_llama(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [
        {"prompt": f"the <cat> {i}", "chosen": " sings", "rejected": " sleeps slowly"}
        for i in range(8)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert cli.main([
        "train", "--model", str(folder / "model"), "--dataset", str(folder / "rows.jsonl"),
        "--eval_split", "train[:4]", "--output_dir", str(folder / "run"), "--max_steps", "6",
        "--ref_model_sync_steps", "2", "--logging_steps", "2", "--eval_steps", "3", "--use_cpu",
        "--report_to", "none", "--per_device_train_batch_size", "2", "--sample_prompts", "2",
        "--sample_tokens", "4", "--log_kl_initial", "--learning_rate", "1e-3",
    ]) == 0  # fmt: skip
    return folder / "run"
