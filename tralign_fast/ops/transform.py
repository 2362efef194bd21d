"""What stands between the LM head's product and the softmax.

The Triton kernels have the same in `tralign_kernels.logprob`: `fold`, `score`, `score_and_slope`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class LogitTransform:
    """Raw logits x to the scores z of the softmax, in fp32:

        s = scale · x;  s = softcap · tanh(s / softcap) if softcap;  z = s / temperature

    Args:
        scale: factor of the logits (Cohere, Granite).
        softcap: their cap (Gemma).
        temperature: what the scores are divided by, after the cap.

    Raises:
        ValueError: a softcap or a temperature that is not positive, a number that is not finite.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        positive = (self.temperature, 1.0 if self.softcap is None else self.softcap)
        if not all(0.0 < number < math.inf for number in positive):
            raise ValueError(
                f"softcap and temperature must be positive, got {self.softcap}, {self.temperature}"
            )
        if not -math.inf < self.scale < math.inf:
            raise ValueError(f"logit_scale must be finite, got {self.scale}")

    @classmethod
    def of_config(cls, config: Any) -> LogitTransform:
        """Of a model of transformers."""
        config = config.get_text_config()
        scale = getattr(config, "logit_scale", None)  # Cohere
        scaling = getattr(config, "logits_scaling", None)  # Granite divides
        if scale is None and scaling is not None:
            scale = 1.0 / scaling
        softcap = getattr(config, "final_logit_softcapping", None)  # Gemma-2, Gemma-3
        return cls(1.0 if scale is None else float(scale), softcap)

    @classmethod
    def of(cls, numbers: Sequence[float]) -> LogitTransform:
        """The inverse of `numbers`."""
        scale, softcap, temperature = numbers
        return cls(scale, softcap or None, temperature)

    def numbers(self) -> list[float]:
        """What an operator of `torch.library`, which takes plain types alone, gets for it."""
        return [float(self.scale), float(self.softcap or 0.0), float(self.temperature)]

    def options(self) -> dict[str, Any]:
        """The keywords of `linear_logprobs`."""
        return {
            "logit_scale": self.scale, "softcap": self.softcap, "temperature": self.temperature,
        }  # fmt: skip

    def kernel_options(self) -> dict[str, Any]:
        """The keywords of the Triton launchers."""
        return {
            "logit_scale": self.scale,
            "softcap": self.softcap,
            "inverse_temperature": self._inverse_temperature,
        }

    @property
    def _inverse_temperature(self) -> float:
        return 1.0 / self.temperature

    @property
    def factor(self) -> float:
        """dz/dx but for the cap; with one, of small logits."""
        return self.scale * self._inverse_temperature

    @property
    def is_identity(self) -> bool:
        return self.softcap is None and self.factor == 1.0

    def apply_(self, z: Tensor) -> Tensor:
        """Raw logits (fp32) to scores, in place."""
        if self.softcap is not None:
            z.mul_(self.scale / self.softcap).tanh_()
            return z.mul_(self.softcap * self._inverse_temperature)
        return z if self.factor == 1.0 else z.mul_(self.factor)

    def slope_of_cap(self, scores: Tensor) -> Tensor | None:
        """dz/dx over `factor`, in memory of its own; None without a cap."""
        if self.softcap is None:
            return None
        return 1 - (scores / (self.softcap * self._inverse_temperature)).square_()
