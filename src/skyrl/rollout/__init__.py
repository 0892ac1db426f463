"""The policy that samples: vLLM, and how the learner's weights reach it. The only package that imports vllm."""
