import copy
import dataclasses
from dataclasses import dataclass
from functools import cache, partial
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_speech import tiny_speech, tones
from torch import nn
from torch.nn import functional as F

from fedpriv.data.federated import DatasetPartition, Examples
from fedpriv.data.text import Alphabet
from fedpriv.data.utterances import Utterances
from fedpriv.errors import InputError
from fedpriv.models import MODELS as KINDS
from fedpriv.models import build_model
from fedpriv.models.parameters import Layout, parameters_of
from fedpriv.models.stochastic import Dropout
from fedpriv.models.vit import LearnedPositions
from fedpriv.optimizers.local import SGD, Adam
from fedpriv.optimizers.schedules import LocalScheduleConfig
from fedpriv.privacy import GlobalClipping, Unclipped
from fedpriv.privacy.randomness import Purpose, Randomness, id_words
from fedpriv.tasks.classification import Classification
from fedpriv.tasks.decoding import greedy
from fedpriv.tasks.recognition import Recognition
from fedpriv.tasks.spec_augment import SpecAugment
from fedpriv.training import stacked
from fedpriv.training.cohort import CohortTrainer, train_cohort
from fedpriv.training.local import LocalTraining, batches, train_user
from fedpriv.training.stacked import (
    StackedModel,
    StackedResult,
    StackedUser,
    Stream,
    can_stack,
    train_stack,
)
from fedpriv.training.user_cache import UserCache

CPU = torch.device("cpu")
SEED = 11
MASKS = SpecAugment(freq_width=3, time_masks=2, time_width=8, time_ratio=0.5)
EXACT = {"rtol": 1e-6, "atol": 1e-8}  # in float64
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
# A gradient's sign is as good as noise where it is as small as rounding: ε holds that down.
ADAM = Adam(eps=0.1)
ADAMW = Adam(betas=(0.8, 0.9), eps=0.1, weight_decay=0.1, decoupled=True)
COSINE = LocalScheduleConfig(kind="cosine", final_factor=0.2)


# Users and models.


@dataclass(frozen=True)
class Images:
    """User i holds `counts[i]` images of 4 by 4; those in `poisoned` are not numbers."""

    counts: tuple[int, ...]
    poisoned: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32

    @property
    def population(self) -> int:
        return len(self.counts)

    @property
    def user_ids(self) -> list[str]:
        return [f"user-{number}" for number in range(self.population)]

    @property
    def classes(self) -> int:
        return 3

    def user(self, index: int) -> Examples:
        if self.counts[index] == 0:
            raise InputError(f"user {index} has nothing")
        generator = torch.Generator().manual_seed(index)
        count = self.counts[index]
        images = torch.randn(count, 1, 4, 4, generator=generator).to(self.dtype)
        if index in self.poisoned:
            images[0] = torch.nan
        return Examples(images, torch.randint(0, 3, (count,), generator=generator))


MODELS = {
    f"vit {placement} {norm} {pooling}": {
        "name": "vit",
        "norm_placement": placement,
        "norm": norm,
        "pooling": pooling,
    }
    for placement, norm, pooling in [
        ("pre", "layernorm", "mean"),
        ("pre", "rmsnorm", "class"),
        ("post", "layernorm", "class"),
        ("post", "rmsnorm", "mean"),
        ("peri", "layernorm", "mean"),
        ("peri", "rmsnorm", "class"),
    ]
} | {
    "speech": {"name": "speech", "mels": 8},
    "speech cape": {"name": "speech", "mels": 8, "positions": "cape", "norm": "rmsnorm"},
}


