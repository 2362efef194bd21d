"""The matrix of steps on a GPU, tried out with tiny models on a CPU: rows, gate, resuming."""

from __future__ import annotations

import math
import os
import shlex
import signal
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig

from benchmarks.common import commit, read_csv
from benchmarks.gpu import __main__ as matrix
from benchmarks.gpu import arm, cases, everything, results, trace, work
from tralign_fast.model import graphs as arm_graphs

WORK = "1b-full/2p4k/nockpt"
TRL_AND_OURS = [f"{WORK}/trl", f"{WORK}/ours"]


def run(folder, names, *options):
    return matrix.main(["--tiny", "--output_dir", str(folder), "--cases", *names, *options])


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    pytest.importorskip("trl")
    folder = tmp_path_factory.mktemp("matrix")
    assert run(folder, [*TRL_AND_OURS, f"{WORK}/ours_frozen", f"{WORK}/trl_liger"]) == 0
    return folder


def test_every_case_is_a_row_and_a_failing_one_says_why(measured):
    rows = {row["case"]: row for row in read_csv(measured / "gpu_steps.csv")}
    assert list(rows) == [*TRL_AND_OURS, f"{WORK}/trl_liger", f"{WORK}/ours_frozen"]
    # Liger's layers need a GPU; without Liger the import fails
    failed = rows.pop(f"{WORK}/trl_liger")
    assert failed["status"] == "failed"
    assert failed["reason"]
    assert not failed["step_s"]
    for row in rows.values():
        assert row["status"] == "measured"
        assert float(row["alone_s"]) > 0
        assert int(row["windows"]) >= arm.LEAST
        assert float(row["tau512_s"]) <= float(row["tau4_s"])
        assert float(row["mfu"]) == pytest.approx(
            float(row["limit_s"]) / float(row["step_s"]), rel=1e-4
        )
        assert (row["packed_tokens"], row["useful_tokens"]) == ("64", "96")
        assert row["commit"]
        assert row["torch"]
        assert row["device"] == "tiny models on a CPU"
        assert row["graphs_captured"] == "0"  # which a CPU has none of


def test_all_arms_start_from_the_same_weights_and_rows(measured):
    rows = {row["case"]: row for row in read_csv(measured / "gpu_steps.csv")}
    trl, ours, frozen = (rows[f"{WORK}/{name}"] for name in ("trl", "ours", "ours_frozen"))
    for row in (trl, ours, frozen):
        assert row["agrees_with_trl"] == "yes"
        assert float(row["loss"]) == pytest.approx(math.log(2), rel=1e-3)
        for column in ("logps_chosen", "logps_rejected"):
            assert float(row[column]) == pytest.approx(float(trl[column]), rel=1e-5)
    assert trl["logps_chosen"] != trl["logps_rejected"]
    # a whole forward of the reference for every step, also where it stands still
    for row in (ours, frozen):
        assert float(row["sweep_s"]) > 0.1 * float(row["alone_s"])
    assert float(trl["sweep_s"]) < 0.1 * float(trl["alone_s"])


def test_a_second_call_goes_on_where_the_first_stopped(measured, monkeypatch, capsys):
    path = measured / "gpu_steps.csv"
    before = path.read_text()
    called = []
    monkeypatch.setattr(matrix.Processes, "call", lambda self, f, job, *_: called.append(job))
    assert run(measured, [f"{WORK}/*plain", *TRL_AND_OURS], "--minutes", "0") == 0
    assert path.read_text() == before
    assert f"left, the minutes are spent: {WORK}/ours_plain" in capsys.readouterr().err
    assert not called

    monkeypatch.setattr(matrix.Processes, "call", lambda *_: {"error": "OutOfMemoryError: full"})
    assert run(measured, [f"{WORK}/*plain", *TRL_AND_OURS]) == 0
    rows = read_csv(path)
    assert [row["case"] for row in rows if row["reason"] == "OutOfMemoryError: full"] == [
        f"{WORK}/ours_plain"
    ]
    assert run(measured, [f"{WORK}/ours_plain"], "--again") == 0
    assert len(read_csv(path)) == len(rows)
    path.write_text(before)


