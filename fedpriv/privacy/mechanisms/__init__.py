"""Mechanisms: who adds which noise where, what it costs whom, and what may be said of it.

`base.Mechanism` is what a round, the ledger, the planner and the privacy statement ask; there is
one file an instance. `gaussian.GaussianMechanism.add` is where noise is added, and alone.
"""
