"""Run directory in; progress, tables, plots, statement and HTML out."""