@cache
def model_of(kind: str, dtype: torch.dtype = torch.float32, **changes: float) -> nn.Module:
    """A model of one block whose biases and norms are not trivial."""
    config = KINDS.parse({"dim": 8, "depth": 1, "heads": 2, "mlp_ratio": 1.5, **MODELS[kind]})
    config = config.model_copy(update=changes)
    speech = config.name == "speech"
    model = build_model(config, (8_000,) if speech else (1, 4, 4), 4 if speech else 3, seed=2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model.to(dtype)


def task_of(kind: str, masks: bool = False) -> Classification | Recognition:
    if kind.startswith("vit"):
        return Classification()
    return Recognition(Alphabet(" ab"), greedy, MASKS if masks else None)


def flat(model: nn.Module) -> torch.Tensor:
    return Layout.of(model).join(parameters_of(model))


def trainer_of(kind: str, dataset: object, recipe: LocalTraining, **changes) -> CohortTrainer:
    return CohortTrainer(
        dataset=dataset,
        model=copy.deepcopy(model_of(kind, **changes.pop("shape", {}))),
        task=task_of(kind, changes.pop("masks", False)),
        recipe=recipe,
        clipping=changes.pop("clipping", Unclipped()),
        randomness=Randomness.simulation(SEED),
        device=CPU,
        **changes,
    )


@cache
def everything_said() -> Utterances:
    """The features of all users, in float64."""
    dataset, task = tiny_speech(), task_of("speech")
    prepared = [task.prepare(model_of("speech"), dataset.user(user)) for user in range(12)]
    whole = Utterances.join(prepared)
    return dataclasses.replace(whole, inputs=whole.inputs.double())


def speakers(counts: list[int]) -> list[Utterances]:
    """Users with so many utterances each, all of them different."""
    order = torch.randperm(len(everything_said()), generator=torch.Generator().manual_seed(1))
    return [everything_said().take(index) for index in order[: sum(counts)].split(counts)]


RECIPES = st.builds(
    LocalTraining,
    epochs=st.integers(1, 2),
    steps=st.one_of(st.none(), st.integers(1, 5)),
    batch_size=st.integers(1, 10),
    batch_sizes=st.one_of(st.none(), st.integers(1, 150)),
    order=st.sampled_from(["shuffled", "by_length"]),
    lr=st.sampled_from([0.02, 0.1]),
    optimizer=st.sampled_from([SGD(), SGD(0.9), ADAM, ADAMW]),
    schedule=st.sampled_from([LocalScheduleConfig(), COSINE]),
    max_grad_norm=st.sampled_from([None, 0.3, 1e3]),
    proximal_mu=st.sampled_from([0.0, 0.7]),
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stacked_user(examples, recipe: LocalTraining, number: int) -> StackedUser:
    own, shared = torch.Generator().manual_seed(100 + number), torch.Generator().manual_seed(99)
    return StackedUser(
        number=number,
        examples=examples,
        steps=list(batches(examples.sizes, recipe, own, shared)),
        dropout=Stream(partial(seeded, 200 + number)),
        augmentation=Stream(partial(seeded, 300 + number)),
    )


def most_steps_first(work: list[StackedUser]) -> list[StackedUser]:
    return sorted(work, key=lambda user: -len(user.steps))


def update_of(result: StackedResult, user: int) -> torch.Tensor:
    return result.deltas.written_out()[user]


# Stacked is sequential.


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([*sorted(set(MODELS) - {"speech cape"}), "speech", "speech"]),
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    RECIPES,
    st.booleans(),
    st.sampled_from([1, 200, 2**19]),
)
def test_each_user_of_a_stack_is_trained_as_if_alone(kind, counts, recipe, masks, at_once):
    model, task = copy.deepcopy(model_of(kind, torch.float64)), task_of(kind, masks)
    start = flat(model).clone()
    if kind == "speech":
        users = speakers(counts)
    else:
        dataset = Images(tuple(counts), dtype=torch.float64)
        users = [dataset.user(index) for index in range(len(counts))]
    numbers = list(range(len(users)))
    numbers.sort(key=lambda n: -len(stacked_user(users[n], recipe, n).steps))
    work = [stacked_user(users[n], recipe, n) for n in numbers]
    with mock.patch.object(stacked, "_CACHED_NUMBERS", at_once):
        result = train_stack(StackedModel(model), start, work, recipe, task, round_=1)
    layout = Layout.of(model)
    for place, number in enumerate(numbers):
        examples, alone = users[number], stacked_user(users[number], recipe, number)
        steps = [task.augment(examples.take(i), 1, alone.augmentation()) for i in alone.steps]
        expected = train_user(model, layout.split(start), steps, recipe, task)
        found = update_of(result, place)
        torch.testing.assert_close(found, layout.join(expected.update), **EXACT)
        assert float(result.losses[place]) == pytest.approx(expected.loss, rel=1e-8)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(0, 11), min_size=1, max_size=9, unique=True),
    st.integers(1, 7),
    st.booleans(),
    st.integers(1, 3),
)
def test_the_engines_agree_on_the_sum_of_a_cohort_of_speakers(users, stack, masks, round_):
    recipe = LocalTraining(epochs=1, batch_size=3, lr=0.1, max_grad_norm=1.0)
    build = partial(trainer_of, "speech", tiny_speech(), recipe, masks=masks, stack=stack)
    clipping = GlobalClipping(0.2)
    stacked = build(engine="stacked", clipping=clipping)
    sequential = build(engine="sequential", clipping=clipping)
    assert stacked.stacked is not None
    start = flat(model_of("speech"))
    one = train_cohort(stacked, start, users, round_)
    two = train_cohort(sequential, start, users, round_)
    torch.testing.assert_close(one.total, two.total, **CLOSE)
    assert (one.users, one.examples, one.skipped, one.non_finite, one.clipped) == (
        two.users, two.examples, two.skipped, two.non_finite, two.clipped
    )  # fmt: skip
    assert one.loss == pytest.approx(two.loss, rel=1e-5)
    assert one.norm == pytest.approx(two.norm, rel=1e-4)
    assert one.block_norms == pytest.approx(two.block_norms, rel=1e-3, abs=1e-6)


