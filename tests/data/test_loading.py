"""Files, folders and hub ids to rows; errors of one line that name the source."""

from __future__ import annotations

import gzip
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
def apart(tmp_path_factory, monkeypatch):
    """A cache of the test's own, and no network."""
    import datasets

    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
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
    expected = "expected rows of parquet" if name == "a.parquet" else "a.json"
    assert expected in (message := fails(tmp_path / name))
    assert name == "a.parquet" or ": line 1: is not JSON: Invalid control" in message


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
    assert "no split dev; expected one of test, train" in fails(tmp_path / "rows", "dev")
    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    assert "no split dev; expected one of train" in fails(tmp_path / "saved", "dev")


# --- files as they are found ----------------------------------------------------------------------


def pack(path, packed):
    if packed.suffix.lower() == ".gz":
        packed.write_bytes(gzip.compress(path.read_bytes()))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        packed.write_bytes(pyarrow.compress(path.read_bytes(), codec="zstd", asbytes=True))
    path.unlink()
    return packed


@pytest.mark.parametrize("ending", [".gz", ".zst", ".GZ", ".Zst"])
@pytest.mark.parametrize("suffix", [".jsonl", ".JSON", ".csv"])
def test_packed_files(suffix, ending, tmp_path):
    plain = write(tmp_path / f"rows{suffix.lower()}", ROWS)
    packed = pack(plain, tmp_path / f"rows{suffix}{ending}")
    assert load_rows(packed).to_list() == ROWS
    packed.write_bytes(packed.read_bytes()[:-9])
    assert "cannot be read: " in fails(packed)
    packed.write_bytes(b"not packed at all")
    assert "line 1: cannot be read: " in fails(packed)


@pytest.mark.parametrize("suffix", [".JSONL", ".Json", ".PARQUET", ".CSV"])
def test_upper_case_suffixes(suffix, tmp_path):
    path = write(tmp_path / f"rows{suffix.lower()}", ROWS)
    assert load_rows(path.rename(tmp_path / f"rows{suffix}")).to_list() == ROWS
    assert load_rows(tmp_path).to_list() == ROWS


def test_a_folder_of_mixed_packings(tmp_path):
    write(tmp_path / "train" / "a.jsonl", ROWS)
    pack(write(tmp_path / "train" / "b.json", OTHER), tmp_path / "train" / "b.JSON.gz")
    pack(write(tmp_path / "train" / "c.jsonl", ROWS), tmp_path / "train" / "c.jsonl.zst")
    pack(write(tmp_path / "x.jsonl", OTHER), tmp_path / "Test-0.JSONL.GZ")
    write(tmp_path / ".hidden" / "train.jsonl", OTHER)
    (tmp_path / "dataset_info.json").write_text("{}")
    assert load_rows(tmp_path).to_list() == [*ROWS, *OTHER, *ROWS]
    assert load_rows(tmp_path, "test").to_list() == OTHER
    assert load_rows(tmp_path, "train[1:3]").to_list() == [ROWS[1], *OTHER]
    write(tmp_path / "more.jsonl", OTHER)
    with pytest.warns(UserWarning, match=r"not read, as no split is named: more\.jsonl"):
        load_rows(tmp_path)


@pytest.mark.parametrize(
    "name", ["a[1].jsonl", "b*?.jsonl", "c::d.jsonl", "{x}[!y].CSV", "e#f %20.json", "[z].parquet"]
)
def test_names_with_brackets_and_the_like(name, tmp_path):
    folder = tmp_path / "[d]*"
    path = write(folder / f"x{(folder / name).suffix.lower()}", ROWS).rename(folder / name)
    write(folder / "1" / "train.jsonl", OTHER)  # would match a pattern
    assert load_rows(path).to_list() == ROWS


def test_cells_keep_their_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(
        'prompt,chosen,rejected\n1,007,yes\n2.50,true,no\nNaN,,1e3\n2024-01-01,"a\n\nb",-\n'
    )
    assert load_rows(path).to_list() == [
        {"prompt": "1", "chosen": "007", "rejected": "yes"},
        {"prompt": "2.50", "chosen": "true", "rejected": "no"},
        {"prompt": "NaN", "chosen": "", "rejected": "1e3"},
        {"prompt": "2024-01-01", "chosen": "a\n\nb", "rejected": "-"},
    ]


