"""The parts of a step that no such system can avoid, each alone in a process without Ray.

``python -m benchmarks._parts rollout|learner THREADS FILE`` is a child (see ``_turns.py``). Its orders: ``WORK FILE``
with what one real step was asked and trained on. It reports seconds:

* ``sample`` (rollout): our ``Sampler.generate``, and after it ``generate``, vLLM's own ``LLM.generate`` of the same
  inputs, ready-made, without text; the engine forgot its caches before each, as in training;
* ``train_step`` (learner): our ``LearnerStep.train_step`` without an optimizer, and within it ``passes``, forward and
  backward over the rows that the learner itself makes of the batch;
* ``forward_backward`` (learner): plain PyTorch passes over every row, padded to the longest of its micro-batch;
* ``forward_backward_distinct`` (learner): the same over the different rows only: what plain passes would take if they
  knew that a policy of this size often repeats its answer. Both without collation, reference or loss.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks._turns import EndedError, Turns
from skyrl.records import RolloutRequest, TrainBatch
from skyrl.settings import Config

if TYPE_CHECKING:
    import torch

Recorded = tuple[Config, str, RolloutRequest, TrainBatch]
"""Settings, the policy's folder, what the rollout was asked, what the learner trained on."""


def record(path: Path, made: Recorded) -> None:
    """Write what the children read."""
    path.write_bytes(pickle.dumps(made))


def main() -> None:
    """Run parts as the parent orders, until it wants no more. The first recorded file is the third argument."""
    turns, (role, threads, first) = Turns(), sys.argv[1:]
    cfg, policy, _, _ = _read(first)
    parts = {"rollout": _rollout, "learner": _learner}[role](cfg, policy, int(threads))
    told: dict[str, Any] = {"ready": True}
    with contextlib.suppress(EndedError):
        while True:
            part, _, file = turns.wait(**told).partition(" ")
            told = parts(part, _read(file))


def _read(file: str) -> Recorded:
    made: Recorded = pickle.loads(Path(file).read_bytes())
    return made


def _rollout(cfg: Config, policy: str, threads: int) -> Callable[[str, Recorded], dict[str, float]]:
    from skyrl.rollout.engine import rollout_environment

    os.environ.update(rollout_environment(cfg.rollout, threads))
    from skyrl.rollout import vllm_engine
    from skyrl.rollout.sampler import Sampler

    sampler = Sampler(cfg, policy)
    engine: Any = sampler.engine
    generate, asked = engine.generate, list[Any]()

    def noted(requests: list[Any]) -> Any:
        asked[:] = requests
        return generate(requests)

    engine.generate = noted

    def part(name: str, recorded: Recorded) -> dict[str, float]:
        engine.forget_caches()
        started = time.perf_counter()
        sampler.generate(recorded[2])
        whole = time.perf_counter() - started
        inputs, params = list(map(vllm_engine._input, asked)), list(map(vllm_engine._params, asked))
        engine.forget_caches()
        started = time.perf_counter()
        engine.llm.generate(inputs, params, use_tqdm=False)
        return {"sample": whole, "generate": time.perf_counter() - started}

    return part


def _learner(cfg: Config, policy: str, threads: int) -> Callable[[str, Recorded], dict[str, float]]:
    os.environ["OMP_NUM_THREADS"] = str(threads)
    from skyrl.learner.step import LearnerStep

    cfg = cfg.model_copy(deep=True)
    cfg.learner.backend = f"{__package__}._parts:BareBackend"
    step = LearnerStep(cfg, policy, 0, threads)
    step.join("localhost", 0)
    backend: Any = step.backend

    def part(name: str, recorded: Recorded) -> dict[str, float]:
        batch = recorded[3]
        if name != "train_step":
            return {name: _plain(backend.module, step.encoder, batch, cfg, distinct=name.endswith("distinct"))}
        backend.seconds = 0.0
        started = time.perf_counter()
        step.train_step(batch)
        return {"train_step": time.perf_counter() - started, "passes": backend.seconds}

    return part


def _plain(module: Any, encoder: Any, batch: TrainBatch, cfg: Config, distinct: bool) -> float:
    """Seconds of plain passes over a batch, collation not counted."""
    items = sorted(batch.items, key=lambda item: len(item.prompt_ids) + len(item.sample.token_ids), reverse=True)
    rows = [(item.prompt, item.prompt_ids, item.sample.token_ids) for item in items]
    if distinct:
        rows = list({(prompt.key, answer.tobytes()): (prompt, ids, answer) for prompt, ids, answer in rows}.values())
    micro, part = [], list[Any]()
    for row in rows:  # longest first, so the first row of a micro-batch is its longest
        longest = len(part[0][1]) + len(part[0][2]) if part else 0
        if part and (len(part) + 1) * longest > cfg.learner.micro_batch_tokens:
            micro.append(encoder.collate(part))
            part = []
        part.append(row)
    micro.append(encoder.collate(part))
    module.zero_grad()
    started = time.perf_counter()
    for encoded in micro:
        (-module(encoded)[0].mean()).backward()
    return time.perf_counter() - started


class BareBackend:
    """A learner's backend in plain torch that never changes the policy, and clocks its passes."""

    collective = False

    def __init__(self, cfg: Config, load: Callable[[], Any], rank: int, host: str, port: int, reference: bool) -> None:
        import torch

        self.device = torch.device("cpu")
        self.module = load().eval()
        self.model = self.module.model
        self.twin: Any = load().requires_grad_(False).eval() if reference else None
        self.seconds = 0.0
        """Spent in forward and backward passes of the policy since somebody set it to 0."""

    def forward(self, rows: Any) -> tuple[torch.Tensor, torch.Tensor]:
        started = time.perf_counter()
        made: tuple[torch.Tensor, torch.Tensor] = self.module(rows, with_entropy=True)
        self.seconds += time.perf_counter() - started
        return made

    def score(self, rows: Any, reference: bool = False) -> torch.Tensor:
        import torch

        with torch.no_grad():
            found: torch.Tensor = (self.twin if reference else self.module)(rows)[0]
        return found

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        started = time.perf_counter()
        loss.backward()
        self.seconds += time.perf_counter() - started

    def update(self, lr: float) -> float:
        self.module.zero_grad()
        return 0.0

    def parameters(self, names: Collection[str] | None = None, reference: bool = False) -> Iterator[tuple[str, Any]]:
        for name, parameter in (self.twin if reference else self.module).model.named_parameters():
            if names is None or name in names:
                yield name, parameter.detach()

    def reduce(self, values: torch.Tensor, operation: str) -> torch.Tensor:
        return values


if __name__ == "__main__":
    main()