def test_rows_of_another_commit_or_card_stay_and_do_not_count(measured, monkeypatch):
    path = measured / "gpu_steps.csv"
    before = path.read_text()
    asked = []

    def fail(self, function, job, *_):
        asked.append(job.case.name)
        return {"error": "RuntimeError: no"}

    monkeypatch.setattr(matrix.Processes, "call", fail)
    monkeypatch.setattr(matrix, "environment", lambda _: {"commit": "other", "torch": "2"})
    monkeypatch.setattr(matrix.Matrix, "_rate", lambda *_: 1e12)
    assert run(measured, TRL_AND_OURS) == 0
    assert asked == TRL_AND_OURS
    assert path.read_text().startswith(before)
    path.write_text(before)


def test_the_table_and_the_bars(measured, capsys):
    assert matrix.main(["--table", "--output_dir", str(measured)]) == 0
    header, rule, *lines = capsys.readouterr().out.strip().splitlines()
    assert all(line.count("|") == header.count("|") == rule.count("|") for line in lines)
    assert len(lines) == 4
    ours = next(line for line in lines if "| tralign-fast |" in line)
    assert ours.startswith("| Llama-3.2-1B full, AdamW, 2 pairs, 4,096 tokens, no checkpointing |")
    rows = {row["case"]: row for row in read_csv(measured / "gpu_steps.csv")}
    trl, own = (float(rows[name]["step_s"]) for name in TRL_AND_OURS)
    assert f"| {own:.3f} | {trl / own:.2f}x |" in ours
    assert (measured / "gpu_steps.png").stat().st_size > 10_000


def test_other_losses_than_trls_are_named_and_have_no_ratio(measured, tmp_path, capsys):
    rows = results.load(measured / "gpu_steps.csv")
    for row in rows:
        if row["case"] == f"{WORK}/ours":
            row["logps_rejected"] = str(1.001 * float(row["logps_rejected"]))
    results.save(tmp_path / "gpu_steps.csv", rows)
    assert matrix.main(["--table", "--output_dir", str(tmp_path)]) == 1
    told = capsys.readouterr()
    assert f"{WORK}/ours: no: logps_rejected" in told.err
    assert told.out.count("other losses") == 1


@pytest.mark.matrix
def test_the_other_kinds_of_models_train_too(tmp_path):
    """Adapters, released gradients and, where it is installed, a quantised base."""
    pytest.importorskip("peft")
    pytest.importorskip("trl")
    names = ["8b-lora64/8p4k/ckpt/ours", "8b-lora64/8p4k/ckpt/trl", "8b-release/2p4k/ckpt/ours"]
    assert run(tmp_path, names) == 0
    rows = {row["case"]: row for row in read_csv(tmp_path / "gpu_steps.csv")}
    assert {row["status"] for row in rows.values()} == {"measured"}
    assert [rows[name]["agrees_with_trl"] for name in names] == ["yes", "yes", ""]
    assert rows[names[1]]["reference"] == "frozen: TRL refuses to move it with PEFT"


def test_without_a_gpu_one_line_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(matrix, "card", lambda: None)
    monkeypatch.setattr(everything.matrix, "card", lambda: None)
    assert matrix.main(["--output_dir", str(tmp_path)]) == 1
    assert everything.main(["--output_dir", str(tmp_path)]) == 1
    assert [line[:12] for line in capsys.readouterr().err.splitlines()] == ["no GPU here:"] * 2
    assert not list(tmp_path.iterdir())


# --- processes ------------------------------------------------------------------------------------


def _killed(job):
    os.kill(os.getpid(), signal.SIGKILL)


def _sleeps(job):
    time.sleep(60)


