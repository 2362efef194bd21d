"""`tralign-fast demo | train | plan`: one line and exit code 2 for whatever cannot be run."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from typing import Any


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tralign-fast", description="Preference alignment with a moving reference."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="demo | train | plan")
    commands.add_parser(
        "demo", add_help=False, help="align a small chat model on this machine's CPU, in minutes"
    )
    commands.add_parser(
        "train",
        add_help=False,
        help="align a model of yours: --config recipe.yaml [--option value]",
    )
    commands.add_parser(
        "plan",
        add_help=False,
        help="does a training fit a GPU? --model llama-3.1-8b --gpu-memory 24GiB",
    )
    arguments = sys.argv[1:] if argv is None else argv
    chosen, rest = parser.parse_known_args(arguments[:1])[0], arguments[1:]
    try:
        return {"demo": _demo, "train": _train, "plan": _plan}[chosen.command](rest)
    except (ValueError, ImportError) as error:
        print(f"tralign-fast: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tralign-fast: interrupted", file=sys.stderr)
        return 130


def _demo(arguments: list[str]) -> int:
    from tralign_fast.demo.run import DemoOptions, run_demo

    return run_demo(_parse("demo", [DemoOptions], arguments)[0])


@dataclass
class TrainOptions:
    """What to train on what."""

    model: str = field(metadata={"help": "Hub id or folder of the policy."})
    dataset: str = field(metadata={"help": "File (jsonl, parquet, csv), folder or hub id."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset."})
    eval_dataset: str | None = field(default=None, metadata={"help": "As dataset; None: none."})
    eval_split: str = field(default="test", metadata={"help": "Split of the eval dataset."})
    resume: bool = field(
        default=False, metadata={"help": "Go on from the last checkpoint in output_dir."}
    )


def _train(arguments: list[str]) -> int:
    from tralign_fast import TRConfig, TRTrainer
    from tralign_fast.data import load_rows
    from tralign_fast.training.checkpoints import check_output_dir

    options, config = _parse("train", [TrainOptions, TRConfig], arguments)
    checkpoint = _checkpoint(options.resume, config.resume_from_checkpoint)
    if not checkpoint and not config.overwrite_output_dir:
        check_output_dir(config.output_dir)  # before hours of loading
    rows = load_rows(options.dataset, options.dataset_split)
    held_out = load_rows(options.eval_dataset, options.eval_split) if options.eval_dataset else None
    trainer = TRTrainer(options.model, args=config, train_dataset=rows, eval_dataset=held_out)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.create_model_card()
    return 0


def _checkpoint(resume: bool, given: str | None) -> str | bool | None:
    """What to go on from: a folder, True for the newest whole checkpoint, None for nothing."""
    words = {"true": True, "yes": True, "1": True, "false": None, "no": None, "0": None}
    named = None if given is None else words.get(given.lower(), given)
    return named or (True if resume else None)


def _plan(arguments: list[str]) -> int:
    from tralign_fast.memory.plan import PlanOptions, run_plan

    return run_plan(_parse("plan", [PlanOptions], arguments)[0])


def _parse(command: str, classes: list[Any], arguments: list[str]) -> Any:
    """Dataclasses from a YAML file (--config) and the command line, which wins."""
    import yaml
    from transformers import HfArgumentParser

    parser = HfArgumentParser(classes, prog=f"tralign-fast {command}")
    known = {action.dest for action in parser._actions}
    own = _own_loss_options(known)
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--config")
    for name in own:  # in both: one reads them, the other's help shows them
        first.add_argument(f"--{name}", type=float)
        help = f"An option of {', '.join(own[name])}; goes into loss_options."
        parser.add_argument(f"--{name}", type=float, default=argparse.SUPPRESS, help=help)
    given, rest = first.parse_known_args(arguments)
    values = {name: getattr(given, name) for name in own}
    if given.config is not None:
        try:
            with open(given.config, encoding="utf-8") as file:
                recipe = yaml.load(file, _unique_keys(yaml.SafeLoader))
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"--config {given.config}: {error}") from error
        if not isinstance(recipe, dict):
            raise ValueError(f"--config {given.config}: expected lines of `option: value`")
        values = {name: recipe.pop(name, None) if v is None else v for name, v in values.items()}
        unknown = sorted({str(key) for key in recipe} - (known - {"help"}))
        if unknown:
            raise ValueError(f"--config {given.config}: unknown options {', '.join(unknown)}")
        for action in parser._actions:
            if action.dest in recipe:
                action.required = False
        parser.set_defaults(**recipe)
    values = {name: value for name, value in values.items() if value is not None}
    if values:
        rest = [*rest, "--loss_options", json.dumps(values)]
    return parser.parse_args_into_dataclasses(rest)


def _unique_keys(base: Any) -> Any:
    """A YAML loader that refuses a key that stands twice, of which it would take the last."""
    import yaml

    class Loader(base):
        def construct_mapping(self, node, deep=False):
            keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
            twice = [key for key in keys if keys.count(key) > 1]
            if twice:
                raise yaml.YAMLError(f"the option {twice[0]} stands there twice")
            return super().construct_mapping(node, deep)

    return Loader


def _own_loss_options(known: set[str]) -> dict[str, list[str]]:
    """Options of registered losses that have no field of their own, and the losses that take them;
    `loss_options` holds them."""
    from tralign_fast import LOSSES

    own: dict[str, list[str]] = {}
    for loss, spec in LOSSES.items() if "loss_options" in known else ():
        for option in spec.options:
            if option.name not in known:
                own.setdefault(option.name, []).append(loss)
    return own


if __name__ == "__main__":
    sys.exit(main())
