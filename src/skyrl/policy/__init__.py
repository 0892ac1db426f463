"""The policy: prompts and answers as tensors, micro-batches, log-probabilities, what is trained."""
