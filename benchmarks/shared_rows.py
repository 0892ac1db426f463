"""Plain rows against forests, in which each prompt runs once for all its answers: the learner's forward and backward
passes over the same answers, in turn, with collation::

    python -m benchmarks.shared_rows                       # everything; medians of 5 rounds
    python -m benchmarks.shared_rows --only digits --rounds 9

``digits``: answers that the embedded policy samples (32 scenes × 8). ``long G``: one prompt of ``--prompt`` random
tokens and G random answers of ``--answer`` tokens, which have nothing in common, to a random Llama of 3 million
parameters.
Equal answers run once in both. Writes OUT.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

GROUPS = (8, 16, 32)
HIDDEN, VOCABULARY = 256, 2048


@dataclass(slots=True)
class Cost:
    """One way of one workload."""

    tokens: int
    """Columns that run, padding included, of all micro-batches."""
    seconds: float
    cpu_seconds: float


@dataclass(slots=True)
class Compared:
    """Both ways, and the largest difference of a log-probability."""

    groups: int
    plain: Cost
    forest: Cost
    gap: float


def main() -> int:
    """Measure, write a JSON file, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--prompt", type=int, default=1000)
    parser.add_argument("--answer", type=int, default=100)
    parser.add_argument("--only", choices=("digits", "long"))
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/shared_rows.json"))
    given = parser.parse_args()
    import torch

    torch.set_num_threads(given.threads)
    found: dict[str, Compared] = {}
    if given.only != "long":
        found["digits"] = compare(*digits(), given.rounds)
    if given.only != "digits":
        for count in GROUPS:
            found[f"long {count}"] = compare(*long(count, given.prompt, given.answer), given.rounds)
    load = os.getloadavg()[0]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    told = {"threads": given.threads, "load": load, "prompt": given.prompt, "answer": given.answer}
    given.out.write_text(json.dumps(told | {name: asdict(one) for name, one in found.items()}, indent=1))
    print(table(found), f"\nThreads: {given.threads}; load average at the end: {load:.1f}. Written: {given.out}")
    return 0


def table(found: dict[str, Compared]) -> str:
    """Markdown."""
    lines = [
        "| workload | tokens a group, plain | forest | seconds, plain | forest | ratio | ratio, CPU time | gap, nats |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        plain, forest = one.plain, one.forest
        lines.append(
            f"| {name} | {plain.tokens / one.groups:.0f} | {forest.tokens / one.groups:.0f} | {plain.seconds:.3f} | "
            f"{forest.seconds:.3f} | {plain.seconds / forest.seconds:.2f} | "
            f"{plain.cpu_seconds / forest.cpu_seconds:.2f} | {one.gap:.1g} |"
        )
    least, most = f"long {GROUPS[0]}", f"long {GROUPS[-1]}"
    if most in found:
        lines.append("")
        for way in ("plain", "forest"):
            few, many = getattr(found[least], way), getattr(found[most], way)
            lines.append(
                f"G = {GROUPS[-1]} against {GROUPS[0]}, {way}: {many.tokens / few.tokens:.2f} times the tokens, "
                f"{many.seconds / few.seconds:.2f} times the seconds, {many.cpu_seconds / few.cpu_seconds:.2f} CPU."
            )
    return "\n".join(lines)


def compare(rows: list[Any], encoder: Any, module: Any, rounds: int) -> Compared:
    """Both ways in turn, the first round for warm-up."""
    import torch

    from skyrl.learner.passes import plan_rows
    from skyrl.policy.forest import Rows

    seen: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    tokens, values = {}, {}

    def passes(forest: bool) -> Any:
        tokens[forest], found = 0, [torch.empty(0)] * len(rows)
        for part in plan_rows(rows, [], 1, 8192, forest)[0]:
            made = Rows.of([rows[i] for i in part], encoder, torch.device("cpu"), forest)
            tokens[forest] += made.encoded.input_ids.numel()
            logprobs = module(made.encoded)[0][made.places]
            logprobs.sum().backward()
            for i, own in zip(part, logprobs.detach().split([len(rows[i][2]) for i in part]), strict=True):
                found[i] = own
        module.zero_grad()
        return torch.cat(found)

    for number in range(rounds + 1):
        for forest in (False, True) if number % 2 else (True, False):
            started, burnt = time.perf_counter(), time.process_time()
            values[forest] = passes(forest)
            if number:
                seen[forest].append((time.perf_counter() - started, time.process_time() - burnt))

    def cost(way: bool) -> Cost:
        seconds, burnt = (statistics.median(column) for column in zip(*seen[way], strict=True))
        return Cost(tokens[way], seconds, burnt)

    prompts = len({row[0].key for row in rows})
    return Compared(prompts, cost(False), cost(True), float((values[True] - values[False]).abs().max()))


def digits() -> tuple[list[Any], Any, Any]:
    """Answers of the embedded policy to 32 scenes, 8 to each."""
    import torch

    from skyrl.digits.embedded import embedded_models
    from skyrl.digits.scenes import DigitScenes
    from skyrl.policy.encode import PromptEncoder
    from skyrl.settings import Config

    policy = str(embedded_models(Config())[0])
    encoder, module = PromptEncoder.from_pretrained(policy), _module(policy)
    scenes, rows = DigitScenes("train", 32, 0.0, 0), []
    torch.manual_seed(0)
    for number in range(32):
        prompt = scenes[number]
        ids, pictures = encoder.encode(prompt)
        batch = encoder.collate([(prompt, ids, ids[:0])] * 8)
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **batch.pictures}
        assert pictures
        with torch.no_grad():
            out = module.model.generate(
                **inputs, do_sample=True, max_new_tokens=48, top_k=0, bad_words_ids=[[encoder.image_token_id]]
            )
        for answer in out[:, len(ids) :].numpy().astype("int32"):
            ends = (answer == encoder.turn_end_id).nonzero()[0]
            rows.append((prompt, ids, answer[: ends[0] + 1] if len(ends) else answer))
    return rows, encoder, module


def long(count: int, prompt_tokens: int, answer_tokens: int) -> tuple[list[Any], Any, Any]:
    """One prompt and ``count`` answers of random tokens."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from skyrl.records import Prompt

    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCABULARY, prompt_tokens).astype(np.int32)
    prompt = Prompt("long", "", (), "", "exact")
    rows = [(prompt, ids, rng.integers(0, VOCABULARY, answer_tokens).astype(np.int32)) for _ in range(count)]
    torch.manual_seed(0)
    cfg = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=3 * HIDDEN, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8192,
    )  # fmt: skip
    return rows, _encoder_of(ids), _module(LlamaForCausalLM(cfg).eval())


def _encoder_of(ids: Any) -> Any:
    """An encoder that knows one prompt, and needs no tokenizer."""
    from skyrl.policy.encode import PromptEncoder

    encoder = PromptEncoder.__new__(PromptEncoder)
    encoder.pad_id, encoder.image_token_id = 0, None
    encoder._cache = {("long", ""): (ids, {})}
    return encoder


def _module(model: Any) -> Any:
    from skyrl.policy.attention import share_prompts
    from skyrl.policy.module import PolicyModule, load_policy

    made = load_policy(model, "float32") if isinstance(model, str) else model
    share_prompts(made)
    return PolicyModule(made, [])


if __name__ == "__main__":
    raise SystemExit(main())
