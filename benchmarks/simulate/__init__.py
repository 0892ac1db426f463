"""Runs of any size on one machine: the real loop, buffer, crews and lag code, with engines and learners that only take
time. docs/results/simulation.md has what was found with it.

``cost`` (what things take) and ``split`` (how many GPUs for which role) import nothing of the rest: they are meant to
be of use outside of this benchmark.
"""
