"""The data sets: those known by name, and how any is built.

A new one is a file with its options and a builder, and one line in `DATASETS`.
"""

from fedpriv.components import Kind
from fedpriv.data.federated import FederatedDataset
from fedpriv.data.files import unreachable
from fedpriv.data.options import DataOptions
from fedpriv.errors import InputError

DATASETS = Kind(
    key="data",
    noun="data set",
    registered={
        "common_voice": "fedpriv.data.common_voice:build_common_voice",
        "digits": "fedpriv.data.digits:build_digits",
        "flwr_datasets": "fedpriv.data.flwr_datasets:build_flwr_datasets",
        "fsdd": "fedpriv.data.fsdd:build_fsdd",
        "hf": "fedpriv.data.hf:build_hf",
        "idx_images": "fedpriv.data.idx_images:build_idx_images",
        "image_folder": "fedpriv.data.image_folder:build_image_folder",
        "librispeech": "fedpriv.data.librispeech:build_librispeech",
        "mnist_writers": "fedpriv.data.mnist_writers:build_mnist_writers",
        "speech_commands": "fedpriv.data.speech_commands:build_speech_commands",
        "synthetic_images": "fedpriv.data.synthetic_images:build_synthetic_images",
        "synthetic_speech": "fedpriv.data.synthetic_speech:build_synthetic_speech",
        "table": "fedpriv.data.table:build_table",
        "text": "fedpriv.data.texts:build_text",
        "torch": "fedpriv.data.torch_dataset:build_torch",
        "user_files": "fedpriv.data.user_files:build_user_files",
    },
    base="fedpriv.data.options:DataOptions",
    facts=("seed",),
    group="fedpriv.data",
    default="digits",
    copies=False,
    private=True,
)

#: What the data set `torch` may be made of: known here, wherever data sets are, for what comes in
#: from outside is known by its kind.
TORCH_DATASETS = Kind(
    key="data.dataset",
    noun="torch data set",
    registered={},
    base="fedpriv.data.torch_dataset:TorchDatasetOptions",
    facts=("path",),
    copies=False,
    private=True,
)

# What every data set has: `FederatedDataset`.
_PARTS = (
    "population",
    "user_ids",
    "classes",
    "input_shape",
    "description",
    "sizes",
    "facts",
    "user",
    "evaluation",
    "digest",
)


def build_dataset(options: DataOptions, seed: int) -> FederatedDataset:
    """Build the data set that `options` are of; equal options and seed give equal users.

    `seed` is the run's seed, 0 or more; it moves the partition only, never the held-out
    examples. Raises InputError, naming the key, for settings or files that it cannot use, and
    EnvironmentFault where the machine does not let it read them.

    >>> dataset = build_dataset(DATASETS.parse({"name": "digits", "users": 200}), seed=17)
    >>> dataset.population, dataset.classes, dataset.input_shape
    (200, 10, (1, 8, 8))
    >>> dataset.user(0).inputs.shape, len(next(dataset.evaluation()))
    (torch.Size([8, 1, 8, 8]), 297)
    """
    if seed < 0:
        raise InputError(f"seed must be 0 or more, got {seed}")
    try:
        dataset: FederatedDataset = DATASETS.of(options).build(options, seed=seed)
    except OSError as error:
        where = f"data.path: {getattr(options, 'path', None)}"
        raise unreachable(error.filename or where, error) from None
    if missing := [name for name in _PARTS if not hasattr(dataset, name)]:
        raise InputError(
            f"data.name: {options.name} made a {type(dataset).__name__}, which has no "
            f"{', no '.join(missing)}; see fedpriv.data.federated.FederatedDataset"
        )
    return dataset
