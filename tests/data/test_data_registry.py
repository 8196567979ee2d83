import doctest

import pytest
import torch
from held_out import held_out
from in_process import small_config
from pydantic import ValidationError
from schema import data_options, sections_of

from fedpriv.data import DATASETS, PartitionConfig, build_dataset, registry
from fedpriv.errors import InputError

MADE = ["iid", "dirichlet", "shards"]


def users_of(dataset):
    return [dataset.user(index).inputs for index in range(dataset.population)]


def digits(kind, **changes):
    return data_options(partition=PartitionConfig(kind=kind), **{"users": 40, **changes})


@pytest.mark.parametrize("kind", MADE)
def test_equal_seeds_give_equal_users_and_others_differ(kind):
    one, again, other = (users_of(build_dataset(digits(kind), seed)) for seed in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_seed_does_not_move_the_evaluation_set():
    for choice in ("test", "development"):
        one, other = (
            held_out(build_dataset(digits("iid", evaluation=choice), seed)) for seed in (5, 6)
        )
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.targets, other.targets)


def test_building_leaves_the_global_generators_alone():
    before = torch.random.get_rng_state()
    build_dataset(digits("dirichlet"), 5)
    assert torch.equal(before, torch.random.get_rng_state())


def test_development_on_digits_replaces_the_test_set():
    dataset = build_dataset(digits("iid", evaluation="development"), seed=5)
    assert len(held_out(dataset)) == 188  # positions 0, 8, ..., 1496 of 1500
    assert sum(map(len, users_of(dataset))) == 1500 - 188


def test_examples_per_user():
    dataset = build_dataset(digits("iid", examples_per_user=3), seed=5)
    assert {len(inputs) for inputs in users_of(dataset)} == {3}


def test_dealt_digits_are_of_whoever_wrote_them():
    for evaluation in ("test", "development"):
        facts = build_dataset(digits("iid", evaluation=evaluation), seed=5).facts
        assert (facts.users, facts.example) == ("dealt", "image")
        assert (facts.held_out, facts.public) == ("unnamed", "none")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("iid", "40 users (iid)"),
        ("dirichlet", "40 users (dirichlet with alpha 0.3)"),
        ("shards", "40 users (shards of 2 a user)"),
    ],
)
def test_description_is_one_line_on_source_users_and_sizes(kind, said):
    dataset = build_dataset(digits(kind), seed=5)
    for part in ("digits (scikit-learn", said, "297 test examples"):
        assert part in dataset.description
    assert dataset.sizes.endswith(" training examples each, 1500 in all")
    assert "\n" not in dataset.description
    assert len(dataset.user_ids) == dataset.population == len(set(dataset.user_ids))


def test_unknown_name_lists_the_known_and_guesses():
    with pytest.raises(InputError) as caught:
        small_config(data={"name": "digit"})
    message = str(caught.value)
    assert all(name in message for name in DATASETS.registered)
    assert message.endswith("did you mean digits?")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (data_options(), r"data\.users must be set for data\.partition\.kind=iid"),
        (digits("natural"), r"data\.partition\.kind=natural: data set digits"),
        (digits("dirichlet", users=1501), r"data\.users must be .*at most 1500 .*got 1501"),
        (digits("shards", users=751), r"data\.users must be at most 750 "),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_key(config, message):
    with pytest.raises(InputError, match=message):
        build_dataset(config, seed=5)


def test_negative_seed():
    with pytest.raises(InputError, match="seed must be 0 or more, got -1"):
        build_dataset(digits("iid"), seed=-1)


@pytest.mark.parametrize(
    "fields",
    [
        {"user": 3},
        {"path": "somewhere"},
        {"speech": {}},
        {"users": 0},
        {"examples_per_user": 0},
        {"evaluation": "train"},
        {"partition": {"kind": "random"}},
        {"partition": {"alpha": 0}},
        {"partition": {"alpha": float("nan")}},
        {"partition": {"shards_per_user": 0}},
        {"partition": {"beta": 1}},
    ],
)
def test_config_is_strict(fields):
    with pytest.raises(ValidationError):
        data_options(**fields)


def test_every_config_field_is_described():
    def described(section):
        for field in section.model_fields.values():
            yield field.description is not None
            for inner in sections_of(field):
                yield from described(inner)

    for name in DATASETS.registered:
        assert all(described(DATASETS.find(name).options)), name


def test_docstring_example_runs():
    outcome = doctest.testmod(registry)
    assert outcome.attempted > 0
    assert outcome.failed == 0
