"""Our side: ``python -m benchmarks.versus_trl.ours WORKLOAD STEPS KIND`` is a child of the comparison."""

from __future__ import annotations

import sys
from typing import Any

from benchmarks._system import serve
from benchmarks._turns import Turns
from benchmarks.versus_trl.workloads import config, policy_folder, step_rows
from skyrl.records import Metrics, TrainBatch

KEPT = ("time/", "batch/", "rollout/", "overlap/", "sync/")


def main() -> None:
    """Serve steps until the parent wants no more."""
    turns, (name, steps, kind) = Turns(), sys.argv[1:]
    cfg = config(name, kind)
    policy, reward = policy_folder(name)
    lengths = _prompt_tokens(name, int(steps), policy)

    def report(step: int, metrics: Metrics, batch: TrainBatch | None) -> dict[str, Any]:
        answers = round(metrics["throughput/tokens_per_second"] * metrics["time/step"])
        kept = {key: value for key, value in metrics.items() if key.startswith(KEPT)}
        return {"answer_tokens": answers, "prompt_tokens": lengths[step - 1] * cfg.rollout.samples_per_prompt} | kept

    serve(cfg, policy, reward if kind == "whole" else None, turns, report)


def _prompt_tokens(name: str, steps: int, policy: str) -> list[int]:
    """Tokens of each step's prompts, each prompt counted once."""
    from skyrl.data.datasets import build_datasets
    from skyrl.policy.encode import PromptEncoder

    encoder, scenes = PromptEncoder.from_pretrained(policy), build_datasets(config(name, "same"))["train"]
    return [sum(len(encoder.encode(scenes[row])[0]) for row in rows) for rows in step_rows(name, steps)]


if __name__ == "__main__":
    main()
