"""The tasks by name: a new one is a file with options and a builder, and one line in `TASKS`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from pydantic import Field

from fedpriv.components import Kind, Options

if TYPE_CHECKING:  # configs are checked where torch is not imported
    from fedpriv.tasks.base import Task


class TaskOptions(Options):
    """What is learnt; each task adds its own."""

    name: str = Field(
        default="data", description="name of the task, or package.module:object for your own"
    )


class OfDataOptions(TaskOptions):
    """The data set decides."""

    name: str = Field(
        default="data", description="data: what the data set is for, classes where it does not say"
    )


TASKS = Kind(
    key="task",
    noun="task",
    registered={
        "data": "fedpriv.tasks.registry:of_data",
        "classification": "fedpriv.tasks.classification:build_classification",
        "next_token": "fedpriv.tasks.next_token:build_next_token",
        "recognition": "fedpriv.tasks.recognition:build_recognition",
        "regression": "fedpriv.tasks.regression:build_regression",
    },
    base="fedpriv.tasks.registry:TaskOptions",
    facts=("dataset", "decode", "spec_augment"),
    group="fedpriv.tasks",
    default="data",
)


def of_data(options: OfDataOptions, dataset: Any, decode: Any, spec_augment: Any) -> Task[Any]:
    """Return the task that a data set names as its `task`, which is classification by default."""
    own = TASKS.parse(getattr(dataset, "task", "classification"))
    return build_task(
        cast(TaskOptions, own), dataset=dataset, decode=decode, spec_augment=spec_augment
    )


def build_task(options: TaskOptions, **facts: Any) -> Task[Any]:
    """Return what is learnt: the task that `options` are of.

    `facts` are what a task may ask for by name: `dataset`, and for speech `decode`, which makes
    characters of log probabilities, and `spec_augment`, what is masked in training, or None.

    Raises:
        InputError: the task does not go with the data set.
    """
    return cast("Task[Any]", TASKS.of(options).build(options, **facts))