def test_a_cohort_larger_than_all_stacks_and_windows_is_trained_whole():
    counts = tuple(1 + (5 * user) % 9 for user in range(41))
    recipe = LocalTraining(epochs=1, batch_size=4, lr=0.1)
    kind = "vit pre layernorm mean"
    totals = {
        (engine, stack): train_cohort(
            trainer_of(kind, Images(counts), recipe, engine=engine, stack=stack),
            flat(model_of(kind)), range(41), 1,
        )
        for engine, stack in [("sequential", 16), ("stacked", 1), ("stacked", 4), ("stacked", 64)]
    }  # fmt: skip
    expected = totals["sequential", 16]
    for found in totals.values():
        torch.testing.assert_close(found.total, expected.total, **CLOSE)
        assert (found.users, found.examples) == (41, sum(counts))


def test_an_empty_cohort_adds_nothing():
    kind = "vit pre layernorm mean"
    for engine in ("stacked", "sequential"):
        trainer = trainer_of(kind, Images((3,)), LocalTraining(), engine=engine)
        summed = train_cohort(trainer, flat(model_of(kind)), [], 1)
        assert summed.users == summed.examples == summed.norm == 0
        assert not summed.total.any()


def test_a_round_of_speakers_equals_a_loop_written_out():
    """Forward, CTC, SGD and the sum by hand: nothing of the engines is used."""
    recipe = LocalTraining(epochs=2, batch_size=2, lr=0.2)
    users, dataset = [0, 1, 2, 5, 7], tiny_speech()
    model = copy.deepcopy(model_of("speech"))
    start = [p.detach().clone() for p in model.parameters()]
    parameters, total, loss_sum = list(model.parameters()), 0.0, 0.0
    for user in users:
        with torch.no_grad():
            for p, origin in zip(parameters, start, strict=True):
                p.copy_(origin)
        spoken = dataset.user(user)
        with torch.no_grad():
            features, frames = model.front_end(spoken.inputs, spoken.lengths)
        source = Randomness.simulation(SEED)
        own = source.torch(Purpose.LOCAL_TRAINING, 4, 0, *id_words(f"user-{user}"))
        shared = source.torch(Purpose.STEP_ORDER, 4)
        losses = []
        for index in batches(frames, recipe, own, shared):
            log_probs, tokens = model(features[index, : int(frames[index].max())], frames[index])
            each = F.ctc_loss(
                log_probs.transpose(0, 1),
                spoken.targets[index],
                tokens,
                spoken.target_lengths[index],
                reduction="none",
            )
            loss = (each / spoken.target_lengths[index]).mean()
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for p, g in zip(parameters, gradients, strict=True):
                    p -= recipe.lr * g
            losses.append(float(loss.detach()))
        loss_sum += sum(losses) / len(losses)
        differences = zip(start, parameters, strict=True)
        total = total + torch.cat([(a - b.detach()).flatten() for a, b in differences])
    found = train_cohort(trainer_of("speech", dataset, recipe), flat(model_of("speech")), users, 4)
    torch.testing.assert_close(found.total.float(), total, **CLOSE)
    assert found.loss == pytest.approx(loss_sum, rel=1e-5)
    assert found.examples == sum(len(dataset.users[user]) for user in users)
    assert total.abs().max() > 0.01


