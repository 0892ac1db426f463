"""Policies and reward models: the embedded defaults, what is trained, log-probabilities."""
