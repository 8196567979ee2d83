"""Anybody's Opacus script: a private classifier of scikit-learn's digits.

One line makes it DiceSGD; with the comment in its place it is Opacus' own DP-SGD. The ε that
Opacus' engine prints is that of the optimizer that trained.

    python simulations/opacus_script.py [EPOCHS]
"""

import sys

import torch
from opacus import PrivacyEngine
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fedpriv.optimizers.dice_sgd import DiceSGD


def main() -> None:
    torch.manual_seed(0)
    epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    images = images.float() / 16
    train, test = slice(0, 1500), slice(1500, None)
    model = torch.nn.Linear(64, 10)
    engine = PrivacyEngine(accountant="rdp")
    model, dp_sgd, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=DataLoader(TensorDataset(images[train], labels[train]), batch_size=300),
        noise_multiplier=20.0,
        max_grad_norm=1.0,
    )
    optimizer = DiceSGD.in_engine(engine, dp_sgd, loader, memory_norm=0.5, gradient_norm=1.5)
    # optimizer = dp_sgd
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean()
    print(f"accuracy {accuracy:.3f}, ε = {engine.get_epsilon(1e-4):.3f} at δ = 1e-4", end=" ")
    print(f"by the accounting {engine.accountant.mechanism()}")


if __name__ == "__main__":
    main()
