"""The model of a step's seconds: against what was measured, at its limits, and in a plan."""

from __future__ import annotations

import dataclasses
import json

import pytest
from transformers import LlamaConfig, MixtralConfig

from benchmarks import scaling
from tralign_fast.cli import main
from tralign_fast.memory import Workload
from tralign_fast.memory.step_flops import Sizes, sizes_of
from tralign_fast.memory.time_model import Layout, Rates, _Step, rates_of, step_time

SIZES = Sizes(layers=4, linear=1e6, fan=(5e3, 6e3), layer=1.1e6, outside=500_000, hidden=256,
              inner=512, query=256, key=128, vocab=1000)  # fmt: skip
RATES = Rates(products=1e14, memory=1e12, nvlink=4e11, interconnect=5e10)
LAYOUT = Layout(16, 2)


def work(**more):
    fields = {"lora_rank": more.pop("lora_rank", None)}
    return Workload(None, tokens=512, options={"ref_model_mixup_alpha": 1.0, **more}, **fields)


def test_steps_that_were_measured_on_a_card():
    for case, seconds, model, sweep, own in scaling.compared():
        small = case.startswith("1b")  # launches are not modelled
        assert model == pytest.approx(seconds, rel=0.2 if small else 0.04), case
        assert own == pytest.approx(sweep, rel=0.35 if small else 0.13), case


@pytest.mark.parametrize("more", [{}, {"lora_rank": 8}, {"gradient_checkpointing": False}])
def test_the_terms_are_the_step(more):
    for layout in (Layout(), LAYOUT, Layout(16, 2, "ddp"), Layout(16, 2, "fsdp2", 4)):
        time = step_time(work(**more), SIZES, RATES, layout)
        parts = dataclasses.asdict(time)
        hidden = ("gathering", "reducing", "of_reference", "total")
        assert sum(v for k, v in parts.items() if k not in hidden) == pytest.approx(time.total)
        assert time.exposed <= (time.gathering + time.reducing) * (1 + 1e-9)
        frozen = step_time(work(sync_ref_model=False, **more), SIZES, RATES, layout)
        assert time.total - frozen.total == pytest.approx(time.of_reference)
        assert (time.gathering > 0) is (layout.gpus > 1 and layout.parallel == "fsdp2")
    assert step_time(work(**more), SIZES, RATES).exposed == 0


def test_layers_that_are_not_checkpointed_are_not_computed_again():
    all_of, none = work(), work(gradient_checkpointing=False)
    times = [
        step_time(work(gradient_checkpointing_layers=layers), SIZES, RATES)
        for layers in (0, 1, 0.5, 4)
    ]
    whole = step_time(all_of, SIZES, RATES)
    again = [time.recomputation / whole.recomputation for time in times]
    assert again == pytest.approx([0, 0.25, 0.5, 1])
    assert times[0] == step_time(none, SIZES, RATES)
    assert times[3] == whole
    assert times[2].total == pytest.approx((times[0].total + whole.total) / 2)


def test_nothing_hides_under_no_time_and_all_but_the_ends_under_much():
    quick = dataclasses.replace(RATES, products=1e30, memory=1e30)
    time = step_time(work(), SIZES, quick, LAYOUT)
    assert time.exposed == pytest.approx(time.gathering + time.reducing)
    slow = dataclasses.replace(RATES, products=1e9)
    step = _Step(work(), SIZES, slow, LAYOUT, None)
    gather, reduce = step._layers_and_rest()
    ends = 3 * sum(gather) + sum(reduce)
    assert step.time().exposed == pytest.approx(ends)


def test_a_ring_costs_what_nccl_says():
    step = _Step(work(), SIZES, RATES, LAYOUT, None)
    link = min(4e11, 8 * 5e10)
    hops = 14 * 3.4e-6 + 1 * 9.6e-6
    assert step._ring(1e9, 16, 1) == pytest.approx(8.4e-6 + hops + 1e9 * 15 / 16 / link)
    thin = dataclasses.replace(RATES, interconnect=1e9)
    assert _Step(work(), SIZES, thin, LAYOUT, None)._link(16) == 8e9
    inside = _Step(work(), SIZES, thin, Layout(8, 1), None)
    assert inside._ring(1e9, 8, 1) == pytest.approx(8.4e-6 + 7 * 3.4e-6 + 1e9 * 7 / 8 / 4e11)
    # a tree is faster where a ring has many hops
    many = _Step(work(), SIZES, RATES, Layout(1024, 128, "ddp"), None)
    assert many._all_reduce(1e6, 1024) < many._ring(1e6, 1024, 2)


def test_rates_are_the_sheets_or_what_is_given():
    assert rates_of("h200").products == pytest.approx(0.63 * 989e12)
    own = rates_of("h100", tflops=500, interconnect_gbs=12.5)
    assert (own.products, own.interconnect) == (500e12, 12.5e9)
    assert own.nvlink == pytest.approx(0.8 * 450e9)


def test_a_mixture_of_experts_is_not_modelled():
    config = MixtralConfig(vocab_size=100, hidden_size=32, intermediate_size=32,
                           num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)  # fmt: skip  # noqa: E501
    with pytest.raises(ValueError, match="without experts"):
        sizes_of(config)


def test_a_plan_of_nodes_has_its_seconds_and_a_command_for_each(tmp_path, capsys):
    LlamaConfig(
        vocab_size=1000, hidden_size=64, intermediate_size=160, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    ).save_pretrained(tmp_path)  # fmt: skip
    words = ["plan", "--model", str(tmp_path), "--tokens", "256", "--no_alternatives"]
    several = [*words, "--gpus", "16", "--nodes", "2"]
    assert main([*several, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["time"]["total"] > plan["time"]["reference"] > 0
    assert plan["command"].startswith("torchrun --nnodes 2 --nproc_per_node 8 ")
    assert "--num_processes" not in plan["command"]
    assert "--parallel fsdp2" in plan["command"]
    assert main(several) == 0
    out = capsys.readouterr().out
    assert "seconds of a step on 16 GPUs on 2 nodes, h100" in out
    assert "several cards have not been measured" in out
    assert "the moving reference takes" in out
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["time"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "8", "--nodes", "3"], "--nodes 3: expected a divisor of --gpus 8"),
        (["--card", "h300"], "--card: expected one of a100, h100, h200, got 'h300'"),
        (["--tflops", "0"], "--tflops: expected a number > 0, got 0"),
        (["--interconnect_gbs", "-1"], "--interconnect_gbs: expected a number > 0, got -1"),
        (["--nodes", "0"], "nodes: expected"),
    ],
)
def test_what_a_plan_refuses(words, message, refused):
    assert message in refused("plan", "--model", "llama-3.2-1b", *words)


def test_the_page_has_the_tables_of_the_model():
    """`python -m benchmarks.scaling docs/scaling.md` makes them."""
    page = scaling.Path("docs/scaling.md").read_text(encoding="utf-8")
    assert scaling.filled(page) == page
