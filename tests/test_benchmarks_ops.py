"""The op and update benchmarks at tiny size: right arms pass the gate, wrong ones do not."""

from __future__ import annotations

import csv
import sys
import types
from dataclasses import replace

import pytest
import torch

from benchmarks import ema
from benchmarks.ops import __main__ as ops
from benchmarks.ops import arms, results, turns, vocab_filter
from benchmarks.ops.__main__ import default_arms, scaling_cases
from tests.quick import fork_arms

CASE = arms.Case(tokens=16, hidden=8, vocab=300, dtype="fp32", device="cpu")
ARMS = ("bare", "tralign_fast", "eager")


@pytest.fixture(scope="module")
def runs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turns, "START", fork_arms())
        processes = [turns.ArmProcess(arm) for arm in ARMS]
    try:
        cases = (CASE, replace(CASE, dtype="bf16"))
        return [turns.measure(processes, case, rounds=2, arm_seconds=60) for case in cases]
    finally:
        for process in processes:
            process.stop()


def test_every_arm_is_called_checked_and_measured(runs):
    for dtype, of_dtype in zip(("fp32", "bf16"), runs, strict=True):
        assert [run.arm for run in of_dtype] == list(ARMS)
        for run in of_dtype:
            assert run.failed is None
            assert run.verdict(dtype) == ("unchecked" if run.arm == "bare" else "ok")
            assert len(run.seconds) == len(run.peak_mb) == 2
            assert run.first > 0
        assert all(e > 0 for run in of_dtype[1:] for e in run.errors or [0])


@pytest.mark.parametrize("name", ["tralign_fast", "tralign_fast_lean", "tralign_fast_1_gib",
                                  "tralign_fast_node", "tralign_fast_logged", "eager",
                                  "eager_scored", "torch", "trl", "liger",
                                  "liger_scaled"])  # fmt: skip
def test_arms_do_the_same_work(name):
    inputs = arms.make_inputs(CASE)
    if name == "torch" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("this torch has no F.linear_cross_entropy")
    if package := {"trl": "trl", "liger": "liger_kernel", "liger_scaled": "liger_kernel"}.get(name):
        pytest.importorskip(package)
    loss = arms.ARMS[name][1](inputs)()
    loss.backward()
    exact = turns.exact_loss_and_gradients(inputs)
    assert loss.item() == pytest.approx(exact[0], rel=1e-5)
    assert inputs.hidden.grad is not None
    assert inputs.weight.grad is not None
    assert turns.relative_error(inputs.hidden.grad, exact[1]) < 1e-4
    assert turns.relative_error(inputs.weight.grad, exact[2]) < 1e-4


def test_the_arm_that_has_only_a_mean_does_the_same_products(monkeypatch):
    """quack's operator in place of itself: called on the scored rows, with and without gradient."""
    called = []

    def chunked_linear_cross_entropy(x, weight, target):
        called.append((len(x), torch.is_grad_enabled()))
        return torch.nn.functional.cross_entropy(x @ weight.t(), target)

    fake = types.ModuleType("quack.linear_cross_entropy")
    vars(fake)["chunked_linear_cross_entropy"] = chunked_linear_cross_entropy
    monkeypatch.setitem(sys.modules, "quack", types.ModuleType("quack"))
    monkeypatch.setitem(sys.modules, "quack.linear_cross_entropy", fake)
    inputs = arms.make_inputs(CASE)
    arms.ARMS["quack"][1](inputs)().backward()
    assert called == [(CASE.tokens, False), (CASE.tokens, True)]
    assert inputs.hidden.grad is not None
    assert inputs.weight.grad is not None
    assert not inputs.hidden.grad.flatten(0, 1)[~inputs.mask.flatten()].any()
    assert "quack" in arms.UNCHECKED


class Told:
    """In place of an arm's process: what it was told."""

    def __init__(self, arm, log, fails=False):
        self.arm, self.log, self.fails = arm, log, fails

    def ask(self, word, *rest):
        self.log.append((self.arm, word, *(r for r in rest if isinstance(r, bool))))
        if word == "call" and self.fails:
            raise turns.Failed("OutOfMemoryError: full")
        return (0.5, 1.0, 2.0) if word == "call" else None

    def stop(self):
        pass


