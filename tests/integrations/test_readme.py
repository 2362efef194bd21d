"""The README's before and after run as they stand there."""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import make_tiny_llama, words

README = Path(__file__).parents[2] / "README.md"
# what shows in a block which one it is
BLOCKS = {
    "trl_user": "import TRConfig",
    "trl_callback": "use_fast_logprobs(trainer)",
    "peft": "get_peft_model",
    "any_trainer": "PairTrainer",
    "loop": "should_sync",
    "ops": "log_softmax",
    "liger": "LigerFusedLinearDPOLoss",
    "hub": "get_local_kernel",
    "axolotl": "plugins:",
    "llama_factory": "MovingReference",
}


def block(name: str) -> str:
    blocks = re.findall(r"```diff\n(.*?)```", README.read_text(), re.S)
    assert len(blocks) == len(BLOCKS)
    (found,) = [text for text in blocks if BLOCKS[name] in text]
    return found


def side(name: str, mark: str) -> str:
    """The block before (-) or after (+)."""
    lines = block(name).splitlines()
    return "\n".join(line[1:] for line in lines if line[:1] in (mark, " "))


@pytest.fixture
def names(tmp_path, monkeypatch, small_tokenizer):
    """What a reader has who pastes a block: a model, rows, and sizes that take no time here."""
    trl = pytest.importorskip("trl")
    peft = pytest.importorskip("peft")
    import tralign_fast

    monkeypatch.chdir(tmp_path)
    small = {
        "use_cpu": True, "max_steps": 2, "report_to": [], "per_device_train_batch_size": 2,
        "bf16": False, "disable_tqdm": True,
    }  # fmt: skip
    for module, config in ((trl, "DPOConfig"), (tralign_fast, "TRConfig")):
        monkeypatch.setattr(module, config, functools.partial(getattr(module, config), **small))
    generator = torch.Generator().manual_seed(0)
    rows = [
        {key: words(n, generator) for key, n in (("prompt", 6), ("chosen", 5), ("rejected", 5))}
        for _ in range(8)
    ]
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    make_tiny_llama(small_tokenizer).save_pretrained("start")  # TRL loads its reference from there
    return {
        "model": AutoModelForCausalLM.from_pretrained("start"),
        "rows": Dataset.from_list(rows),
        "tokenizer": small_tokenizer,
        "lora": peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]),
        **{k: getattr(trl, k) for k in ("DPOConfig", "DPOTrainer")},
        **{k: getattr(tralign_fast, k) for k in ("TRConfig", "TRTrainer")},
        **{k: getattr(peft, k) for k in ("LoraConfig", "get_peft_model")},
    }


def test_every_block_has_at_most_eight_lines_of_either_kind():
    for name in BLOCKS:
        for mark in "-+":
            assert len(side(name, mark).splitlines()) <= 8, name


@pytest.mark.parametrize("mark", ["-", "+"])
@pytest.mark.parametrize("name", ["trl_user", "trl_callback"])
def test_trl_before_and_after(name, mark, names):
    exec(side(name, mark), names)
    assert names["trainer"].state.global_step == 2
    if mark == "+" and name == "trl_callback":
        names["undo"]()


def test_peft(names):
    with pytest.raises(NotImplementedError):
        exec(side("peft", "-"), dict(names))
    exec(side("peft", "+"), names)
    assert names["trainer"].state.global_step == 2
    from peft import PeftModel

    PeftModel.from_pretrained(make_tiny_llama(names["tokenizer"]), "out/adapter")


def test_any_trainer(names, tmp_path):
    from transformers import TrainingArguments

    from tests.integrations.test_any_trainer import ROWS, PairTrainer
    from tralign_fast.model.scoring import enable_logprobs

    enable_logprobs(names["model"])
    reference = copy.deepcopy(names["model"])

    class Yours(PairTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, data_collator=lambda rows: rows[0], **kwargs)
            self.ref_model = reference

    names["args"] = TrainingArguments(
        str(tmp_path), use_cpu=True, max_steps=2, per_device_train_batch_size=1, report_to=[],
        remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    names |= {"rows": ROWS, "PairTrainer": Yours}
    exec(side("any_trainer", "+"), names)
    assert names["trainer"].state.global_step == 2


def test_a_loop_by_hand():
    policy = torch.nn.Linear(3, 2)
    reference = copy.deepcopy(policy)
    start = policy.weight.detach().clone()

    def train_step(policy, reference, batch):
        with torch.no_grad():
            policy.weight.add_(batch)

    names = {"batches": [1.0] * 512, "train_step": train_step}
    exec(side("loop", "+"), names | {"policy": policy, "reference": reference})
    torch.testing.assert_close(reference.weight, start + 0.6 * 512)


def test_ops_before_and_after_are_equal():
    torch.manual_seed(0)
    names = {
        "F": F, "hidden": torch.randn(20, 8), "weight": torch.randn(50, 8), "length": 5,
        "targets": torch.randint(0, 50, (20,)), "ref_chosen": torch.zeros(2),
        "ref_rejected": torch.ones(2),
    }  # fmt: skip
    losses = []
    for mark in "-+":
        scope = dict(names)
        exec(side("ops", mark), scope)
        losses.append(scope["loss"])
    torch.testing.assert_close(*losses)


def test_liger_before_and_after_are_equal(monkeypatch):
    pytest.importorskip("liger_kernel")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # wants a C++ compiler
    torch.manual_seed(0)
    names = {
        "weight": torch.randn(50, 8), "hidden": torch.randn(4, 6, 8),
        "target": torch.randint(0, 50, (4, 6)), "ref_weight": torch.randn(50, 8),
        "ref_hidden": torch.randn(4, 6, 8),
    }  # fmt: skip
    results = []
    for mark in "-+":
        scope = {key: value.clone() for key, value in names.items()}
        exec(side("liger", mark), scope)
        results.append((scope["loss"], scope["metrics"]))
    torch.testing.assert_close(*results)  # the loss and every metric


def test_the_folder_that_the_hub_block_names_is_there():
    folder = re.findall(r'Path\("(.*?)"\)', block("hub"))
    assert (README.parent / folder[0] / "__init__.py").is_file()
    compile(side("hub", "+"), "README.md", "exec")  # tests/integrations/test_hub_kernels.py runs it


def test_what_other_packages_are_given_exists():
    import yaml

    settings = yaml.safe_load(side("axolotl", "+"))
    module, _, plugin = settings.pop("plugins")[0].rpartition(".")
    source = README.parent / f"{module.replace('.', '/')}.py"
    assert f"class {plugin}(" in source.read_text()  # importing it wants axolotl
    page = (README.parent / "docs/axolotl.md").read_text()
    assert all(f"{key}: {value}" in page for key, value in settings.items())
    page = (README.parent / "docs/llama-factory.md").read_text()
    for line in side("llama_factory", "+").splitlines():
        assert line.split("  #")[0] in page
