"""How far a measure may be off, against scipy."""

import numpy as np
import pytest
from scipy import stats

from fedpriv.tasks.error_rates import error_rates
from fedpriv.tasks.intervals import bootstrap, wilson


@pytest.mark.parametrize(("right", "count"), [(0, 5), (5, 5), (81, 263), (1, 1), (9_700, 10_000)])
def test_wilsons_interval_is_scipys(right, count):
    truth = stats.binomtest(right, count).proportion_ci(method="wilson")
    assert wilson(right, count) == pytest.approx((truth.low, truth.high), abs=1e-6)


def test_a_bootstrap_is_scipys_and_the_same_every_time():
    generator = np.random.default_rng(3)
    sizes = generator.integers(1, 12, 300)
    errors = generator.binomial(sizes, 0.2)
    found = bootstrap(errors.tolist(), sizes.tolist())
    truth = stats.bootstrap(
        (errors, sizes),
        lambda wrong, all_, axis: wrong.sum(axis) / all_.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        rng=generator,
    ).confidence_interval
    assert found == pytest.approx((truth.low, truth.high), abs=3e-3)
    assert found == bootstrap(errors.tolist(), sizes.tolist())
    assert bootstrap([1] * 9, [2] * 9) is None


def test_errors_of_an_utterance_are_its_edits():
    """Those of all utterances alike: however they are drawn, the rate is the same."""
    said, heard = ["a b c d"] * 12, ["a x c d e"] * 12
    rates = error_rates(said, heard)
    assert rates.interval == pytest.approx((rates.wer, rates.wer))
    assert rates.wer == pytest.approx(2 / 4)
    assert error_rates(said[:9], heard[:9]).interval is None