def test_arms_on_a_card_give_its_memory_back_after_their_turns():
    log = []
    processes = [Told("bare", log), Told("eager", log, fails=True)]
    case = replace(CASE, device="cuda")
    runs = turns.measure(processes, case, rounds=2, arm_seconds=60, gate=False)
    ends = [("bare", "call"), ("bare", "rest", True)]
    failing = [("eager", "setup"), ("eager", "call"), ("eager", "rest", False)]
    assert log == [("bare", "setup"), *ends, *failing, *ends, *ends]
    assert [run.failed for run in runs] == [None, "OutOfMemoryError: full"]
    assert runs[0].seconds == [1.0, 1.0]


def test_a_rested_arm_repeats_its_call_before_one_is_timed(monkeypatch):
    calls, answers = [], []
    words = [("setup", CASE), ("call",), ("rest", True), ("call",), ("call",), ("rest", False)]
    pipe = types.SimpleNamespace(recv=lambda: words.pop(0), send=answers.append)
    monkeypatch.setattr(turns, "_timed_call", lambda *_: calls.append(len(answers)) or (0.5, 1, 2))
    words.append(("stop",))
    turns.serve_arm("bare", pipe)
    assert [kind for kind, _ in answers] == ["ok"] * 6
    assert calls == [1, 3, 3, 4]


def test_a_sweep_that_is_ended_leaves_the_sizes_that_it_had(monkeypatch, tmp_path):
    def measure(processes, case, **_):
        if case.tokens > 256:
            raise KeyboardInterrupt
        return [turns.Run("bare", 1.0, [1.0], [2.0])]

    monkeypatch.setattr(ops, "measure", measure)
    monkeypatch.setattr(ops, "ArmProcess", lambda arm: Told(arm, []))
    with pytest.raises(KeyboardInterrupt):
        ops.main(["--scaling", "N", "--device", "cpu", "--output_dir", str(tmp_path)])
    rows = list(csv.DictReader((tmp_path / "ops_scaling.csv").open()))
    assert [row["N"] for row in rows] == ["256"]


def test_arms_of_a_gpu_are_left_out_elsewhere():
    for scaling in (None, "N"):
        on_cpu, on_gpu = (default_arms(scaling, on_gpu) for on_gpu in (False, True))
        assert not {*on_cpu} & {*arms.GPU_ARMS}
        assert {*on_gpu} == {*on_cpu, *arms.GPU_ARMS}
        assert len(on_gpu) == len({*on_gpu})
    for name in ("tralign_fast_powers", "tralign_fast_powers_logged"):
        with pytest.raises(ValueError, match="powers are kept by Triton"):
            arms.ARMS[name][1](arms.make_inputs(CASE))


def test_the_arm_of_powers_keeps_them(monkeypatch):
    """On a GPU; here the node is asked what it was told."""
    import tralign_fast

    told = []
    own = tralign_fast.linear_preference_loss
    monkeypatch.setattr(
        tralign_fast, "linear_preference_loss",
        lambda *args, kept, **options: told.append(kept) or own(*args, **options), raising=False,
    )  # fmt: skip
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    make = arms.make_tralign_fast_powers(arms.make_inputs(replace(CASE, dtype="bf16")))
    monkeypatch.undo()
    assert make().isfinite()
    assert told == ["powers"]


def test_the_exact_gradients_are_autograds():
    inputs = arms.make_inputs(CASE)
    blocks = turns.exact_loss_and_gradients(inputs, block=5)
    double = replace(
        inputs,
        hidden=inputs.hidden.detach().double().requires_grad_(),
        weight=inputs.weight.detach().double().requires_grad_(),
        ref_hidden=inputs.ref_hidden.double(),
        ref_weight=inputs.ref_weight.double(),
    )

    def score(hidden, weight):
        logps = (hidden @ weight.t()).log_softmax(-1).gather(-1, double.targets[..., None])[..., 0]
        return (logps * double.mask).sum(-1)

    loss = arms._both(double, score)
    loss.backward()
    assert blocks[0] == pytest.approx(loss.item(), rel=1e-12)
    for mine, truth in zip(blocks[1:], (double.hidden.grad, double.weight.grad), strict=True):
        assert truth is not None
        torch.testing.assert_close(mine, truth.float())


