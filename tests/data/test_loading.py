"""Files, folders and hub ids to rows; errors of one line that name the source."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset, DatasetDict

from tralign_fast.data import load_rows

ROWS = [
    {"prompt": "a", "chosen": "b", "rejected": "NA"},
    {"prompt": "ä\n,", "chosen": "None", "rejected": '"d"'},
]
OTHER = [{"prompt": "x", "chosen": "y", "rejected": "z"}]


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    """A cache of the test's own, and no network."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        Dataset.from_list(rows).to_csv(path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_file_is_one_split_whatever_its_name(suffix, split, tmp_path):
    path = write(tmp_path / f"rows{suffix}", ROWS)
    assert load_rows(str(path), split).to_list() == load_rows(path).to_list() == ROWS


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_a_folder_of_files_with_splits(suffix, tmp_path):
    write(tmp_path / "rows" / f"train{suffix}", ROWS)
    write(tmp_path / "rows" / f"test{suffix}", OTHER)
    (tmp_path / "rows" / "notes.txt").write_text("not data")
    assert load_rows(str(tmp_path / "rows")).to_list() == ROWS
    assert load_rows(str(tmp_path / "rows"), "test").to_list() == OTHER


def test_a_folder_of_shards(tmp_path):
    write(tmp_path / "rows" / "part-0.jsonl", ROWS)
    write(tmp_path / "rows" / "part-1.jsonl", OTHER)
    assert load_rows(str(tmp_path / "rows")).to_list() == ROWS + OTHER


def test_a_slice_of_a_split(tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS)
    assert load_rows(str(path), "train[:1]").to_list() == ROWS[:1]


def test_what_save_to_disk_made(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    assert load_rows(str(tmp_path / "one")).to_list() == ROWS
    splits = {"train": Dataset.from_list(ROWS), "test": Dataset.from_list(OTHER)}
    DatasetDict(splits).save_to_disk(tmp_path / "two")
    assert load_rows(str(tmp_path / "two")).to_list() == ROWS
    assert load_rows(str(tmp_path / "two"), "test").to_list() == OTHER


def test_a_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "rows.jsonl", ROWS)
    assert load_rows("~/rows.jsonl").to_list() == ROWS


def fails(source, split="train"):
    with pytest.raises(ValueError, match="expected") as caught:
        load_rows(str(source), split)
    message = str(caught.value)
    assert message.startswith(f"{source}: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "source", ["/no/such", "./rows", "~/rows", "a/b/c", "rows.jsonl", "a/b.csv"]
)
def test_a_missing_file(source):
    assert "no such file or folder; expected a .jsonl, .json" in fails(source)


@pytest.mark.parametrize("source", ["nobody/nothing", "nothing", "nobody/some.thing"])
def test_a_missing_hub_dataset(source):
    message = fails(source)
    assert "hub id (not on disk)" in message
    assert "offline" in message.lower()


def test_an_unknown_hub_dataset(monkeypatch):
    import datasets

    def missing(*args, **options):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", missing)
    assert "DatasetNotFoundError: Dataset 'a/b' doesn't exist" in fails("a/b")


def test_an_unknown_extension(tmp_path):
    (tmp_path / "rows.xlsx").write_text("x")
    assert "unknown file type .xlsx" in fails(tmp_path / "rows.xlsx")
    (tmp_path / "rows").write_text("x")
    assert "unknown file type (no extension)" in fails(tmp_path / "rows")


def test_an_empty_file(tmp_path):
    (tmp_path / "rows.jsonl").touch()
    assert "the file is empty" in fails(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(("name", "text"), [("a.json", "[]"), ("a.csv", "prompt,chosen\n")])
def test_a_file_without_rows(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    fails(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_a_broken_file(name, tmp_path):
    (tmp_path / name).write_text('{"prompt": "a", "chosen\n{"')
    assert "expected rows of " in fails(tmp_path / name)


def test_folders_without_rows(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "a folder with no files; expected" in fails(tmp_path / "empty")
    write(tmp_path / "mixed" / "a.jsonl", ROWS)
    write(tmp_path / "mixed" / "b.csv", ROWS)
    assert "a folder with .csv and .jsonl files" in fails(tmp_path / "mixed")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    assert "expected what save_to_disk makes" in fails(tmp_path / "saved")


def test_a_missing_split(tmp_path):
    write(tmp_path / "rows" / "train.jsonl", ROWS)
    write(tmp_path / "rows" / "test.jsonl", OTHER)
    assert 'Unknown split "dev"' in fails(tmp_path / "rows", "dev")
    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    assert "no split dev; expected one of train" in fails(tmp_path / "saved", "dev")
