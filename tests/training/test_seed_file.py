"""Which blocks of a seed model's file a model begins with, and which files are refused."""

import re

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from fedpriv.errors import InputError
from fedpriv.training.checkpoint import digest_of
from fedpriv.training.seed_file import load_seed_blocks, read_seed_model


class Net(nn.Module):
    """A body and an output layer, whose name and shape differ from net to net."""

    def __init__(self, head: str = "head", classes: int = 3, bias: bool = True, deep: bool = False):
        super().__init__()
        self.body = nn.Linear(4, 5)
        self.register_buffer("steps", torch.tensor([1, 2]))
        last = nn.Linear(5, classes, bias=bias)
        self.add_module(head, nn.Sequential(nn.Linear(5, 5), nn.ReLU(), last) if deep else last)


class Tied(nn.Module):
    """An embedding that is the last layer too, under a name that comes later."""

    def __init__(self, tied: bool = True):
        super().__init__()
        self.wte, self.mix = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.a_head = nn.Linear(4, 7, bias=False)
        if tied:
            self.a_head.weight = self.wte.weight


@pytest.fixture
def path(tmp_path):
    return tmp_path / "seed.safetensors"


def load(path, model, reinitialize=()):
    load_seed_blocks(path, digest_of(read_seed_model(path)), model, reinitialize)


def blocks_of(model):
    return {name: block.detach().clone() for name, block in model.state_dict().items()}


def refused(path, model, *patterns):
    """The line in which a file is refused, after which the model must be as it was."""
    before = blocks_of(model)
    with pytest.raises(InputError) as error:
        load(path, model, patterns)
    assert "\n" not in str(error.value)
    assert all(torch.equal(before[name], block) for name, block in model.state_dict().items())
    return str(error.value)


# Kinds of numbers.


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_weights_that_are_no_floating_numbers_are_refused_by_name(path, dtype):
    blocks = blocks_of(Net())
    blocks["body.weight"] = (10 * blocks["body.weight"]).to(dtype)
    save_file(blocks, path)
    said = refused(path, Net())
    kind = str(dtype).removeprefix("torch.")
    assert re.match(rf"seed_model\.path: .* holds body\.weight as {kind}, .* float32; write", said)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_floating_numbers_of_another_width_are_read(path, dtype):
    given = Net()
    blocks = {
        name: b.to(dtype) if b.is_floating_point() else b for name, b in blocks_of(given).items()
    }
    save_file(blocks, path)
    load(path, model := Net())
    assert model.body.weight.dtype == torch.float32
    assert torch.equal(model.body.weight.double(), blocks["body.weight"].double().float().double())


def test_numbers_that_are_too_large_for_the_model_are_refused(path):
    blocks = blocks_of(Net())
    blocks["body.bias"] = torch.full((5,), 1e300, dtype=torch.float64)
    save_file(blocks, path)
    assert "holds a NaN or Inf in body.bias" in refused(path, Net())


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_constants_that_are_integers_must_be_of_the_models_kind(path, dtype):
    blocks = blocks_of(Net())
    blocks["steps"] = torch.tensor([5, 6])
    save_file(blocks, path)
    load(path, model := Net())
    assert model.steps.tolist() == [5, 6]
    blocks["steps"] = blocks["steps"].to(dtype)
    save_file(blocks, path)
    assert "holds steps as" in refused(path, Net())


# What begins anew.

OTHERS = {
    "another name": ({"head": "fc"}, ["head.*", "fc.*"]),
    "a bias more": ({"bias": False}, ["head.*"]),
    "deeper": ({"deep": True}, ["head.*"]),
    "other classes": ({"classes": 9}, ["head.*"]),
}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("other", sorted(OTHERS))
def test_what_matches_is_read_neither_of_the_file_nor_missed_in_it(path, other, turned):
    made, patterns = OTHERS[other]
    given, model = (Net(), Net(**made)) if turned else (Net(**made), Net())
    save_model(given, path)
    before = blocks_of(model)
    load(path, model, patterns)
    assert torch.equal(model.body.weight, given.body.weight)
    assert torch.equal(model.body.bias, given.body.bias)
    anew = [name for name in before if name.startswith(("head", "fc"))]
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in anew)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("other", sorted(OTHERS))
def test_the_advice_of_a_refusal_works(path, other, turned):
    made = OTHERS[other][0]
    given, model = (Net(), Net(**made)) if turned else (Net(**made), Net())
    save_model(given, path)
    advised = re.search(r"seed_model\.reinitialize: \[(.*)\]$", refused(path, model))
    load(path, model, advised[1].split(", "))
    assert torch.equal(model.body.weight, given.body.weight)


def test_each_pattern_must_match_something_and_something_must_be_left(path):
    save_model(Net(head="fc"), path)
    assert "no parameter matches 'haed.*'" in refused(path, Net(), "head.*", "fc.*", "haed.*")
    assert "nothing of the seed model is used" in refused(path, Net(), "*")
    assert "nothing of the seed model is used" in refused(
        path, Net(), "body.*", "head.*", "fc.*", "st*"
    )


# Tied weights.


@pytest.mark.parametrize("name", ["wte.weight", "a_head.weight", "both"])
def test_a_tied_weight_may_have_any_of_its_names(path, name):
    given = Tied()
    blocks = blocks_of(given)
    if name != "both":
        del blocks["a_head.weight" if name == "wte.weight" else "wte.weight"]
    save_file({each: block.clone() for each, block in blocks.items()}, path)
    load(path, model := Tied())
    assert torch.equal(model.wte.weight, given.wte.weight)
    assert model.a_head.weight is model.wte.weight


def test_the_file_that_export_writes_of_tied_weights_is_read(path):
    save_model(given := Tied(), path)
    assert "wte.weight" not in read_seed_model(path)
    load(path, model := Tied())
    assert torch.equal(model.wte.weight, given.wte.weight)
    assert torch.equal(model.mix.weight, given.mix.weight)


def test_a_tied_weight_begins_anew_by_any_of_its_names(path):
    save_model(given := Tied(), path)
    for pattern in ("a_head.*", "wte.*"):
        model = Tied()
        before = model.wte.weight.detach().clone()
        load(path, model, [pattern])
        assert torch.equal(model.wte.weight, before)
        assert torch.equal(model.mix.weight, given.mix.weight)


def test_two_blocks_for_one_that_is_tied_are_refused(path):
    save_model(Tied(tied=False), path)
    assert "whose weights are tied" in refused(path, Tied())


# Files that are none.


@pytest.mark.parametrize("kind", ["torch", "folder", "empty", "cut", "nothing"])
def test_a_file_that_is_none_is_told_what_to_write(path, kind):
    save_model(Net(), path)
    if kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "torch":
        torch.save(blocks_of(Net()), path)
    elif kind == "nothing":
        save_file({}, path)
    else:
        path.write_bytes(b"" if kind == "empty" else path.read_bytes()[:-9])
    with pytest.raises(
        InputError, match=r"^seed_model\.path: .*write a \.safetensors file"
    ) as error:
        read_seed_model(path)
    assert "fedpriv export RUN --to safetensors" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_told_as_missing(path):
    with pytest.raises(InputError, match=r"^seed_model\.path: there is no .*seed"):
        read_seed_model(path)


def test_names_of_another_format_are_told_and_no_pattern_is_advised(path):
    save_file(
        {f"layer.{n}.{name}": b for n in range(4) for name, b in blocks_of(Net()).items()}, path
    )
    model = nn.ModuleDict({f"block_{n}": Net() for n in range(4)})
    said = refused(path, model)
    assert "of another format" in said
    assert "reinitialize" not in said
    assert "more);" in said
