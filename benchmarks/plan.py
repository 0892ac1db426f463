"""What ``python -m skyrl.plan`` foretells against what small real runs take.

python -m benchmarks.plan memory [--json FILE]    peak memory of learner processes on a CPU, by DeepSpeed
python -m benchmarks.plan step [--json FILE]      seconds of a step of the embedded default

``memory``: each case is a process (or two) with the environment of an actor that builds a learner rank and takes two
steps of equal, random batches. ``step``: short runs of several sizes; the costs are fitted to the two smaller ones, the
plan then foretells the others.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from skyrl.digits.scenes import DigitScenes
from skyrl.plan import memory
from skyrl.plan.sizes import Shape, shape
from skyrl.records import RewardParts, Sample, TrainBatch, TrainItem
from skyrl.settings import Config, Trainable

MIB = 2.0**20
ANSWERS, PROMPT_TOKENS = 4, 64


@dataclass(slots=True, frozen=True)
class Case:
    """A learner to be measured."""

    name: str
    hidden: int
    layers: int
    inner: int
    tokens: int = 512
    """``learner.micro_batch_tokens``, and the tokens of each of a step's two rows."""
    zero: int = 0
    ranks: int = 1
    lora: int = 0
    dtype: str = "float32"
    trainable: str = "all"
    checkpointing: bool = False
    reference: bool = True


CASES = [
    Case("15M, 2,048 tokens", 256, 10, 704, tokens=2048),
    Case("80M, 2,048 tokens", 768, 8, 2048, tokens=2048),
    Case("40M", 512, 8, 1408),
    Case("40M, LoRA 16", 512, 8, 1408, lora=16),
    Case("40M, adapter only", 512, 8, 1408, trainable="adapter"),
    Case("40M, bfloat16, ZeRO 1", 512, 8, 1408, dtype="bfloat16", zero=1),
    Case("40M, ZeRO 3, 2 ranks", 512, 8, 1408, zero=3, ranks=2),
    Case("40M, ZeRO 2, 2 ranks", 512, 8, 1408, zero=2, ranks=2),
    Case("40M, no reference", 512, 8, 1408, reference=False),
    Case("40M, 1,024 tokens, checkpointing", 512, 8, 1408, tokens=1024, checkpointing=True),
    Case("40M, 1,024 tokens", 512, 8, 1408, tokens=1024),
]


def settings(case: Case, folder: str) -> Config:
    """The configuration of a case: GRPO, and MPO where there is a reference."""
    cfg = Config(name="plan", run_dir=folder)
    cfg.model.policy, cfg.model.dtype = folder, case.dtype  # type: ignore[assignment]
    cfg.algorithm.mpo.weight = 0.25 if case.reference else 0.0
    cfg.rollout.max_prompt_tokens = PROMPT_TOKENS
    cfg.rollout.max_new_tokens = (case.tokens - PROMPT_TOKENS) // ANSWERS
    learner = cfg.learner
    learner.zero_stage, learner.num_workers, learner.micro_batch_tokens = case.zero, case.ranks, case.tokens
    learner.lora.rank, learner.trainable = case.lora, Trainable(case.trainable)
    learner.gradient_checkpointing = case.checkpointing
    return cfg


def build(case: Case, folder: str) -> None:
    """A vision-language model of the embedded architecture and this size, with random weights."""
    import torch
    from transformers import AutoModelForImageTextToText

    from skyrl.digits.architecture import build_config, build_processor

    processor = build_processor()
    config = build_config(processor.tokenizer)
    text = config.text_config
    text.hidden_size, text.num_hidden_layers, text.intermediate_size = case.hidden, case.layers, case.inner
    text.num_attention_heads, text.num_key_value_heads = case.hidden // 64, case.hidden // 64
    text.head_dim, text.max_position_embeddings, text.vocab_size = 64, 8192, 32_000
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).to(getattr(torch, case.dtype))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def batch(case: Case, cfg: Config, encoder: Any) -> TrainBatch:
    """Two prompts for each rank, each with so many answers that its row has about ``case.tokens``."""
    rng, items = np.random.default_rng(0), []
    scenes = DigitScenes("train", 2 * case.ranks, 0.0, seed=0)  # each with a picture
    for number in range(2 * case.ranks):
        prompt = scenes[number]
        ids = encoder.encode(prompt)[0]
        for place in range(ANSWERS):
            tokens = rng.integers(10, 300, cfg.rollout.max_new_tokens).astype(np.int32)
            logprobs = np.full(len(tokens), -5.0, np.float32)
            right = float(place % 2)
            sample = Sample(
                place, tokens, logprobs, "", False, 0, RewardParts(right, 1.0, None, right),
                advantage=right - 0.5, rule_advantage=right - 0.5,
            )  # fmt: skip
            items.append(TrainItem(prompt, ids, sample, 1.0))
    trained = sum(len(item.sample.token_ids) for item in items)
    return TrainBatch(1, 0, cfg.algorithm.weights(1), items, [], len(items), trained)


# ------------------------------------------------------------------ a learner process


