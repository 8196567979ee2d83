"""How fast users of models from outside are trained: many at once by vmap, against one by one.

    OMP_NUM_THREADS=1 python simulations/benchmarks/models_of_others.py [NAME ...]

One process trains the same users from the same parameters with both engines in turns, A B A B ...
Times are the processor time of a call, so that other programs matter less; what is told is the
ratio of medians, and the lowest and highest of the turns' own. `--stack` sets how many users are
trained at once in place of the number that a run would choose, and `--force` runs vmap also where a
run would not.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import nn

from fedpriv.data.federated import Examples
from fedpriv.data.utterances import Utterances
from fedpriv.models.parameters import Layout, parameters_of
from fedpriv.privacy import GlobalClipping
from fedpriv.privacy.randomness import Randomness
from fedpriv.tasks.classification import Classification
from fedpriv.tasks.next_token import NextToken
from fedpriv.training import vmapped
from fedpriv.training.cohort import CohortTrainer, train_cohort
from fedpriv.training.local import LocalTraining
from fedpriv.training.stack_size import planned_stack

USERS, EXAMPLES, BATCH = 64, 20, 10
MEMORY = 2**30


def convolutional(*widths: int, channels: int, hidden: int, side: int) -> nn.Module:
    """Convolutions with group normalisation, pooled by two in between."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(4, width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
        channels = width
    inputs = widths[-1] * (side // 2 ** len(widths)) ** 2
    head = [nn.Flatten(), nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 10)]
    return nn.Sequential(*layers, *head)


def timm_vit() -> nn.Module:
    """The published tiny one for images of 32 x 32 in patches of 8 x 8."""
    from timm.models import vit_tiny_patch16_224

    return vit_tiny_patch16_224(img_size=32, patch_size=8, num_classes=10)


def hf_vit(width: int, depth: int, heads: int) -> nn.Module:
    """Hugging Face's, for the same images and patches."""
    from transformers import ViTConfig, ViTForImageClassification

    shape = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
    images = {"image_size": 32, "patch_size": 8, "num_channels": 3, "num_labels": 10}
    return ViTForImageClassification(ViTConfig(intermediate_size=4 * width, **shape, **images))


def gpt2(width: int, depth: int) -> nn.Module:
    """Hugging Face's, over 32 tokens out of 64; it draws nothing."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"vocab_size": 64, "n_positions": 32, "n_embd": width, "n_layer": depth, "n_head": 4}
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ends = {"bos_token_id": None, "eos_token_id": None}
    return GPT2LMHeadModel(GPT2Config(**shape, **still, **ends))


def images(channels: int, side: int) -> Callable[[torch.Generator], Examples]:
    """Return what makes a user's images."""
    return lambda generator: Examples(
        torch.randn(EXAMPLES, channels, side, side, generator=generator),
        torch.randint(10, (EXAMPLES,), generator=generator),
    )


def tokens(generator: torch.Generator) -> Examples:
    """Return a user's sequences."""
    drawn = torch.randint(64, (EXAMPLES, 33), generator=generator)
    return Examples(drawn[:, :-1], drawn[:, 1:])


#: Each a model, a user's examples, the number of classes of their targets, and the task.
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any], int, Any]] = {
    "cnn-4k": (
        lambda: convolutional(8, 16, channels=1, hidden=32, side=8),
        images(1, 8),
        10,
        Classification(),
    ),
    "cnn-300k": (
        lambda: convolutional(32, 64, 128, channels=3, hidden=100, side=32),
        images(3, 32),
        10,
        Classification(),
    ),
    "timm-vit-tiny": (timm_vit, images(3, 32), 10, Classification()),
    "hf-vit-small": (lambda: hf_vit(32, 2, 2), images(3, 32), 10, Classification()),
    "hf-vit-tiny": (lambda: hf_vit(192, 12, 3), images(3, 32), 10, Classification()),
    "gpt2-32": (lambda: gpt2(32, 5), tokens, 64, NextToken()),
    "gpt2-64": (lambda: gpt2(64, 2), tokens, 64, NextToken()),
}


@dataclass(frozen=True, eq=False)
class Population:
    """Users with equally many examples."""

    make: Callable[[torch.Generator], Examples | Utterances]
    classes: int
    population: int = USERS

    @property
    def user_ids(self) -> list[str]:
        """Their names."""
        return [str(number) for number in range(self.population)]

    def user(self, index: int) -> Examples | Utterances:
        """Return a user's examples."""
        return self.make(torch.Generator().manual_seed(index))


def trainers(name: str, stack: int | None, force: bool) -> tuple[CohortTrainer, str]:
    """Return what trains many at once, and how a run of it would be told."""
    torch.manual_seed(0)
    build, make, classes, task = CASES[name]
    model, dataset = build(), Population(make, classes)
    found = vmapped.vmapping_of(model, task, dataset.user(0), BATCH)
    why = found if isinstance(found, str) else ""
    if why and force:
        with mock.patch.object(vmapped, "_BUSY", float("inf")):
            found = vmapped.vmapping_of(model, task, dataset.user(0), BATCH)
    vmapping = None if isinstance(found, str) else found
    kept = BATCH * vmapping.kept if vmapping else 0
    trainer = CohortTrainer(
        dataset=dataset,  # type: ignore[arg-type]
        model=model,
        task=task,
        recipe=LocalTraining(batch_size=BATCH, lr=0.05),
        clipping=GlobalClipping(1.0),
        randomness=Randomness.simulation(0),
        device=torch.device("cpu"),
        vmapped=vmapping,
        engine="stacked" if vmapping else "sequential",
        stack=stack or planned_stack(Layout.of(model).total, MEMORY, kept=kept),
    )
    return trainer, why or trainer.told


def seconds_of(trainer: CohortTrainer, start: torch.Tensor, users: int) -> float:
    """Return the processor time of one cohort, a user."""
    began = time.process_time()
    train_cohort(trainer, start, range(users), 1)
    return (time.process_time() - began) / users


def main() -> None:
    """Measure the cases that are named, or all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=list(CASES))
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--stack", type=int)
    parser.add_argument("--force", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.names:
        many, told = trainers(name, options.stack, options.force)
        if many.engine == "sequential":
            print(f"{name}: trained one by one: {told}", flush=True)
            continue
        one = replace(many, engine="sequential")
        start = Layout.of(many.model).join(parameters_of(many.model)).clone()
        users = min(USERS, 2 * many.stack)
        turns = [
            (seconds_of(one, start, min(users, 8)), seconds_of(many, start, users))
            for _ in range(options.turns + 1)
        ][1:]
        alone, together = (statistics.median(each) for each in zip(*turns, strict=True))
        ratios = sorted(a / b for a, b in turns)
        print(
            f"{name}: {len(start):,} parameters; {1 / alone:.1f} users a second alone, "
            f"{1 / together:.1f} together: {alone / together:.2f} "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f}); {told}",
            flush=True,
        )


if __name__ == "__main__":
    main()
