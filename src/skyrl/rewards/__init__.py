"""Hybrid rewards: rule verifiers, the form of an answer, and the sum with a reward model's score."""
