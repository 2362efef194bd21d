"""Real processes (gloo) that share a model's layers, or a batch's groups, against one."""

from __future__ import annotations

import copy
import json
import shutil
from types import SimpleNamespace

import pytest
from accelerate import Accelerator, ParallelismConfig
from peft import LoraConfig, get_peft_model
from transformers.distributed import DistributedConfig

from tests.processes import check_ended, launch
from tests.training.tensor_parallel_run import (
    CASES,
    LAYOUTS,
    RESUMED,
    STEPS,
    model_of,
    save_models,
    train,
)
from tralign_fast.data.packing import PreferenceCollator
from tralign_fast.distributed.context_parallel import check_division
from tralign_fast.distributed.processes import check_distribution
from tralign_fast.distributed.tensor_parallel import check_layers, copy_sharded
from tralign_fast.reference import reference_class

# `make test` runs these, and `make test-slow` all
SOME = {"tp2": ("kto-resident", "dpo-snapshot"), "cp2": ("kto-snapshot", "dpo-one")}
WHOLE = {
    "tp2": tuple(c for c in CASES if c != "dpo-one"),
    "tp2-fsdp2": ("dpo-resident", "dpo-snapshot", "kto-resident"),
    "cp2": tuple(c for c in CASES if c not in ("dpo-tied", "dpo-lora", "dpo-by-name")),
}
WHOLE["cp2-fsdp2"] = WHOLE["tp2-fsdp2"]
if not hasattr(DistributedConfig, "tp_size"):  # before 5.17: weights that are no DTensors
    SOME, WHOLE = ({k: v for k, v in x.items() if k[:2] == "cp"} for x in (SOME, WHOLE))
LAUNCHES = [
    pytest.param(SOME, id="some"),
    *[pytest.param({k: c}, id=k, marks=pytest.mark.matrix) for k, c in WHOLE.items()],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tensor-parallel")
    save_models(folder)
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    """case -> what one process finds, made when it is asked for."""
    found = {}

    def find(case):
        if case not in found:
            found[case] = train(case, folder / "alone", model_of(case, folder))
        return found[case]

    return find


@pytest.fixture(scope="module", params=LAUNCHES)
def together(request, folder):
    """layout -> case -> what its processes find."""
    asked = [f"{layout}={','.join(cases)}" for layout, cases in request.param.items()]
    (processes,) = {LAYOUTS[layout][0] for layout in request.param}
    run = launch("tests.training.tensor_parallel_run", processes, str(folder), *asked)
    check_ended(run)
    found = {x: json.loads((folder / f"{x}.json").read_text()) for x in request.param}
    for layout in request.param:
        shutil.rmtree(folder / layout)
    return found


def those_of(together, case):
    found = [(layout, cases) for layout, cases in together.items() if case in cases]
    if not found:
        pytest.skip("not among those of this launch")
    return found


@pytest.mark.parametrize("case", CASES)
def test_they_train_as_one_does(case, alone, together):
    for layout, found in those_of(together, case):
        ours, one = found[case], alone(case)
        assert len(ours["loss"]) == STEPS
        assert len(set(ours["loss"])) > STEPS // 2
        assert ours["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
        assert ours["kl"] == pytest.approx(one["kl"], rel=1e-3, abs=1e-6)
        assert ours["entropy"] == pytest.approx(one["entropy"], rel=1e-5)
        assert ours["num_tokens"] == one["num_tokens"]
        assert ours["eval_rows"] == one["eval_rows"]
        if not (layout.endswith("fsdp2") and case.startswith("kto")):  # who lends to whom
            assert ours["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("case", RESUMED)
def test_they_resume_in_mid_window(case, together):
    for _, found in those_of(together, case):
        assert found[f"{case}-resumed"]["loss"] == found[case]["loss"]


@pytest.mark.parametrize(
    ("processes", "options", "message"),
    [
        (3, {}, "4 attention heads cannot be shared by 3 processes"),
        (4, {}, "2 key-value heads cannot be shared by 4 processes"),
        (2, {}, "cuts weights that are no DTensors"),
        (2, {"log_kl_initial": True}, "log_kl_initial is not supported beside"),
        (2, {"torch_compile": True}, "torch_compile is not supported beside"),
    ],
)
def test_a_layout_that_cannot_be_is_refused_with_the_numbers(
    processes, options, message, tiny_llama
):
    tiny_llama._tp_size = processes
    args = SimpleNamespace(**{"log_kl_initial": False, "torch_compile": False, **options})
    with pytest.raises(ValueError, match=message) as caught:
        check_layers(tiny_llama, None, args)
    assert "\n" not in str(caught.value)


def test_past_adapters_are_refused_beside_shared_layers(tiny_llama):
    tiny_llama._tp_size = 2
    with pytest.raises(ValueError, match='"adapter" cannot hold weights that tensor parallelism'):
        check_distribution(Accelerator(cpu=True), reference_class("adapter"), tiny_llama)
    check_distribution(Accelerator(cpu=True), reference_class("snapshot"), tiny_llama)


def test_a_ref_model_that_is_cut_otherwise_is_refused(tiny_llama):
    whole = copy.deepcopy(tiny_llama)
    tiny_llama._tp_size = 2
    for policy, start, sizes in ((tiny_llama, whole, (1, 2)), (whole, tiny_llama, (2, 1))):
        message = "ref_model is cut up with tp_size={}, the policy with tp_size={}".format(*sizes)
        with pytest.raises(ValueError, match=message):
            check_layers(policy, start, SimpleNamespace())


def test_a_second_model_with_an_adapter_is_refused(tiny_llama):
    with pytest.raises(ValueError, match="a second model with an adapter cannot be cut up"):
        copy_sharded(get_peft_model(tiny_llama, LoraConfig(target_modules=["q_proj"])))


@pytest.mark.parametrize(
    ("sizes", "collator", "plugin", "message"),
    [
        ({"sp_size": 2}, None, None, "sp_size=2: DeepSpeed's sequence parallelism"),
        ({"cp_size": 2, "tp_size": 2}, None, None, "cp_size=2 beside tp_size=2"),
        ({"cp_size": 2}, None, "zero", "cp_size=2 beside DeepSpeed"),
        ({"cp_size": 2}, dict, None, "got a data_collator of dict"),
    ],
)
def test_a_division_that_cannot_be_is_refused_with_the_numbers(sizes, collator, plugin, message):
    accelerator = SimpleNamespace(
        parallelism_config=ParallelismConfig(**sizes),
        state=SimpleNamespace(deepspeed_plugin=plugin),
    )
    made = PreferenceCollator(paired=True) if collator is None else collator()
    with pytest.raises(ValueError, match=message) as caught:
        check_division(accelerator, made)
    assert "\n" not in str(caught.value)
