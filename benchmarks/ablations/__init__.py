"""The paper's tables at small scale: ``python -m benchmarks.ablations``."""
