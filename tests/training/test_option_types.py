"""Options: every cell of the table is tried out, and one line names option, value and what was
expected. What they take is said here once more, by other means than in the library."""

from __future__ import annotations

import contextlib
import math
import warnings
from pathlib import Path

import pytest

pytest.importorskip("hypothesis")
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tralign_fast import TRConfig
from tralign_fast.command_line import parse
from tralign_fast.training import option_table
from tralign_fast.training.option_types import TAKEN, own_options
from tralign_fast.training.train_options import TrainOptions

ROOT = Path(__file__).parents[2]
QUICK = {
    "deadline": None,
    "database": None,
    "derandomize": True,
    "suppress_health_check": list(HealthCheck),
}
INF = math.inf
# name -> type, "?" if None is taken, and bounds; or words; or a function
UNIT = ("float", 0, 1, "[]")
POSITIVE = ("float", 0, INF, "()")
AMOUNT = ("float", 0, INF, "[)")
COUNT = ("int", 1, INF, "[)")
COUNT_OR_NONE = ("int?", 1, INF, "[)")
SEED = ("int", 0, 2**32 - 1, "[]")
ORDERS = ["random", "sequential", "group_by_length", "batch_rebalance"]


def losses(value):
    if value is None:
        return True
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not {"dpo", "ipo", "kto"}.issuperset(
        name for name in names if isinstance(name, str)
    ):  # fmt: skip
        return False
    return all(isinstance(n, str) for n in names) and (names == ["kto"] or "kto" not in names) and (
        len({*names}) == len(names)
    )  # fmt: skip


def steps(value):
    if not is_number(value):
        return False
    whole = 1 <= value < INF and value == value // 1
    return (None if value > 1e37 else True) if whole else 0 < value < 1


def json_table(value):
    return value is None or isinstance(value, dict) or value == '{"a": 1}'


def place(value):
    return value is None or (isinstance(value, str) and value.strip() != "")


def multiple(value):
    if value is None or value in ("auto", "none", "null"):
        return True
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    return is_number(number) and number >= 1 and number < INF and number == int(number)


