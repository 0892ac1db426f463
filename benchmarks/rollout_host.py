"""What each way to relieve vLLM's host side gives: ``python -m benchmarks.rollout_host``.

One engine per set of engine settings (``SETTINGS``), each in a process of its own; within the first, ``WAYS`` are
switched on and off between turns. All of them get the same requests with the same seeds, in turn, and each turn says
whether tokens, log-probabilities and texts are those of ``before``, to the bit. Two workloads of the embedded policy:
``default`` (32 prompts x 8 answers) and ``long`` (16 x 16, temperature 1.7, up to 400 tokens).

Ways that reach into vLLM are here to be measured, not to be used. A JSON file and a table are written.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from benchmarks._turns import EndedError, Side, Turns, machine, python, saved, started, turn, warnings_of

WORKLOADS = {"default": (32, 8, 1.0, 64), "long": (16, 16, 1.7, 400)}
"""Prompts, answers to each, temperature, most tokens."""
SETTINGS: dict[str, dict[str, Any]] = {
    "": {},
    "block_size=32": {"block_size": 32},
    "no prefix cache": {"enable_prefix_caching": False},
}
Way = Callable[[Any], AbstractContextManager[None]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each way, after one that is not counted")
    parser.add_argument("--workload", choices=WORKLOADS, nargs="+", default=list(WORKLOADS))
    parser.add_argument("--only", nargs="+", help="names of ways and settings to be compared with before")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks"), help="folder of the JSON file and logs")
    parser.add_argument("--engine", choices=SETTINGS, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="OpenMP threads of the engine")
    arguments = parser.parse_args()
    if arguments.engine is not None:
        serve(arguments.engine, arguments.threads)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = compare(arguments.rounds, arguments.workload, arguments.only, arguments.threads, arguments.out)
    told = saved(arguments.out / "rollout_host.json", result)
    (arguments.out / "rollout_host.md").write_text(table(told))
    print(table(told))


def compare(rounds: int, workloads: Sequence[str], only: Sequence[str] | None, threads: int, out: Path) -> Any:
    """Turns of every way, in an order that is reversed every second round."""
    sides = [
        Side(name or "as it is", python("benchmarks.rollout_host", "--engine", name, "--threads", str(threads)), {},
             out / f"rollout_host-{place}.log")
        for place, name in enumerate(SETTINGS)
        if not name or only is None or name in only
    ]  # fmt: skip
    turns = [("as it is", way) for way in WAYS if way == "before" or only is None or way in only]
    turns += [(side.name, "now") for side in sides[1:]]
    rows, blocks = [], []
    with started(sides) as by_name:
        for workload in workloads:
            for number in range(rounds + 1):
                for name, way in turns[:: 1 - 2 * (number % 2)]:
                    block = turn(by_name[name], sides, json.dumps([workload, way]))
                    way_name = way if name == "as it is" else name
                    rows.append({"workload": workload, "way": way_name, "round": number, **block.report})
                    blocks.append(block)
    return {"machine": machine(), "threads": threads, "rows": rows, "warnings": warnings_of(blocks)}


def table(result: Any) -> str:
    """Medians, ratios to ``before`` and what changed, as Markdown."""
    lines = [
        "| workload | way | seconds | main thread's CPU | process's CPU | of before's CPU | tokens | log-probabilities "
        "| texts |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows = result["rows"]
    for workload, way in dict.fromkeys((row["workload"], row["way"]) for row in rows):
        own, before = (
            [r for r in rows if r["round"] and r["workload"] == workload and r["way"] == name]
            for name in (way, "before")
        )
        wall, main_cpu, cpu = (statistics.median(r[key] for r in own) for key in ("wall", "main", "process"))
        ratio = main_cpu / statistics.median(r["main"] for r in before)
        same = ["same" if own[0][k] == before[0][k] else "**other**" for k in ("tokens", "logprobs", "texts")]
        lines.append(
            f"| {workload} | {way} | {wall:.3f} | {main_cpu:.3f} | {cpu:.3f} | {ratio:.2f} | {' | '.join(same)} |"
        )
    return "\n".join([*lines, "", *result["warnings"]])


# ---------------------------------------------------------------- a child


def serve(setting: str, threads: int) -> None:
    """One engine, which generates as the parent orders."""
    from benchmarks._system import embedded_models
    from benchmarks.step_time import config
    from skyrl.crew.ray_executor import COMMON_ENVIRONMENT
    from skyrl.rollout.engine import rollout_environment

    turns, cfg = Turns(), config()
    cfg.rollout.max_new_tokens = max(longest for *_, longest in WORKLOADS.values())
    os.environ.update(COMMON_ENVIRONMENT | rollout_environment(cfg.rollout, threads))
    from skyrl.rollout import vllm_engine
    from skyrl.rollout.sampler import Sampler

    plain = vllm_engine.LLM
    vllm_engine.LLM = lambda **options: plain(**options | SETTINGS[setting])
    sampler = Sampler(cfg, embedded_models()[0])
    with contextlib.suppress(EndedError):
        order = turns.wait(ready=True)
        while True:
            workload, way = json.loads(order)
            with WAYS[way](sampler.engine):
                order = turns.wait(**measured(sampler, workload))


def measured(sampler: Any, workload: str) -> dict[str, Any]:
    """Times of one step's answers, and what they are."""
    from skyrl.records import RolloutRequest

    prompts, answers, temperature, longest = WORKLOADS[workload]
    rollout = sampler.cfg.rollout
    rollout.temperature, rollout.max_new_tokens = temperature, longest
    sampler.engine.forget_caches()  # as in training, where each step has new weights
    clocks = time.perf_counter, time.thread_time, time.process_time
    begun = [clock() for clock in clocks]
    groups = sampler.generate(RolloutRequest("train", tuple(range(prompts)), 3, answers, False, 0))
    wall, main_cpu, cpu = (clock() - then for clock, then in zip(clocks, begun, strict=True))
    made = [one for group in groups for one in group.samples]
    parts = {
        "tokens": [one.token_ids.tobytes() for one in made],
        "logprobs": [one.logprobs.tobytes() for one in made],
        "texts": [one.text.encode() + bytes([one.truncated]) for one in made],
    }
    digests = {key: hashlib.sha256(b"|".join(values)).hexdigest()[:16] for key, values in parts.items()}
    count = sum(len(one.token_ids) for one in made)
    return {"wall": wall, "main": main_cpu, "process": cpu, "count": count} | digests


