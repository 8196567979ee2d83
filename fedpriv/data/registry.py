"""The data sets by name. A new one is a file with a builder, and one line in `DATASETS`."""

import difflib
from collections.abc import Callable

from fedpriv.data.common_voice import build_common_voice
from fedpriv.data.config import DataConfig, PartitionConfig
from fedpriv.data.digits import build_digits
from fedpriv.data.federated import FederatedDataset
from fedpriv.data.files import unreachable
from fedpriv.data.fsdd import build_fsdd
from fedpriv.data.idx_images import build_idx_images
from fedpriv.data.librispeech import build_librispeech
from fedpriv.data.mnist_writers import build_mnist_writers
from fedpriv.data.speech_commands import build_speech_commands
from fedpriv.data.synthetic_images import build_synthetic_images
from fedpriv.data.synthetic_speech import build_synthetic_speech
from fedpriv.errors import InputError

__all__ = ["DATASETS", "MAKES_EXAMPLES", "DataConfig", "PartitionConfig", "build_dataset"]

DATASETS: dict[str, Callable[[DataConfig, int], FederatedDataset]] = {
    "common_voice": build_common_voice,
    "digits": build_digits,
    "fsdd": build_fsdd,
    "idx_images": build_idx_images,
    "librispeech": build_librispeech,
    "mnist_writers": build_mnist_writers,
    "speech_commands": build_speech_commands,
    "synthetic_images": build_synthetic_images,
    "synthetic_speech": build_synthetic_speech,
}

#: Here `data.examples_per_user` is how many examples a user is given, not a cap on what it has.
MAKES_EXAMPLES = frozenset({"fsdd", "synthetic_images", "synthetic_speech"})


def build_dataset(config: DataConfig, seed: int) -> FederatedDataset:
    """Build the data set that the config names; equal config and seed give equal users.

    `seed` is the run's seed, 0 or more; it moves the partition only, never the held-out
    examples. Raises InputError, naming the key, for an unknown data set and for settings or
    files that it cannot use, and EnvironmentFault where the machine does not let it read them.

    >>> dataset = build_dataset(DataConfig(name="digits", users=200), seed=17)
    >>> dataset.population, dataset.classes, dataset.input_shape
    (200, 10, (1, 8, 8))
    >>> dataset.user(0).inputs.shape, len(next(dataset.evaluation()))
    (torch.Size([8, 1, 8, 8]), 297)
    """
    if config.name not in DATASETS:
        close = difflib.get_close_matches(config.name, DATASETS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise InputError(
            f"data.name: unknown data set {config.name!r}, known are "
            f"{', '.join(sorted(DATASETS))}{hint}"
        )
    if seed < 0:
        raise InputError(f"seed must be 0 or more, got {seed}")
    try:
        return DATASETS[config.name](config, seed)
    except OSError as error:
        raise unreachable(error.filename or f"data.path: {config.path}", error) from None
