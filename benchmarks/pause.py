"""What it would cost to load new weights while vLLM is in the middle of answers: ``python -m benchmarks.pause``.

The engine of the long-tailed workload (16 prompts with a picture x 16 answers, temperature 1.7, up to 400 tokens) is
stepped by hand. After so many steps the running answers go on under new weights in one of three ways, in turn:

- ``stale``: weights alone; the key-value cache keeps what the old ones made, so no version has the log-probabilities
  that are recorded afterwards;
- ``recompute``: vLLM preempts what runs and forgets its caches, then reads prompts and answers again;
- ``stop``: answers are ended and asked again with their tokens behind the prompt, as ``rollout.oversample`` does.

The price is the time from the pause to the step after which every running answer has a further token, minus an
ordinary step before the pause. Beside it stands the time that all answers take without any pause. Answers that get no
further token are counted as lost.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks._turns import ROOT, machine

WAYS = ("stale", "recompute", "stop")
AT = (10, 30, 100)
"""Steps before the pause."""
IDLE = 200
"""Steps without a token after which vLLM has lost the answers that it should go on with."""
Clock = Callable[[], float]


class Trial:
    """Requests in flight in one engine.

    Args:
        engine: A :class:`~skyrl.rollout.vllm_engine.VllmEngine`.
        requests: What is sampled.
        weights: Named parameters that are loaded.
    """

    def __init__(self, engine: Any, requests: list[Any], weights: list[tuple[str, Any]]) -> None:
        self.engine, self.requests, self.weights = engine, requests, weights
        self.llm = engine.llm.llm_engine
        self.tokens: dict[tuple[int, int], list[int]] = {}
        self.open: set[tuple[int, int]] = set()
        self.before: dict[tuple[int, int], list[int]] = {}
        self.round, self.names = 0, list[str]()

    def add(self, begun: dict[tuple[int, int], list[int]]) -> None:
        """Ask for the answers that these are the beginnings of, each a request of its own."""
        from vllm.sampling_params import RequestOutputKind

        from skyrl.rollout.vllm_engine import _input, _params

        self.round, self.names = self.round + 1, []
        for (place, at), own in begun.items():
            one = replace(self.requests[place].singly[at], begun=(own,) if own else ())
            name = f"{self.round}/{place}/{at}"
            self.names.append(name)
            params = _params(one)
            params.output_kind = RequestOutputKind.CUMULATIVE
            self.llm.add_request(name, _input(one), params)
        self.open = set(begun)
        self.before = {key: list(own) for key, own in begun.items()}

    def step(self) -> set[tuple[int, int]]:
        """One step; the answers that got a token."""
        got = set()
        for output in self.llm.step():
            _, place, at = output.request_id.split("/")
            key, one = (int(place), int(at)), output.outputs[0]
            if len(one.token_ids):
                got.add(key)
            self.tokens[key] = self.before[key] + list(one.token_ids)
            if one.finish_reason is not None:
                self.open.discard(key)
        return got

    def begin(self) -> None:
        self.tokens = {}
        self.add({(place, at): [] for place, one in enumerate(self.requests) for at in range(one.n)})

    def end(self) -> None:
        self.llm.abort_request(self.names)
        self.engine.forget_caches()

    def pause(self, way: str) -> None:
        """Load the weights in the middle."""
        if way == "stop":
            self.end()
            self._load()
            self.add({key: self.tokens[key] for key in sorted(self.open)})
            return
        self._load()
        if way == "recompute":
            if not self.llm.reset_prefix_cache(reset_running_requests=True):
                raise SystemExit("vLLM could not forget its prefix cache")
            self.llm.reset_encoder_cache()

    def _load(self) -> None:
        update = {"parameters": self.weights, "version": 1, "whole": True}
        for method, more in (
            ("start_weight_update", {}),
            ("update_weights", {"update_info": update}),
            ("finish_weight_update", {}),
        ):
            self.engine.llm.collective_rpc(method, kwargs=more)


def measure(trial: Trial, way: str, at: int, clock: Clock) -> dict[str, float]:
    """One pause after ``at`` steps."""
    trial.begin()
    spent = []
    for _ in range(at):
        begun = clock()
        trial.step()
        spent.append(clock() - begun)
    running, tokens = set(trial.open), sum(len(trial.tokens[key]) for key in trial.open)
    begun = clock()
    trial.pause(way)
    loaded, waiting, idle = clock() - begun, set(running), 0
    while waiting and idle < IDLE:
        got = trial.step()
        waiting, idle = waiting - got, 0 if got else idle + 1
    price = clock() - begun - statistics.median(spent[-5:])
    trial.end()
    return {
        "price": price,
        "loading": loaded,
        "step": statistics.median(spent[-5:]),
        "answers": len(running),
        "lost": len(waiting),
        "tokens": tokens,
    }


def whole(trial: Trial, clock: Clock) -> float:
    """Seconds of all answers without a pause."""
    trial.begin()
    begun = clock()
    while trial.open:
        trial.step()
    seconds = clock() - begun
    trial.end()
    return seconds


def main() -> None:
    """Measure, write a JSON file, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "benchmarks" / "pause.json")
    given = parser.parse_args()
    from benchmarks.versus_trl.workloads import config, policy_folder
    from skyrl.rollout.engine import rollout_environment

    cfg = config("long_tail", "same")
    os.environ.update(rollout_environment(cfg.rollout, os.cpu_count() or 1))
    from skyrl.policy.module import load_policy
    from skyrl.records import RolloutRequest
    from skyrl.rollout.sampler import Sampler

    folder, rollout = policy_folder("long_tail")[0], cfg.rollout
    sampler = Sampler(cfg, folder)
    weights = [(name, one.detach()) for name, one in load_policy(folder, cfg.model.dtype).named_parameters()]
    request = RolloutRequest("train", (), 1, rollout.samples_per_prompt, False, 0)
    prompts = [sampler._prompt("train", row) for row in range(rollout.prompts_per_step)]
    asked = [sampler._asked(prompt, request, rollout.max_new_tokens, rollout.top_p) for prompt in prompts]
    trial = Trial(sampler.engine, asked, weights)
    found: dict[str, list[dict[str, float]]] = {f"{way} {at}": [] for at in AT for way in WAYS}
    wholes = []
    for number in range(given.rounds + 1):
        clocks = time.perf_counter, time.process_time
        wholes.append([whole(trial, clock) for clock in clocks])
        for at in AT:
            for way in WAYS if number % 2 else WAYS[::-1]:
                one = measure(trial, way, at, clocks[0])
                if number:  # the first round warms up
                    found[f"{way} {at}"].append(one)
    middle = [statistics.median(column) for column in zip(*wholes[1:], strict=True)]
    result = {"machine": machine(), "whole": middle, "found": found}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1))
    print(f"all answers without a pause: {middle[0]:.2f} s, {middle[1]:.2f} s of processor time\n")
    print("| way | after steps | answers running | their tokens | lost | loading alone, s | price, s | of the whole |")
    print("|" + "---|" * 8)
    for name, ones in found.items():
        way, at_steps = name.split()
        price, loading, answers, tokens, lost = (
            statistics.median(one[key] for one in ones) for key in ("price", "loading", "answers", "tokens", "lost")
        )
        seen = f"{price:.3f} | {price / middle[0]:.1%}" if not lost else "– | –"
        cells = f"{answers:.0f} | {tokens:.0f} | {lost:.0f} | {loading:.3f} | {seen}"
        print(f"| {way} | {at_steps} | {cells} |")


if __name__ == "__main__":
    main()
