"""A contender: Apple's pfl-research, with its own central Gaussian mechanism.

    python -m torch.distributed.run --standalone --nproc-per-node WORKERS pfl_rounds.py FOLDER

pfl sums users where they are trained, in each process, and reduces the sums by gloo.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import task
import torch
import torch.nn.functional as F
from gate import pause
from pfl.aggregate.base import get_num_devices_weight_name
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByUser
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.common_types import Population
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.internal.ops import get_ops
from pfl.metrics import Metrics, Weighted, get_overall_value
from pfl.model.pytorch import PyTorchModel
from pfl.postprocessor.base import Postprocessor
from pfl.privacy.gaussian_mechanism import GaussianMechanism
from pfl.privacy.privacy_mechanism import CentrallyAppliedPrivacyMechanism
from torch import Tensor, nn

NEVER = 10**9


class Learner(nn.Module):
    """The same model, with the two functions that pfl asks for."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self(inputs), targets)

    def metrics(self, inputs: Tensor, targets: Tensor) -> dict[str, Weighted]:
        with torch.no_grad():
            total = float(F.cross_entropy(self(inputs), targets, reduction="sum"))
        return {"loss": Weighted(total, len(targets))}


class Pausing(TrainingProcessCallback):
    """Stops all processes between rounds."""

    def on_train_begin(self, *, model: PyTorchModel) -> Metrics:
        pause_all(0)
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        trained = aggregate_metrics[get_num_devices_weight_name(Population.TRAIN)]
        pause_all(int(get_overall_value(trained)))
        return False, Metrics()


def pause_all(trained: int) -> None:
    """Let the first process pause and the others wait for it."""
    if get_ops().distributed.global_rank == 0:
        pause(trained)
    if get_ops().distributed.world_size > 1:
        torch.distributed.barrier()


def users_of(arrays: task.Arrays) -> FederatedDataset:
    device = "cuda" if torch.cuda.is_available() else "cpu"  # where pfl trains
    inputs = torch.from_numpy(arrays.inputs).to(device)
    targets = torch.from_numpy(arrays.targets).to(device)
    data = {user: [inputs[user], targets[user]] for user in range(len(arrays.targets))}
    users = {user: Dataset(raw_data=each, user_id=str(user)) for user, each in data.items()}
    # The sampler that pfl recommends: each user in turn, so that no round has a user twice.
    return FederatedDataset(users.__getitem__, get_user_sampler("minimize_reuse", list(users)))


def postprocessors(given: task.Task) -> list[Postprocessor]:
    if given.bound is None:
        return [WeightByUser()]
    mechanism = GaussianMechanism(given.bound, given.noise_multiplier)
    return [WeightByUser(), CentrallyAppliedPrivacyMechanism(mechanism)]


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    given, arrays = task.read(folder)
    np.random.seed(0)  # all processes must draw the same seeds
    learner = Learner(task.network(given))
    task.load_start(learner, arrays)
    model = PyTorchModel(
        model=learner,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(learner.parameters(), lr=1.0),
    )
    users = users_of(arrays)
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=given.rounds,
            evaluation_frequency=NEVER,  # which is the first round only, a warm-up
            train_cohort_size=given.cohort,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(users, users, postprocessors(given)),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=given.passes,
            local_learning_rate=given.lr,
            local_batch_size=given.batch_size,
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=None),
        callbacks=[Pausing()],
    )
    if get_ops().distributed.global_rank == 0:
        task.write_end(folder, nn.utils.parameters_to_vector(learner.parameters()))


if __name__ == "__main__":
    main()
