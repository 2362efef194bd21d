"""`torch_compile=True`: decoder layers compiled in place, the losses of the eager run."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from peft import LoraConfig, get_peft_model
from torch._dynamo.utils import counters
from transformers import TrainerCallback, TrainingArguments

from tests.model.test_attention import build, collate
from tests.training.distributed_run import COMPILED
from tests.training.test_trainer import make
from tests.training.test_trl_parity import history
from tralign_fast.distributed.processes import take_over_compilation
from tralign_fast.model import prepare
from tralign_fast.model.scoring import sequence_logps


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


CASES = {
    "resident": {},
    "padded": {"loss_type": "kto", "packing": False},
    "snapshot": {
        "reference": "snapshot", "ref_model_mixup_alpha": 1.0, "gradient_checkpointing": False,
        "max_grad_norm": 0.0, "gradient_release": True,
    },
    "adapter": {"reference": "adapter"},
}  # fmt: skip


QUICK = ("snapshot",)


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[] if c in QUICK else pytest.mark.matrix) for c in CASES]
)
def test_a_compiled_run_has_the_losses_of_an_eager_one(case, tiny_llama, small_tokenizer, tmp_path):
    extra = {"max_steps": 5, "ref_model_sync_steps": 2, **CASES[case]}
    method = extra.pop("loss_type", "dpo")
    model = copy.deepcopy(tiny_llama)
    if case == "adapter":
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    eager = history(make(model, small_tokenizer, tmp_path / "eager", method, **extra))
    assert not counters["stats"]
    trainer = make(model, small_tokenizer, tmp_path / "compiled", method, **extra, **COMPILED)
    names = [name for name, _ in trainer.model.named_parameters()]
    trainer.add_callback(watch := CountGraphs())
    torch.testing.assert_close(history(trainer), eager, rtol=1e-5, atol=1e-6)
    # every batch has its own length: the graphs of the first ones serve all
    assert watch.graphs[2] > 0
    assert case == "adapter" or watch.graphs[2] == watch.graphs[-1]
    assert names == [name for name, _ in model.named_parameters()]


def test_a_checkpoint_runs_a_layer_again_by_the_graph_of_its_forward():
    """Autocast: graphs that end in other places save other tensors, and a checkpoint counts."""
    model = build("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = []
    for compiled in (False, True):
        with prepare.prepare_model(model) as prepared:
            if compiled:
                prepared.compile_layers(backend="aot_eager", dynamic=True)
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                logps = sequence_logps(model, collate())
            logps.sum().backward()
            found.append([p.grad.clone() for p in model.parameters()])
    assert counters["stats"]["unique_graphs"] > 0
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() < 0.03 * theirs.norm()


class CountGraphs(TrainerCallback):
    def __init__(self):
        self.graphs = []

    def on_step_end(self, args, state, control, **kwargs):
        self.graphs.append(counters["stats"]["unique_graphs"])


def test_a_model_without_layers_to_compile_is_refused():
    with pytest.raises(ValueError, match="torch_compile: found no decoder layers in Linear"):
        prepare.compile_layers(torch.nn.Linear(2, 2))  # pyright: ignore[reportArgumentType]


def test_what_accelerate_was_told_is_taken_over(tmp_path):
    """`accelerate launch --dynamo_backend`: the options are ours, and it wraps nothing."""
    plugin = TorchDynamoPlugin(backend="aot_eager", fullgraph=True)  # pyright: ignore[reportArgumentType]
    accelerator = SimpleNamespace(state=SimpleNamespace(dynamo_plugin=plugin))
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.warns(UserWarning, match="fullgraph is ignored"):
        options = take_over_compilation(accelerator, args)  # pyright: ignore[reportArgumentType]
    assert options is not None
    assert options["dynamic"]
    assert "fullgraph" not in options
    assert options["backend"] == "aot_eager"
    assert plugin.backend == DynamoBackend.NO
    assert take_over_compilation(accelerator, args) is None  # pyright: ignore[reportArgumentType]


def test_beside_zero3_it_is_refused(tmp_path):
    zero3 = SimpleNamespace(zero_stage=3)
    state = SimpleNamespace(dynamo_plugin=TorchDynamoPlugin(), deepspeed_plugin=zero3)
    args = TrainingArguments(str(tmp_path), use_cpu=True, **COMPILED)
    with pytest.raises(ValueError, match="cannot compile layers that ZeRO-3 shards"):
        take_over_compilation(SimpleNamespace(state=state), args)  # pyright: ignore[reportArgumentType]