def test_an_arm_that_dies_or_takes_too_long(tmp_path):
    processes = matrix.Processes(fresh=False, on_gpu=False)
    files = tmp_path / "result", tmp_path / "log"
    died = processes.call(_killed, None, *files, 60)
    assert died == {"error": "the process died: killed, by the system if memory ran out"}
    assert processes.call(_sleeps, None, *files, 0.5) is None


def test_a_fork_that_finds_cuda_in_use_is_started_anew(tmp_path, monkeypatch, capsys):
    processes, methods = matrix.Processes(fresh=False, on_gpu=False), []

    def once(*_):
        methods.append(processes._context.get_start_method())
        return {"error": "CannotFork: in use"} if len(methods) == 1 else {"step_s": 1.0}

    monkeypatch.setattr(processes, "_once", once)
    assert processes.call(arm.run, None, tmp_path, tmp_path, 1.0) == {"step_s": 1.0}
    assert methods == ["forkserver", "spawn"]
    assert "fresh process" in capsys.readouterr().err


HERE = {"commit": "abc", "device": "card"}


@pytest.fixture
def session(tmp_path, monkeypatch):
    """session(parts) -> a `Session` of this folder that has run them."""
    monkeypatch.setattr(everything, "LOGS", tmp_path / "logs")
    monkeypatch.delenv("OUT", raising=False)

    def run(parts, here=HERE, seconds=60.0):
        made = everything.Session(tmp_path, here, time.monotonic() + seconds)
        made.run(parts, minutes=5.0)
        return made

    return run


def test_parts_are_run_once_while_the_time_lasts(session, tmp_path, capfd):
    parts = [
        everything.Part("benchmarks.gpu --list", 1.0),
        everything.Part("benchmarks.gpu --cases nothing", 1.0),
        everything.Part("benchmarks.gpu --list --cases *trl", 1e6),
    ]
    first = session(parts)
    assert (first.left, first.failed) == (parts[2:], parts[1:2])
    rows = read_csv(tmp_path / "gpu_parts.csv")
    assert [row["status"][:6] for row in rows] == ["done", "failed"]
    assert "matches no case" in rows[1]["status"]
    assert "8b-lora64" in (tmp_path / "logs/benchmarks-gpu-list.txt").read_text()
    capfd.readouterr()
    assert session(parts[:2]).left == []
    assert capfd.readouterr().out == ""  # neither was started
    assert len(session(parts[:1], {**HERE, "commit": "d"}, 0.0).left) == 1


