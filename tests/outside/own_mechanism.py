"""A mechanism of somebody's own: the server's noise is the sum of what two keepers draw."""

import math
from dataclasses import dataclass, replace

from fedpriv.privacy.mechanisms.base import Independent
from fedpriv.privacy.mechanisms.gaussian import CentralMechanism


class TwoDraws:
    """Of variance σ²/2 each; the second at rounds that no run has."""

    def __init__(self, drawn, first_of_the_second):
        self.drawn, self.first = drawn, first_of_the_second

    def draw(self, round_, attempt, gaussian):
        one = self.drawn.draw(round_, attempt, gaussian)
        other = self.drawn.draw(self.first + round_, attempt, gaussian)
        return (one + other) / math.sqrt(2)


@dataclass(frozen=True)
class TwoKeepers(CentralMechanism):
    """Independent Gaussians add up to one, so it costs what the server's noise costs."""

    first_of_the_second: int = 10**6

    def noise(self, sizes, randomness, attempts):
        return TwoDraws(Independent(sizes, randomness), self.first_of_the_second)


@dataclass(frozen=True)
class Boastful(CentralMechanism):
    """Says that it costs less than its record."""

    def event(self):
        louder = replace(self.gaussian, noise_multiplier=2 * self.gaussian.noise_multiplier)
        return self.sampling.event(louder)


@dataclass(frozen=True)
class Forgetful(CentralMechanism):
    """Says who pays, and records nothing of it."""

    payer = "group"

    def payers(self, round_, cohort):
        return (0,)
