"""The memory tracer against real tensors, the profiler and arithmetic; `tralign-fast plan`."""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch._library import simple_registry
from torch.profiler import ProfilerActivity, profile
from transformers import Gemma3Config, LlamaConfig, LlamaForCausalLM

from tralign_fast import ema_update_, linear_logprobs
from tralign_fast.cli import main
from tralign_fast.memory import LiveTensors, MemoryReport, Workload, measure, trace, trace_trl
from tralign_fast.memory.as_on_gpu import as_on_gpu
from tralign_fast.memory.layers import checkpointed_of, trace_deep
from tralign_fast.memory.plan_answer import GIB, Alternative, Plan
from tralign_fast.memory.plan_options import PlanOptions, load_config, parse_memory, workload
from tralign_fast.memory.plan_text import as_text, recipe_of
from tralign_fast.memory.presets import MODELS, PRESETS
from tralign_fast.memory.sharding import per_gpu
from tralign_fast.memory.trace import _young_garbage as young_garbage
from tralign_fast.memory.trace import count_training, traced
from tralign_fast.model import attention
from tralign_fast.ops import backend, tiles

HARD = {"ref_model_mixup_alpha": 1.0}
FIRST_LAYER = {"gradient_checkpointing_layers": 1}
RELEASE = {**HARD, "gradient_release": True, "max_grad_norm": 0.0, "optim": "adafactor"}


def tiny(**extra: Any) -> LlamaConfig:
    return LlamaConfig(**{
        "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False, **extra,
    })  # fmt: skip


@pytest.mark.parametrize(
    "work",
    [
        Workload(tiny(), tokens=512, dtype="float32", options={**HARD, "bf16": False}),
        Workload(tiny(tie_word_embeddings=True), tokens=512, options=RELEASE),
        Workload(tiny(), tokens=256, options={"loss_type": "kto", "ref_model_sync_steps": 1}),
        Workload(tiny(), tokens=256, lora_rank=4, options={"gradient_checkpointing": False}),
        Workload(tiny(num_hidden_layers=4), tokens=512, options={**HARD, **FIRST_LAYER}),
    ],
    ids=["adamw", "release", "kto-resident", "lora", "first layer"],
)
def test_a_trace_has_the_peak_of_the_real_step(work):
    traced = trace(work, as_on_gpu=False)
    real = trace(work, as_on_gpu=False, fake=False)
    assert traced.peak == pytest.approx(real.peak, rel=0.05)
    assert traced.parameters == real.parameters > 0
    for report in (traced, real):
        parts = dataclasses.asdict(report)
        assert parts.pop("peak") == sum(parts.values())


def test_a_trace_thaws_nothing_that_was_frozen():
    """As the imports of these tests are: each training would look at all of them again."""
    gc.freeze()
    before = gc.get_freeze_count()
    trace(Workload(tiny(num_hidden_layers=1), tokens=64, options=HARD))
    assert gc.get_freeze_count() > before // 2 > 0  # what is freed leaves it
    gc.unfreeze()
    with young_garbage():
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0
    gc.freeze()


def test_checkpointed_layers_of_a_model_that_sees_pictures_are_its_texts():
    config = Gemma3Config(text_config={"num_hidden_layers": 4}, vision_config={})
    work = Workload(config, options={"gradient_checkpointing_layers": 0.5})
    assert checkpointed_of(work) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_measuring_without_a_gpu_says_what_would_do():
    with pytest.raises(RuntimeError, match="measure needs a GPU; trace does not"):
        measure(Workload(tiny()))


def test_the_counter_sees_what_the_allocator_gives_out():
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny(hidden_size=256, intermediate_size=512))
    ids = torch.randint(0, 1000, (2, 128))

    def step():
        model(input_ids=ids, labels=ids).loss.backward()

    step()  # one-time buffers
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    model.zero_grad()
    events: Any = profiler.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    sizes = [
        e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if e.name() == "[memory]"
    ]
    held = allocated = 0
    for size in sizes:
        held += size
        allocated = max(allocated, held)
    with LiveTensors() as live:
        live.tag(list(model.parameters()), "parameters")
        step()
    report = live.report()
    assert report.peak - report.parameters == pytest.approx(allocated, rel=0.05)