SPEC = {
    "learning_rate": AMOUNT, "logging_steps": steps,
    "gradient_checkpointing": "bool",
    "gradient_checkpointing_layers": lambda v: v is None or (is_number(v) and v == 0) or steps(v),
    "bf16": "bool?", "loss_type": losses,
    "loss_weights": lambda v: v is None
    or (isinstance(v, list) and len(v) == 1 and is_number(v[0]) and 0 < v[0] < INF),
    "beta": POSITIVE, "label_smoothing": ("float?", 0, 0.5, "[)"), "discopop_tau": POSITIVE,
    "desirable_weight": AMOUNT, "undesirable_weight": AMOUNT,
    "loss_options": lambda v: v is None or v == {}, "length_normalized": "bool?",
    "f_divergence_type": ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"],
    "f_alpha_divergence_coef": ("float", -INF, INF, "()"), "ld_alpha": ("float?", 0, 1, "[]"),
    "use_weighting": "bool", "router_aux_loss_coef": ("float?", 0, INF, "[)"),
    "sync_ref_model": "bool?", "ref_model_mixup_alpha": UNIT,
    "ref_model_sync_steps": steps,
    "reference": ["auto", "resident", "snapshot", "offloaded", "adapter", "precomputed"],
    "adapter_tolerance": ("float", 0, 1, "[)"), "precompute_ref_log_probs": "bool",
    "precompute_ref_batch_size": COUNT_OR_NONE,
    "ema_rounding": ["nearest", "stochastic"], "train_sampling_strategy": [*ORDERS, None],
    "max_length": ("int?", 2, INF, "[)"), "truncation_mode": ["keep_start", "keep_end"],
    "pad_token": place,
    "on_bad_rows": ["drop_overlong", "drop", "error", "raise"],
    "dataset_num_proc": COUNT_OR_NONE, "prefix_sharing": "bool", "packing": "bool",
    "padding_free": "bool", "pad_to_multiple_of": multiple, "token_budget": COUNT_OR_NONE,
    "model_init_kwargs": json_table, "trust_remote_code": "bool", "activation_offloading": "bool",
    "disable_dropout": "bool",
    "gradient_release": "bool", "layer_kernels": ["auto", "liger", "none"],
    "logits_budget_mb": ("float?", 0, INF, "[)"), "vocab_filter": ("float?", 0, 1, "[)"),
    "kept": ["logits", "powers"],
    "cuda_graphs": "bool?", "log_kl_initial": "bool", "async_save": "bool",
    "overwrite_output_dir": "bool",
    # of TrainingArguments
    "output_dir": place, "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT, "gradient_accumulation_steps": COUNT,
    "num_train_epochs": POSITIVE,
    "max_steps": lambda v: is_number(v) and (v == -1 or (v >= 1 and steps(v))),
    "weight_decay": AMOUNT,
    "adam_beta1": ("float", 0, 1, "[)"), "adam_beta2": ("float", 0, 1, "[)"),
    "adam_epsilon": AMOUNT, "max_grad_norm": ("float?", 0, INF, "[)"), "warmup_steps": AMOUNT,
    "seed": SEED, "data_seed": ("int?", 0, 2**32 - 1, "[]"), "fp16": "bool",
    "eval_steps": lambda v: v is None or (is_number(v) and v == 0) or steps(v),
    "save_steps": lambda v: (is_number(v) and v == 0) or steps(v),
    "save_total_limit": ("int?", 0, INF, "[)"), "save_only_model": "bool",
    "load_best_model_at_end": "bool",
    "resume_from_checkpoint": lambda v: type(v) is bool or place(v), "use_liger_kernel": "bool",
    "torch_compile": "bool", "dataloader_num_workers": ("int", 0, INF, "[)"),
    "metric_for_best_model": place, "eval_accumulation_steps": COUNT_OR_NONE,
    "neftune_noise_alpha": ("float?", 0, INF, "[)"), "optim_args": place,
}  # fmt: skip
# what an option needs beside it
WITH = {
    "discopop_tau": {"loss_type": "discopop"},
    "desirable_weight": {"loss_type": "kto"}, "undesirable_weight": {"loss_type": "kto"},
    "f_alpha_divergence_coef": {"f_divergence_type": "alpha_divergence"},
    "reference": {"ref_model_mixup_alpha": 1.0}, "gradient_release": {"max_grad_norm": 0.0},
    "load_best_model_at_end": {"eval_strategy": "steps"},
}  # fmt: skip


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def fits(name, value):
    """Whether the option takes the value; None: a number beyond fp32, which it may."""
    spec = SPEC[name]
    if callable(spec):
        return spec(value)
    if isinstance(spec, list):
        return not isinstance(value, bool) and value in spec
    if isinstance(spec, str):
        return type(value) is bool or (value is None and spec == "bool?")
    kind, low, high, ends = spec
    if value is None:
        return kind.endswith("?")
    if not is_number(value) or abs(value) == INF:
        return False
    above = value >= low if ends[0] == "[" else value > low
    below = value <= high if ends[1] == "]" else value < high
    if not above or not below:
        return False
    if kind.startswith("int") and value != int(value):
        return False
    return None if value and not 1e-37 < abs(value) < 1e37 else True


def edges(name):
    """Values at both ends of a range, and just outside."""
    spec = SPEC[name]
    if not isinstance(spec, tuple):
        return []
    found = []
    for end in (e for e in spec[1:3] if abs(e) < INF):
        steps = [-1, 1] if spec[0].startswith("int") else []
        found += [end, *(end + step for step in steps)]
        if not steps:
            found += [math.nextafter(end, -INF), math.nextafter(end, INF), end - 1e-3, end + 1e-3]
    return found


def values(name):
    spec = SPEC[name]
    words = [w for w in spec if w] if isinstance(spec, list) else ["dpo", "ipo", "kto", "runs/a"]
    odd = [
        None, True, False, 0, 1, -1, 2, 0.5, 1.5, 4.0, math.nan, INF, -INF, 10**400, "", " ", "no",
        "off", "yes", "true", "0.1", "1", "1e-6", "nan", [], [1], [0.5], ["dpo"], ["dpo", "dpo"],
        {}, {"a": 1}, '{"a": 1}', "{a", [None], [[1]], 1e300, "Dpo",
    ]  # fmt: skip
    near = [*words, *(w.upper() for w in words), *(w[:-1] for w in words)]
    return st.one_of(
        st.sampled_from([*edges(name), *odd]), st.sampled_from([*edges(name), *near]),
        st.floats(), st.integers(-3, 2**33), st.text(max_size=4), st.floats(0, 1),
        st.lists(st.floats() | st.text(max_size=3), max_size=2),
    )  # fmt: skip


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def config(folder, **options):
    with quiet():
        return TRConfig(**{"output_dir": str(folder), "use_cpu": True, "report_to": [], **options})


