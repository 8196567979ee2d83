"""A small BERT of Hugging Face's, and made-up reviews that are dealt to the nodes."""

from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

WORDS, LENGTH, REVIEWS, HELD_OUT = 64, 12, 1400, 200


def get_model() -> BertForSequenceClassification:
    """Return the model with random numbers; `from_pretrained` would bring public ones."""
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=LENGTH,
        num_labels=2,
    )
    return BertForSequenceClassification(config)


@lru_cache(maxsize=1)
def reviews() -> tuple[torch.Tensor, torch.Tensor]:
    """Return reviews, as numbers of words, of which some are said by who liked it."""
    generator = np.random.default_rng(0)
    labels = generator.integers(2, size=REVIEWS)
    words = generator.integers(8, WORDS, size=(REVIEWS, LENGTH))
    telling = generator.random((REVIEWS, LENGTH)) < 0.4
    words = np.where(telling, generator.integers(4, size=words.shape) + 4 * labels[:, None], words)
    return torch.tensor(words), torch.tensor(labels)


def load_data(partition_id: int, num_partitions: int) -> DataLoader:
    words, labels = reviews()
    own = slice(HELD_OUT + partition_id, None, num_partitions)
    return DataLoader(TensorDataset(words[own], labels[own]), batch_size=4)


def load_held_out() -> DataLoader:
    words, labels = reviews()
    return DataLoader(TensorDataset(words[:HELD_OUT], labels[:HELD_OUT]), batch_size=HELD_OUT)


def train(net: BertForSequenceClassification, loader: DataLoader, epochs: int, lr: float) -> None:
    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
    for _ in range(epochs):
        for words, labels in loader:
            optimizer.zero_grad()
            net(input_ids=words, labels=labels).loss.backward()
            optimizer.step()


@torch.no_grad()
def test(net: BertForSequenceClassification, loader: DataLoader) -> tuple[float, float]:
    net.eval()
    loss, right, total = 0.0, 0, 0
    for words, labels in loader:
        said = net(input_ids=words, labels=labels)
        loss += said.loss.item() * len(labels)
        right += int((said.logits.argmax(1) == labels).sum())
        total += len(labels)
    return loss / total, right / total
