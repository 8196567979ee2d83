"""What is learnt: losses, measures, and which of them tells how good a model is."""
