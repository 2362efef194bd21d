"""What a model card says about the trust region."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from tralign_fast.training.config import TRConfig

CITATION = """@misc{gorbatovski2024learn,
    title         = {Learn Your Reference Model for Real Good Alignment},
    author        = {Alexey Gorbatovski and Boris Shaposhnikov and Alexey Malakhov and Nikita Surnachev and Yaroslav Aksenov and Ian Maksimov and Nikita Balagansky and Daniil Gavrilov},
    year          = {2024},
    eprint        = {2404.09656},
    archivePrefix = {arXiv},
    primaryClass  = {cs.LG},
}"""  # noqa: E501
_HEADING = "## Trust region"


def add_trust_region(file: Path, args: TRConfig, reference: str) -> None:
    """Adds the section and the tags to a model card; replaces a section that is there.

    Args:
        file: the card, as `transformers.Trainer.create_model_card` wrote it.
        reference: where the reference lived (`ReferencePolicy.name`).
    """
    card = ModelCard.load(file)
    method = {"dpo": "TR-DPO", "sigmoid": "TR-DPO", "ipo": "TR-IPO", "kto": "TR-KTO"}
    name, schedule = method[args.loss_type], args.trust_region
    if schedule.is_frozen:
        name, moves = name.removeprefix("TR-"), "frozen"
    else:
        moves = f"α = {schedule.alpha}, every τ = {schedule.every} steps"
    rows = {
        "method": name, "reference": f"{moves} (held: {reference})", "β": args.beta,
        "log-probs": "divided by length" if args.normalizes_length else "summed",
        **{option: getattr(args, option) for option in args.loss_spec.options if option != "beta"},
    }  # fmt: skip
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    section = (
        f"{_HEADING}\n\nTrained with tralign-fast, after [Learn Your Reference Model for Real Good "
        f"Alignment](https://arxiv.org/abs/2404.09656).\n\n| | |\n|---|---|\n{table}\n\n"
        f"```bibtex\n{CITATION}\n```\n"
    )
    data: Any = card.data
    data.tags = sorted({*(data.tags or []), "tralign-fast", name.lower()})
    card.text = f"{card.text.split(_HEADING)[0].rstrip()}\n\n{section}"
    card.save(file)