def test_wrong_and_failed_arms_are_marked():
    assert turns.Run("eager", errors=(1e-6, 1e-6, 1e-6)).verdict("fp32") == "ok"
    assert turns.Run("eager", errors=(1e-6, 1e-6, 1e-3)).verdict("fp32") == "wrong"
    assert turns.Run("eager", errors=(float("nan"), 0.0, 0.0)).verdict("fp32") == "wrong"
    process = turns.ArmProcess("eager")
    run, *_ = turns.measure(
        [process], replace(CASE, device="cuda:99"), rounds=1, arm_seconds=1, gate=False
    )
    process.stop()
    assert run.failed
    assert run.verdict("fp32") == "failed"
    assert results.make_records(CASE, [run])[0]["failure"] == run.failed


def test_records_tables_and_plots(runs, tmp_path):
    cases = (CASE, replace(CASE, dtype="bf16"))
    records = [r for c, own in zip(cases, runs, strict=True) for r in results.make_records(c, own)]
    assert results.table(records).count("\n") == 1 + len(records)
    path = tmp_path / "ops.csv"
    results.merge(path, records[3:], "dtype")
    merged = results.merge(path, records[:3], "dtype")  # runs of one dtype each make one file
    results.plot_comparison(tmp_path / "ops.png", merged)
    assert (tmp_path / "ops.png").stat().st_size > 10_000
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["dtype"] for row in rows] == ["fp32"] * 3 + ["bf16"] * 3
    assert float(rows[0]["ratio_to_bare"]) == 1.0
    assert float(rows[1]["ratio_to_bare"]) == pytest.approx(
        float(rows[1]["median_s"]) / float(rows[0]["median_s"]), rel=1e-4
    )
    swept = [{"axis": "N", **r} for r in records[:3]]
    results.plot_scaling(tmp_path / "scaling.png", swept)
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_scaling_changes_one_size():
    for axis, name in (("N", "tokens"), ("V", "vocab"), ("H", "hidden")):
        cases = scaling_cases(axis, CASE)
        sizes = [getattr(case, name) for case in cases]
        assert sizes == sorted(set(sizes))
        assert {replace(case, **{name: 0}) for case in cases} == {replace(CASE, **{name: 0})}


def test_vocab_filter_curve(monkeypatch, tmp_path, smollm2):
    import tralign_fast.demo.smollm2 as source

    monkeypatch.setattr(source, "load_smollm2", lambda: smollm2)
    records = vocab_filter.measure(32, "fp32", "cpu", 1, epsilons=(None, 2e-5, 2e-4))
    exact, fine, coarse = records
    assert exact["kept"] == 1.0
    assert exact["d_hidden_error"] == 0.0
    assert fine["kept"] > coarse["kept"]
    assert 0 < fine["d_hidden_error"] < coarse["d_hidden_error"]
    assert fine["d_hidden_error"] < fine["d_hidden_bf16_rounding"]
    vocab_filter.plot(tmp_path / "filter.png", records)
    assert "bare products" in vocab_filter.table(records)


def test_reference_updates_compute_the_same_and_are_timed(tmp_path):
    for dtype in ("fp32", "bf16"):
        records = ema.measure_time(5_000, dtype, "cpu", rounds=2)
        assert {r["verdict"] for r in records} == {"ok"}
        assert {r["update"] for r in records} >= {"copy", "tralign_fast", "foreach", "trl"}
        assert all(r["median_s"] > 0 for r in records)

    def wrong(reference, policy, alpha):
        torch._foreach_lerp_(*([p.data for p in m.parameters()] for m in (reference, policy)), 0.5)

    assert ema.worst_error(wrong, "fp32", "cpu") > 1000
    weights = ema.Weights(12_345, torch.float32, "cpu", 0)
    assert sum(p.numel() for p in weights.parameters()) == 12_345


def test_movement_in_bf16(tmp_path):
    records = ema.measure_movement(4_000, "cpu", updates=100)
    made = {(r["update"], r["alpha"]): r["movement"] for r in records}
    for alpha in ema.ALPHAS:
        assert made["tralign_fast_stochastic", alpha] == pytest.approx(1.0, abs=0.15)
    assert made["trl", 0.001] < 0.1
    assert made["trl", 0.01] < 0.5 < made["trl", 0.6]
    ema.plot_movement(tmp_path / "movement.png", records)
    assert "α = 0.001" in ema.movement_table(records)