def check(name, value, make, taken):
    """The option has the value, or one line names option, value and what was expected."""
    made, refusal = None, ""
    try:
        made = make()
    except ValueError as error:
        refusal = str(error)
    if made is None:
        assert not taken, refusal
        assert len(refusal.splitlines()) == 1
        if name != "loss_options" or not isinstance(value, dict):  # of which it names one
            assert f"{name}" in refusal
        if not isinstance(value, (list, str, dict)) and len(repr(value)) < 60:
            assert repr(value) in refusal or f"{value}" in refusal, refusal
        assert "expected" in refusal or "does not take" in refusal or "is not JSON" in refusal
        return
    assert taken is not False, "a silent success"
    kept = getattr(made, name)
    spec = SPEC[name]
    if isinstance(spec, tuple) and value is not None:
        assert type(kept) is (int if spec[0].startswith("int") else type(kept))
        assert math.isfinite(kept)
        assert isinstance(value, str) or kept == value


def test_every_option_is_in_the_table():
    assert [*SPEC] == [
        *own_options(TRConfig),
        *(n for n in TAKEN if n not in own_options(TRConfig)),
    ]


def test_the_page_is_what_the_config_makes():
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == option_table.page(), "make docs-config writes it anew"
    assert all(f"| `{name}` |" in page for name in SPEC)


@pytest.mark.parametrize("name", SPEC)
@settings(max_examples=16, **QUICK)
@given(data=st.data())
def test_an_option_is_taken_or_refused(name, data, tmp_path):
    value = data.draw(values(name))
    taken = fits(name, value)
    check(name, value, lambda: config(tmp_path, **{**WITH.get(name, {}), name: value}), taken)


@pytest.mark.parametrize("name", [name for name in SPEC if isinstance(SPEC[name], tuple)])
def test_both_ends_of_a_range(name, tmp_path):
    seen = set()
    for value in edges(name):
        taken = fits(name, value)
        seen.add(taken)
        check(name, value, lambda: config(tmp_path, **{**WITH.get(name, {}), name: value}), taken)  # noqa: B023
    assert {True, False} <= seen or name == "f_alpha_divergence_coef"


def read_as(name, value):
    """What a recipe's value is on the command line."""
    spec = SPEC[name]
    if name in ("logging_steps", "ref_model_sync_steps", "eval_steps", "save_steps"):
        spec = AMOUNT
    if name == "max_steps":
        spec = COUNT
    if not isinstance(value, str) or callable(spec) or isinstance(spec, list):
        return value
    words = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False,
             "t": True, "y": True, "f": False, "n": False}  # fmt: skip
    if isinstance(spec, str):
        return words.get(value.lower(), value)
    with contextlib.suppress(ValueError):
        return int(value) if spec[0].startswith("int") else float(value)
    return value


@pytest.mark.parametrize("name", SPEC)
@settings(max_examples=8, **QUICK)
@given(data=st.data())
def test_a_recipe_is_taken_or_refused(name, data, tmp_path):
    value = data.draw(values(name))
    given = {"model": "m", "dataset": "d", "output_dir": str(tmp_path), "use_cpu": True}
    given |= {"report_to": "none", **WITH.get(name, {}), name: value}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(given, allow_unicode=True), encoding="utf-8")
    value = yaml.safe_load(file.read_text(encoding="utf-8"))[name]

    def make():
        with quiet():
            return parse("train", [TrainOptions, TRConfig], ["--config", str(file)])[1]

    value = read_as(name, value)
    check(name, value, make, fits(name, value))


# --- options that contradict each other -----------------------------------------------------------

