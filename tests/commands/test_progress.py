"""What is seen while a run trains: a table of its logs, a bar in a terminal, one bar at a time."""

from __future__ import annotations

import io

import pytest

from tralign_fast import cli
from tralign_fast.commands import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_without_a_terminal_a_line_for_every_log(recipe, capsys):
    assert cli.main(["train", "--config", str(recipe), "--eval_split", "train[:2]"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "step", "loss", "margin", "accuracy", "chosen", "rejected", "grad", "norm", "rate", "moves"
    ]  # fmt: skip
    assert [line.split()[0] for line in lines[1:5]] == ["1", "eval", "2", "eval"]
    assert not [line for line in lines if "{" in line or "\r" in line or "\x1b" in line]
    assert lines[-1].startswith(f"{recipe.parent / 'run'}/: report.html")


@pytest.mark.parametrize("drawn_by", ["rich", "tqdm"])
def test_a_bar_in_a_terminal(drawn_by, recipe, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    if drawn_by == "tqdm":
        monkeypatch.setattr(progress, "find_spec", lambda name: None)
    shown = []
    bar = {"rich": progress.RichBar, "tqdm": progress.TqdmBar}[drawn_by]
    show = bar.show

    def noted(self, done, text):
        shown.append((done, text))
        show(self, done, text)

    monkeypatch.setattr(bar, "show", noted)
    more = ["--max_steps", "4", "--ref_model_sync_steps", "2"]
    assert cli.main(["train", "--config", str(recipe), *more]) == 0
    texts = [text for _, text in shown]
    assert "reference moves at 2" in texts[0]
    assert any("loss 0." in t and "margin +" in t and "accuracy" in t for t in texts)
    assert any(t.startswith("reference window 1/2") for t in texts)
    assert "no more moves" in texts[-1]
    written = terminal.getvalue()
    assert "step" in written
    assert "{'loss'" not in written


def test_when_the_reference_moves_next():
    assert progress.next_move(0, 5, False, 12) == "reference moves at 5"
    assert progress.next_move(5, 5, False, 12) == "reference moves at 10"
    assert progress.next_move(10, 5, False, 12) == "no more moves"
    assert progress.next_move(10, 5, True, 12) == "reference frozen"


def test_a_row_without_pairs_has_empty_cells():
    line = progress.row(10, {"loss": 0.5, "learning_rate": 1e-6, "tr/skipped_steps": 2})
    assert line.split() == ["10", "0.5000", "1.00e-06", "skipped", "2"]


def test_no_bar_where_none_is_wanted(monkeypatch):
    monkeypatch.setattr("sys.stdout", Terminal())
    assert isinstance(progress.make_bar(False)[0], progress.NoBar)
    assert isinstance(progress.make_bar(True)[0], progress.RichBar)