# Lower precision.


@pytest.mark.parametrize("kind", ["vit pre layernorm mean", "vit pre rmsnorm class", "speech"])
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_products_in_bfloat16_move_an_update_by_their_rounding(kind, max_grad_norm):
    dataset = Images((6,) * 4) if kind.startswith("vit") else tiny_speech()
    totals = {}
    for engine in ("stacked", "sequential"):
        for precision in ("float32", "bfloat16"):
            recipe = LocalTraining(
                epochs=2, batch_size=3, max_grad_norm=max_grad_norm, precision=precision
            )
            trainer = trainer_of(kind, dataset, recipe, engine=engine)
            summed = train_cohort(trainer, flat(model_of(kind)), [0, 1, 2, 3], 1)
            assert summed.non_finite == 0
            totals[engine, precision] = summed.total
    exact = totals["sequential", "float32"]
    for engine in ("stacked", "sequential"):
        moved = (totals[engine, "bfloat16"] - exact).norm() / exact.norm()
        assert 2**-13 < moved < 2**-4  # bfloat16 rounds by up to 2^-9


# Random layers.


DROPS = {"dropout": 0.3, "layer_drop": 0.2}


@pytest.mark.parametrize("kind", ["vit pre layernorm mean", "speech", "speech cape"])
def test_a_users_dropout_does_not_depend_on_who_else_is_in_the_stack(kind):
    """Others have more examples, and longer ones: a user is filled up to have as many."""
    model, task = copy.deepcopy(model_of(kind, torch.float64, **DROPS)), task_of(kind)
    recipe, start = LocalTraining(epochs=2, batch_size=9, lr=0.1), flat(model).clone()
    counts, stacked = [6, 2, 9, 3, 1], StackedModel(model)
    if kind.startswith("vit"):
        dataset = Images(tuple(counts), dtype=torch.float64)
        examples = [dataset.user(user) for user in range(5)]
    else:
        examples = speakers(counts)

    def updates(users: list[int]) -> torch.Tensor:
        work = [stacked_user(examples[user], recipe, user) for user in users]
        return train_stack(stacked, start, work, recipe, task, 1).deltas.written_out()

    alone = updates([3])[0]
    for users in ([3, 0], [1, 2, 3], [4, 3, 2, 1, 0]):
        torch.testing.assert_close(updates(users)[users.index(3)], alone, **EXACT)
    assert not torch.allclose(updates([1])[0], alone, atol=1e-3)


@pytest.mark.parametrize("kind", ["vit pre layernorm mean", "speech", "speech cape"])
def test_users_drop_in_a_stack_what_they_drop_sequentially(kind):
    recipe = LocalTraining(epochs=2, batch_size=4, lr=0.1)
    dataset = Images((6, 3, 9)) if kind.startswith("vit") else tiny_speech()
    totals = [
        train_cohort(
            trainer_of(kind, dataset, recipe, engine=engine, stack=3, shape=DROPS),
            flat(model_of(kind, **DROPS)), [0, 1, 2], 1,
        ).total
        for engine in ("stacked", "sequential")
    ]  # fmt: skip
    torch.testing.assert_close(*totals, **CLOSE)


@pytest.mark.parametrize(("dropout", "masks"), [(0.3, False), (0.0, True), (0.0, False)])
@pytest.mark.parametrize("engine", ["stacked", "sequential"])
def test_dropout_and_masks_differ_by_round_and_repeat(engine, dropout, masks):
    """Of users with one recording each: the order of recordings has no say."""
    kind, shape = "speech", {"dropout": dropout}
    recipe = LocalTraining(epochs=1, batch_size=3, lr=0.1)
    start, totals = flat(model_of(kind, **shape)), []
    for round_ in (1, 1, 2):
        trainer = trainer_of(kind, tiny_speech(), recipe, engine=engine, shape=shape, masks=masks)
        torch.manual_seed(len(totals))  # no global state has a say
        totals.append(train_cohort(trainer, start, [0, 9], round_).total)
    assert totals[0].equal(totals[1])
    assert torch.allclose(totals[0], totals[2], atol=1e-3) is not (masks or dropout > 0)


