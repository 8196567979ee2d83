"""A mechanism of somebody's own: the server's noise is the sum of what two keepers draw."""

import math
import os
from dataclasses import dataclass, replace

import numpy as np
import torch

from fedpriv.privacy.mechanisms.base import Independent, Mechanism
from fedpriv.privacy.mechanisms.correlated import CorrelatedMechanism
from fedpriv.privacy.mechanisms.gaussian import CentralMechanism
from fedpriv.privacy.randomness import Purpose, Randomness


def need(what):
    """Raise what the environment says, where it says that a keeper is away for `what`."""
    if os.environ.get("KEEPER_AWAY") == what:
        raise {"memory": MemoryError}.get(what, ConnectionError)("the keeper is away")


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


class Calling:
    """Two keepers, who are called for each round."""

    def __init__(self, drawn):
        self.drawn = drawn

    def draw(self, round_, attempt, gaussian):
        need("memory")
        need(f"draw {round_}")
        return self.drawn.draw(round_, attempt, gaussian)


@dataclass(frozen=True)
class Unplugged(TwoKeepers):
    """Whose keepers may be away."""

    def noise(self, sizes, randomness, attempts):
        need("noise")
        return Calling(super().noise(sizes, randomness, attempts))

    def event(self):
        need("event")
        return super().event()

    def record(self, payers):
        need("record")
        return super().record(payers)

    def stddevs(self, blocks, round_, answers):
        need("stddevs")
        return super().stddevs(blocks, round_, answers)


@dataclass(frozen=True)
class Paying(TwoKeepers):
    """Asks a keeper who pays."""

    def payers(self, round_, cohort):
        need("payers")


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


class Scaled:
    """Somebody else's noise, made smaller, or another round's, or another run's."""

    def __init__(self, drawn, factor=1.0, round_of=lambda round_: round_, attempt_of=lambda a: a):
        self.drawn, self.factor = drawn, factor
        self.round_of, self.attempt_of = round_of, attempt_of

    def draw(self, round_, attempt, gaussian):
        round_, attempt = self.round_of(round_), self.attempt_of(attempt)
        return self.drawn.draw(round_, attempt, gaussian) * self.factor


@dataclass(frozen=True)
class Quiet(CentralMechanism):
    """Adds four fifths of what it records."""

    def noise(self, sizes, randomness, attempts):
        return Scaled(Independent(sizes, randomness), factor=0.8)


