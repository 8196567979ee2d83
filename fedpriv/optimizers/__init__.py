"""The server's step: optimizers by name, learning-rate schedules, layer-wise normalisation."""