@pytest.mark.parametrize(("dropout", "masks"), [(0.3, False), (0.0, True), (0.0, False)])
@pytest.mark.parametrize("engine", ["stacked", "sequential"])
def test_users_who_said_the_same_draw_dropout_and_masks_of_their_own(engine, dropout, masks):
    kind, shape = "speech", {"dropout": dropout}
    recipe = LocalTraining(epochs=1, batch_size=3, lr=0.1)
    alike = dataclasses.replace(tiny_speech(), users=[tones(3)[:1]] * 12)  # "baba"
    start, totals = flat(model_of(kind, **shape)), []
    for user in (2, 3):
        trainer = trainer_of(kind, alike, recipe, engine=engine, shape=shape, masks=masks)
        totals.append(train_cohort(trainer, start, [user], 1).total)
    assert totals[0].equal(totals[1]) is not (masks or dropout > 0)


def test_a_stack_drops_its_share_and_each_user_another():
    stacked = StackedModel(nn.Sequential(nn.Linear(1, 4_000), Dropout(0.3)))
    start = torch.cat([torch.zeros(4_000), torch.ones(4_000)])  # weights, biases
    stacked.start(start, 3)
    stacked.set_users(3, first=True)
    stacked.set_streams([torch.Generator().manual_seed(seed) for seed in (1, 2, 1)])
    kept = stacked.module.train()(torch.ones(3 * 5, 1)).view(3, 5, 4_000)
    assert (kept == 0).float().mean(dim=(1, 2)).tolist() == pytest.approx([0.3] * 3, abs=0.01)
    torch.testing.assert_close(kept.unique(), torch.tensor([0.0, 1 / 0.7]))
    assert torch.equal(kept[0], kept[2])
    assert not torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0, 0], kept[0, 1])


def test_training_a_stack_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    trainer = trainer_of("speech", tiny_speech(), LocalTraining(), shape={"dropout": 0.3})
    train_cohort(trainer, flat(model_of("speech", dropout=0.3)), [0, 1], 1)
    assert torch.equal(torch.get_rng_state(), state)


# What can be stacked.


class Shared(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Linear(16, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x.flatten(1)).tanh()))


class Tied(Shared):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(16, 16)
        self.second.weight = self.first.weight


class Convolutional(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 3))


class OwnParameter(nn.Module):
    """A parameter in a module that is no layer that is known."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(16))
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.flatten(1) * self.scale)


class LinearOfAnotherKind(nn.Sequential):
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), self.Doubled(16, 3))


class Frozen(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))
        self[1].bias.requires_grad_(False)


class Centred(nn.Module):
    """Has no parameters, and lets each row of a batch into all others."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0)


def between(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), *layers, nn.Linear(8, 3))


class LooksAtOthers(nn.Sequential):
    stackable = True

    def __init__(self) -> None:
        super().__init__(between(Centred()))


class NormalisesTheBatch(nn.Sequential):
    stackable = True

    def __init__(self) -> None:
        super().__init__(between(nn.BatchNorm1d(8, affine=False, track_running_stats=False)))


class DrawsGlobally(nn.Sequential):
    stackable = True

    def __init__(self) -> None:
        super().__init__(between(nn.Dropout(0.5)))


class PassesTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.inner(self.inner(x.flatten(1))))


UNKNOWN = [
    Shared,
    Tied,
    Convolutional,
    OwnParameter,
    LinearOfAnotherKind,
    Frozen,
    LooksAtOthers,
    NormalisesTheBatch,
    DrawsGlobally,
    PassesTwice,
]


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_our_models_can_be_stacked(kind):
    assert can_stack(model_of(kind))


