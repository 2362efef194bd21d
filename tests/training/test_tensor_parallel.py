"""Real processes (gloo) that share a model's layers, or a batch's groups, against one."""

from __future__ import annotations

import copy
import json
import warnings
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
from tralign_fast.data import division
from tralign_fast.data.packing import PreferenceCollator
from tralign_fast.distributed.context_parallel import check_division, dividing
from tralign_fast.distributed.processes import check_distribution
from tralign_fast.distributed.tensor_parallel import check_layers, copy_sharded
from tralign_fast.reference import reference_class

TENSOR_LAYOUTS = ("tp2", "tp2-fsdp2")
# `make test` runs these, and `make test-slow` all
SOME = {
    "tp2": ("kto-resident", "dpo-snapshot"),
    "cp2": ("kto-snapshot", "dpo-one", "dpo-snapshot-long"),
    "cut": ("plain", "checkpointing"),
    "sent": ("shared",),
}
CUT = tuple(c for c in CASES if c.endswith("-long"))
WHOLE = {
    "tp2": tuple(c for c in CASES if c not in ("dpo-one", *CUT)),
    "tp2-fsdp2": tuple(
        f"{m}-{p}" for m in ("dpo", "kto") for p in ("resident", "snapshot", "offloaded")
    ),
    "cp2": tuple(c for c in CASES if c not in ("dpo-tied", "dpo-lora", "dpo-by-name", *CUT)),
}
WHOLE["cp3"] = ("dpo-snapshot-long", "kto-split-long", "kto-offloaded-long", "dpo-one")
WHOLE["cp2-fsdp2"] = (*WHOLE["tp2-fsdp2"], "dpo-split-long", "dpo-resident-long")
if not hasattr(DistributedConfig, "tp_size"):  # before 5.17: weights that are no DTensors
    SOME, WHOLE = ({k: v for k, v in x.items() if k[0] == "c"} for x in (SOME, WHOLE))
LAUNCHES = [
    pytest.param(SOME, id="some"),
    *[pytest.param({k: c}, id=k, marks=pytest.mark.matrix) for k, c in WHOLE.items()],
    pytest.param({"cp2": CUT}, id="cp2-cut", marks=pytest.mark.matrix),
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
    return {x: json.loads((folder / f"{x}.json").read_text()) for x in request.param}


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
        if layout.startswith("cp") and case in (*CUT, "dpo-one"):
            assert ours["cuts"] > 0
        if not (layout.endswith("fsdp2") and case.startswith("kto")):  # who lends to whom
            assert ours["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("case", SOME["cut"])
def test_pieces_send_keys_and_values_once_a_layer_and_pass(case, together):
    for _, cases in those_of(together, case):
        found = cases[case]
        assert found["logps"] < 1e-5
        assert found["gradients"] < 1e-5
        assert found["filling"] <= 1  # of two processes, one has a token less
        forwards = 2 if case == "checkpointing" else 1
        assert found["bytes"] == {
            "all-gather": forwards * found["keys"] + found["scores"],
            "reduce-scatter": found["keys"] + found["scores"],
        }
        # of P processes each sends (P-1)/P of what all hold: a half
        passes = forwards + 1
        assert found["sent"] == (passes * found["keys"] + 2 * found["scores"]) / 2


def test_shared_layers_send_what_transformers_do_and_the_heads_gradient(together):
    ((_, cases),) = those_of(together, "shared")
    found = cases["shared"]
    row, tokens, last, layers = (found[key] for key in ("row", "tokens", "last", "layers"))
    # embeddings, and of each layer the outputs of attention and MLP; back, the gradients of the
    # inputs of q, k, v, gate and up, each by itself, where two sums would do
    assert found["theirs"] == {
        "forward": (found["embeddings"] + 2 * layers) * tokens * row,
        "backward": 5 * layers * tokens * row,
    }
    fewer = tokens - last  # rows that the last MLP leaves out
    forward = found["theirs"]["forward"] - fewer * row
    backward = found["theirs"]["backward"] - 2 * fewer * row + found["scored"] * row
    assert fewer > 0
    assert found["plain"] == {"forward": forward, "backward": backward}
    # computed again: outputs of attention, and of the last MLP, whose rows are put in place
    again = layers * tokens * row + last * row
    assert found["checkpointing"] == {"forward": forward, "backward": backward + again}


@pytest.mark.parametrize("case", RESUMED)
def test_they_resume_in_mid_window(case, together):
    for _, found in those_of(together, case):
        assert found[f"{case}-resumed"]["loss"] == found[case]["loss"]


@pytest.mark.filterwarnings("ignore:a step of")
@pytest.mark.parametrize("case", RESUMED)
def test_one_process_goes_on_from_theirs(case, together, folder, tmp_path):
    for layout, found in those_of(together, case):
        if layout not in TENSOR_LAYOUTS:
            continue
        checkpoint = folder / layout / case / "checkpoint-4"  # in mid-window
        ours = train(case, tmp_path / layout, model_of(case, folder), resume_from=str(checkpoint))
        assert len(ours["loss"]) == STEPS
        assert ours["loss"] == pytest.approx(found[case]["loss"], rel=1e-5)
        assert ours["num_tokens"] == found[case]["num_tokens"]


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


def test_tied_embeddings_in_uneven_shares_are_refused(tiny_llama):
    tiny_llama._tp_size, tiny_llama._device_mesh = 2, SimpleNamespace(size=lambda: 4)
    tiny_llama.config.tie_word_embeddings, tiny_llama.config.vocab_size = True, 322
    args = SimpleNamespace(log_kl_initial=False, torch_compile=False)
    with pytest.raises(ValueError, match=r"322 tied embeddings .* evenly by 4 processes") as caught:
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
    ("layout", "routers", "why"),
    [
        ("shared", False, None),
        ("padded", False, "padded rows cannot be cut; leave packing on"),
        ("shared", True, "set router_aux_loss_coef=0, or take max_length down"),
    ],
)
def test_a_long_group_is_cut_or_the_warning_says_what_to_do(layout, routers, why, monkeypatch):
    monkeypatch.setattr(division, "_long_groups", division.itertools.count())
    group = SimpleNamespace(group_name="seven")
    mesh = SimpleNamespace(get_local_rank=lambda: 1, get_group=lambda: group)
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(
            parallelism_config=ParallelismConfig(cp_size=2), torch_device_mesh={"cp": mesh}
        ),
        data_collator=PreferenceCollator(paired=True, layout=layout),
        aux_loss_enabled=routers,
    )
    own = trainer.data_collator
    rows = [{"row": 5, "prompt_ids": [1] * 9, "chosen_ids": [2] * 9, "rejected_ids": [3] * 9}]
    with dividing(trainer), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        batch = trainer.data_collator(rows)
    assert trainer.data_collator is own
    if why is None:
        assert not caught
        assert batch.pieces.group == batch.layout.cut.group == "seven"
        assert batch.weight == 0.0  # the first process owns it
    else:
        assert batch.pieces is None
        (warning,) = caught
        assert str(warning.message).startswith("row 5 has ")
        assert why in str(warning.message)


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
