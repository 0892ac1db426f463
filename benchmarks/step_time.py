"""How much a training step costs over its bare parts.

``python benchmarks/step_time.py`` runs the whole system (32 prompts x 8 samples on the embedded default), then, in
fresh processes without Ray, the two parts that no such system can avoid, on the same prompts and the same tokens:

* ``generate``: vLLM's own ``LLM.generate`` with ready-made inputs;
* ``forward_backward``: a plain PyTorch forward and backward pass of the same micro-batches, with no optimizer step.

The learner runs equal rows once (a policy of this size often repeats its answer), the plain pass does not. So there is
a third, ``forward_backward_distinct``, over the distinct rows only, and ``ratio_distinct`` with it: what the ratio
would be if the plain pass knew that trick too.

The learning rate is so small that the policy stays the same, so every part sees the same token counts. Medians of the
steps after the warm-up. ``--json`` prints one line with ``ratio`` and the parts, in seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

PROMPTS, SAMPLES = 32, 8
PHASES = ("rollout", "reward", "buffer", "learner", "sync")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of the table")
    parser.add_argument("--steps", type=int, default=20, help="steps measured, the warm-up included")
    parser.add_argument("--warm-up", type=int, default=8, help="steps that are not counted")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.warm_up >= arguments.steps:
        parser.error(f"--warm-up {arguments.warm_up} must be less than --steps {arguments.steps}")
    if arguments.part:
        seconds = PARTS[arguments.part](arguments.work)
        (arguments.work / f"{arguments.part}.json").write_text(json.dumps(seconds))
        return
    with tempfile.TemporaryDirectory() as work:
        result = measure(Path(work), arguments.steps, arguments.warm_up)
    print(json.dumps(result) if arguments.json else table(result))


def measure(work: Path, steps: int, warm_up: int) -> dict[str, float]:
    """Whole steps first, then each bare part in a process of its own."""
    from skyrl.crew.ray_executor import COMMON_ENVIRONMENT

    records = whole_steps(work, steps)
    result = {"step": _median(record["time/step"] for record in records[warm_up:])}
    for phase in PHASES:
        result[phase] = _median(record[f"time/{phase}"] for record in records[warm_up:])
    for part in PARTS:
        command = [sys.executable, __file__, "--part", part, "--work", str(work)]
        # The same environment as the actors have: only the system's own work may make a difference.
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | COMMON_ENVIRONMENT)
        if done.returncode:
            raise SystemExit(f"{part} failed:\n{done.stderr[-3000:]}")
        result[f"bare_{part}"] = _median(json.loads((work / f"{part}.json").read_text())[warm_up:])
    bare = result["bare_generate"] + result["bare_forward_backward"]
    distinct = result["bare_generate"] + result["bare_forward_backward_distinct"]
    return {"ratio": result["step"] / bare, "ratio_distinct": result["step"] / distinct, "bare": bare, **result}


def config() -> Any:
    """The embedded default with 32 prompts, quiet."""
    from skyrl.settings import Config, WandbMode

    cfg = Config(name="benchmark")
    cfg.rollout.prompts_per_step, cfg.rollout.samples_per_prompt = PROMPTS, SAMPLES
    cfg.learner.lr = 1e-12
    cfg.data.eval_size = 16
    cfg.cluster.dashboard = False
    cfg.monitoring.wandb = WandbMode.off
    cfg.checkpoint.export = False
    return cfg


def whole_steps(work: Path, steps: int) -> list[dict[str, float]]:
    """Metrics of each step of the real loop; leaves the requests and train batches in ``work``."""
    from skyrl.crew.ray_executor import ray_session
    from skyrl.data.stream import PromptStream
    from skyrl.loop import Loop
    from skyrl.records import RolloutRequest
    from skyrl.run import model_folders
    from skyrl.system import start_system

    cfg = config()
    cfg.controller.steps = steps
    cfg.evaluation.every = cfg.checkpoint.every = 0
    records: list[dict[str, float]] = []
    promised: list[Any] = []
    policy, reward = model_folders(cfg)
    with ray_session(cfg, "benchmark"), start_system(cfg, policy, reward) as system:
        size, pair = system.sizes()["train"], system.buffer.pair

        def noted(*call: Any) -> Any:
            batch, told = pair(*call)
            promised.append(batch)
            return batch, told

        system.buffer.pair = noted  # type: ignore[method-assign,assignment]
        Loop(cfg, system, PromptStream(size, 0), _Sink(records), work).run()
        batches = system.buffer.fetch(promised)
    stream = PromptStream(size, 0)
    requests = [RolloutRequest("train", stream.take(PROMPTS), k, SAMPLES, False, 0) for k in range(1, steps + 1)]
    (work / "recorded.pkl").write_bytes(pickle.dumps((policy, requests, batches)))
    return records


class _Sink:
    def __init__(self, records: list[dict[str, float]]) -> None:
        self.records = records

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if "time/step" in metrics:
            self.records.append(metrics)

    def close(self) -> None:
        pass


def bare_generate(work: Path) -> list[float]:
    """Seconds of ``LLM.generate`` alone for each recorded request."""
    from skyrl.rollout.engine import rollout_environment

    cfg = config()
    os.environ.update(rollout_environment(cfg.rollout, os.cpu_count() or 1))
    from skyrl.rollout import vllm_engine
    from skyrl.rollout.sampler import Sampler

    policy, requests, _ = pickle.loads((work / "recorded.pkl").read_bytes())
    sampler = Sampler(cfg, policy)
    engine: Any = sampler.engine
    seconds = []
    for request in requests:
        prompts = [sampler.datasets["train"][row] for row in request.rows]
        limits = cfg.rollout.max_new_tokens, cfg.rollout.top_p
        asked = [sampler._asked(prompt, request, *limits) for prompt in prompts]
        inputs, params = [vllm_engine._input(one) for one in asked], [vllm_engine._params(one) for one in asked]
        engine.forget_caches()  # as in training, where each step has new weights
        started = time.perf_counter()
        engine.llm.generate(inputs, params, use_tqdm=False)
        seconds.append(time.perf_counter() - started)
    return seconds


def bare_forward_backward(work: Path, distinct: bool = False) -> list[float]:
    """Seconds of plain forward and backward passes over each recorded train batch, collation not counted.

    ``distinct`` leaves out rows that another of their micro-batch equals.
    """
    import torch

    from skyrl.policy.encode import PromptEncoder
    from skyrl.policy.module import PolicyModule, load_policy
    from skyrl.policy.packing import distinct_rows, plan_micro_batches

    torch.set_num_threads(os.cpu_count() or 1)
    policy, _, batches = pickle.loads((work / "recorded.pkl").read_bytes())
    encoder = PromptEncoder.from_pretrained(policy)
    module = PolicyModule(load_policy(policy, "float32"), encoder.forbidden_token_ids())
    seconds = []
    for batch in batches:
        lengths = [len(item.prompt_ids) + len(item.sample.token_ids) for item in batch.items]
        plan = plan_micro_batches(lengths, batch.pairs, 1, config().learner.micro_batch_tokens)[0]
        items = [[batch.items[i] for i in part] for part in plan]
        rows = [[(item.prompt, item.prompt_ids, item.sample.token_ids) for item in part] for part in items]
        micro = [encoder.collate(distinct_rows(part)[0] if distinct else part) for part in rows]
        module.zero_grad()
        started = time.perf_counter()
        for part in micro:
            (-module(part)[0].mean()).backward()
        seconds.append(time.perf_counter() - started)
    return seconds


PARTS: dict[str, Callable[[Path], list[float]]] = {
    "generate": bare_generate,
    "forward_backward": bare_forward_backward,
    "forward_backward_distinct": partial(bare_forward_backward, distinct=True),
}


def table(result: dict[str, float]) -> str:
    """The result for people."""
    lines = [f"{'part':<28}{'seconds':>9}", f"{'whole step':<28}{result['step']:>9.3f}"]
    lines += [f"  {phase:<26}{result[phase]:>9.3f}" for phase in PHASES]
    lines += [f"{'bare parts':<28}{result['bare']:>9.3f}"]
    lines += [f"  {part:<26}{result[f'bare_{part}']:>9.3f}" for part in ("generate", "forward_backward")]
    lines += [f"{'ratio':<28}{result['ratio']:>9.2f}", "", "the plain pass, equal rows once"]
    lines += [f"  {'forward_backward_distinct':<26}{result['bare_forward_backward_distinct']:>9.3f}"]
    return "\n".join([*lines, f"{'ratio with it':<28}{result['ratio_distinct']:>9.2f}"])


def _median(values: Any) -> float:
    return statistics.median(list(values))


if __name__ == "__main__":
    main()
