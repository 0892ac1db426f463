"""``python -m skyrl.plan``: what a run would take on a cluster, before a GPU is paid for. docs/operations.md shows it;
docs/results/plan.md compares its figures with measured ones.

``machines`` (cards and clusters), ``sizes`` (models), ``memory``, ``places`` and ``speed`` (figures), ``report`` (the
tables).
"""
