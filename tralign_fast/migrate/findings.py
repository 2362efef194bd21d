"""What a script of TRL computes otherwise here, and what of it cannot be kept; by line."""

from __future__ import annotations

import ast
import warnings
from typing import Any

from tralign_fast.migrate.bindings import Binding, of_trl
from tralign_fast.migrate.options import (
    METHODS,
    OLD_OF_TRAINERS,
    OVERRIDES_ONLY,
    is_trls_collator,
    known_options,
    old_options,
)
from tralign_fast.migrate.report import Migration
from tralign_fast.migrate.source import Source
from tralign_fast.training.option_types import nearest

# of a machine and its packages, and not of what is computed
_ELSEWHERE = {"bf16", "fp16", "torch_compile", "use_liger_kernel", "resume_from_checkpoint"}
_TRAINER_KEYWORDS = {
    "model", "ref_model", "args", "data_collator", "train_dataset", "eval_dataset",
    "processing_class", "compute_metrics", "callbacks", "optimizers", "quantization_config",
    "peft_config", "preprocess_logits_for_metrics",
}  # fmt: skip
_VISION = {"AutoModelForImageTextToText", "AutoModelForVision2Seq"}


def findings(source: Source, found: dict[str, Binding], done: Migration) -> None:
    """Adds a line for each thing that whoever runs the migrated script has to know."""
    trainers = [b for b in found.values() if not b.is_config]
    configs = [b for b in found.values() if b.is_config]
    for binding in configs:
        for call in _calls(source, binding):
            _config_call(call, binding.theirs, done)
    for binding in trainers:
        for call in _calls(source, binding):
            _trainer_call(call, done)
    _own_classes(source, trainers, done)
    _own_uses(source, trainers, done)
    _elsewhere(source, found, done)
    _of_the_parser(configs, done)
    if not any("bf16" in _names(call) for b in configs for call in _calls(source, b)):
        done.changes(
            "bf16: on an accelerator as in TRL; a CPU computes in fp32 unless bf16=True, where TRL "
            "takes bf16"
        )
    if any(binding.theirs.startswith("KTO") for binding in found.values()):
        done.changes(
            "KTO, evaluation on a stream: the KL term pairs prompts and completions of an "
            "evaluation's batch, TRL of per_device_train_batch_size rows; a Dataset is as in TRL"
        )
    done.changes(
        "steps whose loss or gradients are not finite are left out (tr/skipped_steps); TRL trains "
        "on them"
    )
    done.same.append(
        "losses, order of the rows, auxiliary loss of experts, num_tokens and the other metrics, "
        "as TRL 1.16 has them"
    )


def _calls(source: Source, binding: Binding) -> list[ast.Call]:
    parents = [(node, source.parents[node]) for node in binding.uses]
    return [call for node, call in parents if isinstance(call, ast.Call) and call.func is node]


def _names(call: ast.Call) -> set[str]:
    return {keyword.arg or "**" for keyword in call.keywords}


# --- calls ----------------------------------------------------------------------------------------


def _config_call(call: ast.Call, theirs: str, done: Migration) -> None:
    values: dict[str, Any] = {}
    for keyword in call.keywords:
        name, line = keyword.arg, keyword.value.lineno
        if name is None:
            done.loses(f"line {line}: options in a table are not looked into: **{_short(keyword)}")
        elif (old := old_options().get(name)) is not None:
            if old.name is not None:
                continue
            kept = "left out" if old.can_go(keyword.value) else "to be changed by hand"
            off = isinstance(keyword.value, ast.Constant) and not keyword.value.value
            if not off:
                done.loses(f"line {line}: {name}: {kept}; {old.say}")
        elif name not in known_options():
            near = nearest(name, known_options())
            hint = f"; {near} is one" if near else ""
            done.loses(f"line {line}: {name}: TRConfig has no such option{hint}")
        else:
            try:
                values[name] = ast.literal_eval(keyword.value)
            except (ValueError, TypeError, SyntaxError, RecursionError):
                continue
    as_ours(values, theirs, f"line {call.lineno}: ", done)
    if values.get("train_sampling_strategy") == "group_by_length":
        done.changes(
            f"line {call.lineno}: train_sampling_strategy: rows of like length come in an order of "
            "seed and epoch, TRL's in another"
        )
    if values.get("sync_ref_model") is True:
        done.changes(
            f"line {call.lineno}: sync_ref_model=True: a reference in bf16 or fp16 is rounded "
            'stochastically, so that it arrives; ema_rounding="nearest" rounds once, TRL twice'
        )


def as_ours(values: dict[str, Any], theirs: str, place: str, done: Migration) -> None:
    """What `TRConfig` itself says of the options that are written out."""
    from tralign_fast.ops.backend import warn_once
    from tralign_fast.training.aliases import TRDPOConfig, TRKTOConfig
    from tralign_fast.training.config import TRConfig
    from tralign_fast.training.option_types import TAKEN, own_options

    fields: Any = TRConfig
    checked = {*own_options(fields), *TAKEN, "eval_strategy", "save_strategy"} - _ELSEWHERE
    given = {name: value for name, value in values.items() if name in checked}
    given = {"sync_ref_model": False, "output_dir": "tr-output", **given, "use_cpu": True}
    warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            {"KTOConfig": TRKTOConfig, "DPOConfig": TRDPOConfig}.get(theirs, TRConfig)(**given)
        except ValueError as error:
            done.loses(f"{place}refused: {' '.join(str(error).split())}")
        except (TypeError, ImportError):
            pass  # of an option of transformers, which a run would tell, too
    warn_once.cache_clear()
    for warning in said:
        if "tralign_fast" in warning.filename and "has no effect" not in str(warning.message):
            done.changes(f"{place}{warning.message}")