# ---------------------------------------------------------------- ways


@contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """With other attributes, which must exist; all get their old ones back, whatever happens."""
    old = {name: getattr(owner, name) for name in values}
    own = {name for name in values if name in vars(owner)}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in old.items():
            if name in own:
                setattr(owner, name, value)
            else:
                delattr(owner, name)


def through_generate(each: bool) -> Way:
    """``LLM.generate`` and its records of every token, as before; with ``each``, tokens are decoded as they come."""

    def way(_: Any) -> AbstractContextManager[None]:
        import numpy as np

        from skyrl.rollout import vllm_engine as module
        from skyrl.rollout.engine import Completion

        def completion(self: Any, prompt_ids: Any, one: Any) -> Completion:
            ids, ended = one.token_ids, one.finish_reason
            answer = module._Answer(0, 0, list(prompt_ids), [], token_ids=ids, ended=ended)
            return Completion(
                prompt_ids=np.asarray(prompt_ids, np.int32),
                token_ids=np.asarray(ids, np.int32),
                logprobs=np.asarray(one.logprobs.logprobs, np.float32),
                text=one.text if each else module.answer_text(self.tokenizer, answer),
                truncated=ended == "length",
            )

        def generate(self: Any, requests: list[Any]) -> list[list[Completion]]:
            params = list(map(module._params, requests))
            for one in params:
                one.detokenize = each
            outputs = self.llm.generate(list(map(module._input, requests)), params, use_tqdm=False)
            return [
                [
                    completion(self, output.prompt_token_ids, one)
                    for one in sorted(output.outputs, key=lambda o: o.index)
                ]
                for output in outputs
            ]

        return replaced(module.VllmEngine, generate=generate)

    return way


@contextmanager
def without_collector(_: Any) -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def one_thread(_: Any) -> Iterator[None]:
    """All OpenMP regions of this process; torch's own function is taken away by vLLM."""
    path = next(
        row.split()[-1] for row in Path("/proc/self/maps").read_text().splitlines() if "torch/lib/libgomp" in row
    )
    openmp = ctypes.CDLL(path)
    threads = openmp.omp_get_max_threads()
    openmp.omp_set_num_threads(1)
    try:
        yield
    finally:
        openmp.omp_set_num_threads(threads)


def without_ranks(engine: Any) -> AbstractContextManager[None]:
    """Of the log-probabilities only the drawn token's, without its rank."""
    import torch
    from vllm.v1.outputs import LogprobsTensors

    def gather(logprobs: Any, _: int, token_ids: Any) -> Any:
        drawn = token_ids.unsqueeze(-1)
        ranks = torch.zeros(len(drawn), dtype=torch.int64)
        return LogprobsTensors(drawn.to(torch.int32), logprobs.gather(-1, drawn), ranks)

    return replaced(core(engine).model_executor.driver_worker.worker.model_runner.sampler, gather_logprobs=gather)


@contextmanager
def short_schedule(engine: Any) -> Iterator[None]:
    """An answer under way has no picture to encode, and room in its block but at the block's ends."""
    scheduler = core(engine).scheduler
    manager, size = scheduler.kv_cache_manager, scheduler.block_size
    encode, allocate, nothing = (
        scheduler._try_schedule_encoder_inputs, manager.allocate_slots, manager.empty_kv_cache_blocks,
    )  # fmt: skip

    def encoder_inputs(request: Any, computed: int, new: int, budget: int, **more: Any) -> Any:
        if computed >= request.num_prompt_tokens:
            return [], new, budget, [], []
        return encode(request, computed, new, budget, **more)

    def slots(request: Any, new: int, **more: Any) -> Any:
        at = request.num_computed_tokens
        roomy = new == 1 and at >= request.num_prompt_tokens and at % size and (at + 1) % size
        return nothing if roomy else allocate(request, new, **more)

    with replaced(scheduler, _try_schedule_encoder_inputs=encoder_inputs), replaced(manager, allocate_slots=slots):
        yield


def core(engine: Any) -> Any:
    """vLLM's engine core, which on CPU is in this process."""
    return engine.llm.llm_engine.engine_core.engine_core


WAYS: dict[str, Way] = {
    "before": through_generate(each=True),
    "decoded at the end": through_generate(each=False),
    "now": lambda _: nullcontext(),
    "now, one thread": one_thread,
    "now, no garbage collection": without_collector,
    "now, no ranks": without_ranks,
    "now, short schedule": short_schedule,
}


if __name__ == "__main__":
    main()
