"""Models whose code is not known here: many users at once, each as if it were alone."""

import copy
import dataclasses
import re
import warnings
from dataclasses import dataclass
from functools import cache, partial
from unittest import mock

import pytest
import torch
from in_process import Silent, drive_on, small_config
from outside.groupnorm_cnn import cnn
from torch import Tensor, nn
from training.test_stacked import Images, flat

from fedpriv import experiment
from fedpriv.data.federated import Examples
from fedpriv.federation.builders import build_trainer
from fedpriv.models.parameters import Layout
from fedpriv.optimizers.local import SGD, Adam, Signs
from fedpriv.privacy import GlobalClipping, Unclipped
from fedpriv.privacy.randomness import Randomness
from fedpriv.tasks.base import Task
from fedpriv.tasks.classification import Classification
from fedpriv.tasks.next_token import NO_TOKEN, NextToken
from fedpriv.training import cohort, vmapped
from fedpriv.training.cohort import CohortTrainer, train_cohort
from fedpriv.training.local import LocalTraining
from fedpriv.training.stack_size import planned_stack
from fedpriv.training.stacked import can_stack
from fedpriv.training.vmapped import Vmapping, missing_rules, vmapping_of

COUNTS = (5, 1, 9, 3, 4, 2)


@dataclass(frozen=True)
class Pictures(Images):
    """User i holds `counts[i]` images of `side` by `side`."""

    side: int = 4
    channels: int = 1

    def user(self, index: int) -> Examples:
        small = super().user(index)
        generator = torch.Generator().manual_seed(100 + index)
        shape = (len(small), self.channels, self.side, self.side)
        images = torch.randn(shape, generator=generator)
        if index in self.poisoned:
            images[0] = torch.nan
        return Examples(images, small.targets)


@dataclass(frozen=True)
class Texts(Images):
    """User i holds `counts[i]` sequences of 8 tokens out of 11, some of which are shorter."""

    @property
    def classes(self) -> int:
        return 11

    def user(self, index: int) -> Examples:
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(11, (self.counts[index], 9), generator=generator)
        targets = tokens[:, 1:].clone()
        targets[0, 8 - index % 5 :] = NO_TOKEN
        return Examples(tokens[:, :-1], targets)


def groupnorm() -> nn.Module:
    return cnn((1, 8, 8), 3, width=4)


def timm() -> nn.Module:
    from timm.models import vit_tiny_patch16_224

    return vit_tiny_patch16_224(img_size=32, patch_size=8, num_classes=3, depth=2)


def hf_vit() -> nn.Module:
    from outside.hf_vit import vit

    return vit((1, 8, 8), 3, width=16, depth=2)


