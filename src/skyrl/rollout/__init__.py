"""The role that samples, and the engine under it: vLLM, or one of your own."""
