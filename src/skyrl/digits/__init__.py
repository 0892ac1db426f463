"""The embedded default: digit scenes, the models that are made for them, and their training."""