REFUSED = {
    "a soft snapshot": ({"reference": "snapshot"}, "needs ref_model_mixup_alpha=1"),
    "a loss twice": ({"loss_type": ["dpo", "dpo"]}, "loss_type: expected each loss once"),
    "a loss by two names": ({"loss_type": ["dpo", "sigmoid"]}, "loss_type: expected each loss"),
    "of another loss": ({"discopop_tau": 0.1}, "discopop_tau: the loss dpo does not take it"),
    "of pairs alone": ({"loss_type": "kto", "ld_alpha": 0.5}, "ld_alpha: kto takes no pairs"),
    "weights of no pairs": ({"loss_type": "kto", "use_weighting": True}, "use_weighting: kto"),
    "a sorted batch in parts": (
        {"loss_type": "aot", "token_budget": 9}, "token_budget: aot sorts the pairs"
    ),
    "α of another divergence": ({"f_alpha_divergence_coef": 0.3}, "f_alpha_divergence_coef:"),
    "a field in loss_options": ({"loss_options": {"beta": 1}}, "beta is an option of its own"),
    "a classifier's smoothing": ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: exp"),
    "the best of none": ({"load_best_model_at_end": True}, "load_best_model_at_end=True: expected"),
    "the best at other times": (
        {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "epoch"},
        "load_best_model_at_end=True: expected checkpoints when",
    ),
    "release and clipping": ({"gradient_release": True}, "max_grad_norm=1.0 needs every gradient"),
    "release and accumulation": (
        {"gradient_release": True, "max_grad_norm": 0.0, "gradient_accumulation_steps": 2},
        "expected gradient_accumulation_steps=1, got 2",
    ),
    "release and parts": (
        {"gradient_release": True, "max_grad_norm": 0.0, "token_budget": 9}, "token_budget splits"
    ),
    "both precisions": ({"fp16": True, "bf16": True}, "fp16 and bf16"),
    "Liger's head": (
        {"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": True}},
        "liger_kernel_config: fused_linear_cross_entropy",
    ),
    "Liger's kernel of another name": (
        {"layer_kernels": "liger", "liger_kernel_config": {"rotary": False}},
        "expected some of rms_norm, swiglu, geglu, rope, got 'rotary'",
    ),
    "the rows' own tensors for metrics": (
        {"include_for_metrics": ["inputs"]}, "include_for_metrics: expected no inputs"
    ),
    "an order that no seed knows": (
        {"accelerator_config": {"use_seedable_sampler": False}}, "use_seedable_sampler true"
    ),
    "Liger and none": (
        {"use_liger_kernel": True, "layer_kernels": "none"}, "use_liger_kernel=True contradicts"
    ),
}  # fmt: skip
FROZEN = {"sync_ref_model": False}
NO_EFFECT = {
    "α of a frozen one": ({**FROZEN, "ref_model_mixup_alpha": 0.9}, "ref_model_mixup_alpha=0.9"),
    "τ of a frozen one": ({**FROZEN, "ref_model_sync_steps": 7}, "ref_model_sync_steps=7"),
    "rounding of a frozen one": ({**FROZEN, "ema_rounding": "nearest"}, "ema_rounding='nearest'"),
    "τ of α = 0": (
        {"ref_model_mixup_alpha": 0.0, "ref_model_sync_steps": 6}, "ref_model_sync_steps=6"
    ),
    "rounding of a copy": (
        {"ref_model_mixup_alpha": 1.0, "ema_rounding": "nearest"}, "copies weights as they are"
    ),
    "an adapter's tolerance elsewhere": (
        {"reference": "resident", "adapter_tolerance": 0.1}, "adapter_tolerance=0.1 has no effect"
    ),
    "a window of none": (
        {"reference": "resident", "precompute_ref_batch_size": 4}, "precompute_ref_batch_size=4"
    ),
    "a window in parts": (
        {"token_budget": 8, "precompute_ref_batch_size": 5}, "precompute_ref_batch_size=5"
    ),
    "less than a batch": ({"precompute_ref_batch_size": 3}, "in whole batches"),
    "a budget of padded rows": (
        {"packing": False, "token_budget": 77}, "token_budget=77 counts tokens without padding"
    ),
    "a divisor of nothing": (
        {"loss_type": "sft", "length_normalized": True}, "length_normalized=True has no effect"
    ),
    "KL never evaluated": ({"log_kl_initial": True}, "log_kl_initial=True has no effect"),
    "evaluations never": ({"eval_steps": 11}, "eval_steps=11 has no effect"),
    "checkpoints never": (
        {"save_strategy": "no", "save_steps": 12}, "save_steps=12 has no effect"
    ),
    "checkpoints beside none": (
        {"save_strategy": "no", "async_save": True}, "async_save=True has no effect"
    ),
    "logs never": ({"logging_strategy": "no", "logging_steps": 3}, "logging_steps=3 has no effect"),
    "a warm-up of a constant": (
        {"lr_scheduler_type": "constant", "warmup_steps": 9}, "warmup_steps=9 has no effect"
    ),
    "fp16 of no GPU": ({"fp16": True}, "fp16=True has no effect"),
    "graphs of no GPU": ({"cuda_graphs": True}, "cuda_graphs=True has no effect: graphs are of a"),
    "how many of none": (
        {"save_strategy": "no", "save_total_limit": 2}, "save_total_limit=2 has no effect"
    ),
    "fp16 without a GPU": ({"fp16": True}, "fp16=True has no effect"),
    "Liger's options without it": (
        {"liger_kernel_config": {"rope": True}}, "liger_kernel_config={'rope': True}"
    ),
    "checkpointing's without it": (
        {"gradient_checkpointing": False, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        "gradient_checkpointing_kwargs=",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_contradictions_are_refused(case, tmp_path):
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        config(tmp_path, **options)
    assert message in str(caught.value)


def warned(folder, **options):
    from tralign_fast.ops.backend import warn_once

    warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        TRConfig(str(folder), use_cpu=True, report_to=[], **options)
    return [str(w.message) for w in caught if w.category is UserWarning]


@pytest.mark.parametrize("case", NO_EFFECT)
def test_what_has_no_effect_is_said(case, tmp_path):
    options, message = NO_EFFECT[case]
    (line,) = [line for line in warned(tmp_path, **options) if message in line]
    assert "\n" not in line


def test_nothing_is_said_of_defaults(tmp_path):
    assert warned(tmp_path) == []
    assert warned(tmp_path, sync_ref_model=False) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": "0.1"}, r"beta: expected a finite number, got '0.1'"),
        ({"loss_type": ["exo_pair", "dpo"]}, "label_smoothing: the losses exo_pair, dpo have"),
        ({"max_length": 4.5}, "max_length: expected a whole number ≥ 2 or nothing, got 4.5"),
        ({"reference": "residnet"}, "got 'residnet'; did you mean 'resident'?"),
        ({"loss_type": 3}, "loss_type: expected a list of words or .*, got 3"),
        ({"ref_model_mixup_alpha": True}, r"ref_model_mixup_alpha: expected a number in \[0, 1\]"),
        ({"max_steps": 0}, "max_steps: expected a whole number ≥ 1, or -1, got 0"),
        ({"num_train_epochs": 0}, "num_train_epochs: expected a number > 0, got 0"),
        ({"seed": -1}, r"seed: expected a whole number in \[0, 4294967295\], got -1"),
        ({"model_init_kwargs": "{a"}, "model_init_kwargs: expected JSON"),
        ({"lr_scheduler_kwargs": "{a"}, "lr_scheduler_kwargs: expected JSON"),
    ],
)
def test_a_wrong_value_is_named(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_whole_floats_are_whole_numbers(tmp_path):
    import numpy

    assert config(tmp_path, max_length=64.0).max_length == 64
    assert type(config(tmp_path, ref_model_sync_steps=8.0).ref_model_sync_steps) is int
    assert config(tmp_path, beta=numpy.float32(0.5)).beta == 0.5
    assert type(config(tmp_path, max_length=numpy.int64(9)).max_length) is int


def test_a_path_is_a_folder(tmp_path):
    """As `TrainingArguments` and TRL's configs take it."""
    assert config(tmp_path).output_dir == str(tmp_path)
    made = TRConfig(tmp_path / "run", use_cpu=True, report_to=[])
    assert made.output_dir == str(tmp_path / "run")
