"""What one user does locally, and how a model is measured."""
