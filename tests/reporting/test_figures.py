"""Figures as inline SVG."""

import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from fedpriv.reporting import heat_maps, svg
from fedpriv.reporting.heat_maps import block_figures
from fedpriv.reporting.plots import figures, noise_norms
from fedpriv.reporting.reader import read_run
from fedpriv.reporting.svg import Marked


def all_figures(path):
    marked = Marked(read_run(path), "", 0)
    return figures([marked]) + block_figures(marked)


def test_figures_take_their_colours_from_the_page(make_run) -> None:
    for plot in all_figures(make_run()):
        ET.fromstring(plot.svg)
        assert not any(placeholder in plot.svg for placeholder in svg._CSS)
        assert "var(--" in plot.svg
        assert "<text" in plot.svg
        assert f'aria-label="{plot.title}"' in plot.svg


def test_every_figure_of_a_private_run(make_run) -> None:
    assert [plot.key for plot in all_figures(make_run())] == [
        "quality-by-epsilon",
        "quality-by-round",
        "epsilon",
        "noise",
        "cohort",
        "throughput",
        "noise-blocks",
        "clipped",
        "norms",
    ]


def test_without_privacy_there_is_no_epsilon_to_draw(make_run) -> None:
    keys = [plot.key for plot in all_figures(make_run(privacy=None))]
    assert keys == ["quality-by-round", "noise", "cohort", "throughput", "norms"]


def test_word_error_rate_is_drawn_where_there_is_one(make_run) -> None:
    path = make_run()
    metrics = path / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"accuracy": ', '"wer": '))
    assert "word error rate" in all_figures(path)[1].svg


def test_values_that_are_not_finite_are_left_out(make_run) -> None:
    path = make_run()
    metrics = path / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    for row in rows[:3]:
        row["aggregate_norm"] = float("inf")
        row["simulation_only"]["users_per_second"] = float("nan")
        row["simulation_only"]["block_norms"] = {
            name: float("nan") for name in row["simulation_only"]["block_norms"]
        }
        row["simulation_only"]["block_clipped"] = dict.fromkeys(
            row["simulation_only"]["block_clipped"], None
        )
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(all_figures(path)) == 9


def test_noise_needs_the_number_of_parameters(make_run) -> None:
    assert noise_norms(read_run(make_run())) is None


def test_heat_maps_are_pooled_to_what_can_be_seen() -> None:
    pooled = heat_maps._pooled(np.arange(960.0).reshape(1, -1), 120)
    assert pooled.shape == (1, 120)
    assert pooled.mean() == pytest.approx(479.5)


def test_neighbouring_blocks_share_a_row_where_there_are_many(make_run) -> None:
    path = make_run()
    metrics = path / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    for row in rows:
        row["simulation_only"]["block_norms"] = {f"block{i}.weight": float(i) for i in range(80)}
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    labels, values = heat_maps._seen(read_run(path), "block_norms")
    assert labels[:2] == ["block0.weight +1", "block2.weight +1"]
    assert values[:2, 0].tolist() == [0.5, 2.5]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("embed.weight", "embed.weight"),
        ("transformer.blocks.0.mlp.up.bias", "…blocks.0.mlp.up.bias"),
        (
            "transformer.blocks.0.attention_residual.norm.weight",
            "…0.attention_residual.norm.weight",
        ),
    ],
)
def test_block_names_fit_their_axis(name: str, shown: str) -> None:
    assert heat_maps._shortened(name) == shown
