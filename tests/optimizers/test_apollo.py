"""APOLLO against Algorithm 1 of its paper, written out number by number."""

import copy
import math
from itertools import chain

import pytest
import torch
from torch import nn

from fedpriv.draws import drawing_from
from fedpriv.errors import InputError
from fedpriv.optimizers.apollo import Apollo
from fedpriv.optimizers.registry import server_optimizer

BETAS, EPS, LR, DECAY = (0.8, 0.95), 1e-6, 0.1, 0.05
SHAPES = [(5, 9), (9, 5), (6, 6), (1, 7), (4,), (3, 2, 2)]


def built(parameters, **options):
    given = {"betas": list(BETAS), "eps": EPS, "weight_decay": DECAY, "rank": 3} | options
    return server_optimizer("apollo", parameters, LR, given)


def parameters(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in SHAPES]


def gradients(step):
    """The third is much longer than the second, so that its growth is limited."""
    generator = torch.Generator().manual_seed(100 + step)
    length = 50.0 if step == 3 else 1.0
    return [length * torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]


def take(optimizer, moved, step):
    for parameter, gradient in zip(moved, gradients(step), strict=True):
        parameter.grad = gradient.to(parameter, copy=True)
    with drawing_from(step):
        optimizer.step()


def by_the_paper(weights, steps, **options):
    """Algorithm 1, whose matrices have more columns than rows."""
    if weights.shape[0] < weights.shape[1]:
        return written_out(weights, steps, **options)
    return written_out(weights.T, [(g.T, seed) for g, seed in steps], **options).T


def written_out(weights, steps, rank=3, gap=200, alpha=1.0, tensor_wise=False):
    """Lists of numbers and loops, with the projections that the steps drew."""
    rows, columns = weights.shape
    w = weights.tolist()
    rank = min(rank, rows)
    m = [[0.0] * columns for _ in range(rank)]
    v = [[0.0] * columns for _ in range(rank)]
    before = None
    for t, (gradient, seed) in enumerate(steps, start=1):
        g = gradient.tolist()
        if (t - 1) % gap == 0:
            drawn = torch.randn(rank, rows, generator=torch.Generator().manual_seed(seed))
            p = [[float(x) / math.sqrt(rank) for x in row] for row in drawn]
        r = [
            [sum(p[i][k] * g[k][j] for k in range(rows)) for j in range(columns)]
            for i in range(rank)
        ]
        adam = [[0.0] * columns for _ in range(rank)]
        for i in range(rank):
            for j in range(columns):
                m[i][j] = BETAS[0] * m[i][j] + (1 - BETAS[0]) * r[i][j]
                v[i][j] = BETAS[1] * v[i][j] + (1 - BETAS[1]) * r[i][j] ** 2
                adam[i][j] = m[i][j] / (math.sqrt(v[i][j]) + EPS)
        if tensor_wise:
            s = [math.hypot(*chain(*adam)) / math.hypot(*chain(*r))] * columns
        else:
            s = [
                math.hypot(*(row[j] for row in adam)) / math.hypot(*(row[j] for row in r))
                for j in range(columns)
            ]
        scaled = [[alpha * g[k][j] * s[j] for j in range(columns)] for k in range(rows)]
        norm = math.hypot(*chain(*scaled))
        if before is not None and norm / before > 1.01:
            scaled = [[x / norm * 1.01 * before for x in row] for row in scaled]
            norm = 1.01 * before
        before = norm
        rate = LR * math.sqrt(1 - BETAS[1] ** t) / (1 - BETAS[0] ** t)
        for k in range(rows):
            for j in range(columns):
                w[k][j] = w[k][j] - rate * scaled[k][j] - LR * DECAY * w[k][j]
    return torch.tensor(w, dtype=torch.float64)


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, {}),
        ({"update_proj_gap": 3}, {"gap": 3}),
        ({"rank": 1, "scale_type": "tensor", "scale": 128}, {"rank": 1, "alpha": math.sqrt(128)}),
    ],
    ids=["channels", "projections anew", "mini"],
)
def test_steps_are_those_of_the_paper(steps, options, named):
    started, moved = parameters(), parameters()
    optimizer, seeds = built(moved, **options), []
    for step in range(1, steps + 1):
        take(optimizer, moved, step)
        seeds.append([optimizer.state[p].get("seed") for p in moved])
    for place, shape in enumerate(SHAPES):
        if len(shape) != 2:
            continue
        taken = [(gradients(t + 1)[place], seeds[t][place]) for t in range(steps)]
        expected = by_the_paper(
            started[place].detach(), taken, tensor_wise="scale_type" in options, **named
        )
        torch.testing.assert_close(moved[place].detach(), expected, rtol=1e-6, atol=1e-6)


