"""Metrics as Ray gauges: the Ray dashboard and any Prometheus that scrapes the cluster can read them."""

from __future__ import annotations

import re

from ray.util.metrics import Gauge

from skyrl.records import Metrics


class RayGaugeSink:
    """``reward/rule`` becomes the gauge ``skyrl_reward_rule``, tagged with the run."""

    def __init__(self, run: str) -> None:
        self.tags = {"run": run}
        self._gauges: dict[str, Gauge] = {}

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in ({"step": float(step)} | metrics).items():
            if name not in self._gauges:
                self._gauges[name] = Gauge("skyrl_" + re.sub(r"\W", "_", name), tag_keys=("run",))
            self._gauges[name].set(value, tags=self.tags)

    def close(self) -> None:
        """Gauges end with the process."""
