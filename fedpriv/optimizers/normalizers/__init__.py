"""Normalisers of the averaged update, one file each, in the order of their papers."""
