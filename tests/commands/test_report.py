"""What a run leaves behind: report, summary, whole configuration; runs side by side."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from tralign_fast import TRConfig, cli
from tralign_fast.command_line import parse
from tralign_fast.commands import curves
from tralign_fast.commands.record import read_run
from tralign_fast.commands.resolved import recipe_of
from tralign_fast.training.train_options import TrainOptions


def test_the_summary_holds_what_the_logs_say(run):
    summary = json.loads((run / "summary.json").read_text())
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    last = [log for log in history if "loss" in log][-1]
    assert summary["train"]["loss"] == last["loss"]
    assert (summary["steps"], summary["moves"], summary["every"]) == (6, 3, 2)
    assert summary["method"] == "TR-DPO"
    assert summary["held_out"]["eval_kl/initial"] > 0
    assert summary["tokens"] == last["num_tokens"] > 0
    assert summary["tokens_per_second"] == summary["tokens"] / summary["train_seconds"]
    assert read_run(run).moves == [2, 4, 6]


class Page(HTMLParser):
    """Tags that are open, and text; raises where they do not nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.seen = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen += [(tag, key, value) for key, value in attrs]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_report_is_one_whole_page(run):
    page = Page((run / "report.html").read_text())
    text = " ".join("".join(page.words).split())
    for words in (
        "TR-DPO of", "3 moves of the reference", "KL to the start", "tokens/s", "the <cat>",
        "Completions before and after", "ref_model_sync_steps: 2",
    ):  # fmt: skip
        assert words in text, words
    assert "svg" in {tag for tag, *_ in page.seen}
    outside = [v for _, key, v in page.seen if key in ("src", "href") and not v.startswith("#")]
    assert [v for v in outside if not v.startswith("data:")] == []
    assert (run / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_curves_have_the_moves_marked(run):
    figure = curves.figure([read_run(run)])
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles == [title for title, *_ in curves.PANELS]
    marks = [sorted({*line.get_xdata()}) for line in figure.axes[0].lines]
    assert marks[-3:] == [[2], [4], [6]]
    assert list(figure.axes[0].lines[0].get_xdata()) == [2, 4, 6]
    assert list(figure.axes[0].lines[1].get_xdata()) == [3, 6]


def test_the_whole_configuration_starts_the_same_run(run, tmp_path, capsys):
    again = tmp_path / "again"
    config = run / "config.yaml"
    assert cli.main(["train", "--config", str(config), "--output_dir", str(again)]) == 0
    ours, theirs = read_run(run), read_run(again)
    assert [log["loss"] for log in ours.history if "loss" in log] == [
        log["loss"] for log in theirs.history if "loss" in log
    ]
    text, other = config.read_text(), (again / "config.yaml").read_text()
    assert text.replace(str(run), "") == other.replace(str(again), "")
    names = {f.name for c in (TrainOptions,) for f in c.__dataclass_fields__.values() if f.init}
    left_out = {"resume"}
    assert names - left_out <= {*re.findall(r"^(\w+):", text, re.MULTILINE)}
    assert str(again) in capsys.readouterr().out.splitlines()[-1]


def test_the_configuration_keeps_every_kind_of_value(tmp_path):
    arguments = [
        "--model", "m", "--dataset", "d", "--use_cpu", "--output_dir", str(tmp_path / "o"),
        "--loss_type", "dpo", "sft", "--loss_weights", "1", "0.5", "--columns", "prompt=q",
        "--optim", "adafactor", "--lr_scheduler_type", "cosine_with_restarts",
        "--lr_scheduler_kwargs", '{"num_cycles": 2}', "--report_to", "none", "--pad_token", "<pad>",
        "--use_peft", "--lora_target_modules", "q_proj", "v_proj", "--save_strategy", "epoch",
    ]  # fmt: skip
    made = parse("train", [TrainOptions, TRConfig], arguments)
    file = tmp_path / "config.yaml"
    file.write_text(recipe_of(*made))
    again = parse("train", [TrainOptions, TRConfig], ["--config", str(file)])
    assert again[1].to_dict() == made[1].to_dict()
    assert again[0].lora_target_modules == ["q_proj", "v_proj"]
    assert "hub_token" not in file.read_text()


def test_two_runs_side_by_side(run, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("beta: 0.1\n", "beta: 0.3\n"))
    output = tmp_path / "both"
    assert cli.main(["report", str(run), str(other), "--output", str(output)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"beta +0\.1 +0\.3", out)
    page = Page((output / "report.html").read_text())
    assert "2 runs compared" in "".join(page.words)
    (other / "config.yaml").write_text(text.replace("rows.jsonl", "others.jsonl"))
    assert cli.main(["report", str(run), str(other), "--output", str(output)]) == 2
    assert "these runs do not compare: dataset is" in capsys.readouterr().err
    arguments = ["report", str(run), str(other), "--output", str(output), "--any_data"]
    assert cli.main(arguments) == 0


def test_a_run_that_was_stopped_is_reported_of_its_checkpoint(run, tmp_path, capsys):
    stopped = tmp_path / "stopped"
    shutil.copytree(run, stopped)
    for name in ("trainer_state.json", "summary.json", "report.html"):
        (stopped / name).unlink()
    assert cli.main(["report", str(stopped)]) == 0
    text = (stopped / "report.html").read_text()
    assert "has not ended" in text
    assert read_run(stopped).moves == [2, 4, 6]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: RUN"),
        (["nothing"], "nothing: no such folder; expected one that tralign-fast train wrote"),
        (["TMP"], "no run: expected trainer_state.json or checkpoints"),
        (["RUN", "--out", "x"], "--out: no such option; did you mean --output?"),
        (["RUN", "--output", "RUN/summary.json/x"], "cannot be written"),
    ],
)
def test_what_cannot_be_reported(arguments, message, run, tmp_path, refused):
    given = [a.replace("TMP", str(tmp_path)).replace("RUN", str(run)) for a in arguments]
    assert message in refused("report", *given)


def test_without_matplotlib_the_report_says_so(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(curves, "find_spec", lambda name: None)
    assert cli.main(["report", str(run), "--output", str(tmp_path)]) == 0
    assert "matplotlib is not installed" in (tmp_path / "report.html").read_text()
    assert not (tmp_path / "curves.png").exists()
