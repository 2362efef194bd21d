"""Fixtures that several rooms of the test tree share."""

from __future__ import annotations

import gc
import json
import os
import sys
from importlib.util import find_spec

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # a core each; the processes that tests start inherit it
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

from tests.quick import look_up_packages_once, read_gguf_once, wait_for_no_disk

# Where those tests compute that can do so on either: "cuda" with `make test-gpu`.
DEVICE = torch.device(os.environ.get("TRALIGN_TEST_DEVICE", "cpu"))

# `-n`: who runs what, and what ends the run
pytest_plugins = ["tests.workers"]


@pytest.fixture(scope="session", autouse=True)
def frozen_imports():
    """Every `Trainer.train` collects garbage, which takes 0.6 s among the objects of these
    libraries: they are left out of it."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def frozen_leftovers(frozen_imports):
    """What the files before this one have imported since."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def quick():
    wait_for_no_disk()
    if "accelerate" in sys.modules:
        look_up_packages_once()


@pytest.fixture(scope="session")
def smollm2():
    """(model, tokenizer) of SmolLM2-135M-Instruct in fp32; copy the model before training it."""
    from tralign_fast.demo.smollm2 import load_smollm2

    if find_spec("gguf"):
        read_gguf_once()
    return load_smollm2()


@pytest.fixture(scope="session")
def tokenizer(smollm2):
    return smollm2[1]


@pytest.fixture
def refused(capsys):
    """refused("train", ...) -> stderr of a command line that ends with code 2.

    In this process: another takes 5 s to import what it refuses with.
    """
    from tralign_fast.cli import main

    def run(*arguments: str) -> str:
        capsys.readouterr()
        try:
            code = main([*arguments])
        except SystemExit as end:  # argparse
            code = end.code
        assert code == 2
        return capsys.readouterr().err

    return run


WORDS = [
    "the", "a", "red", "blue", "green", "cat", "dog", "bird", "house", "river", "stone", "runs",
    "sings", "sleeps", "slowly", "never", "always", "under", "over", "near", "bright", "old",
    "small", "and", "but",
]  # fmt: skip


def words(count: int, generator: torch.Generator) -> str:
    picks = torch.randint(0, len(WORDS), (count,), generator=generator).tolist()
    return " ".join(WORDS[i] for i in picks)


def make_small_tokenizer():
    """A byte-level BPE tokenizer of 320 tokens with a chat template: losses over a real vocabulary
    of 49,152 would take most of the time of the tests that train."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<start>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    generator = torch.Generator().manual_seed(0)
    tokenizer.train_from_iterator([words(200, generator)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<start>", eos_token="<end>"
    )
    fast.chat_template = (
        "{% for m in messages %}<start>{{ m['role'] }}\n{{ m['content'] }}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
    )
    return fast


@pytest.fixture(scope="session")
def small_tokenizer():
    return make_small_tokenizer()


def make_tiny_llama(tokenizer, **options):
    """A two-layer Llama with the tokenizer's vocabulary, weights of a fixed seed, fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    }  # fmt: skip
    names = ("pad_token_id", "eos_token_id", "bos_token_id")
    tokens = {name: getattr(tokenizer, name) for name in names}
    config = {"vocab_size": len(tokenizer), **size, **tokens, **options}
    return LlamaForCausalLM(LlamaConfig(**config))


@pytest.fixture
def tiny_llama(small_tokenizer):
    return make_tiny_llama(small_tokenizer)


@pytest.fixture
def recipe(tmp_path, tiny_llama, small_tokenizer):
    """A recipe, a model and a data file as a user has them."""
    tiny_llama.save_pretrained(tmp_path / "model")
    small_tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {"prompt": f"the cat {i}", "chosen": " sings", "rejected": " sleeps slowly"}
        for i in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "recipe.yaml").write_text(
        f"model: {tmp_path}/model\ndataset: {tmp_path}/rows.jsonl\noutput_dir: {tmp_path}/run\n"
        "max_steps: 2\nper_device_train_batch_size: 2\nref_model_sync_steps: 1\nuse_cpu: true\n"
        "report_to: none\nlogging_steps: 1\nlearning_rate: 1.0e-3\n"
    )
    return tmp_path / "recipe.yaml"


@pytest.fixture
def reader(tmp_path, monkeypatch, small_tokenizer):
    """What a reader has who pastes a block of a document: `model`, `rows`, `tokenizer`, and in the
    folder `rows.jsonl`. Runs of TRL's and this library's trainers take two steps here."""
    import functools

    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    import tralign_fast

    monkeypatch.chdir(tmp_path)
    small = {
        "use_cpu": True, "max_steps": 2, "report_to": [], "per_device_train_batch_size": 2,
        "bf16": False, "disable_tqdm": True,
    }  # fmt: skip
    for module, name in ((trl, "DPOConfig"), (tralign_fast, "TRConfig")):
        config = getattr(module, name)

        def made(*args, _config=config, **options):
            return _config(*args, **{**options, **small})

        monkeypatch.setattr(module, name, functools.wraps(config, updated=())(made))
    generator = torch.Generator().manual_seed(0)
    rows = [
        {key: words(n, generator) for key, n in (("prompt", 6), ("chosen", 5), ("rejected", 5))}
        for _ in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_tiny_llama(small_tokenizer).save_pretrained("start")  # TRL loads its reference from there
    model = AutoModelForCausalLM.from_pretrained("start")
    return {"model": model, "rows": Dataset.from_list(rows), "tokenizer": small_tokenizer}
