"""Of a pre-trained model a part is trained: what is bounded, noised, sent and kept is that part."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from flwr.app import Message
from in_process import (
    SMALL,
    InProcessGrid,
    Silent,
    drive_on,
    resume_small,
    small_config,
    train_small,
)
from safetensors.torch import load_file, save_file

from fedpriv import experiment
from fedpriv.config_files import parse_config
from fedpriv.errors import FedprivError, InputError
from fedpriv.federation.builders import build_trainer
from fedpriv.federation.messages import flat_tensor
from fedpriv.models.parameters import Layout, parameters_of
from fedpriv.models.trained_part import frozen_of
from fedpriv.privacy import Purpose
from fedpriv.privacy.clipping import bounds_of
from fedpriv.training.checkpoint import checkpoint_files, digest_of
from fedpriv.training.cohort import train_cohort

OUTSIDE = Path(__file__).parent.parent / "outside"
TIMM = {"name": "pretrained:timm_vit"}
GPT2 = {"name": "pretrained:gpt2"}
LETTERS = {"data": {"name": "letters:alphabets", "users": 60}}
LORA = {"train": "lora", "lora": {"r": 2}}
WITHOUT_HEAD = {"train": "lora", "lora": {"r": 2, "head": False, "variant": "dora"}}
PARTS = {
    "timm head": (TIMM | {"train": "head"}, {}),
    "timm patterns": (TIMM | {"train": ["blocks.1.*", "head.*"]}, {}),
    "timm lora": (TIMM | LORA, {}),
    "gpt2 patterns": (GPT2 | {"train": ["*ln_*"]}, LETTERS),
    "gpt2 lora": (GPT2 | WITHOUT_HEAD, LETTERS),
}


class WeighingGrid(InProcessGrid):
    """Notes how many bytes of numbers go to a node, and come back."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[tuple[int, int]] = []

    def answer(self, message: Message) -> Message:
        reply = super().answer(message)
        if message.metadata.message_type == "train":
            there, back = message.content["arrays"], reply.content["sum"]
            self.bytes.append((flat_tensor(there).nbytes, flat_tensor(back).nbytes))
        return reply


def trained(folder, model, grid=None, **changes):
    changes = {"rounds": 2, "code": str(OUTSIDE), "model": model} | changes
    return train_small(folder, grid, **changes)


@pytest.mark.parametrize("case", sorted(PARTS))
def test_only_what_is_trained_is_noised_sent_and_kept(case, tmp_path):
    model, changes = PARTS[case]
    of_part, of_all = WeighingGrid(), WeighingGrid()
    directory, part = trained(tmp_path / "part", model, of_part, **changes)
    _, whole = trained(tmp_path / "all", {"name": model["name"]}, of_all, **changes)
    began = build_trainer(part.config).model
    numbers, all_numbers = part.plan.layout.total, whole.plan.layout.total
    assert 0 < numbers < all_numbers / 2

    # The price is that of the run that trains everything, at the same z.
    assert part.plan.planned_cost().epsilon == whole.plan.planned_cost().epsilon
    assert directory.read_metrics()[-1]["epsilon"]["rdp"] == pytest.approx(
        part.plan.planned_cost().epsilon
    )
    # Each of the part's blocks has its bound, and noise of its size is drawn.
    assert len(bounds_of(part.plan.mechanism.gaussian.clipping)) == len(part.plan.layout.names)
    assert sum(part.plan.sizes) == numbers
    # Bytes a round: parameters float32 there, sums float64 back.
    assert set(of_part.bytes) == {(4 * numbers, 8 * numbers)}
    assert set(of_all.bytes) == {(4 * all_numbers, 8 * all_numbers)}

    end = part.server.model
    assert frozen_of(began).keys() == frozen_of(end).keys()
    assert all(frozen_of(end)[name].equal(block) for name, block in frozen_of(began).items())
    moved = [not parameters_of(end)[n].equal(block) for n, block in parameters_of(began).items()]
    assert all(moved)
    kept = load_file(checkpoint_files(directory.checkpoints)[-1])
    names = {name.removeprefix("parameter/") for name in kept if name.startswith("parameter/")}
    assert names == set(part.plan.layout.names)
    assert directory.config().model.frozen_sha256 == digest_of(frozen_of(began))
    reopened = experiment.reopen(directory.path)[1]
    for name, tensor in end.state_dict().items():
        assert reopened.server.model.state_dict()[name].equal(tensor)


