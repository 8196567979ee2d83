"""What a config says beside the defaults, what differs between runs, and spread over seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from fedpriv.components import Slot
from fedpriv.config import ExperimentConfig
from fedpriv.reporting.reader import Run
from fedpriv.sections import Section, alike

# What names a run and bears on nothing of it.
_NAMES = ("name", "run_dir")
# What names a component.
_NAMING = ("name", "kind")
# What follows from the seed: with what a model begins.
_BEGUN = ("model.frozen_sha256", "model.start_sha256")
# A value is cut here where it stands in a table; the whole config stands in the report too.
_LONGEST = 60


@dataclass(frozen=True)
class Setting:
    """A value that is not the default.

    Attributes:
        key: its dotted key.
        value: as YAML has it on one line.
        default: likewise; empty where there is none, so that every config has to say it.
    """

    key: str
    value: str
    default: str


def beside_defaults(config: ExperimentConfig) -> list[Setting]:
    """Return what differs from the defaults, in the schema's order."""
    return [each for each in _differing(config, "") if each.key not in _NAMES]


def _differing(section: Section, prefix: str, usual: str = "") -> Iterator[Setting]:
    """Yield the values of a section that are no defaults.

    `usual` is what names the component that it is of where a config says nothing.
    """
    for name, about in type(section).model_fields.items():
        value, default = getattr(section, name), about.get_default(call_default_factory=True)
        key = f"{prefix}{name}"
        if prefix and name in _NAMING and value == usual:
            continue
        if isinstance(value, Section) and value != default:
            named = [each.kind.default for each in about.metadata if isinstance(each, Slot)]
            yield from _differing(value, f"{key}.", (named and named[0]) or "")
        elif about.is_required() or not alike(value, default):
            yield Setting(key, _text(value), "" if about.is_required() else _text(default))
    for name, value in (section.model_extra or {}).items():
        yield Setting(f"{prefix}{name}", _text(value), "")


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


# -------------------------------------------------------------------- between runs


def between_runs(configs: Sequence[ExperimentConfig]) -> list[tuple[str, tuple[str, ...]]]:
    """Return each key that the configs do not agree on, with one value a config; – for none.

    Of a section that not all of them have, such as `privacy`, what is the default says nothing.
    """
    flat = [_flat(config.document()) for config in configs]
    said = {each.key for config in configs for each in _differing(config, "")}
    keys = [key for key in dict.fromkeys(key for each in flat for key in each) if key not in _NAMES]
    missing = object()
    found = []
    for key in keys:
        values = [each.get(key, missing) for each in flat]
        if any(value != values[0] for value in values) and (missing not in values or key in said):
            found.append((key, tuple("–" if v is missing else _text(v) for v in values)))
    return found


def _flat(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values by dotted key; what is empty says nothing."""
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            flat[prefix + key] = value
    return flat


# -------------------------------------------------------------------- over seeds


@dataclass(frozen=True)
class Spread:
    """Runs that differ in their seed alone.

    Attributes:
        runs: their places among those compared.
        quality: the measure's name.
        mean: of the last measure of each, as people read it.
        deviation: the standard deviation of one run, likewise.
        least: likewise.
        most: likewise.
    """

    runs: tuple[int, ...]
    quality: str
    mean: str
    deviation: str
    least: str
    most: str


def over_seeds(runs: Sequence[Run]) -> list[Spread]:
    """Return mean and spread of those of `runs` whose settings differ in nothing but the seed.

    They have finished as many rounds, and none has the seed of another.
    """
    alike: dict[str, list[int]] = {}
    for place, run in enumerate(runs):
        if not math.isnan(run.measured.final):
            alike.setdefault(_but_for_the_seed(run), []).append(place)
    groups = (_of_different_seeds(places, runs) for places in alike.values())
    return [_spread(places, runs) for places in groups if len(places) > 1]


def _but_for_the_seed(run: Run) -> str:
    flat = _flat(run.config.document())
    kept = {k: v for k, v in flat.items() if k not in (*_NAMES, *_BEGUN, "seed")}
    also = [run.finished_rounds, run.deployed, run.delta, run.private, run.header.population]
    return json.dumps([kept, also, run.measured.quality.record()], sort_keys=True)


def _of_different_seeds(places: Iterable[int], runs: Sequence[Run]) -> list[int]:
    """Return the first of each seed; a deployment has one of its own, which nobody knows."""
    first: dict[Any, int] = {}
    for place in places:
        run = runs[place]
        first.setdefault(run.path.resolve() if run.deployed else run.config.seed, place)
    return list(first.values())


def _spread(places: Sequence[int], runs: Sequence[Run]) -> Spread:
    quality = runs[places[0]].measured.quality
    values = [runs[place].measured.final for place in places]
    return Spread(
        runs=tuple(places),
        quality=quality.name,
        mean=quality.number(fmean(values)),
        deviation=quality.number(stdev(values)),
        least=quality.number(min(values)),
        most=quality.number(max(values)),
    )


def spread_sentence(spread: Spread, marks: Sequence[str]) -> str:
    """Return mean and spread in a sentence; `marks` name all runs that are compared."""
    return (
        f"{', '.join(marks[place] for place in spread.runs)} differ in the seed alone: "
        f"{spread.quality} {spread.mean} on average, from {spread.least} to {spread.most}, with a "
        f"standard deviation of {spread.deviation} over {len(spread.runs)} seeds."
    )