def test_a_part_has_its_limit_its_environment_and_may_go_on(session, tmp_path, monkeypatch):
    (tmp_path / "part_of_test.py").write_text(
        "import os, sys, time\n"
        "print(os.environ.get('WHERE'), sys.argv[1:])\n"
        "time.sleep(60 if 'sleep' in sys.argv else 0)\n"
        "print('2 arms are left')\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    slow = everything.Part("part_of_test sleep", 0.0, "", limit_s=1.0)
    goes_on = everything.Part("part_of_test", 0.0, "", 240.0, (("WHERE", "there"),), "are left")
    run = session([slow, goes_on], seconds=600.0)
    assert (run.left, run.failed) == ([goes_on], [slow])
    (row,) = read_csv(tmp_path / "gpu_parts.csv")
    assert row["status"] == "failed: took more than 1 s"
    log = (tmp_path / "logs/part-of-test.txt").read_text()
    assert log.startswith("there ['--minutes', '3.25']")


def test_results_and_logs_are_packed_after_every_part(session, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    part = everything.Part("benchmarks.gpu --list", 1.0)
    session([])
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    session([part])
    with tarfile.open(tmp_path / "out/card.tar.gz") as archive:
        names = archive.getnames()
    assert any(name.endswith("/gpu_parts.csv") for name in names)
    assert any(name.endswith("logs/benchmarks-gpu-list.txt") for name in names)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["card.tar.gz"]


def test_the_stages_of_a_card_in_their_order(monkeypatch, tmp_path, capsys):
    ran = []
    monkeypatch.setattr(matrix, "card", lambda: "NVIDIA H100")
    monkeypatch.setattr(matrix, "main", lambda given: ran.append(given[4:]) or 0)
    monkeypatch.setattr(everything.Session, "run", lambda self, parts, _: ran.append(parts))
    given = ["--output_dir", str(tmp_path), "--data", "pairs.jsonl"]
    assert everything.main([*given, "--stages", "all"]) == 0
    cases_of = ["--cases", *everything.CASES]
    arms = [everything.evidence("pairs.jsonl")]
    stages = [[], everything.HEAD, cases_of, everything.OTHER]
    assert ran == [everything.TESTS, *stages, arms]
    del ran[:]
    assert everything.main([*given[:2], "--stages", "evidence"]) == 0
    assert not ran
    assert "expected --data FILE" in capsys.readouterr().err
    assert everything.main(given) == 0
    assert ran == stages
    cases.choose(everything.CASES)  # each matches some
    for part in (*everything.TESTS, *everything.HEAD, *everything.OTHER):
        for word in shlex.split(part.command):
            assert not word.startswith("tests/") or Path(word).exists(), word


# --- what is computed and counted -----------------------------------------------------------------


def test_rows_differ_in_every_step_and_are_the_same_in_every_run():
    shape = cases.SHAPES["2p4k"]
    rows = work.make_rows(shape, vocab=128_256, steps=3)
    assert len(rows) == 6
    assert len({tuple(row["prompt_ids"][:8]) for row in rows}) == 6
    assert rows == work.make_rows(shape, vocab=128_256, steps=3)
    for row in rows:
        lengths = [len(row[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")]
        assert lengths == [1024, 512, 512]
        assert 0 not in row["prompt_ids"]


def test_a_windows_times():
    """Two windows after the warm-up: 0.4 s of sweep, 1.6 s of steps, a move of 0.1 s."""
    clock = SimpleNamespace(
        is_long=lambda: False,
        windows=[(0.0, 9.0, 9.5, 9.6), (10.0, 10.4, 12.0, 12.1), (13.0, 13.4, 15.0, 15.1)],
        logs=[{"loss": 0.69, "grad_norm": 1.0}, {"loss": 0.5}],
    )
    record = arm.summarize(clock, cases.SHAPES["2p4k"], on_gpu=False)
    assert record["windows"] == 2
    assert record["step_s"] == pytest.approx(0.5)
    assert record["alone_s"] == pytest.approx(0.4)
    assert record["sweep_s"] == pytest.approx(0.1)
    assert record["move_ms"] == pytest.approx(100)
    assert record["loss"] == 0.69
    # 2 pairs a step, 4 a batch of the sweep, which took 0.3 s each but for the first
    arm._add_scoring(record, [(5.0, 4), (0.3, 4), (0.3, 4), (0.1, 1)], 2)
    assert record["step_s"] == pytest.approx(0.65)


def test_one_window_is_profiled_and_its_time_is_left_out(tmp_path, monkeypatch):
    """A GPU's clock, its calls replaced: where it waits, what it profiles, when the run ends."""
    pytest.importorskip("trl")
    import torch

    events = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("wait"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 << 30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 4 << 30)

    class Profile:
        def __init__(self):
            events.append("profile")

        def stop(self):
            events.append("stop")
            return trace.DeviceWork(0.2, kernels=400, events=480)

    monkeypatch.setattr(trace, "Profile", Profile)
    monkeypatch.setattr(arm, "MOST", arm.LEAST)
    case = cases.parse(f"{WORK}/trl")
    trainer = work.make_trainer(case, work.make_work(case, tiny=True), str(tmp_path), on_gpu=False)
    clock = arm.make_clock(on_gpu=True, enough_s=0.0)
    trainer.callback_handler.callbacks.insert(0, clock.before)
    trainer.add_callback(clock.after)
    trainer.train()
    # where a window starts, its first step begins, its last has ended, the reference has moved
    window = ["wait"] * 4
    profiled = ["profile", "wait", "wait", "wait", "stop", "wait"]
    assert events == [*window * (1 + arm.LEAST), *profiled]
    record = arm.summarize(clock, case.shape, on_gpu=True)
    assert trainer.state.global_step == (2 + arm.LEAST) * cases.WINDOW
    assert record["windows"] == arm.LEAST
    assert record["gpu_busy_s"] == pytest.approx(0.05)
    assert (record["kernels"], record["device_events"]) == (100, 120)
    assert (record["peak_gib"], record["reserved_gib"]) == (3, 4)
    row = results.make_row(
        case,
        {**record, "flops": 1e12, "recomputed_flops": 5e11, "packed_tokens": 64, "dtype": "b"},
        rate=1e14,
    )
    assert row["gpu_busy_share"] == pytest.approx(0.05 / record["step_s"])
    assert row["limit_s"] == pytest.approx(0.01)
    assert row["limit_with_recomputation_s"] == pytest.approx(0.015)


def test_of_long_windows_one_is_timed_and_none_profiled(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    import torch

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 << 30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 4 << 30)
    monkeypatch.setattr(arm, "LONG_S", 0.0)
    case = cases.parse(f"{WORK}/ours")
    trainer = work.make_trainer(case, work.make_work(case, tiny=True), str(tmp_path), on_gpu=False)
    clock = arm.make_clock(on_gpu=True, enough_s=60.0)
    trainer.callback_handler.callbacks.insert(0, clock.before)
    trainer.add_callback(clock.after)
    trainer.train()
    record = arm.summarize(clock, case.shape, on_gpu=True)
    assert trainer.state.global_step == 2 * cases.WINDOW
    assert (record["windows"], record["peak_gib"]) == (1, 3)
    assert record["reason"] == "no profile: a window takes more than 0 s"


def test_the_time_that_is_left_is_asked_of_a_case_before_it_starts():
    """What a case of 64k tokens would be stopped in stays for the next call."""
    short, long = (cases.parse(f"8b-lora64/{s}/ckpt/ours") for s in ("2p4k", "2p64k"))
    assert 25 < short.usual_s < 35
    assert 110 < long.usual_s < matrix.TIMEOUT_S


@pytest.mark.matrix
def test_without_a_card_cases_are_traced(monkeypatch, capsys):
    from tralign_fast.memory import plan_options

    monkeypatch.setattr(plan_options, "load_config", lambda _: work._tiny_config())
    names = ["8b-lora64/2p4k/ckpt/ours", "8b-lora64/2p4k/ckpt/trl", "8b-qlora64/2p4k/ckpt/ours"]
    assert matrix.main(["--dry", "--cases", *names]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [names[1], names[0], names[2]]
    assert all(line.endswith(" GiB") for line in lines)

    def fail(case):
        raise RuntimeError("no such option")

    monkeypatch.setattr(arm, "trace_case", fail)
    assert matrix.main(["--dry", "--cases", names[0]]) == 1
    assert f"{names[0]}: RuntimeError: no such option" in capsys.readouterr().err


def test_a_profile_that_fails_leaves_the_times():
    """On a CPU the profiler sees no kernel."""
    clock = arm.make_clock(on_gpu=True, enough_s=0.0)
    with clock.without_profile_if_it_fails():
        trace.Profile()
    clock.windows = [(0.0, 0.0, 1.0, 1.0), (1.0, 1.0, 2.0, 2.0), (2.0, 2.0, 3.0, 3.0)]
    clock.logs = [{"loss": 0.69}]
    record = arm.summarize(clock, cases.SHAPES["2p4k"], on_gpu=True)
    assert record["reason"].startswith("no profile: ")
    assert record["step_s"] == pytest.approx(0.25)
    assert "gpu_busy_s" not in record


def test_a_trace_counts_what_the_device_did():
    """Kernels that overlap count once; ranges that annotate them are nothing of their own."""
    events = [
        {"cat": "kernel", "ts": 0.0, "dur": 10.0},
        {"cat": "kernel", "ts": 5.0, "dur": 10.0},
        {"cat": "kernel", "ts": 2.0, "dur": 1.0},
        {"cat": "kernel", "ts": 100.0, "dur": 5.0},
        {"cat": "gpu_memcpy", "ts": 20.0, "dur": 50.0},
        {"cat": "gpu_memset", "ts": 80.0, "dur": 1.0},
        {"cat": "gpu_user_annotation", "name": "Optimizer.step#AdamW", "ts": 0.0, "dur": 500.0},
        {"cat": "cuda_runtime", "ts": 0.0, "dur": 500.0},
        {"ph": "M", "name": "process_name"},
    ]
    assert trace.device_work(events) == trace.DeviceWork(20e-6, kernels=4, events=6)


def test_needed_operations_are_those_of_the_model():
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=160, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=24,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    shape = cases.Shape(pairs=1, tokens=64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, shape.tokens, dtype=torch.long))
    counted = counter.get_flop_counts()["Global"]
    products = counted[torch.ops.aten.mm]
    head = 2 * shape.tokens * config.hidden_size * config.vocab_size
    prompt, completion = shape.prompt, shape.completion
    # a query of a completion sees the prompt and itself: half of the square that eager computes
    share = (prompt**2 / 2 + 2 * completion * (prompt + completion / 2)) / shape.tokens**2
    attention = share * counted[torch.ops.aten.bmm]
    forward = products - head / 2 + attention  # half of the tokens are completions
    full = cases.flops_of(config, shape, None)
    assert full.needed == pytest.approx(4 * forward, rel=0.01)
    assert full.recomputed == pytest.approx(forward - head / 2, rel=0.01)
    # no gradients of the weights
    lora = cases.flops_of(config, shape, 4)
    adapters = (
        2
        * shape.tokens
        * sum(4 * sum(w.shape) for name, w in model.model.named_parameters() if "proj" in name)
    )
    assert lora.needed == pytest.approx(
        4 * forward - (products - head / 2) + 3 * adapters, rel=0.01
    )


def test_names_of_cases_and_cards():
    assert len({case.name for case in cases.DEFAULT}) == len(cases.DEFAULT)
    assert all(cases.is_case(case.name) for case in cases.DEFAULT)
    assert not cases.is_case("8b-full/2p4k/ckpt/theirs")
    assert [c.name for c in cases.choose(["8b-full/2p4k/ckpt/*"])][:2] == [
        "8b-full/2p4k/ckpt/trl", "8b-full/2p4k/ckpt/ours",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"--cases 9b\*: matches no case; expected MODEL/SHAPE"):
        cases.choose(["9b*"])
    for name, folder in {
        "NVIDIA H200": "h200",
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA GeForce RTX 4090": "geforce-rtx-4090",
    }.items():
        assert matrix.folder_of(name) == folder


def test_without_git_the_environment_names_the_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("TRALIGN_COMMIT", raising=False)
    assert commit() == "unknown"
    monkeypatch.setenv("TRALIGN_COMMIT", "902c6f1")
    assert commit() == "902c6f1"


def test_the_card_is_asked_of_the_driver(tmp_path: Path, monkeypatch):
    fake = tmp_path / "nvidia-smi"
    fake.write_text(
        '#!/bin/sh\nfor a; do last=$a; done\n[ "$last" = --id=1 ] && echo "NVIDIA H200"'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert matrix.card() == "NVIDIA H200"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert matrix.card() is None


def test_graphs_of_all_models_are_counted():
    from torch import nn

    with arm._counting_graphs() as found:
        decoders = [nn.Linear(1, 1), nn.Linear(1, 1)]
        made = [arm_graphs.DecoderGraphs(decoder, always=True) for decoder in decoders]
        for graphs in made:
            graphs.captured, graphs.replayed = 2, 5
        assert not found
    assert found == {"graphs_captured": 4, "graphs_replayed": 10}