def gpt2() -> nn.Module:
    """Its last layer has the weights of its embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"vocab_size": 11, "n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 2}
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ends = {"bos_token_id": None, "eos_token_id": None}
    return GPT2LMHeadModel(GPT2Config(**shape, **still, **ends))


KINDS = {
    "GroupNorm CNN": (groupnorm, Pictures(COUNTS, side=8), Classification()),
    "timm ViT": (timm, Pictures(COUNTS, side=32, channels=3), Classification()),
    "Hugging Face ViT": (hf_vit, Pictures(COUNTS, side=8), Classification()),
    "GPT-2": (gpt2, Texts(COUNTS), NextToken()),
}


@cache
def made(kind: str) -> nn.Module:
    torch.manual_seed(3)
    return KINDS[kind][0]()


def trainer_of(
    model: nn.Module, dataset: Images, task: Task, recipe: LocalTraining, **changes: object
) -> CohortTrainer:
    held_out = dataset.user(2)
    found = vmapping_of(model, task, held_out, recipe.batch_size)
    assert isinstance(found, Vmapping), found
    return CohortTrainer(
        dataset=dataset,
        model=copy.deepcopy(model),
        task=task,
        recipe=recipe,
        clipping=Unclipped(),
        randomness=Randomness.simulation(1),
        device=torch.device("cpu"),
        vmapped=found,
        **changes,
    )


RECIPES = {
    "sgd": LocalTraining(epochs=2, batch_size=4, lr=0.1),
    "momentum": LocalTraining(epochs=2, batch_size=4, lr=0.05, optimizer=SGD(0.5)),
    "clipped": LocalTraining(steps=3, batch_size=2, lr=0.1, max_grad_norm=0.5, proximal_mu=0.2),
    "adam": LocalTraining(epochs=1, batch_size=3, lr=0.01, optimizer=Adam(eps=0.1)),
}


@pytest.mark.parametrize("recipe", sorted(RECIPES))
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_many_users_at_once_end_where_each_ends_alone(kind, recipe):
    trainer = trainer_of(made(kind), *KINDS[kind][1:], RECIPES[recipe])
    start, users = flat(trainer.model).clone(), range(len(COUNTS))
    together = train_cohort(trainer, start, users, 1)
    alone = train_cohort(dataclasses.replace(trainer, engine="sequential"), start, users, 1)
    torch.testing.assert_close(together.total, alone.total, rtol=1e-5, atol=1e-5)
    assert together.loss == pytest.approx(alone.loss, rel=1e-5)
    assert together.block_norms == pytest.approx(alone.block_norms, rel=1e-3, abs=1e-5)
    assert alone.total.norm() > 0.02


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_signs_of_many_users_are_those_of_each_alone(kind):
    """But for a score or two that rounding puts on the other side of zero."""
    recipe = LocalTraining(epochs=1, batch_size=3, lr=3.0, optimizer=Signs())
    trainer = trainer_of(made(kind), *KINDS[kind][1:], recipe)
    start, users = flat(trainer.model).clone(), range(len(COUNTS))
    together = train_cohort(trainer, start, users, 1).total
    alone = train_cohort(dataclasses.replace(trainer, engine="sequential"), start, users, 1).total
    apart = ~torch.isclose(together, alone, rtol=1e-5, atol=1e-5)
    assert float(apart.double().mean()) < 1e-3
    assert float((alone != 0).double().mean()) > 0.02


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_linear_maps_norms_and_embeddings_are_served_outside_vmap(kind):
    found = vmapping_of(made(kind), KINDS[kind][2], KINDS[kind][1].user(2), 4)
    layers = dict(made(kind).named_modules())
    served = {type(layers[path]).__name__ for path in found.served}
    assert (
        served
        == {
            "GroupNorm CNN": {"GroupNorm", "Linear"},
            "timm ViT": {"Linear", "LayerNorm"},
            "Hugging Face ViT": {"Linear", "LayerNorm"},
            # One of its two embeddings is the last layer's too.
            "GPT-2": {"LayerNorm", "Embedding", "Conv1D"},
        }[kind]
    )
    if kind == "GPT-2":
        assert "transformer.wte" not in found.served
    assert found.kept > 1_000


def test_who_else_is_trained_beside_a_user_changes_nothing_that_it_sends(monkeypatch):
    """Neither how many there are, nor how many examples they have, nor what is in these."""
    monkeypatch.setattr(vmapped, "FEWEST", 1)
    dataset = Pictures((3, 9, 4), poisoned=(1,), side=8)
    trainer = trainer_of(made("GroupNorm CNN"), dataset, Classification(), RECIPES["sgd"])
    trainer = dataclasses.replace(trainer, clipping=GlobalClipping(0.05))
    start = flat(trainer.model).clone()
    sent = [train_cohort(trainer, start, users, 1).total for users in ([0], [2], [0, 1, 2])]
    assert sent[0].norm() > 0.04
    torch.testing.assert_close(sent[2], sent[0] + sent[1], rtol=0, atol=1e-7)


class Own(nn.Module):
    """Parameters of its own, a layer that is passed twice, one that never is, weights that are
    looked at, and one parameter that is kept as it is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(16))
        self.twice, self.never = nn.Linear(16, 16), nn.Linear(16, 16)
        self.seen, self.head = nn.Linear(16, 16, bias=False), nn.Linear(16, 3)
        self.fixed = nn.Parameter(torch.full((16,), 0.5), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(x.flatten(1) * self.scale).tanh()) + self.fixed
        return self.head(x + x @ self.seen.weight.T)


class Asks(Own):
    """Goes another way where its numbers are so."""

    def __init__(self, above: float) -> None:
        super().__init__()
        self.above = above

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.above == -1 or x.amax() < self.above else -x
        return super().forward(x)


def test_whatever_a_model_does_with_its_parameters_each_user_has_its_own():
    torch.manual_seed(1)
    trainer = trainer_of(Own(), Images(COUNTS), Classification(), RECIPES["sgd"])
    assert trainer.vmapped.served == {"head"}
    start = flat(trainer.model).clone()
    together = train_cohort(trainer, start, range(6), 1).total
    alone = dataclasses.replace(trainer, engine="sequential")
    torch.testing.assert_close(
        together, train_cohort(alone, start, range(6), 1).total, rtol=1e-5, atol=1e-5
    )
    blocks = Layout.of(trainer.model).split(together)
    assert not blocks["never.weight"].any()
    assert all(block.norm() > 0 for name, block in blocks.items() if "never" not in name)