def test_fake_operators_allocate_the_logits_tile_forward_and_backward():
    rows, vocab, width = 64, 4096, 16
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(vocab, width)
    targets = torch.randint(0, vocab, (rows,))
    tile = 256
    options = ([1.0, 0.0, 1.0], "torch", torch.float32, tile, False, 0.0)

    def peak(name: str, *arguments: Any) -> int:
        kernel: Any = simple_registry.singleton.find(f"tralign_fast::{name}").fake_impl.kernel
        with LiveTensors() as live, torch.no_grad():
            kernel.func(*arguments)
        return live.report().peak

    scratch = rows * tile * 4
    assert peak("linear_logprobs", hidden, weight, targets, None, *options) >= scratch
    grads = torch.ones(rows), hidden, weight, targets, None, torch.ones(rows), hidden.new_empty(0)
    needs = [True, False, False]
    backward = peak(
        "linear_logprobs_backward", *grads, [1.0, 0.0, 1.0], "torch", tile, needs, 0.0
    )  # fmt: skip
    assert backward >= scratch
    # and a trace, which runs the operator's own code, counts it as what it is
    with LiveTensors() as live:
        linear_logprobs(hidden, weight, targets, logits_budget_mb=0.0625).sum().backward()
    assert live.report().logits_tile >= scratch


def test_one_switch_turns_every_path_to_that_of_a_gpu():
    """Nothing of this library is replaced: what asks for the device hears of another one."""
    cpu = torch.device("cpu")
    query = torch.zeros(1, 2, 4, 8, dtype=torch.bfloat16)
    options = attention._Options(1.0, 0.0, None, None)
    hidden, weight = torch.randn(4, 8).bfloat16(), torch.randn(5000, 8).bfloat16()
    ref = torch.zeros(4)
    plan = {"wants_grad": False, "wants_all_or_none": False, "is_fused": True}
    before = {name: vars(module).copy() for name, module in _own_modules().items()}
    with as_on_gpu():
        assert backend.device_kind(cpu) == "cuda"
        assert backend.pick_backend("auto", cpu) == "triton"
        assert attention._varlen_function(query, options) is attention._torch_varlen
        assert tiles.plan(4, 5000, torch.bfloat16, cpu, 0, **plan) == (5000, 0)
        assert ema_update_([ref], [torch.ones(4)], 0.5) is None
        assert linear_logprobs(hidden, weight, torch.arange(4)).isnan().all()  # no kernel ran
        after = {name: vars(module) for name, module in _own_modules().items()}
        changed = {
            (name, key)
            for name, values in before.items()
            for key, value in values.items()
            if after[name].get(key) is not value
        }
        assert changed == {("tralign_fast.ops.backend", "_pretending")}
    assert (ref == 0).all()
    assert backend.device_kind(cpu) == "cpu"
    assert backend.pick_backend("auto", cpu) == "torch"


def _own_modules() -> dict[str, Any]:
    return {k: m for k, m in sys.modules.items() if k.startswith("tralign_fast.")}


def test_where_bytes_are_counted():
    base = Workload(tiny(), tokens=256, options=HARD)
    size = 2 * sum(p.numel() for p in LlamaForCausalLM(tiny()).parameters())
    snapshot = trace(base)
    resident = trace(dataclasses.replace(base, options={**HARD, "reference": "resident"}))
    offloaded = trace(dataclasses.replace(base, options={"reference": "offloaded"}))
    released = trace(dataclasses.replace(base, options={**RELEASE, "optim": "adamw_torch_fused"}))
    for report in (snapshot, resident, offloaded):
        assert size <= report.parameters <= 1.001 * size  # and rotary buffers
        assert 2 * size <= report.optimizer <= 2.1 * size
    assert resident.reference >= size
    assert snapshot.reference == offloaded.reference == 0
    assert resident.peak - snapshot.peak == pytest.approx(size, rel=0.01)
    assert released.gradients <= 2 * 2 * 1000 * 64 < size
    assert released.peak < snapshot.peak


