"""A thousand odd rows and files: each is read as it stands, or refused by one line.

What a good row is, is said here once more, by other means than in the library.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import warnings

import pytest

pytest.importorskip("hypothesis")
import datasets
from datasets import IterableDataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tralign_fast.data import load_rows, tokenize_pairs, tokenize_unpaired
from tralign_fast.data.packing import PreferenceCollator

QUICK = {
    "deadline": None,
    "database": None,
    "derandomize": True,
    "suppress_health_check": list(HealthCheck),
}
LIMIT = 24  # max_length

# --- rows -----------------------------------------------------------------------------------------

text = st.one_of(
    st.sampled_from(
        ["", " ", "a", "the red cat", " blue", "<end>", "blue<end>", "\n", "red " * 30]
    ),
    st.text(max_size=6),
)
junk = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.just([]), st.just({}),
    st.lists(st.integers(-1, 9), max_size=3), st.lists(st.text(max_size=2), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip
part = st.one_of(
    st.builds(lambda t: {"type": "text", "text": t}, text),
    st.sampled_from([{"type": "image"}, {"type": "text"}, "a", None, 3]),
)
content = st.one_of(text, text, text, st.none(), st.integers(), st.lists(part, max_size=2))
message = st.one_of(
    st.builds(
        lambda r, c: {"role": r, "content": c}, st.sampled_from(["user", "assistant"]), content
    ),
    st.builds(lambda c: {"role": "assistant", "content": c}, text),
    st.sampled_from(
        [{"role": "user"}, {"content": "a"}, {"role": None, "content": "a"}, "a", None]
    ),
)
good_message = st.builds(
    lambda r, c: {"role": r, "content": c}, st.sampled_from(["user", "assistant"]), text
)
side = st.one_of(
    text, text, st.lists(good_message, min_size=1, max_size=3), st.lists(message, max_size=3), junk
)
label = st.one_of(st.booleans(), st.sampled_from([0, 1, 2, -1, 1.0, "yes", "True", None, [], 0.5]))
ids = st.one_of(
    st.lists(st.integers(0, 300), max_size=30), st.lists(st.integers(0, 9), max_size=2), junk
)
pair = st.fixed_dictionaries(
    {"chosen": side, "rejected": side},
    optional={"prompt": side, "images": st.sampled_from([None, [], ["a.png"]]), "tools": junk},
)
unpaired = st.fixed_dictionaries({"prompt": side, "completion": side, "label": label})
pair_ids = st.fixed_dictionaries({"prompt_ids": ids, "chosen_ids": ids, "rejected_ids": ids})
unpaired_ids = st.fixed_dictionaries({"prompt_ids": ids, "completion_ids": ids, "label": label})


def is_text(value):
    return type(value) is str and value != ""


def is_messages(value):
    if type(value) is not list or not value:
        return False
    return all(
        type(m) is dict and type(m.get("role")) is str and type(m.get("content")) is str
        for m in value
    )


def is_side(value):
    return is_text(value) or (is_messages(value) and any(m["content"] for m in value))


def is_ids(value):
    return type(value) is list and all(type(i) is int and 0 <= i < 2**31 for i in value)


def may_be_good(row):
    """Needed, not enough: lengths and what a template makes of messages are seen after."""
    if "prompt_ids" in row:
        sides = [row[c] for c in ("chosen_ids", "rejected_ids", "completion_ids") if c in row]
        fine = is_ids(row["prompt_ids"]) and all(is_ids(s) and s for s in sides)
    else:
        sides = [row[c] for c in ("chosen", "rejected", "completion") if c in row]
        fine = all(map(is_side, sides)) and not row.get("images")
        prompt = row["prompt"] if "prompt" in row else sides[0]
        fine = fine and len({type(value) for value in (prompt, *sides)}) == 1
        fine = fine and (type(prompt) is str or is_messages(prompt))
    if len(sides) == 2:
        return fine and sides[0] != sides[1]
    return fine and type(row["label"]) in (bool, int) and row["label"] in (0, 1)


def result_of(function):
    """What a function returns, or the one line by which it refuses."""
    try:
        return function(), ""
    except ValueError as error:
        message = str(error)
    assert len(message.splitlines()) == 1, message
    return None, message


def check_row(tokenize, row, tokenizer):
    """The tokenised rows, all of them good; or None where the row was refused by one line."""
    stream = IterableDataset.from_generator(lambda: iter([row]))
    options = {"max_length": LIMIT, "on_bad_rows": "error"}
    made, refusal = result_of(lambda: list(tokenize(stream, tokenizer, **options)))
    if refusal:
        return None
    assert may_be_good(row), "a silent success"
    paired = tokenize is tokenize_pairs
    assert len(made) == (2 if not paired and "chosen" in row else 1)
    for record in made:
        sides = ("chosen_ids", "rejected_ids") if paired else ("completion_ids",)
        for column in sides:
            assert record[column]
            assert not paired or len(record["prompt_ids"]) + len(record[column]) <= LIMIT
        assert len(record["prompt_ids"]) < LIMIT
        if paired:
            assert record["chosen_ids"] != record["rejected_ids"]
        else:
            assert type(record["label"]) is bool
        spelled = row.get("prompt", "")
        if spelled and type(spelled) is str and all(type(v) is str for v in row.values()):
            whole = tokenizer.decode(record["prompt_ids"] + record[sides[0]])
            expected = spelled + (row["chosen"] if paired else row.get("completion", ""))
            if "completion" in row or paired:
                assert (expected + "<end>").startswith(whole.removesuffix("<end>"))
        batch = PreferenceCollator(paired=paired, max_length=LIMIT)([record] * 2)
        assert all(part.targets.numel() >= 0 for part in batch.parts)
    return made


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@settings(max_examples=300, **QUICK)
@given(row=pair)
def test_pairs(row, small_tokenizer):
    check_row(tokenize_pairs, row, small_tokenizer)


@settings(max_examples=100, **QUICK)
@given(row=pair)
def test_pairs_that_are_unpaired(row, small_tokenizer):
    check_row(tokenize_unpaired, row, small_tokenizer)


@settings(max_examples=150, **QUICK)
@given(row=unpaired)
def test_completions(row, small_tokenizer):
    check_row(tokenize_unpaired, row, small_tokenizer)


@settings(max_examples=150, **QUICK)
@given(row=st.one_of(pair_ids, unpaired_ids))
def test_rows_that_come_tokenised(row, small_tokenizer):
    tokenize = tokenize_pairs if "chosen_ids" in row else tokenize_unpaired
    check_row(tokenize, row, small_tokenizer)


def test_most_good_rows_are_taken(small_tokenizer):
    """The strategies above reach good rows, and the library does not refuse them all."""
    taken = []

    @settings(max_examples=60, **QUICK)
    @given(row=pair.filter(may_be_good))
    def run(row):
        taken.append(check_row(tokenize_pairs, row, small_tokenizer) is not None)

    run()
    assert sum(taken) > len(taken) / 3


# --- files ----------------------------------------------------------------------------------------

value = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**40), 2**40), st.text(max_size=4),
              st.sampled_from(["2024-01-01", "12:30", "NaN", "\u2028", "é", "🙂", "\x85"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2), st.dictionaries(st.sampled_from("xyz"), inner, max_size=2)
    ),
    max_leaves=4,
)  # fmt: skip
record = st.dictionaries(st.sampled_from(["prompt", "chosen", "a"]), value, min_size=1, max_size=3)
broken = st.sampled_from(
    [b"null", b"1", b'"x"', b"[]", b"{}", b"{", b'{"a": 1,}', b'{"a": "\xe9"}', b'{"a": 1, "a": 2}',
     b"\x00", b'{"a": "\\ud800"}', b"[" * 2000, b'{"a": NaN', b"\xff\xfe{", b"{'a': 1}"]
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz")
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = path / "cache"
    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    yield path
    datasets.config.HF_DATASETS_CACHE = before
    if shown:
        datasets.enable_progress_bars()


counter = iter(range(10**9))


def read(folder, name, body, packed=False):
    """The rows, or None where the file was refused by one line."""
    file = folder / f"{next(counter)}{name}{'.gz' if packed else ''}"
    file.write_bytes(gzip.compress(body) if packed else body)
    rows, refusal = result_of(lambda: load_rows(file).to_list())
    file.unlink()
    assert rows or refusal.startswith(f"{file}: ")
    return rows


def same(got, expected):
    """Equal but for keys and items that a table fills with None where a row has none."""
    if isinstance(expected, dict) and isinstance(got, dict):
        return all(same(got.get(k), v) for k, v in expected.items()) and all(
            v is None for k, v in got.items() if k not in expected
        )
    if isinstance(expected, list) and isinstance(got, list):
        return len(got) == len(expected) and all(map(same, got, expected))
    if isinstance(expected, float) and isinstance(got, float) and math.isnan(expected):
        return math.isnan(got)
    return type(got) is type(expected) and got == expected


@settings(max_examples=120, **QUICK)
@given(
    rows=st.lists(record, min_size=1, max_size=3),
    spelling=st.sampled_from(["lines", "lines", "list", "pretty", "bom"]),
    packed=st.booleans(),
    upper=st.booleans(),
)
def test_json_is_read_as_it_stands_or_refused(folder, rows, spelling, packed, upper):
    body = {
        "lines": "\n".join(map(json.dumps, rows)),
        "list": json.dumps(rows, ensure_ascii=False),
        "pretty": json.dumps(rows, indent=1),
        "bom": "\ufeff" + "\r\n".join(map(json.dumps, rows)),
    }[spelling]
    got = read(folder, ".JSON" if upper else ".jsonl", body.encode(), packed)
    assert got is None or same(got, rows), (rows, got)


@settings(max_examples=80, **QUICK)
@given(before=st.integers(0, 2), bad=broken, after=st.integers(0, 1))
def test_broken_json_is_refused(folder, before, bad, after):
    good = b'{"a": "x"}'
    assert read(folder, ".jsonl", b"\n".join([good] * before + [bad] + [good] * after)) is None


@settings(max_examples=60, **QUICK)
@given(
    body=st.binary(max_size=40), suffix=st.sampled_from([".jsonl", ".csv", ".parquet", ".json.zst"])
)
def test_any_bytes_are_refused_or_read(folder, body, suffix):
    got = read(folder, suffix, body)
    assert got is None or suffix == ".csv" or all(got)


cell = st.one_of(
    st.sampled_from(["", "1", "007", "yes", "NA", "1.50", "true", 'say "x"', "a,b", "a\nb", "é"]),
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=4),
)


@settings(max_examples=80, **QUICK)
@given(
    table=st.lists(st.lists(cell, min_size=2, max_size=2), min_size=1, max_size=3),
    extra=st.sampled_from([0, 0, 0, 1, -1]),
    packed=st.booleans(),
)
def test_csv_keeps_its_text_or_is_refused(folder, table, extra, packed):
    lines = [list(row) for row in table]
    lines[-1] = [*lines[-1], "more"] if extra > 0 else lines[-1][: len(lines[-1]) + extra]
    out = io.StringIO()
    csv.writer(out, quoting=csv.QUOTE_ALL).writerows([["prompt", "chosen"], *lines])
    got = read(folder, ".csv", out.getvalue().encode(), packed)
    if extra:
        assert got is None
    else:
        assert got == [dict(zip(["prompt", "chosen"], row, strict=True)) for row in table]