def test_gpt2s_tied_weights_are_one_block_that_is_trained_bounded_and_counted_once(tmp_path):
    directory, prepared = trained(tmp_path / "run", GPT2, **LETTERS)
    model, layout = prepared.server.model, prepared.plan.layout
    assert model.lm_head.weight is model.transformer.wte.weight
    assert [name for name in layout.names if "wte" in name or "lm_head" in name] == [
        "transformer.wte.weight"
    ]
    assert layout.total == sum({id(p): p.numel() for p in model.parameters()}.values())
    assert len(directory.read_metrics()[-1]["simulation_only"]["block_norms"]) == len(layout.names)
    head = trained(tmp_path / "head", GPT2 | {"train": "head"}, **LETTERS)[1].plan.layout
    assert head.names == ("transformer.wte.weight",)


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ({"train": "head"}, {}),
        (LORA, {}),
        ({"train": "lora", "lora": {"variant": "dora"}}, {}),
        (TIMM | LORA, {}),
        (GPT2 | LORA, LETTERS),
    ],
)
def test_many_users_at_once_are_trained_as_one_after_another(model, changes):
    trainers = [
        build_trainer(
            small_config(
                **changes,
                code=str(OUTSIDE),
                model=model if "name" in model else SMALL["model"] | model,
                runtime__engine=engine,
                runtime__stack=6,
            )
        )
        for engine in ("stacked", "sequential")
    ]
    together, alone = trainers
    assert together.stacked is not None, together.why
    assert alone.stacked is None
    layout = Layout.of(together.model)
    start = layout.join(parameters_of(together.model)).clone()
    users = [3, 1, 17, 4, 8, 9, 20]
    totals = [train_cohort(each, start, users, round_=1).total for each in trainers]
    size = float(torch.linalg.vector_norm(totals[1]))
    assert size > 0
    assert float(torch.linalg.vector_norm(totals[0] - totals[1])) < 1e-5 * size


# Every process has the same frozen part, or nothing is trained.


@pytest.fixture
def weights(tmp_path):
    """The file that the model's builder reads, and what it would begin with otherwise."""
    path = tmp_path / "weights.pt"
    model = build_trainer(small_config(code=str(OUTSIDE), model=TIMM)).model
    state = {name: tensor + 1e-3 for name, tensor in model.state_dict().items()}
    torch.save(state, path)
    return path, state


def changed(path, state, name) -> None:
    torch.save({**state, name: state[name] + 1e-7}, path)


def test_what_the_builder_read_stays_as_it_was(weights, tmp_path):
    path, state = weights
    model = TIMM | {"train": "head", "weights": str(path)}
    prepared = trained(tmp_path / "run", model)[1]
    for name, tensor in prepared.server.model.state_dict().items():
        assert tensor.equal(state[name]) == (not name.startswith("head."))


def test_a_node_with_other_frozen_weights_trains_nobody(weights, tmp_path):
    path, state = weights
    model = TIMM | {"train": "head", "weights": str(path)}
    settings = small_config(code=str(OUTSIDE), model=model, run_dir=str(tmp_path / "run"))
    prepared = experiment.prepare(settings)
    changed(path, state, "blocks.0.mlp.fc1.weight")
    directory = experiment.create(prepared)
    with pytest.raises(FedprivError, match=r"what is not trained has other numbers on ") as caught:
        experiment.train(prepared, directory, Silent(), drive_on(None))
    assert "\n" not in str(caught.value)
    assert not directory.read_metrics()
    # The head is sent.
    changed(path, state, "head.weight")
    experiment.train(prepared, directory, Silent(), drive_on(None))
    assert len(directory.read_metrics()) == 4


def test_a_run_goes_on_with_the_frozen_weights_that_it_began_with(weights, tmp_path):
    path, state = weights
    model = TIMM | {"train": "head", "weights": str(path)}
    whole = trained(tmp_path / "whole", model, rounds=4)[1]
    directory = trained(tmp_path / "run", model, rounds=4)[0]
    for file in checkpoint_files(directory.checkpoints)[1:]:
        file.unlink()
    changed(path, state, "norm.bias")
    with pytest.raises(InputError, match=r"^model\.frozen_sha256: what is not trained"):
        experiment.reopen(directory.path)
    torch.save(state, path)
    assert resume_small(directory.path)[1].server.parameters().equal(whole.server.parameters())


@pytest.mark.parametrize(
    ("train", "name"),
    [("head", "norm.bias"), ("head", "head.weight"), ("all", "norm.bias"), ("lora", "head.bias")],
)
def test_runs_that_begin_with_other_weights_share_no_noise(train, name, weights):
    path, state = weights
    settings = small_config(code=str(OUTSIDE), model=TIMM | {"train": train, "weights": str(path)})
    one = experiment.prepare(settings).plan
    again = experiment.prepare(settings).plan
    changed(path, state, name)
    other = experiment.prepare(settings).plan
    assert one.fingerprint == again.fingerprint != other.fingerprint
    for purpose in (Purpose.NOISE, Purpose.SAMPLING):
        first, second = (
            plan.randomness.numpy(purpose, 1, 0).standard_normal(9) for plan in (one, other)
        )
        assert not set(first) & set(second)


