"""The server of a Hugging Face app."""

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAdam

from text_app.task import get_model, load_held_out, test

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    num_rounds = context.run_config["num-server-rounds"]
    model = get_model()

    strategy = FedAdam(eta=0.01, beta_1=0.9, beta_2=0.99)

    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(model.state_dict()),
        num_rounds=num_rounds,
        evaluate_fn=global_evaluate,
    )
    model.load_state_dict(result.arrays.to_torch_state_dict())
    model.save_pretrained(context.run_config["model"])


def global_evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    model = get_model()
    model.load_state_dict(arrays.to_torch_state_dict())
    loss, accuracy = test(model, load_held_out())
    return MetricRecord({"accuracy": accuracy, "loss": loss})