@pytest.mark.parametrize("build", UNKNOWN)
def test_what_cannot_be_stacked_is_trained_one_user_after_another(build):
    torch.manual_seed(0)
    model = build()
    assert not can_stack(model)
    trainer = trainer_of("vit pre layernorm mean", Images((4, 2, 5)), LocalTraining(lr=0.1))
    trainer = dataclasses.replace(trainer, model=model)
    assert trainer.stacked is None
    start = flat(model).clone()
    summed = train_cohort(trainer, start, [0, 1, 2], 1)
    sequential = dataclasses.replace(trainer, engine="sequential")
    assert summed.total.equal(train_cohort(sequential, start, [0, 1, 2], 1).total)
    assert summed.total.norm() > 0.01


@pytest.mark.parametrize("build", [LooksAtOthers, NormalisesTheBatch, DrawsGlobally])
def test_what_a_user_sends_is_the_same_whoever_else_is_in_the_cohort(build):
    torch.manual_seed(0)
    trainer = trainer_of("vit pre layernorm mean", Images((4, 2, 5)), LocalTraining(lr=0.1))
    trainer = dataclasses.replace(trainer, model=build())
    start = flat(trainer.model).clone()
    both = train_cohort(trainer, start, [0, 1], 1).total
    alone = [train_cohort(trainer, start, [user], 1).total for user in (0, 1)]
    torch.testing.assert_close(both, sum(alone), rtol=0, atol=1e-6)


def test_a_class_of_ones_own_may_say_that_it_can_be_stacked_for_itself_alone():
    class Mine(nn.Sequential):
        stackable = True

    class Derived(Mine):
        pass

    assert can_stack(Mine(nn.Flatten(), nn.Linear(16, 3)))
    assert not can_stack(Derived(nn.Flatten(), nn.Linear(16, 3)))
    assert not can_stack(Mine(nn.Flatten(0, 1), nn.Linear(16, 3)))


def test_layers_without_bias_without_scale_and_over_several_dimensions_are_stacked():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.LayerNorm((4, 4), elementwise_affine=False),
        nn.Flatten(1, 2),
        LearnedPositions(4, 4),
        nn.Linear(4, 6, bias=False),
        nn.LayerNorm((4, 6)),
        nn.LayerNorm(6, bias=False),
        nn.RMSNorm(6, eps=0.5),
        nn.Flatten(),
        nn.Linear(24, 3),
    ).double()
    for p in model.parameters():
        nn.init.normal_(p)
    assert can_stack(model)
    recipe, dataset = LocalTraining(epochs=2, batch_size=2, lr=0.1), Images((3, 5, 2))
    dataset = dataclasses.replace(dataset, dtype=torch.float64)
    start, layout = flat(model).clone(), Layout.of(model)
    work = most_steps_first([stacked_user(dataset.user(u), recipe, u) for u in range(3)])
    result = train_stack(StackedModel(model), start, work, recipe, Classification(), 1)
    for user in range(3):
        steps = [work[user].examples.take(index) for index in work[user].steps]
        alone = train_user(model, layout.split(start), steps, recipe, Classification())
        torch.testing.assert_close(update_of(result, user), layout.join(alone.update), **EXACT)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_linear_layer_that_is_passed_twice_or_never_is_noticed(momentum):
    class Passing(nn.Module):
        def __init__(self, times: int) -> None:
            super().__init__()
            self.inner, self.last, self.times = nn.Linear(16, 16), nn.Linear(16, 3), times

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.flatten(1)
            for _ in range(self.times):
                x = self.inner(x)
            return self.last(x)

    recipe, task = LocalTraining(batch_size=2, optimizer=SGD(momentum)), Classification()
    work = [stacked_user(Images((4,)).user(0), recipe, 0)]
    for times, error in ((0, "was not in the forward pass"), (2, "can only be used once")):
        model = Passing(times)
        with pytest.raises(RuntimeError, match=error):
            train_stack(StackedModel(model), flat(model), work, recipe, task, 1)
    model = Passing(1)
    train_stack(StackedModel(model), flat(model), work, recipe, task, 1)


def test_users_must_come_with_those_who_train_longest_first():
    recipe, dataset = LocalTraining(epochs=1, batch_size=2), Images((2, 4))
    model = copy.deepcopy(model_of("vit pre layernorm mean"))
    work = [stacked_user(dataset.user(user), recipe, user) for user in range(2)]
    with pytest.raises(ValueError, match=r"more steps must come first, got \[1, 2\]"):
        train_stack(StackedModel(model), flat(model), work, recipe, Classification(), 1)


