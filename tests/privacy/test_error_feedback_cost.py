"""The memory that a user keeps costs nothing: exact densities over all of its sampling bits.

One number is released a round, N(0, 1) added; user k is there (P) or not (Q). Under P the density
of all releases together is a sum over the 2^T histories of k's bits, in each of which `feed_back`
itself says what k sends: its updates may depend on its bits and on every release before. Nothing
else is approximated but integrals by sums over a grid, of functions that are smooth in each new
release, where such sums are exact to many digits.
"""

import math

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting.rdp import RdpAccountant

from fedpriv.privacy import (
    Adjacency,
    Dice,
    ErrorFeedback,
    GlobalClipping,
    PldAccountant,
    Remainder,
    feed_back,
)

GRID = np.arange(-8.0, 11.0, 0.25)
SPACING, POINTS, ROUNDS = 0.25, len(GRID), 3

# What the user's update is before clipping to 1: of the round, its last bit, the last release.
ADVERSARIES = {
    "always more than it may send": lambda t, bit, y: 5.0 + 0 * y,
    "only the first time, which the memory repeats": lambda t, bit, y: 3.0 * (t == 1) + 0 * y,
    "with the last release": lambda t, bit, y: 2.0 * np.sign(y - 0.5) + 0.3,
    "against the last release": lambda t, bit, y: -y,
    "by whether it was sampled last": lambda t, bit, y: np.where(bit, 3.0, -3.0) + 0 * y,
    "back and forth": lambda t, bit, y: (-1.0) ** t * 2.5 + 0 * y,
}
FEEDBACK = {
    "remainder": (Remainder(), 1.0),
    "remainder, decaying and capped": (Remainder(0.6, 1.5), 1.0),
    "dice": (Dice(GlobalClipping(0.6)), 0.4),
    "dice, decaying": (Dice(GlobalClipping(0.5), 0.8), 0.5),
}


def gaussian(shift: np.ndarray | float) -> np.ndarray:
    """The density on the grid of N(shift, 1): a last axis is added to `shift`."""
    return np.exp(-((GRID - np.asarray(shift)[..., None]) ** 2) / 2) / math.sqrt(2 * math.pi)


def densities(adversary, feedback: ErrorFeedback, bound: float, q: float):
    """Return P and Q on the grid of all releases: `[POINTS] * ROUNDS`."""
    # Leading axis: a history of bits. Then a grid axis for each release so far.
    weight, memory = np.ones(1), np.zeros(1)
    bit, last = np.zeros(1, bool), np.zeros(1)
    for t in range(1, ROUNDS + 1):
        update = np.broadcast_to(adversary(t, bit, last), memory.shape)
        sent, kept = feed(update, memory, feedback, bound)
        away = weight[..., None] * (1 - q) * gaussian(np.zeros(weight.shape))
        there = weight[..., None] * q * gaussian(sent)
        weight = np.concatenate([away, there])
        memory, bit = (
            np.repeat(np.concatenate(parts)[..., None], POINTS, axis=-1)
            for parts in ((memory, kept), (0 * bit, 0 * bit + 1))
        )
        bit, last = bit.astype(bool), np.broadcast_to(GRID, weight.shape)
    reference = gaussian(0.0)
    for _ in range(ROUNDS - 1):
        reference = reference[..., None] * gaussian(0.0)
    return weight.sum(0), reference


def feed(update: np.ndarray, memory: np.ndarray, feedback: ErrorFeedback, bound: float):
    """Return what is sent and kept in each place: every row of a stack is a place of the grid."""
    updates, memories = (torch.tensor(x).reshape(-1, 1) for x in (update, memory))
    uncapped = type(feedback)(**{**vars(feedback), "norm_cap": None})
    rule = GlobalClipping(bound)
    whole = feed_back(updates, memories, [1], rule, uncapped).memories
    kept = feed_back(updates, memories, [1], rule, feedback).memories
    sent = updates + feedback.decay * memories - whole
    return sent.numpy().reshape(update.shape), kept.numpy().reshape(update.shape)


def renyi(p: np.ndarray, q: np.ndarray, order: int) -> float:
    return math.log((p**order * q ** (1.0 - order)).sum() * SPACING**ROUNDS) / (order - 1)


def accounted(order: int, q: float) -> float:
    """What dp-accounting says of the sampled Gaussian without any memory."""
    accountant = RdpAccountant([order])
    event = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(1.0))
    accountant.compose(event, ROUNDS)
    return float(accountant._rdp[0])


def delta(p: np.ndarray, q: np.ndarray, epsilon: float) -> float:
    return float(np.maximum(p - math.exp(epsilon) * q, 0).sum() * SPACING**ROUNDS)


@pytest.mark.parametrize("q", [0.1, 0.5])
@pytest.mark.parametrize("variant", FEEDBACK)
@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_no_memory_raises_the_cost_of_sampled_rounds(adversary, variant, q):
    feedback, bound = FEEDBACK[variant]
    assert feedback.contribution(GlobalClipping(bound)).bound == 1.0
    p, reference = densities(ADVERSARIES[adversary], feedback, bound, q)
    assert p.sum() * SPACING**ROUNDS == pytest.approx(1, abs=1e-9)
    for order in (2, 3):
        limit = accounted(order, q) * (1 + 1e-6)
        assert renyi(p, reference, order) <= limit
        assert renyi(reference, p, order) <= limit
    tight = PldAccountant(Adjacency.ADD_OR_REMOVE_ONE)
    tight.compose(
        dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(1.0)), ROUNDS
    )
    for epsilon in (0.25, 1.0):
        # The corner of max(., 0) lies between points of the grid.
        limit = tight.delta(epsilon) + 2e-4
        assert delta(p, reference, epsilon) <= limit
        assert delta(reference, p, epsilon) <= limit


def test_the_worst_case_is_reached_and_a_larger_contribution_would_be_found():
    constant = ADVERSARIES["always more than it may send"]
    p, reference = densities(constant, Remainder(), 1.0, 0.5)
    for order in (2, 3):
        assert renyi(p, reference, order) == pytest.approx(accounted(order, 0.5), rel=1e-4)
    p, reference = densities(constant, Remainder(), 1.1, 0.5)
    assert renyi(p, reference, 2) > 1.05 * accounted(2, 0.5)
    # Had the memory been added after clipping, the bound would not have held.
    p, reference = densities(constant, Dice(GlobalClipping(0.6)), 1.0, 0.5)
    assert renyi(p, reference, 2) > 1.5 * accounted(2, 0.5)