def test_a_constant_of_the_start_is_part_of_it(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "class Scaled(torch.nn.Linear):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x.flatten(1) * self.scale)\n"
        "def build(input_shape, classes, at: str = ''):\n"
        "    layer = Scaled(64, classes)\n"
        "    layer.register_buffer('scale', torch.load(at), persistent=False)\n"
        "    return torch.nn.Sequential(layer)\n"
    )
    model = {"name": "mine:build", "at": str(tmp_path / "scale.pt")}
    found = set()
    for scale in (1.0, 1.5):
        torch.save(torch.tensor(scale), tmp_path / "scale.pt")
        plan = experiment.prepare(small_config(code=str(tmp_path), model=model)).plan
        found.add(plan.fingerprint)
    assert len(found) == 2


def test_a_run_that_has_a_checkpoint_needs_its_start_no_more(weights, tmp_path):
    path, state = weights
    model = TIMM | {"weights": str(path)}
    whole = trained(tmp_path / "whole", model, rounds=4)[1]
    directory = trained(tmp_path / "run", model, rounds=4)[0]
    for file in checkpoint_files(directory.checkpoints)[1:]:
        file.unlink()
    changed(path, state, "norm.bias")
    again = parse_config(yaml.safe_load((directory.path / "config.yaml").read_text()))
    with pytest.raises(InputError, match=r"^model\.start_sha256: .* leave start_sha256 out$"):
        experiment.prepare(again)
    assert resume_small(directory.path)[1].server.parameters().equal(whole.server.parameters())
    ledger = directory.ledger.read_bytes()
    for file in checkpoint_files(directory.checkpoints):
        file.unlink()
    with pytest.raises(InputError, match=r"^model\.start_sha256: "):
        experiment.reopen(directory.path)
    assert directory.ledger.read_bytes() == ledger


# A seed model.


@pytest.fixture
def seed(tmp_path):
    """A seed model's file for the small config's own model, and its blocks."""
    path = tmp_path / "seed.safetensors"
    blocks = parameters_of(build_trainer(small_config()).model)
    blocks = {name: block + 0.01 for name, block in blocks.items()}
    save_file(blocks, path)
    return path, blocks


def beginning_with(seed, part):
    """The changes of a config that trains a part of what begins with the seed model."""
    path, blocks = seed
    changes = {f"model__{key}": value for key, value in part.items()}
    return changes | {"seed_model": {"path": str(path), "sha256": digest_of(blocks)}}


@pytest.mark.parametrize("part", [{"train": "head"}, LORA])
def test_a_seed_model_is_what_the_frozen_part_is_of(part, seed, tmp_path):
    _, blocks = seed
    directory, prepared = train_small(tmp_path / "run", rounds=2, **beginning_with(seed, part))
    frozen = frozen_of(prepared.server.model)
    assert len(frozen) == len(blocks) - 2
    assert all(
        block.equal(blocks[name.replace(".base_layer", "")]) for name, block in frozen.items()
    )
    assert not prepared.server.model.head.weight.equal(blocks["head.weight"])
    shutil.rmtree(directory.checkpoints)
    directory.checkpoints.mkdir()
    # Without a checkpoint it begins again, and there too with the seed model.
    start = parameters_of(experiment.prepare(prepared.config).server.model)
    assert start["head.weight"].equal(blocks["head.weight"])


@pytest.mark.parametrize("part", [{"train": "head"}, LORA])
def test_where_its_file_has_gone_a_run_says_so(part, seed, tmp_path):
    path, _ = seed
    directory, _ = train_small(tmp_path / "run", rounds=1, **beginning_with(seed, part))
    path.unlink()
    for opened in (experiment.reopen, experiment.reopen_model):
        with pytest.raises(InputError, match=r"^seed_model\.path: there is no .*seed\.saf.*; put"):
            opened(directory.path)


def test_nodes_of_a_deployment_do_not_have_its_file(seed):
    path, blocks = seed
    changes = {"seed_model": {"path": str(path), "sha256": digest_of(blocks)}}
    deployed = {"runtime__deployment": True, "model__train": "head"}
    with pytest.raises(InputError, match=r"^model\.train: the nodes of a deployment do not have"):
        build_trainer(small_config(**changes, **deployed))
