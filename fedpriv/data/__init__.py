"""Federated data sets: users with examples, behind one interface."""

from fedpriv.data.federated import Examples, FederatedDataset, PartitionedImages
from fedpriv.data.options import DataOptions
from fedpriv.data.partition import PartitionConfig
from fedpriv.data.registry import DATASETS, build_dataset

__all__ = [
    "DATASETS",
    "DataOptions",
    "Examples",
    "FederatedDataset",
    "PartitionConfig",
    "PartitionedImages",
    "build_dataset",
]
