"""Small fakes of our own interfaces: everything in one process, handles are the values themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from skyrl.records import Prompt, RolloutRequest, Sample, SampleGroup, SyncError


class Log:
    """What was called, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def names(self) -> list[str]:
        return [call[0] for call in self.calls]


class FakeRollout:
    def __init__(self, log: Log) -> None:
        self.log = log

    def generate(self, request: RolloutRequest) -> list[list[SampleGroup]]:
        self.log.calls.append(("generate", request))
        return [[_group(request.split, row, request.samples_per_prompt) for row in request.rows]]

    def continue_blind(self, groups: list[Any], step: int) -> list[Any]:
        self.log.calls.append(("continue_blind", step))
        return groups

    def wait(self, handles: list[Any]) -> None:
        self.log.calls.append(("wait_rollout",))


class FakeReward:
    def __init__(self, log: Log) -> None:
        self.log = log

    def score(self, groups: list[Any]) -> list[Any]:
        self.log.calls.append(("score",))
        return groups

    def wait(self, handles: list[Any]) -> None:
        self.log.calls.append(("wait_reward",))

    def evaluate(
        self, groups: list[Any], blind: list[Any], gallery: Any
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        self.log.calls.append(("evaluate", gallery, sum(map(len, blind))))
        return {"eval/accuracy": 0.5}, (gallery or [{"id": "eval/0"}])


class FakeBuffer:
    def __init__(self, log: Log) -> None:
        self.log = log
        self.total = 0

    def exchange(self, groups: list[Any], step: int, version: int) -> tuple[Any, dict[str, float]]:
        rows = [group.prompt.id for part in groups for group in part]
        self.log.calls.append(("exchange", step, version, rows))
        self.total += len(rows)
        return rows, {"buffer/size": float(self.total), "rollout_samples": 10.0, "rollout_tokens": 100.0}

    def offline(self, step: int) -> tuple[Any, dict[str, float]]:
        self.log.calls.append(("offline", step))
        return [f"pair {step}"], {"rollout_samples": 0.0, "rollout_tokens": 0.0}

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.total))

    def load(self, path: Path) -> None:
        self.total = json.loads(path.read_text())


class FakeLearner:
    def __init__(self, log: Log) -> None:
        self.log = log
        self.seen: list[str] = []

    def train_step(self, batch: Any) -> dict[str, float]:
        self.log.calls.append(("train", batch))
        self.seen += batch
        return {"loss/total": float(len(self.seen))}

    def picture_drop(self, groups: list[Any]) -> dict[str, float]:
        self.log.calls.append(("picture_drop",))
        return {"eval/picture_drop": 0.1}

    def save(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "seen.json").write_text(json.dumps(self.seen))

    def load(self, folder: Path) -> None:
        self.seen = json.loads((folder / "seen.json").read_text())

    def export(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.log.calls.append(("export",))


class FakeSyncer:
    """Raises at version ``broken_at``."""

    def __init__(self, log: Log, broken_at: int | None = None) -> None:
        self.log, self.broken_at = log, broken_at

    def sync(self, version: int) -> dict[str, float]:
        self.log.calls.append(("sync", version))
        if version == self.broken_at:
            raise SyncError(f"sync {version} is broken")
        return {"sync/logprob_gap": 0.0}


class ListSink:
    def __init__(self) -> None:
        self.records: list[tuple[int, dict[str, float]]] = []

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.records.append((step, metrics))

    def close(self) -> None:
        pass


def _group(split: str, row: int, size: int) -> SampleGroup:
    prompt = Prompt(f"{split}/{row}", "?", (), "1", "exact")
    samples = [
        Sample(i, np.array([1], np.int32), np.array([-0.5], np.float32), "<answer>1</answer>", False, 0)
        for i in range(size)
    ]
    return SampleGroup(prompt, np.array([0], np.int32), samples)
