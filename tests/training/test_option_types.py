"""Options of a wrong type: one line that names option, value and what was expected."""

from __future__ import annotations

import dataclasses
import math
import typing

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tralign_fast import TRConfig, cli

OWN = sorted(
    n for n in TRConfig.__annotations__ if n in {f.name for f in dataclasses.fields(TRConfig)}
)
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.floats(), st.text(max_size=5),
    st.lists(st.floats() | st.text(max_size=3), max_size=2), st.just({"a": 1}), st.just(b"x"),
)  # fmt: skip


def config(folder, **options):
    return TRConfig(str(folder), use_cpu=True, report_to=[], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": "0.1"}, r"beta: expected a finite number, got '0.1'"),
        ({"beta": 10**400}, "beta: expected a finite number, got 1000"),
        ({"loss_options": {"beta": 0.3}}, "loss_options: beta is an option of its own"),
        ({"loss_type": ["exo_pair", "dpo"]}, "label_smoothing: the losses exo_pair, dpo have"),
        ({"beta": [0.1]}, r"beta: expected a finite number, got \[0.1\]"),
        ({"prefix_sharing": "no"}, "prefix_sharing: expected true or false, got 'no'"),
        ({"sync_ref_model": 1}, "sync_ref_model: expected true or false or nothing, got 1"),
        ({"max_length": 4.5}, "max_length: expected a whole number or nothing, got 4.5"),
        ({"logits_budget_mb": math.nan}, "logits_budget_mb: expected a finite number, got nan"),
        ({"reference": None}, "reference: expected a word, got None"),
        ({"loss_type": 3}, "loss_type: expected a list of words or a word, got 3"),
        ({"ref_model_mixup_alpha": True}, "ref_model_mixup_alpha: expected a finite number"),
    ],
)
def test_a_wrong_type_is_named(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_whole_floats_are_whole_numbers(tmp_path):
    assert config(tmp_path, max_length=64.0).max_length == 64
    assert type(config(tmp_path, ref_model_sync_steps=8.0).ref_model_sync_steps) is int


@pytest.mark.parametrize("name", OWN)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(value=ODD)
def test_every_option_takes_its_type_or_says_so(name, value, tmp_path):
    """Of anything: the config has it, in the declared type, or one line names the option."""
    made, refusal = None, ""
    try:
        made = config(tmp_path, **{name: value})
    except ValueError as error:
        refusal = str(error)
    if made is None:
        assert "\n" not in refusal
        assert name in refusal or "loss" in refusal, (name, value, refusal)
        return
    kept = getattr(made, name)
    hint = typing.get_type_hints(TRConfig)[name]
    kinds = typing.get_args(hint) or (hint,)
    plain = tuple(typing.get_origin(kind) or kind for kind in kinds)
    assert isinstance(kept, plain) or (float in plain and isinstance(kept, int)), (name, kept)
    assert not (isinstance(kept, float) and not math.isfinite(kept))


def test_a_key_that_stands_twice_is_refused(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("beta: 0.1\nmax_steps: 3\nbeta: 0.5\n")
    assert cli.main(["train", "--config", str(recipe)]) == 2
    assert "the option beta stands there twice" in capsys.readouterr().err