@dataclass(frozen=True)
class Vectors(Images):
    """User i holds `counts[i]` rows of 16 numbers."""

    def user(self, index: int) -> Examples:
        images = super().user(index)
        return Examples(images.inputs.flatten(1), images.targets)


@pytest.mark.parametrize(
    ("layer", "frozen"),
    [
        (partial(nn.Linear, 16, 3), ()),
        (partial(nn.Linear, 16, 3), ("bias",)),
        (partial(nn.LayerNorm, 16), ()),
        (partial(nn.RMSNorm, 16), ()),
    ],
)
def test_a_model_that_is_a_single_layer_is_trained_as_one_that_holds_it(layer, frozen):
    torch.manual_seed(4)
    model, dataset, task = layer(), Vectors(COUNTS), Classification()
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    trainer = trainer_of(nn.Sequential(model), dataset, task, RECIPES["momentum"])
    bare = dataclasses.replace(trainer, model=copy.deepcopy(model), vmapped=None)
    if frozen:
        bare = dataclasses.replace(bare, vmapped=vmapping_of(model, task, dataset.user(2), 4))
    assert frozen or can_stack(bare.model)
    start = flat(trainer.model).clone()
    alone = dataclasses.replace(trainer, engine="sequential")
    expected = train_cohort(alone, start, range(6), 1).total
    torch.testing.assert_close(
        train_cohort(bare, start, range(6), 1).total, expected, rtol=1e-5, atol=1e-5
    )
    assert expected.norm() > 0.02


def test_group_norms_of_any_shape_end_as_each_users_own():
    torch.manual_seed(2)
    norms = [nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.GroupNorm(2, 16), nn.Linear(16, 3)]
    model = nn.Sequential(nn.Unflatten(1, (4, 4)), *norms)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    trainer = trainer_of(model, Vectors(COUNTS), Classification(), RECIPES["momentum"])
    assert trainer.vmapped.served == {"1", "4", "5"}
    start = flat(trainer.model).clone()
    alone = dataclasses.replace(trainer, engine="sequential")
    expected = train_cohort(alone, start, range(6), 1).total
    found = train_cohort(trainer, start, range(6), 1).total
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    blocks = Layout.of(trainer.model).split(expected)
    assert all(block.norm() > 1e-3 for block in blocks.values())


def test_few_users_are_trained_one_after_another():
    """What vmap adds to every operation is then more than company saves."""
    trainer = trainer_of(made("GroupNorm CNN"), *KINDS["GroupNorm CNN"][1:], RECIPES["sgd"])
    start = flat(trainer.model).clone()
    with mock.patch.object(cohort, "train_stack", wraps=cohort.train_stack) as together:
        few = train_cohort(trainer, start, range(5), 1)
        assert not together.called
        assert (few.alone, few.slowed[:25]) == (5, "vmap pays from 6 users on")
        assert train_cohort(trainer, start, range(6), 1).slowed == ""
        assert together.called
    alone = dataclasses.replace(trainer, engine="sequential")
    assert few.total.equal(train_cohort(alone, start, range(5), 1).total)


def test_a_stack_that_vmap_cannot_run_is_trained_one_user_after_another():
    """It was not seen when the model was tried: those examples did not come that way."""
    torch.manual_seed(1)
    model = Asks(-1)
    trainer = trainer_of(model, Images(COUNTS), Classification(), RECIPES["sgd"])
    trainer.model.above = 1.5
    start = flat(trainer.model).clone()
    found = train_cohort(trainer, start, range(6), 1)
    alone = dataclasses.replace(trainer, engine="sequential")
    assert found.total.equal(train_cohort(alone, start, range(6), 1).total)
    assert (found.users, found.examples) == (6, sum(COUNTS))
    assert found.alone == 6
    assert re.match("vmap cannot run it: .*data-dependent control flow", found.slowed)


class Loops(Asks):
    """Has, for some numbers, an operation that torch runs user by user."""

    def forward(self, x: Tensor) -> Tensor:
        if self.above != -1:
            x = torch.renorm(x.flatten(1), 2, 0, self.above).view_as(x)
        return Own.forward(self, x)


