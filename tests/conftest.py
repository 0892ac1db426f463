"""Shared fixtures."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # tests/fakes.py
sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks
