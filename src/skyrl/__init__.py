"""skyrl: hybrid reinforcement learning (MPO + GRPO with a Selective Sample Buffer) for multimodal reasoning models."""

__version__ = "0.1.0"