def test_what_is_no_matrix_takes_steps_of_adamw():
    """torch's has its ε under the bias correction, so there is next to none of it here."""
    moved, other = parameters()[4:], parameters()[4:]
    optimizer = built(moved, eps=1e-15)
    reference = torch.optim.AdamW(other, LR, BETAS, 1e-15, weight_decay=DECAY)
    for step in range(1, 5):
        for mine, theirs, gradient in zip(moved, other, gradients(step)[4:], strict=True):
            mine.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
    for mine, theirs in zip(moved, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_a_step_has_the_rank_of_the_gradient_and_not_that_of_the_projection():
    """The library's has: it moves a matrix by what was projected."""
    (matrix, *_) = moved = parameters()
    begun = matrix.detach().clone()
    take(built(moved, rank=1, weight_decay=0.0), moved, 1)
    assert torch.linalg.matrix_rank(matrix.detach() - begun) == 5


def test_projections_last_so_many_steps_and_are_the_rounds_own():
    def seeds(first):
        moved = parameters()
        optimizer, found = built(moved, update_proj_gap=3), []
        for step in range(first, first + 7):
            take(optimizer, moved, step)
            found.append(optimizer.state[moved[0]]["seed"])
        assert optimizer.state[moved[0]]["seed"] != optimizer.state[moved[1]]["seed"]
        return found

    one = seeds(1)
    assert one == [one[0]] * 3 + [one[3]] * 3 + [one[6]]
    assert len(set(one)) == 3
    assert one == seeds(1)
    assert one[0] != seeds(2)[0]


def test_a_resumed_optimizer_goes_on_to_the_bit():
    whole, first = parameters(torch.float32), parameters(torch.float32)
    one, other = built(whole, update_proj_gap=3), built(first, update_proj_gap=3)
    for step in range(1, 6):
        take(one, whole, step)
        take(other, first, step)
    again = [nn.Parameter(p.detach().clone()) for p in first]
    resumed = built(again, update_proj_gap=3)
    resumed.load_state_dict(copy.deepcopy(other.state_dict()))
    for step in range(6, 9):
        take(one, whole, step)
        take(resumed, again, step)
    assert all(a.equal(b) for a, b in zip(whole, again, strict=True))


def test_two_moments_of_so_many_rows_are_kept_and_no_projection():
    moved = parameters()
    optimizer = built(moved)
    take(optimizer, moved, 1)
    for parameter, numbers in zip(moved[:3], (9, 9, 6), strict=True):
        tensors = [t for t in optimizer.state[parameter].values() if isinstance(t, torch.Tensor)]
        assert sum(t.numel() for t in tensors if t.dim()) == 2 * 3 * numbers


def test_a_step_of_nothing_does_not_hold_back_the_next():
    matrix = nn.Parameter(torch.ones(2, 3))
    optimizer = Apollo([matrix], lr=1.0, weight_decay=0.0)
    matrix.grad = torch.zeros(2, 3)
    optimizer.step()
    matrix.grad = torch.ones(2, 3)
    optimizer.step()
    assert float((matrix.detach() - 1).norm()) > 0.01


@pytest.mark.parametrize(
    "options", [{"rank": 0}, {"update_proj_gap": 0}, {"scale": -1}, {"scale_type": "row"}]
)
def test_impossible_options_are_refused(options):
    (name,) = options
    with pytest.raises(InputError, match=rf"server\.options\.{name}"):
        built(parameters(), **options)
