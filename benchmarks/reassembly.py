"""Modular reassembly on the digit scenes: the embedded policy is taken apart and joined by a fresh adapter, which alone
is trained (docs/models.md has the figures)::

    python -m benchmarks.reassembly OUT                       # the parts; prints the command that trains
    python -m benchmarks.reassembly OUT --trained RUN/policy  # which tensors of which part changed
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from skyrl.settings import Config

TRAIN = (
    "python -m skyrl.launch name=reassembly model=huggingface model.policy={} data=digits algorithm=grpo "
    "reward=rule_only learner.trainable=adapter learner.lr=1e-3 rollout.max_prompt_tokens=96 rollout.max_new_tokens=64 "
    "rollout.prompts_per_step=32 controller.steps=200 evaluation.every=50 checkpoint.every=0 data.eval_size=256 "
    "hallucination.probe_prompts=0"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder that is written")
    parser.add_argument("--trained", type=Path, metavar="FOLDER", help="only compare a trained policy with OUT/joined")
    given = parser.parse_args()
    if given.trained is not None:
        return compare(given.output / "joined", given.trained)
    from skyrl.assemble import assemble
    from skyrl.digits.embedded import embedded_models

    policy, _ = embedded_models(Config())
    shutil.rmtree(given.output, ignore_errors=True)
    take_language(Path(policy), given.output / "language")
    print(assemble(Path(policy), given.output / "language", given.output / "joined")["parameters"])
    print(TRAIN.format(given.output / "joined"))
    return 0


def take_language(policy: Path, folder: Path) -> None:
    """The embedded policy's language model as a model of its own."""
    from transformers import AutoProcessor, LlamaForCausalLM

    from skyrl.digits.architecture import CHAT_TEMPLATE
    from skyrl.policy.module import load_policy

    whole = load_policy(str(policy), "float32")
    alone = LlamaForCausalLM(whole.config.text_config)
    alone.model.load_state_dict(whole.model.text_model.state_dict())
    alone.tie_weights()
    alone.save_pretrained(folder)
    tokenizer = AutoProcessor.from_pretrained(policy).tokenizer
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def compare(joined: Path, trained: Path) -> int:
    """Print, part by part, how many tensors differ in any bit; 1 if one does that must not."""
    import torch

    from skyrl.policy.module import load_policy, module_of

    before, after = (dict(load_policy(str(folder), "float32").named_parameters()) for folder in (joined, trained))
    changed = {part: 0 for part in ("vision", "language", "adapter")}
    for name, value in before.items():
        changed[module_of(name)] += not torch.equal(value, after[name])
    print(f"tensors that changed: {changed}")
    return int(changed["vision"] + changed["language"] > 0)


if __name__ == "__main__":
    sys.exit(main())
