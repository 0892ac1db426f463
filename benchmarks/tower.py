"""What keeping the features of a frozen vision tower gives: learner steps of ``learner.trainable=adapter`` with and
without, over the same pictures::

    python -m benchmarks.tower [--json FILE] [--rounds 5] [--threads 1] [--side 256] [--depth 6]

An Idefics3 model with random weights, whose pictures are 64 tokens each by default; 8 prompts with a picture of their
own and 4 answers each, in two micro-batches. A step is the reference's pass, then the policy's, forward and backward.
``first`` steps see new pictures, ``again`` the same ones a second time, as at a later epoch, or as replayed. Rows
are plain ones (every answer with its picture) or forests (every prompt with its picture once), as
``learner.shared_rows``. Medians; seconds of the processor, which other programs do not change as much as those of the
clock; both are in the file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

PROMPTS, ANSWERS, TOKENS = 8, 4, 24


def build(side: int, depth: int) -> tuple[Any, Any]:
    """A policy whose pictures are ``side`` pixels wide, and its processor."""
    from transformers import Idefics3ForConditionalGeneration
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

    from skyrl.digits.architecture import CHAT_TEMPLATE, build_config, build_tokenizer

    patch, scale = 16, 2
    size = {"longest_edge": side}
    pictures = Idefics3ImageProcessorPil(do_image_splitting=False, size=size, max_image_size=size)
    tokenizer = build_tokenizer()
    tokens = (side // patch // scale) ** 2
    processor = Idefics3Processor(pictures, tokenizer, image_seq_len=tokens, chat_template=CHAT_TEMPLATE)
    config = build_config(tokenizer)
    config.vision_config.update({"image_size": side, "patch_size": patch, "num_hidden_layers": depth})
    config.vision_config.update({"hidden_size": 192, "intermediate_size": 768})
    config.text_config.max_position_embeddings = 2048
    torch.manual_seed(0)
    return Idefics3ForConditionalGeneration(config).eval(), processor


def batches(encoder: Any, side: int, seed: int, shared: bool) -> list[Any]:
    from skyrl.policy.forest import Rows
    from skyrl.records import Prompt

    rng = np.random.default_rng(seed)
    allowed = np.setdiff1d(np.arange(len(encoder.tokenizer)), encoder.forbidden_token_ids())
    rows = []
    for place in range(PROMPTS):
        picture = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        prompt = Prompt(f"{seed}/{place}", "What do you see?", (picture,), "", "exact")
        ids = encoder.encode(prompt)[0]
        rows += [(prompt, ids, rng.choice(allowed, TOKENS).astype(np.int32)) for _ in range(ANSWERS)]
    half = len(rows) // 2
    return [Rows.of(some, encoder, torch.device("cpu"), shared).encoded for some in (rows[:half], rows[half:])]


def step(policy: Any, twin: Any, parts: list[Any]) -> tuple[float, float, torch.Tensor]:
    """Seconds by the clock and of the processor, and the gradient of the adapter."""
    policy.zero_grad()
    clock, processor = time.perf_counter(), time.process_time()
    with torch.no_grad():
        references = [twin(part)[0] for part in parts]
    for part, reference in zip(parts, references, strict=True):
        (policy(part)[0] - reference).square().sum().backward()
    taken = time.perf_counter() - clock, time.process_time() - processor
    return *taken, torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", default=Path("outputs/tower.json"))
    for name, default in (("rounds", 5), ("threads", 1), ("side", 256), ("depth", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    from copy import deepcopy

    from skyrl.policy.attention import share_prompts
    from skyrl.policy.encode import PromptEncoder
    from skyrl.policy.module import PolicyModule, freeze
    from skyrl.policy.tower import TowerFeatures
    from skyrl.settings import Trainable

    model, processor = build(given.side, given.depth)
    encoder = PromptEncoder(processor)
    freeze(model.named_parameters(), Trainable.adapter)
    share_prompts(model)
    features = TowerFeatures(2**31)
    sides: dict[str, tuple[Any, Any]] = {}
    for name in ("plain", "kept"):
        models = deepcopy(model), deepcopy(model)
        with torch.no_grad():
            next(p for n, p in models[1].named_parameters() if "connector" in n).mul_(0.9)  # a reference of its own
        if name == "kept":
            served = [features.serve(part) for part in models]
            assert all(served)
        sides[name] = tuple(PolicyModule(part, encoder.forbidden_token_ids()) for part in models)  # type: ignore[assignment]
    count = {
        part: sum(p.numel() for n, p in model.named_parameters() if part in n) for part in ("vision_model", "text")
    }
    results = []
    print("| rows | pictures | kept, s | plain, s | kept / plain | gradient differs by |")
    print("|---|---|---|---|---|---|")
    for shared in (False, True):
        taken: dict[tuple[str, str], list[tuple[float, float]]] = {}
        worst = 0.0
        for seed in range(given.rounds + 1):  # the first round warms up
            parts = batches(encoder, given.side, 1000 * shared + seed, shared)
            for when in ("first", "again"):
                gradients = []
                for name, (policy, twin) in sides.items():
                    *seconds, gradient = step(policy, twin, parts)
                    gradients.append(gradient)
                    if seed:
                        taken.setdefault((when, name), []).append(tuple(seconds))  # type: ignore[arg-type]
                worst = max(worst, float((gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max()))
        for when in ("first", "again"):
            clocks, processors = (
                {name: statistics.median(pair[kind] for pair in taken[when, name]) for name in sides} for kind in (0, 1)
            )
            ratio = processors["kept"] / processors["plain"]
            cells = ("forests" if shared else "plain", when, f"{processors['kept']:.2f}", f"{processors['plain']:.2f}")
            print("|", " | ".join((*cells, f"{ratio:.2f}", f"{worst:.1e}")), "|", flush=True)
            results.append(
                {"shared_rows": shared, "pictures": when, "processor": processors, "clock": clocks, "difference": worst}
            )
    asked, ran = features.counts()
    print(
        f"tower {count['vision_model']:,} parameters, language model {count['text']:,}; {ran} of {asked} pictures ran"
    )
    given.json.parent.mkdir(parents=True, exist_ok=True)
    setting = {**vars(given), "json": str(given.json), "load": os.getloadavg(), "parameters": count}
    given.json.write_text(json.dumps({"setting": setting, "results": results}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