def test_stacks_of_other_sizes_one_after_another_are_independent():
    kind, recipe = "speech", LocalTraining(epochs=1, batch_size=3, lr=0.1, optimizer=SGD(0.5))
    trainer, start = trainer_of(kind, tiny_speech(), recipe), flat(model_of(kind))
    first = train_cohort(trainer, start, [2, 3], 1).total
    train_cohort(trainer, start * 1.5, range(7), 2)
    assert train_cohort(trainer, start, [2, 3], 1).total.equal(first)
    assert start.equal(flat(model_of(kind)))


# Users whose data are of no use.


@pytest.mark.parametrize("engine", ["stacked", "sequential"])
def test_a_user_with_nan_data_does_not_disturb_the_others(engine):
    kind, counts = "vit pre layernorm mean", (4, 9, 2, 7)
    recipe = LocalTraining(steps=3, batch_size=4, lr=0.1, optimizer=SGD(0.9), max_grad_norm=1.0)
    clipping = GlobalClipping(0.05)
    build = partial(trainer_of, kind, recipe=recipe, engine=engine, clipping=clipping)
    start = flat(model_of(kind))
    with_nan = train_cohort(build(Images(counts, poisoned=(1,))), start, [0, 1, 2, 3], 1)
    without = train_cohort(build(Images(counts)), start, [0, 2, 3], 1)
    torch.testing.assert_close(with_nan.total, without.total, rtol=0, atol=1e-7)
    assert (with_nan.users, with_nan.non_finite) == (4, 1)
    assert with_nan.loss == pytest.approx(without.loss, rel=1e-5)
    assert with_nan.norm == pytest.approx(without.norm, rel=1e-5)
    assert with_nan.clipped == without.clipped == 3
    assert with_nan.block_norms == pytest.approx(without.block_norms, rel=1e-4)