def _trainer_call(call: ast.Call, done: Migration) -> None:
    for keyword in call.keywords:
        name, line = keyword.arg, keyword.value.lineno
        if name is None:
            done.loses(f"line {line}: keywords in a table are not looked into: **{_short(keyword)}")
        elif name == "data_collator":
            _collator(keyword, line, done)
        elif name == "compute_metrics":
            done.changes(
                f"line {line}: compute_metrics gets an EvalPrediction of rewards, (rows, 2) or "
                "(rows,), where TRL computes logits for it"
            )
        elif (old := OLD_OF_TRAINERS.get(name)) is not None:
            if old.name is None:
                kept = "left out" if old.can_go(keyword.value) else "to be changed by hand"
                done.loses(f"line {line}: {name}: {kept}; {old.say}")
        elif name not in _TRAINER_KEYWORDS:
            near = nearest(name, _TRAINER_KEYWORDS)
            hint = f"; {near} is one" if near else ""
            done.loses(f"line {line}: {name}: TRTrainer has no such keyword{hint}")


def _collator(keyword: ast.keyword, line: int, done: Migration) -> None:
    if isinstance(keyword.value, ast.Constant):
        return
    theirs = is_trls_collator(keyword.value)
    kept = "left out, as TRL's is not needed" if theirs else "to be taken out by hand"
    done.loses(
        f"line {line}: data_collator: {kept}: batches are PackedBatch here, pad_to_multiple_of and "
        "max_length are options of the config"
    )


def _short(keyword: ast.keyword) -> str:
    text = ast.unparse(keyword.value)
    return text if len(text) < 40 else f"{text[:37]}..."


# --- the rest of a script -------------------------------------------------------------------------


def _own_classes(source: Source, trainers: list[Binding], done: Migration) -> None:
    """Subclasses of a trainer, and what they replace."""
    uses = {node for binding in trainers for node in binding.uses}
    for node in source.walk(ast.ClassDef):
        if not uses & {*node.bases}:
            continue
        for call in source.walk(ast.Call):
            named = isinstance(call.func, ast.Name) and call.func.id == node.name
            if named and len(call.args) < 3 and not _names(call) & {"args", "**"}:
                done.loses(
                    f"line {call.lineno}: {node.name} gets no args, and its reference moves then: "
                    "pass a config with sync_ref_model=False"
                )
        for method in node.body:
            name = getattr(method, "name", "")
            if name in METHODS:
                done.loses(
                    f"line {method.lineno}: {node.name}.{name} overrides what is not there, or "
                    f"gets a PackedBatch: {METHODS[name]}"
                )


def _own_uses(source: Source, trainers: list[Binding], done: Migration) -> None:
    """Attributes of trainers that TRTrainer has not."""
    calls = {call for binding in trainers for call in _calls(source, binding)}
    names = {
        target.id
        for node in source.walk(ast.Assign)
        if node.value in calls
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in source.walk(ast.Attribute):
        known = isinstance(node.value, ast.Name) and node.value.id in names
        if known and node.attr in METHODS and node.attr not in OVERRIDES_ONLY:
            done.loses(f"line {node.lineno}: {ast.unparse(node)}: {METHODS[node.attr]}")


def _elsewhere(source: Source, found: dict[str, Binding], done: Migration) -> None:
    for node in source.walk(ast.Name):
        if node.id in _VISION:
            done.loses(
                f"line {node.lineno}: {node.id}: rows of images are refused, rows of text train; "
                "TRL's DPOTrainer with use_fast_logprobs reads images"
            )
            break
    for node in source.walk(ast.ImportFrom):
        names = {alias.name for alias in node.names}
        if of_trl(node.module) and "SyncRefModelCallback" in names:
            done.loses(
                f"line {node.lineno}: SyncRefModelCallback: to be taken out by hand; the trainer "
                "moves the reference itself, sync_ref_model=True"
            )
        if str(node.module).startswith("tralign_fast.integrations"):
            done.loses(
                f"line {node.lineno}: {node.module}: to be taken out by hand; TRTrainer has its "
                "fused head and its moving reference without"
            )
    for node in source.walk(ast.Constant):
        listed = isinstance(source.parents.get(node), (ast.List, ast.Tuple))  # as of __all__
        if node.value in {binding.theirs for binding in found.values()} and not listed:
            done.loses(f"line {node.lineno}: the word {node.value!r} stays as it is")
    header = source.text.split("# ///")
    if len(header) > 2 and '"trl' in header[1]:
        line = header[0].count("\n") + 1
        done.loses(f"line {line}: dependencies of the script's header: add tralign-fast by hand")


def _of_the_parser(configs: list[Binding], done: Migration) -> None:
    if any(binding.as_value for binding in configs):
        done.changes(
            "options of a command line keep TRL's names; --label_smoothing with sigmoid is "
            "conservative DPO, where TRL ignores it"
        )