@dataclass(frozen=True)
class Repeating(CentralMechanism):
    """Every second round has the noise of the one before it."""

    def noise(self, sizes, randomness, attempts):
        return Scaled(Independent(sizes, randomness), round_of=lambda round_: round_ // 2)


class Changed:
    """The noise of each round, changed by a function of it and of a generator."""

    def __init__(self, drawn, change):
        self.drawn, self.change = drawn, change

    def draw(self, round_, attempt, gaussian):
        generator = self.drawn.randomness.numpy(Purpose.NOISE, 10**6 + round_, attempt)
        noise = self.drawn.draw(round_, attempt, gaussian)
        return self.change(noise, round_, gaussian, generator)


def changed(change):
    """Return a mechanism whose noise is what `change` makes of the server's."""

    @dataclass(frozen=True)
    class ChangedNoise(CentralMechanism):
        def noise(self, sizes, randomness, attempts):
            return Changed(Independent(sizes, randomness), change)

    return ChangedNoise


def _of_variance_one(drawn, stddev):
    return torch.from_numpy(drawn) * stddev


#: Of the right variance on the whole, and dearer than Gaussian noise.
Laplace = changed(
    lambda noise, round_, gaussian, generator: _of_variance_one(
        generator.laplace(0, 2**-0.5, len(noise)), gaussian.stddev
    )
)
Uniform = changed(
    lambda noise, round_, gaussian, generator: _of_variance_one(
        generator.uniform(-(3**0.5), 3**0.5, len(noise)), gaussian.stddev
    )
)
#: None for some numbers, and more for the others.
Patchy = changed(
    lambda noise, round_, gaussian, generator: (
        noise * torch.where(torch.arange(len(noise)) % 8 == 0, 1e-6, 1.5)
    )
)
#: The noise of the first half, or of each second number, for the others too.
Halved = changed(
    lambda noise, round_, gaussian, generator: noise[: (len(noise) + 1) // 2].repeat(2)[
        : len(noise)
    ]
)
Doubled = changed(
    lambda noise, round_, gaussian, generator: noise[::2].repeat_interleave(2)[: len(noise)]
)
#: More than is recorded, in every second round.
Louder = changed(lambda noise, round_, gaussian, generator: noise * (1 + (round_ + 1) % 2))


@dataclass(frozen=True)
class SmallBlocks(CentralMechanism):
    """Adds next to nothing to small blocks."""

    def noise(self, sizes, randomness, attempts):
        def change(noise, round_, gaussian, generator):
            for part in noise.split([*sizes, len(noise) - sum(sizes)]):
                part.mul_(1e-6 if len(part) < 100 else 1)
            return noise

        return Changed(Independent(sizes, randomness), change)


def _without(noise, place):
    noise[place] = 0
    return noise


#: None for one number.
OneLess = changed(lambda noise, round_, gaussian, generator: _without(noise, 5))
#: Less after the first 32 rounds; and 1% less in all.
Late = changed(lambda noise, round_, gaussian, generator: noise * (0.01 if round_ > 32 else 1))
Quiet1pc = changed(lambda noise, round_, gaussian, generator: noise * 0.99)
#: From a generator of the whole process.
OwnRng = changed(
    lambda noise, round_, gaussian, generator: (
        torch.randn(len(noise), dtype=torch.float64) * gaussian.stddev
    )
)
#: Something that is no noise.
Short = changed(lambda noise, round_, gaussian, generator: noise[:-1])
Listed = changed(lambda noise, round_, gaussian, generator: noise.tolist())
Broken = changed(lambda noise, round_, gaussian, generator: noise.nope())


class Walking:
    """Each round takes back half of the noise before it, if it still knows that."""

    def __init__(self, drawn):
        self.drawn, self.before = drawn, None

    def draw(self, round_, attempt, gaussian):
        before, self.before = self.before, 2 * self.drawn.draw(round_, attempt, gaussian)
        return self.before - before / 2 if before is not None else self.before.clone()


@dataclass(frozen=True)
class Forgetting(CentralMechanism):
    """Draws other noise where a run is resumed."""

    def noise(self, sizes, randomness, attempts):
        return Walking(Independent(sizes, randomness))


class AtFirstBounds:
    """Noise by the bounds of the first round."""

    def __init__(self, drawn, gaussian):
        self.drawn, self.gaussian = drawn, gaussian

    def draw(self, round_, attempt, gaussian):
        return self.drawn.draw(round_, attempt, self.gaussian)


@dataclass(frozen=True)
class Stale(CentralMechanism):
    """Does not follow bounds that adapt."""

    def noise(self, sizes, randomness, attempts):
        return AtFirstBounds(Independent(sizes, randomness), self.gaussian)


@dataclass(frozen=True)
class NoSource(CentralMechanism):
    """Returns a number where there must be a source of noise."""

    def noise(self, sizes, randomness, attempts):
        return 5


@dataclass(frozen=True)
class FewArguments(CentralMechanism):
    """Knows nothing of attempts."""

    def noise(self, sizes, randomness):
        return Independent(sizes, randomness)


@dataclass(frozen=True)
class Bare(Mechanism):
    """Extends the base of all mechanisms, which a ledger cannot read."""

    def noise(self, sizes, randomness, attempts):
        return Independent(sizes, randomness)


@dataclass(frozen=True)
class Constant(CentralMechanism):
    """Seeds its noise itself, alike in every run."""

    def noise(self, sizes, randomness, attempts):
        return Independent(sizes, Randomness.simulation(3))


@dataclass(frozen=True)
class Stubborn(CentralMechanism):
    """Draws a round afresh with the noise that was seen."""

    def noise(self, sizes, randomness, attempts):
        return Scaled(Independent(sizes, randomness), attempt_of=lambda attempt: 0)


@dataclass(frozen=True)
class Everybody(CentralMechanism):
    """Draws everybody and records a sample."""

    def cohort(self, round_, generator):
        return np.arange(self.sampling.population)


@dataclass(frozen=True)
class Leaving(CentralMechanism):
    """Leaves the noise to nodes, which were never told."""

    in_sums = True


@dataclass(frozen=True)
class Narrow(CentralMechanism):
    """Records a smaller bound than that to which updates are clipped."""

    def record(self, payers):
        fields = super().record(payers)
        return fields | {"bound": fields["bound"] / 2, "sensitivity": fields["sensitivity"] / 2}

    def event(self):
        louder = replace(self.gaussian, noise_multiplier=2 * self.gaussian.noise_multiplier)
        return self.sampling.event(louder)


@dataclass(frozen=True)
class Cheap(CorrelatedMechanism):
    """Correlated noise whose runs are said to cost one round."""

    def paid(self, rounds):
        return 1


@dataclass(frozen=True)
class Half(CorrelatedMechanism):
    """Takes back more of earlier noise than was proved."""

    def noise(self, sizes, randomness, attempts):
        return Scaled(super().noise(sizes, randomness, attempts), factor=0.9)


@dataclass(frozen=True)
class Renamed(CorrelatedMechanism):
    """Correlated noise as it is."""
