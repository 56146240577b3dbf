"""How fast an engine computes, learnt from the engine's own steps.

A step that computes n tokens behind s others takes a + b * n + c * n * (s + n / 2): what a step costs at all, what every
token costs, and attention, which grows with what a token looks back on. The features of the requests of a step add up, so a
step of many requests, a chunk of a long prompt and decoding beside it all teach the same three numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvstore.policy.fit import OnlineFit

PRIOR = (0.005, 33e-6, 33e-6 / 32_000)
"""An 8B model on an H100 (5 ms a step, 30k tokens/s, half of that at 64k tokens): the shape from which learning starts."""

MEMORY = 200.0
"""Steps."""

LEAST_TOKENS = 32
"""Steps that compute fewer teach nothing of prefill: they wait for the weights to be read."""

LEAST_STEPS = 3
"""Before so many steps were seen, nothing is predicted."""


def attention(start: int, tokens: int) -> float:
    """Pairs of tokens that computing ``tokens`` behind ``start`` looks at."""
    return tokens * (start + tokens / 2)


@dataclass(slots=True)
class PrefillSpeed:
    """One engine's model and hardware, as one namespace stands for."""

    fit: OnlineFit = field(default_factory=lambda: OnlineFit(PRIOR, MEMORY))
    step_tokens: int = 1
    """Tokens of the largest step seen: longer prompts take several."""

    @property
    def known(self) -> bool:
        return self.fit.observations >= LEAST_STEPS

    def observe(self, tokens: int, pairs: float, seconds: float) -> None:
        """A step computed so many tokens, which looked at so many pairs (the sum of ``attention`` over its requests)."""
        if tokens >= LEAST_TOKENS:
            self.step_tokens = max(self.step_tokens, tokens)
            self.fit.observe((1.0, tokens, pairs), seconds)

    def seconds(self, start: int, tokens: int) -> float:
        """Seconds to compute ``tokens`` behind ``start``."""
        if tokens <= 0:
            return 0.0
        steps = -(-tokens // self.step_tokens)
        return self.fit.seconds((steps, tokens, attention(start, tokens)))

    def pack(self) -> list[Any]:
        """What was learnt, as plain values."""
        return [self.fit.pack(), self.step_tokens]

    def load(self, packed: Any) -> None:
        """What ``pack`` gave. Raises ValueError for what it cannot have given."""
        try:
            fit, step_tokens = packed
            possible = 1 <= step_tokens < 1 << 32
        except (TypeError, ValueError) as error:
            raise ValueError("not a prefill speed") from error
        if not possible:
            raise ValueError("not a step of an engine")
        self.fit.load(fit)
        self.step_tokens = int(step_tokens)

    def describe(self) -> Mapping[str, float]:
        """For people: what was learnt."""
        per_step, per_token, per_pair = self.fit.coefficients
        return {
            "steps": self.fit.observations,
            "seconds_per_step": per_step,
            "seconds_per_token": per_token,
            "seconds_per_pair": per_pair,
            "spread": self.fit.spread,
        }
