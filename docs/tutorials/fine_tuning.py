"""A pre-trained model, of which adapters and the head are trained with privacy, and out again."""

import timm
from torch import nn

import fedpriv


def network(classes: int, weights: str | None = None) -> nn.Module:
    """Your pre-trained model: whatever your function returns is where training begins."""
    shape = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 48, "num_heads": 2}
    return timm.create_model(
        "vit_tiny_patch16_224", depth=2, num_classes=classes, checkpoint_path=weights, **shape
    )


experiment = fedpriv.Experiment.load("configs/vit_digits.yaml", rounds=3).with_(
    model={"name": network, "train": "lora", "lora": {"r": 4, "variant": "rslora"}}
)
run = experiment.train(grid="local", run_dir="fine-tuning")
print(run.epsilon(), run.quality, experiment.with_({"model.train": "head", "model.lora": None}))
print(run.export("hf", out="model"))  # merged: timm reads it, and its card says what it cost
