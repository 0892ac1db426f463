"""The mathematics: advantages, losses, pairs. Pure functions; no Ray, no vLLM, no DeepSpeed."""
