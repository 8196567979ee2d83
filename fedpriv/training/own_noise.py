"""Noise that is added to a node's sum before it leaves: the node's share, or its users' own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedpriv.privacy.mechanisms import GaussianMechanism
from fedpriv.privacy.noise_shares import NoiseShares
from fedpriv.privacy.randomness import Purpose, Randomness, id_words
from fedpriv.privacy.user_noise import UserNoise
from fedpriv.training.cohort import CohortSum


def with_share(
    summed: CohortSum,
    shares: NoiseShares,
    mechanism: GaussianMechanism,
    sizes: Sequence[int],
    generator: np.random.Generator,
) -> CohortSum:
    """Return a node's sum with its share of the noise, which a node without users adds too."""
    share = shares.draw(mechanism, sizes, generator)
    return replace(summed, total=mechanism.add(summed.total, share))


def with_users_noise(
    summed: CohortSum,
    noise: UserNoise,
    sizes: Sequence[int],
    user_ids: Sequence[str],
    round_: int,
    attempt: int,
    secret: Randomness,
) -> CohortSum:
    """Return a node's sum with the noise of each of its users: the sum of their noisy messages.

    Every user adds noise, whatever became of its update: one that contributes zero, since it has
    no usable data or its update is not finite, must not be recognised by its message.
    """
    total = summed.total
    for user_id in user_ids:
        generator = secret.numpy(Purpose.USER_NOISE, round_, attempt, *id_words(user_id))
        total = noise.mechanism.add(total, noise.draw(sizes, generator))
    return replace(summed, total=total)


def released_alone(summed: CohortSum) -> CohortSum:
    """Return the noisy sum without what was seen on the way, which no noise covers."""
    return CohortSum(
        total=summed.total,
        users=0,
        examples=0,
        skipped=0,
        non_finite=0,
        loss=0.0,
        norm=0.0,
        clipped=0,
        block_norms=[0.0] * len(summed.block_norms),
        block_clipped=[0] * len(summed.block_clipped),
    )
