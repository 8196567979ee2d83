"""Rules from outside keep the bound whatever they answer, and see one user at a time."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from in_process import small_config

from fedpriv.errors import InputError
from fedpriv.privacy.clipping import GlobalClipping, clip, clip_and_sum
from fedpriv.privacy.clipping_rules import OutsideRule, build_rule

BLOCKS, BOUND = 3, 0.5


class Honest:
    """As global clipping, half as long."""

    def __init__(self, bound: float, share: float = 0.5) -> None:
        self.limit = share * bound

    def scales(self, norms):
        return (self.limit / torch.linalg.vector_norm(norms)).clamp(max=1).expand_as(norms)


class Answers:
    def __init__(self, *factors: float) -> None:
        self.factors = factors

    def scales(self, norms):
        norms.fill_(1e9)  # it may not change what it is shown
        return list(self.factors)


class Remembering:
    """A rule that clips a user to the mean of those whom it has seen."""

    seen: list[float]

    def __init__(self) -> None:
        self.seen = []

    def scales(self, norms):
        self.seen.append(float(torch.linalg.vector_norm(norms)))
        return torch.full_like(norms, min(1.0, np.mean(self.seen) / self.seen[-1] / 10))


def rule(make) -> OutsideRule:
    return OutsideRule("mine:rule", BOUND, make)


FACTORS = st.one_of(
    st.floats(-1e3, 1e3),
    st.sampled_from([0.0, 1.0, 1e300, -1e-3, math.inf, -math.inf, math.nan]),
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(FACTORS, min_size=BLOCKS, max_size=BLOCKS),
    st.lists(st.floats(width=32), min_size=2 * BLOCKS, max_size=2 * BLOCKS),
)
def test_no_answer_lifts_a_contribution_above_the_bound(factors, numbers):
    blocks = {str(i): torch.tensor(numbers[2 * i : 2 * i + 2]) for i in range(BLOCKS)}
    clipped = clip(blocks, rule(lambda: Answers(*factors))).blocks
    squares = [float(x) ** 2 for block in clipped.values() for x in block.tolist()]
    assert math.sqrt(math.fsum(squares)) <= BOUND
    summed = clip_and_sum(
        torch.tensor([numbers]), [2] * BLOCKS, rule(lambda: Answers(*factors))
    ).total
    assert math.sqrt(math.fsum(float(x) ** 2 for x in summed.tolist())) <= BOUND


def test_an_honest_rule_is_followed():
    updates = torch.tensor([[3.0, 0.0, 4.0, 0.0], [0.1, 0.0, 0.0, 0.1]])
    mine = clip_and_sum(updates, [2, 2], rule(lambda: Honest(BOUND)))
    half = clip_and_sum(updates, [2, 2], GlobalClipping(BOUND / 2))
    assert torch.allclose(mine.total, half.total, rtol=1e-5)


def test_what_a_rule_answers_for_one_user_does_not_depend_on_others():
    generator = torch.Generator().manual_seed(4)
    updates = torch.randn(6, 4, generator=generator)
    together = clip_and_sum(updates, [2, 2], rule(Remembering)).total
    without = clip_and_sum(updates[1:], [2, 2], rule(Remembering)).total
    alone = clip_and_sum(updates[:1], [2, 2], rule(Remembering)).total
    assert torch.allclose(together - without, alone, atol=1e-12)
    assert torch.linalg.vector_norm(together - without) <= BOUND


CODE = """
import torch
class Half:
    def __init__(self, bound, sizes, share: float = 0.5):
        assert len(sizes) > 1
        self.bound, self.share = bound, share
    def scales(self, norms):
        total = torch.linalg.vector_norm(norms)
        return (self.share * self.bound / total).clamp(max=1).expand_as(norms)
class Loose(Half):
    def scales(self, norms):
        return torch.ones_like(norms)
class Negative(Half):
    def scales(self, norms):
        return -torch.ones_like(norms)
class Short(Half):
    def scales(self, norms):
        return torch.ones(1)
class Failing(Half):
    def scales(self, norms):
        return norms.no_such_thing
class Ruleless:
    def __init__(self, bound): ...
"""


@pytest.fixture
def code(tmp_path):
    (tmp_path / "rules.py").write_text(CODE)
    return str(tmp_path)


def test_a_rule_from_outside_has_options_and_the_configs_bound(code):
    clipping = {"kind": "rules:Half", "bound": 0.2, "share": 0.25}
    config = small_config(code=code, privacy__clipping=clipping)
    built = build_rule(config.privacy.clipping, [4, 4])
    assert built.bound == 0.2
    norms = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert torch.allclose(built.scales(norms), torch.tensor([0.01, 0.01], dtype=torch.float64))


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("Loose", r"rules:Loose breaks its bound: .* norm 0\.\d+, and privacy.clipping.bound is 0"),
        (
            "Negative",
            r"rules:Negative returns \[-1, -1\] for the norms \[0, 0\]; factors must",
        ),
        ("Short", r"rules:Short returns factors of shape \[1\] for the norms of 2 blocks"),
        ("Failing", r"rules:Failing fails on norms of blocks, \[2\]: AttributeError"),
        ("Ruleless", r"rules:Ruleless fails on .*has no attribute 'scales'"),
    ],
)
def test_a_rule_that_breaks_its_bound_is_refused_before_anything_is_spent(code, name, line):
    clipping = {"kind": f"rules:{name}", "bound": 0.2}
    config = small_config(code=code, privacy__clipping=clipping)
    with pytest.raises(InputError, match=line) as refused:
        build_rule(config.privacy.clipping, [4, 4])
    assert "\n" not in str(refused.value)


def test_noise_in_proportion_to_blocks_has_no_proof_with_a_rule_from_outside(code):
    clipping = {"kind": "rules:Half", "bound": 0.2}
    with pytest.raises(InputError, match="per_block has no proof unless every tensor is bounded"):
        small_config(code=code, privacy__clipping=clipping, privacy__noise="per_block")
