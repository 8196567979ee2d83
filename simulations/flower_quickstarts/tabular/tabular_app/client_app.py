"""The client of a scikit-learn app."""

import warnings

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from sklearn.metrics import log_loss

from fedpriv.flower import clipping_mod
from tabular_app.task import create_model, get_params, load_data, set_params

app = ClientApp(mods=[clipping_mod])


@app.train()
def train(msg: Message, context: Context) -> Message:
    model = create_model(context.run_config["local-epochs"])
    set_params(model, msg.content["arrays"].to_numpy_ndarrays())
    x, y = load_data(context.node_config["partition-id"], context.node_config["num-partitions"])
    if len(set(y)) == 2:  # scikit-learn takes no other
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it has not converged, and need not
            model.fit(x, y)
    metrics = {"train_loss": log_loss(y, model.predict_proba(x), labels=[0, 1])}
    metrics["num-examples"] = len(x)
    content = {"arrays": ArrayRecord(get_params(model)), "metrics": MetricRecord(metrics)}
    return Message(content=RecordDict(content), reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    model = create_model(context.run_config["local-epochs"])
    set_params(model, msg.content["arrays"].to_numpy_ndarrays())
    x, y = load_data(context.node_config["partition-id"], context.node_config["num-partitions"])
    metrics = MetricRecord({"accuracy": model.score(x, y), "num-examples": len(x)})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=msg)
