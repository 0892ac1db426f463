"""What rounding does to the log-probabilities of a policy in bfloat16, and what a wrong copy does (docs/models.md):

``python -m benchmarks.rounding MODEL`` for a folder of a text model, such as ``outputs/smollm2/model`` of
``python -m benchmarks.smollm2``. 8 questions, 8 sampled tokens each.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from skyrl.learner.passes import score_groups
from skyrl.policy.encode import PromptEncoder
from skyrl.policy.module import PolicyModule, load_policy
from skyrl.records import Prompt, Sample, SampleGroup
from skyrl.sync.syncer import limit_of, rounding_gap

PROMPTS, TOKENS = 8, 8


def main() -> int:
    if len(sys.argv) != 2:
        print((__doc__ or "").strip(), file=sys.stderr)
        return 2
    encoder, model = PromptEncoder.from_pretrained(sys.argv[1]), load_policy(sys.argv[1], "bfloat16").eval()
    module, groups = PolicyModule(model, encoder.forbidden_token_ids()), sampled(model, encoder)

    @torch.no_grad()
    def logprobs(some: list[SampleGroup]) -> list[np.ndarray]:
        return score_groups(lambda rows: module(rows)[0], some, encoder, torch.device("cpu"), 4096)

    def show(what: str, found: list[np.ndarray]) -> None:
        gap = np.abs(np.concatenate(found) - np.concatenate(exact))
        print(f"{what}: largest {gap.max():.3g}, mean {gap.mean():.3g}")

    exact: list[np.ndarray] = logprobs(groups)
    learner: Any = SimpleNamespace(logprobs=logprobs, backend=SimpleNamespace(model=model))
    rounding = rounding_gap(learner, groups)
    print(f"rounding errors on purpose: {rounding}; the limits that follow: {limit_of(rounding)}")
    model.float()
    show("computed in float32", logprobs(groups))
    model.bfloat16()
    show("row by row", [row for group in groups for row in logprobs([group])])
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-6 * torch.randn(parameter.shape).sign().to(parameter.dtype))
    show("every weight moved by 1e-6", logprobs(groups))
    weight = model.base_model.layers[len(model.base_model.layers) // 2].mlp.down_proj.weight
    with torch.no_grad():
        weight.copy_(weight.roll(1, 0).clone())
    show("one layer with permuted rows", logprobs(groups))
    return 0


def sampled(model: Any, encoder: PromptEncoder) -> list[SampleGroup]:
    """Answers of a fixed length to small sums."""
    torch.manual_seed(0)
    groups = []
    for place in range(PROMPTS):
        prompt = Prompt(f"p{place}", f"What is {place * 7 + 3} + {place * 11 + 5}?", (), "1", "exact")
        ids = encoder.encode(prompt)[0]
        row = torch.tensor(ids[None].astype(np.int64))
        lengths = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
        drawn = model.generate(row, attention_mask=torch.ones_like(row), do_sample=True, top_k=0, top_p=1.0, **lengths)
        answer = drawn[0, row.shape[1] :].numpy().astype(np.int32)
        groups.append(SampleGroup(prompt, ids, [Sample(0, answer, None, "", False, 0)]))
    return groups


if __name__ == "__main__":
    sys.exit(main())