def test_llama_1b_with_gradient_release_needs_little_more_than_its_weights():
    config = load_config("llama-3.2-1b")
    report = trace(Workload(config, options=RELEASE))
    weights, head = 1_235_814_400 * 2, 128_256 * 2048 * 2
    assert report.parameters == pytest.approx(weights, rel=1e-4)
    assert report.gradients <= 2 * head  # a tied weight's two
    assert report.peak < weights + 2 * head + 0.6 * GIB


def test_trl_holds_a_second_model_and_an_fp32_gradient_of_its_head():
    pytest.importorskip("trl")
    # a large vocabulary, so that the head's gradient is what the peak is made of
    work = Workload(tiny(vocab_size=60_000), tokens=256, options={**HARD, "max_grad_norm": 0.0})
    ours, theirs = trace(work), trace_trl(work)
    head = 60_000 * 64
    assert theirs.reference == pytest.approx(ours.parameters, rel=0.01)
    assert theirs.parameters == ours.parameters
    assert theirs.gradients >= 4 * head
    assert theirs.peak > ours.peak + theirs.reference


@pytest.mark.skipif(not find_spec("bitsandbytes") or not find_spec("peft"), reason="bitsandbytes")
def test_a_4_bit_base_holds_half_a_byte_a_weight():
    config = tiny(hidden_size=256, intermediate_size=1024)
    report = trace(Workload(config, tokens=256, lora_rank=4, base_bits=4))
    linear = 2 * (256 * (256 + 256 // 2) * 2 + 3 * 256 * 1024)
    adapters = 2 * 4 * (2 * (256 + 256) + 2 * (256 + 128) + 3 * (256 + 1024))
    embeddings = 2 * 1000 * 256
    expected = linear * 4.13 / 8 + 2 * (embeddings + adapters)
    assert report.parameters == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("text", "gib"), [("24GiB", 24), ("80gb", 80), ("7.5", 7.5)])
def test_sizes_of_gpus(text, gib):
    assert parse_memory(text) == gib * GIB


def test_plan_prints_json_and_a_change_that_fits_and_draws_them(tmp_path, capsys):
    from PIL import Image

    tiny(vocab_size=50_000).save_pretrained(tmp_path)
    memory = 1 + 35 / 1024  # GiB, of which 1 is left for what a trace does not see
    arguments = ["--model", str(tmp_path / "config.json"), "--alpha", "1.0", "--tokens", "256"]
    drawn = ["--plot", str(tmp_path / "plan.png")]
    code = main(["plan", *arguments, "--json", "--gpu-memory", str(memory), *drawn])
    plan = json.loads(capsys.readouterr().out)
    ours, remedy = plan["tralign_fast"], plan["remedy"]
    assert code == 0
    assert ours["peak"] == sum(v for k, v in ours.items() if k != "peak")
    assert not plan["fits"]
    assert ours["peak"] > memory * GIB - GIB >= remedy["tralign_fast"]["peak"]
    # AdamW's states do not fit, and Adafactor's kernels hold no more than its statistics
    assert remedy["change"] == "--gradient_release true --optim adafactor"
    assert plan["command"].startswith("tralign-fast train")
    assert plan["recipe"]["optim"] == "adafactor"
    assert plan["alternatives"][remedy["change"]] == remedy["tralign_fast"]["peak"]
    width, height = Image.open(tmp_path / "plan.png").size
    assert width > 1000
    assert height > 300
    for wrong in (tmp_path / "plan.txt", tmp_path / "no" / "plan.png"):
        assert main(["plan", *arguments, "--plot", str(wrong)]) == 2
        assert "--plot" in capsys.readouterr().err


def test_a_plan_in_text():
    options = PlanOptions(str(MODELS["llama-3.2-1b"][0]))
    work = workload(options)
    big = MemoryReport(**dict.fromkeys(_NAMES, 2 * GIB), peak=12 * GIB)
    small = MemoryReport(**dict.fromkeys(_NAMES, GIB // 2), peak=3 * GIB)
    tried = [Alternative("", work, big), Alternative("--optim adafactor", work, small)]
    text = as_text(options, Plan(8 * GIB, tried, tried[1], None, None))
    assert "4096 packed tokens; it fits with --optim adafactor" in text
    assert "Traced tensors only" in text
    assert all(row in text for row in ("parameters", "logits tile", "peak"))
    bars = [line for line in text.splitlines() if "│" in line]
    assert {line.index("│") for line in bars} == {bars[0].index("│")}
    assert [line.endswith("fits") for line in bars] == [False, True]
    assert bars[0].count("█") > 3 * bars[1].count("█")
    assert " 12 GiB  --optim adafactor (3.0 GiB)" in text
    assert " 16 GiB  as asked (12.0 GiB)" in text
    assert "fits 24 GiB" in as_text(options, Plan(24 * GIB, tried, None, None, None))


_NAMES = [f.name for f in dataclasses.fields(MemoryReport) if f.name != "peak"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "no/such"], "--model no/such: expected llama-3.2-1b"),
        (["--model", "llama-3.2-1b", "--gpu-memory", "much"], "--gpu-memory 'much'"),
        (["--model", "llama-3.2-1b", "--method", "ppo"], "loss_type: expected one of"),
        (["--model", "llama-3.2-1b", "--tokens", "3"], "at least 4 tokens a pair"),
        (["--model", "llama-3.2-1b", "--base-bits", "4"], "set lora_rank"),
        (["--model", "llama-3.2-1b", "--alpha", "1.5"], "ref_model_mixup_alpha: expected"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, expected, capsys):
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("tralign-fast: error: ")
    assert expected in error


def test_options_have_the_names_of_the_trainer_too():
    options = PlanOptions("llama-3.1-8b", method="ipo", alpha=0.3, sync=0, gradient_release=True)
    training = workload(options).options
    assert training["sync_ref_model"] is False
    assert training["loss_type"] == "ipo"
    assert training["max_grad_norm"] == 0.0


@pytest.mark.skipif(not find_spec("liger_kernel"), reason="Liger")
def test_a_trace_counts_what_layer_kernels_save():
    """Without checkpointing: norms keep their input alone, and MLPs no activated gate."""
    config = LlamaConfig(
        vocab_size=320, hidden_size=256, intermediate_size=1024, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip

    def activations(layer_kernels: str) -> int:
        options = {"gradient_checkpointing": False, "layer_kernels": layer_kernels}
        return trace(Workload(config, tokens=2048, options=options)).activations

    kernels, plain = activations("auto"), activations("none")
    assert kernels < 0.75 * plain, (kernels, plain)
    assert activations("liger") == kernels


DEEP = {
    "adamw": Workload(tiny(num_hidden_layers=16), tokens=512, options=HARD),
    "release": Workload(tiny(num_hidden_layers=16), tokens=512, options=RELEASE),
    "lora": Workload(
        tiny(num_hidden_layers=16), tokens=512, lora_rank=4,
        options={**HARD, "gradient_checkpointing": False},
    ),
}  # fmt: skip
for _layers in (6, 15, 0.5):
    for _case in ("adamw", "release", "lora"):
        _work = DEEP[_case]
        _options = {"gradient_checkpointing": True, "gradient_checkpointing_layers": _layers}
        DEEP[f"{_case}, {_layers:g} layers"] = dataclasses.replace(
            _work, options={**_work.options, **_options}
        )


# past adapters that a sweep brings in: 3 or 6 of them, and until they are matrices
SOFT = {
    "3 past adapters": {"adapter_tolerance": 0.1},
    "6 past adapters": {"adapter_tolerance": 1e-2},
    "past adapters": {},
}
for _name, _few in SOFT.items():
    for _checkpointing in (True, False):
        _options = {**_few, "ref_model_mixup_alpha": 0.6, "gradient_checkpointing": _checkpointing}
        DEEP[f"{_name}{'' if _checkpointing else ', all kept'}"] = dataclasses.replace(
            DEEP["lora"], tokens=64, options=_options
        )
DEEP["lora, checkpointed"] = dataclasses.replace(DEEP["lora"], options=HARD)


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[] if c == "6 past adapters" else pytest.mark.matrix) for c in DEEP],
)
def test_two_shallow_models_say_what_a_deep_one_holds(case, monkeypatch):
    from tralign_fast.memory import layers

    def whole(_):
        raise AssertionError("traced whole")

    monkeypatch.setattr(layers, "trace", whole)
    assert trace_deep(DEEP[case]) == trace(DEEP[case])


