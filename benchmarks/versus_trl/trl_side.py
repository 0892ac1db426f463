"""TRL's side: ``python -m benchmarks.versus_trl.trl_side WORKLOAD STEPS`` is a child of the comparison.

GRPOTrainer, with what makes it fastest on CPU: no gradient checkpointing, float32 as on our side (its own default is
bfloat16), the key-value cache on, one generation a step for all prompts, forward passes of ``Workload.trl_rows`` rows,
PyTorch's fused AdamW, all cores, no logging, no saving. Its answers come from transformers' ``generate``; transformers'
continuous batching, which TRL takes for text models only, needed 13 times its processor time here.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import Callable
from typing import Any

from benchmarks._turns import EndedError, Turns
from benchmarks.versus_trl.workloads import LR, WORKLOADS, coin, config, policy_folder, step_rows
from skyrl.records import Prompt

VLLM_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # TRL reaches into the engine of its own process
    "TORCH_COMPILE_DISABLE": "1",  # TRL can't be told to leave compiling out
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


def main() -> None:
    """Serve steps until the parent wants no more."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", choices=list(WORKLOADS))
    parser.add_argument("steps", type=int)
    parser.add_argument("--rows", type=int, help="instead of the workload's trl_rows")
    parser.add_argument("--vllm", action="store_true", help="generate with vLLM in this process")
    given = parser.parse_args()
    turns = Turns()
    if given.vllm:
        os.environ.update(VLLM_ENVIRONMENT)
    with tempfile.TemporaryDirectory() as folder:
        trainer, prompts = _trainer(given, folder)
        counted = _count(trainer, given.workload, prompts)
        trainer.add_callback(_callback(turns, counted))
        with contextlib.suppress(EndedError):
            trainer.train()


def _trainer(given: Any, output: str) -> tuple[Any, list[Prompt]]:
    """The trainer, and the prompts in the order in which it asks them: that of our side."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    from skyrl.data.datasets import build_datasets
    from skyrl.policy.encode import PromptEncoder

    load, cfg = WORKLOADS[given.workload], config(given.workload, "same")
    folder, _ = policy_folder(given.workload)
    encoder = PromptEncoder.from_pretrained(folder)
    scenes = build_datasets(cfg)["train"]
    prompts = [scenes[row] for step in step_rows(given.workload, given.steps) for row in step]
    pictures = load.policy != "text"
    model = (AutoModelForImageTextToText if pictures else AutoModelForCausalLM).from_pretrained(folder, dtype="float32")
    rows = min(given.rows or load.trl_rows, load.prompts * load.samples)
    forbidden = encoder.forbidden_token_ids()
    vllm = {"logit_bias": dict.fromkeys(forbidden, -100.0)}
    learner = cfg.learner
    arguments = GRPOConfig(
        output_dir=output,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_steps=given.steps,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=load.prompts * load.samples // rows,
        num_generations=load.samples,
        max_completion_length=load.max_new_tokens,
        temperature=load.temperature,
        generation_kwargs=vllm if given.vllm else {"suppress_tokens": sorted(forbidden), "use_cache": True},
        use_vllm=given.vllm,
        vllm_mode="colocate",
        vllm_max_model_length=load.max_prompt_tokens + load.max_new_tokens,
        beta=0.0,
        loss_type="grpo",
        epsilon=0.2,
        learning_rate=LR,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        adam_beta1=learner.betas[0],
        adam_beta2=learner.betas[1],
        weight_decay=learner.weight_decay,
        max_grad_norm=learner.max_grad_norm,
        shuffle_dataset=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=_reward(load.coin),
        args=arguments,
        train_dataset=_dataset(prompts, pictures),
        processing_class=(AutoProcessor if pictures else AutoTokenizer).from_pretrained(folder, padding_side="left"),
    )
    return trainer, prompts


def _dataset(prompts: list[Prompt], pictures: bool) -> Any:
    from datasets import Dataset
    from PIL import Image

    rows: dict[str, list[Any]] = {
        "prompt": [[{"role": "user", "content": prompt.question}] for prompt in prompts],
        "truth": [prompt.answer for prompt in prompts],
    }
    if pictures:
        rows["images"] = [[Image.fromarray(picture) for picture in prompt.images] for prompt in prompts]
    return Dataset.from_dict(rows)


def _reward(tossed: bool) -> Callable[..., list[float]]:
    """Our side's verifier as a reward function of TRL's."""
    from skyrl.rewards.answers import AnswerForm
    from skyrl.rewards.verifiers import get_verifier
    from skyrl.settings import Config

    form, numeric = AnswerForm(Config().reward.answer), get_verifier("numeric")

    def reward(completions: list[Any], truth: list[str], **_: Any) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        if tossed:
            return [coin(text.strip(), "") for text in texts]
        found = [form.find(text) for text in texts]
        return [0.0 if one is None else numeric(one, what) for one, what in zip(found, truth, strict=True)]

    return reward


def _count(trainer: Any, name: str, prompts: list[Prompt]) -> dict[str, int]:
    """Tokens of the last step, filled in as it is generated.

    Raises:
        SystemExit: in the first step, if TRL's prompts are other tokens than ours.
    """
    from skyrl.policy.encode import PromptEncoder

    encoder, samples = PromptEncoder.from_pretrained(policy_folder(name)[0]), WORKLOADS[name].samples
    counted, generate = dict[str, int](), trainer._generate

    def noted(asked: Any) -> Any:
        made = generate(asked)
        if not counted:
            for place, ids in enumerate(made[0]):
                ours = encoder.encode(prompts[place // samples])[0].tolist()
                if list(ids) != ours:
                    raise SystemExit(f"prompt {place // samples}: TRL asks {list(ids)}, ours is {ours}")
        counted["prompt_tokens"] = sum(map(len, made[0]))
        counted["answer_tokens"] = sum(map(len, made[1]))
        return made

    trainer._generate = noted
    return counted


def _callback(turns: Turns, counted: dict[str, int]) -> Any:
    from transformers import TrainerCallback

    class Waits(TrainerCallback):
        """Waits for the order to begin each step: all that TRL does between two beginnings is the step's."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            turns.wait(**counted)

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            turns.wait(**counted)

    return Waits()


if __name__ == "__main__":
    main()
