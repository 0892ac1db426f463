"""Commands over :mod:`skyrl.simulate`: what the control plane costs, published ratios, the best split of the GPUs.
docs/results/simulation.md has what was found with them.

``split`` imports nothing of the loop: it is meant to be of use outside of this benchmark.
"""
