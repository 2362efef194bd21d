"""Names for those who come from TRL's DPOTrainer and KTOTrainer: other defaults, nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field

from tralign_fast.training.config import Losses, TRConfig
from tralign_fast.training.trainer import TRTrainer


@dataclass
class TRDPOConfig(TRConfig):
    """`TRConfig` with `loss_type="dpo"`."""

    loss_type: Losses = field(
        default="dpo", metadata={"help": "A loss of pairs, or several that are added up."}
    )


@dataclass
class TRKTOConfig(TRConfig):
    """`TRConfig` with `loss_type="kto"`."""

    loss_type: Losses = field(
        default="kto", metadata={"help": "A loss of completions with a label."}
    )


@dataclass
class TRFrozenDPOConfig(TRDPOConfig):
    """`TRDPOConfig` with TRL's default of the reference, for parsers of command lines: it stands
    still unless `sync_ref_model=True`."""

    sync_ref_model: bool | None = field(default=False, metadata={"help": "Move the reference."})


@dataclass
class TRFrozenKTOConfig(TRKTOConfig):
    """`TRKTOConfig` with TRL's default of the reference, for parsers of command lines: it stands
    still unless `sync_ref_model=True`."""

    sync_ref_model: bool | None = field(default=False, metadata={"help": "Move the reference."})


class TRDPOTrainer(TRTrainer):
    """`TRTrainer` for losses of pairs: DPO where `loss_type` is open, whatever the rows."""

    method = "dpo"


class TRKTOTrainer(TRTrainer):
    """`TRTrainer` for KTO and its like: KTO where `loss_type` is open; pairs are unpaired."""

    method = "kto"
