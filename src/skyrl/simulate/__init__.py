"""Runs of any size on one machine: the real loop, buffer, crews and lag code, with engines and learners that only take
time. ``python -m benchmarks.simulate`` compares it with measured and published runs (docs/results/simulation.md);
``python -m skyrl.plan`` foretells the time of a step with it.

``cost`` (what things take) and ``lengths`` (how long answers are) know nothing of the rest.
"""
