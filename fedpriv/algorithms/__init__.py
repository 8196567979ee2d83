"""Algorithms: what a user computes and keeps, what it sends, what the server does with averages.

One file each, in the order of its paper. The local steps themselves, clipping, noise and the ledger
are the same for all of them.
"""
