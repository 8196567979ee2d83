"""A quickstart app of Flower's shape."""
