"""Federated data sets: users with examples, behind one interface."""

from fedpriv.data.config import DataConfig, PartitionConfig
from fedpriv.data.federated import Examples, FederatedDataset, PartitionedImages
from fedpriv.data.registry import DATASETS, build_dataset

__all__ = [
    "DATASETS",
    "DataConfig",
    "Examples",
    "FederatedDataset",
    "PartitionConfig",
    "PartitionedImages",
    "build_dataset",
]