@pytest.mark.parametrize(("cells", "expected"), [
    (["True", "false", "1", "0"], [True, False, True, False]),
    (["1", ""], [True, None]),
    (["yes", "no"], ["yes", "no"]),
    (["1", "2"], ["1", "2"]),
])  # fmt: skip
def test_labels_of_a_csv(cells, expected, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion,label\n" + "".join(f"p,c,{cell}\n" for cell in cells))
    assert load_rows(path)["label"][:] == expected


@pytest.mark.parametrize(("body", "reason"), [
    ("a,b\n1,2\n1,2,3\n", "line 3: has 3 cells; expected 2, as the header has"),
    ('a,b\n"1\n\n",2\n\n1\n', "line 6: has 1 cells; expected 2"),
    ("a,b\n1,2,3\n4,5,6\n", "line 2: has 3 cells; expected 2"),
    ("a,a\n1,2\n", "line 1: has the column 'a' twice; expected it once"),
    ('a,b\n1,2\n"x,2\n', "line 3: is not CSV: unexpected end of data"),
    ('a,b\n1,"x"y\n', "line 2: is not CSV: ',' expected after"),
    ("a,b\n1,2\n\n\xe9,2\n", "line 4: the byte 0xe9 is not UTF-8; expected UTF-8 (is it Lat"),
    ("\n\n", "no rows; expected a header"),
])  # fmt: skip
def test_lines_of_a_csv_are_named(body, reason, tmp_path):
    (tmp_path / "a.csv").write_bytes(body.encode("latin-1"))
    assert f"a.csv: {reason}" in fails(tmp_path / "a.csv")


GOOD = '{"a": "x", "b": "y"}'


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize(("body", "reason"), [
    ("null", "line 1: is null; expected an object with the columns of a row"),
    ("null\nnull\n", "line 1: is null"),
    (GOOD + "\n\nnull\n" + GOOD, "line 3: is null"),
    (GOOD + "\n[1]\n", "line 2: is [1]; expected an object"),
    (GOOD + '\n"x"\n', 'line 2: is "x"; expected an object'),
    ("{}", "line 1: is {}; expected an object"),
    ("[null]", "item 1: is null; expected an object"),
    (f'[{GOOD}, "x"]', 'item 2: is "x"; expected an object'),
    ("[]", "no rows; expected at least one"),
    (" \n\n", "no rows; expected at least one"),
    (GOOD + "\n" + GOOD[:-3] + "\n" + GOOD, "line 2: is not JSON: Invalid control character at"),
    (GOOD + "\n" + GOOD[:-1], "line 2: is not JSON: Expecting ',' delimiter at column 20"),
    (GOOD + ",\n" + GOOD, "line 1: is not JSON: Extra data at column 21"),
    ("{'a': 'x'}", "line 1: is not JSON: Expecting property name enclosed in double quotes"),
    ('[{"a": "x"},\n{"a" "y"}]', "line 2: is not JSON: Expecting ':' delimiter"),
    (GOOD + '\n{"a": "\xe9"}\n', "line 2: the byte 0xe9 is not UTF-8"),
    ('{"a": "x", "a": "y"}', "line 1: has the key 'a' twice; expected it once"),
    ('{"a": "\\ud800"}', "line 1: holds half of a surrogate pair"),
    ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 1: nests too deep"),
    ('{"a": ' + '{"b":' * 5_000 + "1" + "}" * 5_001, "line 1: nests too deep"),
])  # fmt: skip
def test_lines_of_json_are_named(name, body, reason, tmp_path):
    (tmp_path / name).write_bytes(body.encode("latin-1"))
    assert f"{name}: {reason}" in fails(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize("ends", ["le", "be"])
def test_utf_16_is_told_from_latin_1(name, ends, tmp_path):
    """What PowerShell's `>` writes."""
    (tmp_path / name).write_bytes(("\ufeff" + GOOD + "\n").encode(f"utf-16-{ends}"))
    assert "line 1: the byte 0xf" in (line := fails(tmp_path / name))
    assert "is not UTF-8; expected UTF-8 (is it UTF-16?)" in line


def test_the_file_of_a_folder_is_named(tmp_path):
    write(tmp_path / "train" / "a.jsonl", ROWS)
    (tmp_path / "train" / "b.jsonl").write_text(GOOD + "\n{")
    assert f": {tmp_path.joinpath('train', 'b.jsonl').relative_to(tmp_path)} line 2: " in fails(
        tmp_path
    )
    write(tmp_path / "c" / "a.csv", ROWS)
    write(tmp_path / "c" / "b.csv", [{"x": "y"}])
    message = fails(tmp_path / "c")
    assert "b.csv line 1: has the columns x; expected those of a.csv: prompt, chosen" in message


@pytest.mark.parametrize("body", [
    "\ufeff" + GOOD + "\n" + GOOD,
    f"  \n [{GOOD}, {GOOD}]",
    f"[\n{GOOD},\n\n{GOOD}\n]\n",
    GOOD + "\r\n\r\n" + GOOD + "\r\n",
])  # fmt: skip
def test_other_spellings_of_the_same_rows(body, tmp_path):
    for name in ("a.json", "a.jsonl"):
        (tmp_path / name).write_text(body, newline="")
        assert load_rows(tmp_path / name).to_list() == [{"a": "x", "b": "y"}] * 2


def test_one_object_over_several_lines_is_a_row(tmp_path):
    (tmp_path / "a.json").write_text('{\n "a": "x",\n "b": ["y"]\n}\n')
    assert load_rows(tmp_path / "a.json").to_list() == [{"a": "x", "b": ["y"]}]


def test_dates_stay_text(tmp_path):
    rows = [{"prompt": "When?", "chosen": f"2024-01-0{i}", "rejected": "12:30"} for i in (1, 2)]
    rows.append({"prompt": "?", "chosen": "2024-01-03T10:00:00", "rejected": "1"})
    assert load_rows(write(tmp_path / "a.jsonl", rows)).to_list() == rows
    assert load_rows(write(tmp_path / "b.json", rows)).to_list() == rows


def test_rows_of_text_and_of_messages_in_one_file(tmp_path):
    rows = [
        {"prompt": "a", "tools": [{"x": 1}]},
        {"prompt": [{"role": "user"}], "tools": [{"y": 2}]},
    ]
    for name, body in (("a.jsonl", "\n".join(map(json.dumps, rows))), ("b.json", json.dumps(rows))):
        (tmp_path / name).write_text(body)
        assert load_rows(tmp_path / name).to_list() == rows
