"""Shared fixtures."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # tests/tiny_runs.py and its like
sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks
sys.path.insert(0, str(Path(__file__).parent / "integration"))  # parts that a test names by path
sys.path.insert(0, str(Path(__file__).parent / "unit"))