def test_an_operation_that_goes_from_user_to_user_is_noticed_while_users_are_trained():
    trainer = trainer_of(Loops(-1), Images(COUNTS), Classification(), RECIPES["sgd"])
    start = flat(trainer.model).clone()
    assert train_cohort(trainer, start, range(6), 1).slowed == ""
    trainer.model.above = 0.5
    cohort.vmapped_model.cache_clear()  # it has the model as it was
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing of torch's own reaches the user
        found = train_cohort(trainer, start, range(6), 1)
    assert found.slowed.startswith("vmap goes from user to user in aten::renorm, for which it has")
    assert found.alone == 0
    alone = dataclasses.replace(trainer, engine="sequential")
    expected = train_cohort(alone, start, range(6), 1)
    torch.testing.assert_close(found.total, expected.total, rtol=1e-5, atol=1e-5)
    assert expected.slowed == ""


def test_what_else_warns_while_users_are_trained_is_heard():
    with pytest.warns(UserWarning, match="mine"), missing_rules() as missing:
        warnings.warn("mine", stacklevel=1)
    assert not missing


def test_a_run_says_once_that_a_stack_falls_back_and_keeps_it(tmp_path):
    torch.manual_seed(0)
    given = {"model": nn.Sequential(nn.AvgPool2d(2), Own(), nn.Linear(3, 10)), "rounds": 3}
    sampling = {"kind": "poisson", "expected_cohort": 6}
    config = small_config(**given, privacy__sampling=sampling, run_dir=str(tmp_path / "run"))
    prepared, observer = experiment.prepare(config), Silent()
    directory = experiment.create(prepared)
    experiment.train(prepared, directory, observer, drive_on(None))
    (said,) = [each for each in observer.sentences if "after another" in each]
    begins = r"round 1: \d+ of \d+ users trained one after another: vmap pays from"
    assert re.match(begins, said)
    seen = [row["simulation_only"] for row in directory.read_metrics()]
    slowed = [row for row in seen if "slowed" in row]  # in a round of many users nothing is
    assert slowed[0] == seen[0]
    assert all(row["slowed"] in said and row["alone"] for row in slowed)
    assert directory.environment()["engine"] == "users are trained 64 at a time, run by vmap"


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x.flatten(1, 2))[0][:, -1])


class Writes(nn.Module):
    """Writes rows into a tensor that all users would share."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        room = torch.zeros(len(x), 16)
        room[:, :] = x.flatten(1)
        return self.head(room)


class Wide(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 256, 3, padding=1), nn.Conv2d(256, 256, 3, padding=1), nn.Flatten(),
            nn.Linear(256 * 16, 3),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (partial(Asks, 1.5), "^vmap cannot run it: .*data-dependent control flow"),
        (Recurrent, r"^vmap cannot run it: .*aten::gru"),
        (Writes, "^vmap cannot run it: .*vmap"),
        (Wide, "convolutions of one user's step are enough"),
    ],
)
def test_what_vmap_cannot_run_or_would_slow_down_says_why(model, reason):
    torch.manual_seed(0)
    found = vmapping_of(model(), Classification(), Images(COUNTS).user(2), 10)
    assert isinstance(found, str)
    assert re.search(reason, found), found


def test_what_a_forward_pass_keeps_is_within_the_memory_of_a_stack():
    assert planned_stack(1_000, 2**20) == 64
    assert planned_stack(1_000, 2**20, kept=92_000) == 10


class Mixes(Own):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


class Draws(Own):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(x, 0.2))


@pytest.mark.parametrize(
    ("model", "changes", "told"),
    [
        (Own, {}, "64 at a time, run by vmap"),
        (Own, {"runtime__engine": "sequential"}, "one after another"),
        (Own, {"local__optimizer": "torch.optim:RMSprop"}, "torch.optim:RMSprop is not known to"),
        (
            Own,
            {"runtime__stack": 1},
            "memory for fewer than 6 at a time",
        ),
        (Mixes, {}, "one after another: it mixes the rows of a batch"),
        (Draws, {}, "one after another: it draws random numbers"),
        (partial(Asks, 1.5), {}, "one after another: vmap cannot run it"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), {}, "64 at a time"),
    ],
)
def test_a_run_says_how_users_are_trained_and_why(model, changes, told):
    torch.manual_seed(0)
    given = {"model": nn.Sequential(nn.AvgPool2d(2), model(), nn.Linear(3, 10)), **changes}
    trainer = build_trainer(small_config(**given, data__users=12))
    assert told in trainer.told
    assert (trainer.stacked is None) == ("one after another" in trainer.told)