def measured_child(case: Case, folder: str, rank: int, port: int) -> None:
    """Print what this process has in use: after the imports, and at most."""
    import deepspeed  # noqa: F401
    import torch
    import transformers  # noqa: F401

    from skyrl.learner.step import LearnerStep
    from skyrl.policy.encode import PromptEncoder

    cfg = settings(case, folder)
    PromptEncoder.configured(folder, cfg)
    from transformers.models.idefics3 import modeling_idefics3  # noqa: F401

    torch.set_num_threads(1)
    libraries = status("VmRSS")
    learner = LearnerStep(cfg, folder, rank, 1)
    learner.join("127.0.0.1", port)
    made, joined = batch(case, cfg, learner.encoder), status("VmHWM")
    for step in (1, 2):
        made.step = step
        learner.train_step(made)
    print(json.dumps({"libraries": libraries, "joined": joined, "peak": status("VmHWM"), "after": status("VmRSS")}))


def status(name: str) -> float:
    """Bytes of an entry of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) * 1024


def measured(case: Case) -> dict[str, float]:
    """What the ranks of a case had in use, the largest of each figure; bytes."""
    from skyrl.crew.ray_executor import COMMON_ENVIRONMENT

    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        build(case, folder)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        env = os.environ | COMMON_ENVIRONMENT | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        words = [sys.executable, "-m", "benchmarks.plan", "child", json.dumps(asdict(case)), folder, str(port)]
        children = [
            subprocess.Popen([*words, str(rank)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for rank in range(case.ranks)
        ]
        found = []
        for child in children:
            out, errors = child.communicate(timeout=300)
            if child.returncode:
                sys.exit(errors[-2000:])
            found.append(json.loads(out.splitlines()[-1]))
    return {name: max(one[name] for one in found) for name in found[0]}


def predicted(case: Case, folder: str) -> tuple[memory.Bill, Shape]:
    """The plan's figures."""
    cfg = settings(case, folder)
    known = shape(folder, "model.policy", "", cfg.learner)
    return memory.learner(cfg, known, case.reference), known


def memory_table(cases: list[Case]) -> list[dict[str, Any]]:
    rows = []
    print(
        f"{'case':<34}{'parameters':>12}{'trained':>12}{'libraries':>10}{'predicted':>10}{'measured':>10}{'ratio':>7}"
    )
    for case in cases:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            build(case, folder)
            bill, known = predicted(case, folder)
        found, foretold = measured(case), memory.total(bill.host)
        ratio = foretold / found["peak"]
        print(
            f"{case.name:<34}{known.parameters:>12,}{known.trained:>12,}{found['libraries'] / MIB:>10.0f}"
            f"{foretold / MIB:>10.0f}{found['peak'] / MIB:>10.0f}{ratio:>7.2f}"
            f"   joined {found['joined'] / MIB:.0f}, after {found['after'] / MIB:.0f}, "
            f"{time.perf_counter() - started:.0f} s",
            flush=True,
        )
        parts = {one.part: round(one.bytes / MIB, 1) for one in bill.host}
        rows.append(
            {"case": asdict(case), "parameters": known.parameters, "trained": known.trained, "parts_mib": parts}
            | {f"{name}_mib": round(value / MIB, 1) for name, value in found.items()}
            | {"predicted_mib": round(foretold / MIB, 1), "ratio": round(ratio, 3)}
        )
    return rows


# ------------------------------------------------------------------ a step


def step_table(found: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Measured and foretold seconds of a step.

    Args:
        found: What ``benchmarks.simulate.measure`` printed; None measures now.
    """
    from benchmarks.simulate.measure import RUNS, config, fitted, measure
    from skyrl.plan.foretell import foretell, models_of
    from skyrl.plan.machines import Machines

    found = found or measure()
    costs, lengths = fitted(found)
    cfg, rows = config(), []
    models, machines = models_of(cfg), Machines(cpus=os.cpu_count(), memory_gib=64)
    print(f"{'run':<10}{'measured':>10}{'predicted':>11}{'ratio':>7}")
    for name, (prompts, lag) in RUNS.items():
        cfg.rollout.prompts_per_step, cfg.controller.lag = prompts, lag
        told = foretell(cfg, machines, lengths, costs, models).step
        assert told is not None
        real = found["runs"][name]["time/step"]
        print(f"{name:<10}{real:>10.2f}{told.mean_step:>11.2f}{told.mean_step / real:>7.2f}")
        rows.append({"run": name, "prompts": prompts, "lag": lag, "measured": real, "predicted": told.mean_step})
    return rows


def main() -> None:
    if sys.argv[1:2] == ["child"]:
        case, folder, port, rank = sys.argv[2:]
        measured_child(Case(**json.loads(case)), folder, int(rank), int(port))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory", "step"])
    parser.add_argument("--from", dest="found", type=Path, help="JSON of benchmarks.simulate.measure, for step")
    parser.add_argument("--cases", nargs="+", metavar="WORD", help="only those whose name holds one of these")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.what == "step":
        rows = step_table(json.loads(given.found.read_text(encoding="utf-8")) if given.found else None)
    else:
        rows = memory_table(_chosen(given.cases))
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _chosen(words: list[str] | None) -> list[Case]:
    return [case for case in CASES if not words or any(word in case.name for word in words)]


if __name__ == "__main__":
    main()
