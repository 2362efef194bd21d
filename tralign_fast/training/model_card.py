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
    objective, schedule = args.objective, args.trust_region
    name = objective.title
    if schedule.is_frozen:
        moves = "frozen"
    else:
        name = f"TR-{name}"
        moves = f"α = {schedule.alpha}, every τ = {schedule.every} steps"
    divided = {objective.normalizes(spec) for spec in objective.specs}
    rows = {
        "method": name, "reference": f"{moves} (held: {reference})", "β": objective.beta,
        "log-probs": " and ".join("divided by length" if d else "summed" for d in sorted(divided)),
        **{option: value for option, value in objective.options.items() if option != "beta"},
        **{option: value for option, value in _others(args).items() if value},
    }  # fmt: skip
    papers = {spec.paper.arxiv: spec.paper for spec in objective.specs}
    citations = "\n\n".join([CITATION, *(paper.bibtex for paper in papers.values())])
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    section = (
        f"{_HEADING}\n\nTrained with tralign-fast, after [Learn Your Reference Model for Real Good "
        f"Alignment](https://arxiv.org/abs/2404.09656).\n\n| | |\n|---|---|\n{table}\n\n"
        f"```bibtex\n{citations}\n```\n"
    )
    data: Any = card.data
    tags = {spec.title.lower().replace(" ", "-") for spec in objective.specs}
    tags = tags if schedule.is_frozen else {f"tr-{tag}" for tag in tags}
    data.tags = sorted({*(data.tags or []), "tralign-fast", *tags})
    card.text = f"{card.text.split(_HEADING)[0].rstrip()}\n\n{section}"
    card.save(file)


def _others(args: TRConfig) -> dict[str, Any]:
    """What changes the objective beside its losses' own options."""
    divergence = args.f_divergence_type
    return {
        "f_divergence_type": divergence if divergence != "reverse_kl" else None,
        "f_alpha_divergence_coef": (
            args.f_alpha_divergence_coef if divergence == "alpha_divergence" else None
        ),
        "ld_alpha": None if args.ld_alpha is None else str(args.ld_alpha),
        "use_weighting": args.use_weighting,
    }
