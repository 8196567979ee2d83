"""The server of a scikit-learn app."""

import numpy as np
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fedpriv.flower import PrivateStrategy
from tabular_app.task import create_model, get_params, load_held_out, set_params

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    num_rounds = context.run_config["num-server-rounds"]
    arrays = ArrayRecord(get_params(create_model(1)))

    strategy = PrivateStrategy(
        FedAvg(),
        population=context.run_config["nodes"],
        run_dir=context.run_config["run-dir"],
        privacy={
            "delta": 1e-3,
            "target_epsilon": 8.0,
            "sampling": {"kind": "poisson", "expected_cohort": 30},
            "clipping": {"kind": "global", "bound": 1.0},
        },
    )

    result = strategy.start(
        grid=grid, initial_arrays=arrays, num_rounds=num_rounds, evaluate_fn=global_evaluate
    )
    np.savez(context.run_config["model"], *result.arrays.to_numpy_ndarrays())


def global_evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    model = create_model(1)
    set_params(model, arrays.to_numpy_ndarrays())
    return MetricRecord({"accuracy": model.score(*load_held_out())})