@pytest.mark.skipif(not find_spec("peft"), reason="PEFT")
def test_a_trace_has_as_many_past_adapters_as_a_long_run():
    """One of which fills less than a piece of the memory that they are cut from."""
    options = {"ref_model_mixup_alpha": 0.6, "adapter_tolerance": 1e-2}  # no matrices by then
    work = Workload(tiny(), tokens=64, lora_rank=4, options=options)
    with traced(work, True, True) as (live, trainer):
        count_training(live, trainer)
    assert trainer.reference._weights == pytest.approx([0.6, 0.24, 0.096, 0.0384, 0.01536, 0.01024])
    assert not trainer.reference.grows


def test_the_room_that_is_left_over_keeps_activations(monkeypatch):
    """The fewest layers that fit, with the seconds of a step, whatever the traces say."""
    from tralign_fast.memory import fewer_checkpointed
    from tralign_fast.memory.fewer_checkpointed import fewest_checkpointed, may_checkpoint_fewer
    from tralign_fast.memory.time_model import Layout, rates_of

    def held(layers: int) -> MemoryReport:
        peak = (16 - layers) * GIB
        return MemoryReport(0, 0, 0, 0, peak, 0, 0, peak)

    def by_layers(work, goes_on):
        return held if goes_on(held(15)) else None

    monkeypatch.setattr(fewer_checkpointed, "by_layers", by_layers)
    monkeypatch.setattr(fewer_checkpointed, "trace_deep", lambda work: held(0))
    options = {"gradient_checkpointing": True, **HARD, "optim": "adafactor"}
    work = Workload(tiny(num_hidden_layers=16), tokens=512, options=options)
    rest = (rates_of("h200"), Layout(), "h200")
    found = {gib: fewest_checkpointed(work, gib * GIB, *rest) for gib in (1, 2, 9, 16, 17)}
    assert found[1] is None
    changes = [f.change.split()[-1] for f in found.values() if f is not None]
    assert changes == ["15", "8", "1", "false"]
    seconds = [f.seconds for f in found.values() if f is not None]
    assert seconds == sorted(seconds, reverse=True)
    assert all(s < f.asked for s, f in zip(seconds, [*found.values()][1:], strict=True))
    assert may_checkpoint_fewer(work, 2 * GIB)
    assert not may_checkpoint_fewer(work, GIB // 2)
    for more in ({"gradient_checkpointing": False}, FIRST_LAYER):
        changed = dataclasses.replace(work, options={**options, **more})
        assert not may_checkpoint_fewer(changed, 2 * GIB)


def test_layers_in_no_order_are_traced_whole(monkeypatch):
    from transformers import Qwen3Config

    from tralign_fast.memory import layers

    kinds = ["full_attention"] * 15 + ["sliding_attention"]
    config = Qwen3Config(num_hidden_layers=16, layer_types=kinds, sliding_window=8)
    monkeypatch.setattr(layers, "trace", lambda work: "whole")
    assert trace_deep(Workload(config)) == "whole"


def test_presets_have_the_sizes_of_their_names():
    for name in PRESETS:
        with torch.device("meta"):
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_config(load_config(name))
        stated = {"phi-4-mini": 3.8, "phi-4": 14.7, "gemma-2-2b": 2.6}.get(name)
        if stated is None:
            size = name.rsplit("-", 1)[1]
            stated = float(size[:-1]) / (1000 if size.endswith("m") else 1)
        weights = sum(p.numel() for p in model.parameters()) / 1e9
        assert weights == pytest.approx(stated, rel=0.25), name
    assert load_config(MODELS["qwen3-8b"][0]).hidden_size == 4096


def test_shards_of_several_gpus():
    work = Workload(tiny(), tokens=256, options=HARD)
    alone = trace(work)
    assert per_gpu(alone, work) == alone
    report = per_gpu(alone, dataclasses.replace(work, gpus=4))
    assert report.parameters == -(-alone.parameters // 4)
    assert report.optimizer == -(-alone.optimizer // 4)
    model = LlamaForCausalLM(tiny())
    layer = 2 * sum(p.numel() for p in model.model.layers[0].parameters())
    head = 2 * 2 * 1000 * 64 + 2 * 64
    assert report.activations == alone.activations
    assert report.gathered == 3 * layer + 2 * head
    assert report.peak == sum(getattr(report, name) for name in _NAMES)
    options = PlanOptions("tiny", gpus=4)
    recipe = recipe_of(options, work)
    assert (recipe["num_processes"], recipe["parallel"]) == (4, "fsdp2")


@pytest.mark.parametrize(
    "asked", [[], ["--lora_rank", "4", "--base_bits", "4"], ["--gradient_release"]]
)
def test_what_a_plan_answers_with_starts(asked, recipe, capsys):
    """The very words and the recipe that are printed, on a model of the planned one's shape."""
    import shlex

    import yaml

    folder = recipe.parent
    model, rows = str(folder / "model"), str(folder / "rows.jsonl")
    arguments = ["--model", model, "--dataset", rows, "--tokens", "256", "--no_alternatives"]
    assert main(["plan", *arguments, "--json", *asked]) == 0
    plan = json.loads(capsys.readouterr().out)
    command = shlex.split(plan["command"].replace("\\\n", " "))
    assert command[:2] == ["tralign-fast", "train"]
    file = folder / "planned.yaml"
    file.write_text(yaml.safe_dump(plan["recipe"]))
    here = ["--max_steps", "2", "--use_cpu", "--report_to", "none", "--logging_steps", "1"]
    for how, words in (("command", command[2:]), ("recipe", ["--config", str(file)])):
        words = [w for i, w in enumerate(words) if "--output_dir" not in (w, words[i - 1])]
        assert main(["train", *words, *here, "--output_dir", str(folder / how)]) == 0


def test_the_plan_of_a_recipe(recipe, capsys):
    recipe.write_text(
        recipe.read_text() + "use_peft: true\nlora_r: 4\ndtype: bfloat16\nmax_length: 192\n"
        "loss_type: ipo\n"
    )
    more = ["--json", "--no_alternatives", "--pairs", "1"]
    assert main(["plan", "--config", str(recipe), *more]) == 0
    setup = json.loads(capsys.readouterr().out)["setup"]
    assert (setup["lora_rank"], setup["method"], setup["dtype"]) == (4, "ipo", "bfloat16")
    assert setup["tokens"] == 2 * 192 * 4 // 3
    assert setup["pairs"] == 1
    assert setup["model"] == str(recipe.parent / "model")
    recipe.write_text(recipe.read_text() + "betta: 1\n")
    assert main(["plan", "--config", str(recipe)]) == 2
    assert "betta: no such option; did you mean beta?" in capsys.readouterr().err
