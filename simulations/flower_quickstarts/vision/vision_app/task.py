"""A small convolutional network, and digits that are dealt to the nodes."""

from functools import lru_cache

import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

HELD_OUT = 297


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc(x.flatten(1))


@lru_cache(maxsize=1)
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images).float().view(-1, 1, 8, 8) / 16, torch.tensor(labels)


def load_data(partition_id: int, num_partitions: int) -> DataLoader:
    """Return a node's share of the digits that are not held out."""
    images, labels = digits()
    own = slice(HELD_OUT + partition_id, None, num_partitions)
    return DataLoader(TensorDataset(images[own], labels[own]), batch_size=8)


def load_held_out() -> DataLoader:
    images, labels = digits()
    return DataLoader(TensorDataset(images[:HELD_OUT], labels[:HELD_OUT]), batch_size=HELD_OUT)


def train(net: nn.Module, loader: DataLoader, epochs: int, lr: float) -> float:
    net.train()
    optimizer, loss = torch.optim.SGD(net.parameters(), lr=lr), torch.zeros(())
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()
    return loss.item()


@torch.no_grad()
def test(net: nn.Module, loader: DataLoader) -> tuple[float, float]:
    net.eval()
    loss, right, total = 0.0, 0, 0
    for images, labels in loader:
        logits = net(images)
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        right += int((logits.argmax(1) == labels).sum())
        total += len(labels)
    return loss / total, right / total
