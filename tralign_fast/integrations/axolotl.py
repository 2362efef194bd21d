"""A plugin of axolotl: `plugins: [tralign_fast.integrations.axolotl.TrustRegionPlugin]`."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin  # pyright: ignore[reportMissingImports]
from pydantic import BaseModel

from tralign_fast.integrations.callback import HoldingTrainer, TrustRegionCallback


class TrustRegionArgs(BaseModel):
    """What the plugin adds to axolotl's config: the schedule of the reference (`TrustRegion`)."""

    trust_region_alpha: float = 0.6
    trust_region_every: int = 512


class TrustRegionPlugin(BasePlugin):
    """Adds `TrustRegionCallback` to the trainer that axolotl builds (`rl: dpo`, `ipo`, `kto`)."""

    def get_input_args(self) -> str:
        return "tralign_fast.integrations.axolotl.TrustRegionArgs"

    def add_callbacks_post_trainer(
        self, cfg: Any, trainer: HoldingTrainer
    ) -> list[TrustRegionCallback]:
        return [
            TrustRegionCallback(cfg.trust_region_alpha, cfg.trust_region_every, trainer=trainer)
        ]
