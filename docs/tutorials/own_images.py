"""Images of your own, in folders user/class/file, trained on with privacy, and out again."""

import fedpriv

experiment = fedpriv.Experiment.load("configs/vit_digits.yaml", rounds=3).with_(
    {"evaluation.keep_best": True, "privacy.delta": 0.01, "privacy.sampling.expected_cohort": 12},
    data={
        "name": "image_folder",
        "path": "photos",
        "held_out": "test",  # photos/test/class/file: public, to measure on
        "users": 60,
        "image": {"size": 8, "color": "grey"},
    },
)
run = experiment.train(grid="local", run_dir="own-images")
print(run.epsilon(), run.quality, run.export(out="model"))