def test_what_a_finished_user_would_compute_next_is_not_looked_at():
    """A user's one step is finite, but the model it leaves overflows; another has more steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double()
    image = torch.full((1, 1, 4, 4), 1e160, dtype=torch.float64)
    huge = Examples(image, model(image).argmin(dim=1))  # the model is as wrong as can be
    usual = dataclasses.replace(Images((6,)), dtype=torch.float64).user(0)
    for extra in ({}, {"optimizer": SGD(0.9)}, {"proximal_mu": 0.5}):
        recipe = LocalTraining(epochs=1, batch_size=2, lr=0.1, **extra)
        work = [stacked_user(usual, recipe, 1), stacked_user(huge, recipe, 0)]
        assert [len(user.steps) for user in work] == [3, 1]
        layout, start = Layout.of(model), flat(model).clone()
        result = train_stack(StackedModel(model), start, work, recipe, Classification(), 1)
        for number, user in enumerate(work):
            steps = [user.examples.take(index) for index in user.steps]
            alone = train_user(model, layout.split(start), steps, recipe, Classification())
            expected = layout.join(alone.update)
            assert torch.isfinite(expected).all()
            assert expected.any()
            torch.testing.assert_close(update_of(result, number), expected, **EXACT)
            assert float(result.losses[number]) == pytest.approx(alone.loss)
        load = layout.split(start)
        for name, p in model.named_parameters():
            p.data.copy_(load[name])


@pytest.mark.parametrize("engine", ["stacked", "sequential"])
def test_a_user_without_usable_data_counts_as_zero_where_that_is_tolerated(engine):
    kind, recipe = "vit pre layernorm mean", LocalTraining(lr=0.1)
    build = partial(trainer_of, kind, recipe=recipe, engine=engine)
    start = flat(model_of(kind))
    tolerant = build(Images((4, 0, 3)), tolerant=True)
    summed = train_cohort(tolerant, start, [0, 1, 2], 1)
    expected = train_cohort(build(Images((4, 0, 3))), start, [0, 2], 1)
    torch.testing.assert_close(summed.total, expected.total, rtol=0, atol=1e-7)
    assert (summed.users, summed.examples, summed.non_finite) == (3, 7, 1)
    with pytest.raises(InputError, match="user 1 has nothing"):
        train_cohort(build(Images((4, 0, 3))), start, [0, 1, 2], 1)
    nobody = train_cohort(tolerant, start, [1], 1)
    assert (nobody.users, nobody.non_finite, nobody.loss) == (1, 1, 0.0)
    assert not nobody.total.any()


@dataclass(frozen=True)
class Mumbled:
    """Speakers of whom user 1 said too much in too little time, and user 2 so once."""

    whole: object

    @property
    def user_ids(self) -> list[str]:
        return self.whole.user_ids

    @property
    def classes(self) -> int:
        return self.whole.classes

    def user(self, index: int) -> Utterances:
        spoken = self.whole.user(index)
        hurried = {1: slice(None), 2: slice(0, 1)}.get(index, slice(0, 0))
        lengths = spoken.lengths.clone()
        lengths[hurried] = 10
        return dataclasses.replace(spoken, lengths=lengths, skipped=index)


@pytest.mark.parametrize("engine", ["stacked", "sequential"])
def test_recordings_that_cannot_be_learnt_are_counted(engine):
    dataset, recipe = tiny_speech(), LocalTraining(epochs=1, batch_size=3, lr=0.1)
    dataset = dataclasses.replace(
        dataset, users=[[one for one in user if len(one.text) > 1] for user in dataset.users]
    )
    counts = [len(dataset.users[user]) for user in (0, 1, 2)]
    trainer = trainer_of("speech", Mumbled(dataset), recipe, engine=engine)
    counts = [len(user) for user in dataset.users]
    users = [user for user in (1, 2, 3, 4) if counts[user]]
    summed = train_cohort(trainer, flat(model_of("speech")), users, 1)
    assert summed.users == len(users) == 4
    assert summed.non_finite == 1
    assert summed.skipped == sum(users) + counts[1] + 1
    assert summed.examples == counts[2] - 1 + counts[3] + counts[4]
    assert torch.isfinite(summed.total).all()


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 11), min_size=2, max_size=5, unique=True), st.booleans())
def test_where_users_are_trained_alone_one_of_them_moves_the_sum_by_the_bound_at_most(users, alone):
    """Also by a recipe that diverges, which turns the least rounding into another update."""
    recipe = LocalTraining(steps=12, batch_size=3, lr=0.5)
    engine, stack = ("sequential", 16) if alone else ("stacked", 1)
    trainer = trainer_of(
        "speech", tiny_speech(), recipe, engine=engine, stack=stack, clipping=GlobalClipping(1.0)
    )
    start = flat(model_of("speech"))
    without = train_cohort(trainer, start, users[1:], 1).total
    moved = train_cohort(trainer, start, users, 1).total - without
    assert float(moved.norm()) <= 1.0
    own = train_cohort(trainer, start, users[:1], 1).total
    torch.testing.assert_close(moved, own, rtol=0, atol=1e-13)


# Prepared users.


def test_what_is_kept_of_users_changes_nothing():
    recipe = LocalTraining(epochs=1, batch_size=3, lr=0.1)
    plain = trainer_of("speech", tiny_speech(), recipe)
    keeping = dataclasses.replace(plain, cache=UserCache(2**20))
    start = flat(model_of("speech"))
    for round_ in (1, 2, 2):
        users = range(round_, 9)
        expected = train_cohort(plain, start, users, round_).total
        assert train_cohort(keeping, start, users, round_).total.equal(expected)
    assert len(keeping.cache) == 8
    assert len(plain.cache) == 0


def test_nodes_that_share_a_process_do_not_get_each_others_users():
    """In a deployment each numbers its own from 0: a user trained twice would add up to 2C."""
    kind, whole = "vit pre layernorm mean", Images((4, 6, 5, 7))
    one = trainer_of(kind, whole, LocalTraining(), cache=UserCache(2**20))
    near, far = (
        dataclasses.replace(one, dataset=DatasetPartition(whole, share, 2)) for share in (0, 1)
    )
    assert [len(node.prepared(0)) for node in (near, far, near)] == [4, 6, 4]
    assert [len(node.prepared(1)) for node in (far, near, far)] == [7, 5, 7]
    again = dataclasses.replace(
        one, dataset=DatasetPartition(whole, 0, 2)
    )  # made anew with every message
    assert again.prepared(0) is near.prepared(0)
