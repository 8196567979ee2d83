"""What a model is trained to do: how its loss is taken, and how it is measured.

A task is a frozen dataclass; what it knows is public.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fedpriv.data.federated import Batch
from fedpriv.errors import InputError
from fedpriv.tasks.quality import Quality

B = TypeVar("B", bound=Batch)

#: The key among a task's measures of what is counted by class: lists of `examples`, `right` answers
#: and `answers`, a number a class. All other measures are numbers.
BY_CLASS = "by_class"


class Task(Protocol[B]):
    """How a model learns from a batch, and how well it does.

    Examples are prepared and augmented on the host, and go to the model's device step by step: a
    GPU's memory is for users' parameters, and whoever chooses rows there has to send indices.
    """

    #: The one among `measure`'s numbers that tells how good a model is.
    quality: ClassVar[Quality]
    #: Whether taking losses reads numbers on the host, which a recorded pass cannot.
    waits: ClassVar[bool]
    #: Whether one example is as long as many others': fewer users are then stacked.
    long_examples: ClassVar[bool]

    def require(self, dataset: Any) -> None:
        """Check that the data set is for this task; in a simulation all of it is there to check.

        Raises:
            InputError: it is not.
        """

    def require_targets(self, examples: B, classes: int) -> None:
        """Check prepared examples, on the host, where the model would fail on their values.

        A GPU cannot refuse them without ending all that it does.

        Raises:
            InputError: it would, as with a target that is no class of the data's.
        """

    def largest_step(
        self, model: nn.Module, batch_size: int, batch_sizes: int | None, shape: tuple[int, ...]
    ) -> tuple[Tensor, ...]:
        """Return what a model reads in the largest step of a recipe; its numbers mean nothing.

        `shape` is that of one input, `batch_sizes` the most that a batch may cost.
        """

    def prepare(self, model: nn.Module, examples: B) -> B:
        """Do what is the same in every round: features, and leaving out what cannot be learnt."""

    def augments(self, round_: int) -> bool:
        """Whether `augment` changes anything in a round; where not, nobody draws for it."""

    def augment(self, batch: B, round_: int, generator: torch.Generator) -> B:
        """Return the batch as it is trained on in a round."""

    def require_model(self, model: nn.Module, examples: B, classes: int) -> None:
        """Check, on a few prepared examples, that a model gives what `losses` needs.

        Raises:
            InputError: it does not; a sentence whose subject is the model.
        """

    def losses(self, model: nn.Module, batch: B) -> Tensor:
        """Return the loss of each example: `[n]`."""

    def measure(self, model: nn.Module, parts: Sequence[B], batch_size: int) -> dict[str, Any]:
        """Return mean loss and error measures of prepared examples, which come in parts.

        Where there are classes, what is counted of each may be under `BY_CLASS`.
        """


class Plain:
    """What a task does that trains on examples as they are.

    One that is derived from it and reads numbers on the host in `losses` says `waits = True`.
    """

    waits: ClassVar[bool] = False
    long_examples: ClassVar[bool] = False

    def require(self, dataset: Any) -> None:
        """Take any data set of which something can be used, where it can say so."""
        if hasattr(dataset, "require_usable"):
            dataset.require_usable()

    def require_targets(self, examples: Any, classes: int) -> None:
        """Take any targets."""

    def largest_step(
        self, model: nn.Module, batch_size: int, batch_sizes: int | None, shape: tuple[int, ...]
    ) -> tuple[Tensor, ...]:
        """Return a batch of inputs: see `Task`."""
        return (torch.empty(batch_size, *shape),)

    def require_model(self, model: nn.Module, examples: Any, classes: int) -> None:
        """Take any model."""

    def prepare(self, model: nn.Module, examples: Any) -> Any:
        """Return the examples as they are."""
        return examples

    def augments(self, round_: int) -> bool:
        """Never."""
        return False

    def augment(self, batch: B, round_: int, generator: torch.Generator) -> B:
        """Return the batch as it is."""
        return batch


def outputs_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return what a model gives: a tensor, or the `logits` of an object, as transformers' do.

    Raises:
        InputError: it gives neither; a sentence whose subject is the model.
    """
    given = model(inputs)
    outputs = given if isinstance(given, Tensor) else getattr(given, "logits", None)
    if not isinstance(outputs, Tensor):
        raise InputError(
            f"returns a {type(given).__name__}; it must return a tensor, or an object with one as "
            "its logits"
        )
    return outputs


def require_shape(outputs: Tensor, wanted: tuple[int, ...], what: str) -> None:
    """Check what a model gives for a few examples, which is `what` of the data.

    Raises:
        InputError: it has another shape; a sentence whose subject is the model.
    """
    if tuple(outputs.shape) == wanted:
        return
    each, right = (" x ".join(map(str, s[1:])) or "1" for s in (tuple(outputs.shape), wanted))
    if outputs.dim() == 0 or len(outputs) != wanted[0]:
        given = f"{tuple(outputs.shape)} for {wanted[0]} examples"
        raise InputError(f"returns {given}; it must return {wanted}: {what}")
    raise InputError(f"returns {each} numbers an example; it must return {right}: {what}")


def require_classes(targets: Tensor, classes: int) -> None:
    """Check that a model has a class for every target.

    On a GPU one that it has not would end the process's use of the GPU, and so the training of all
    others, or read memory that is not the loss's.

    Raises:
        InputError: it has not.
    """
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < classes:
        raise InputError(
            f"data: a target is not one of the {classes} classes, 0 to {classes - 1}; let the data "
            "set give these alone, or say that it has more classes"
        )


def require_kind(name: str, fits: bool, learns: str, targets: Tensor) -> None:
    """Check that targets are of the kind that a task learns, `learns` in words.

    Raises:
        InputError: they do not fit.
    """
    if not fits:
        kind = str(targets.dtype).removeprefix("torch.")
        raise InputError(
            f"task.name: {name} learns {learns}, and the targets of these data are {kind} "
            f"{list(targets.shape)}; leave task out, which is then what the data are for, or let "
            "them give others, as with data.predict"
        )


def in_order(examples: B, batch_size: int) -> Iterator[B]:
    """Cut examples into batches, in their order."""
    for first in range(0, len(examples), batch_size):
        yield examples.take(torch.arange(first, min(first + batch_size, len(examples))))
