"""The policy that learns: one DeepSpeed engine per rank. The only package that imports deepspeed."""
