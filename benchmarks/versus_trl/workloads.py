"""What both sides are given: prompts, a policy, the limits of an answer, a reward."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks._system import embedded_models
from skyrl.data.datasets import PromptDataset
from skyrl.records import Prompt
from skyrl.settings import AnswerPlace, Config, Std, Think, WandbMode

LR = 1e-12
"""So small that the policy stays the same: every step of both sides draws from one distribution."""
PICTURE_PIXELS, PICTURE_TOKENS = 128, 64
LONG_PROMPT = 1000
DIGITS_ASKED = 498
"""Of the long question: one token each, and one for the sign between two."""
COIN = f"{__name__}:coin"


@dataclass(frozen=True, slots=True)
class Workload:
    """One row of the comparison."""

    about: str
    prompts: int
    samples: int
    max_new_tokens: int
    max_prompt_tokens: int = 96
    temperature: float = 1.0
    policy: str = "digits"
    """``digits`` (the embedded default), or ``pictures`` or ``text``: random weights in its shape."""
    source: str = "digits"
    """``data.source``."""
    coin: bool = False
    """The reward is a hash's lowest bit of the answer's text, so that nearly every group has a signal; else the rule
    of the digit scenes."""
    whole: bool = False
    """There is a reward model, so the default's whole can run too."""
    steps: int = 12
    """Turns that count, unless ``--steps`` says otherwise: fewer where one takes long."""
    workers: int = 2
    """Rollout and reward workers of ours, each: the default of the embedded policy (conf/model/digits.yaml)."""
    trl_rows: int = 64
    """Rows of one forward pass of TRL; 256 took as much processor time on ``default``, and more memory."""


WORKLOADS = {
    "default": Workload(
        "32 digit scenes x 8 answers of at most 24 tokens, embedded policy, numeric rule", 32, 8, 24, whole=True
    ),
    "default_coin": Workload(
        "the same with the coin, so that ours can leave no group out",
        32, 8, 24, source=f"{__name__}:coin_scenes", coin=True,
    ),
    "long_tail": Workload(
        "16 digit scenes x 16 answers at temperature 1.7 of at most 400 tokens, embedded policy, coin",
        16, 16, 400, temperature=1.7, source=f"{__name__}:coin_scenes", coin=True, whole=True, steps=5,
    ),
    "pictures": Workload(
        f"32 scenes of {PICTURE_TOKENS} picture tokens x 8 answers of at most 24 tokens, random weights, coin",
        32, 8, 24, max_prompt_tokens=160, policy="pictures", source=f"{__name__}:large_scenes", coin=True,
    ),
    "long_prompt": Workload(
        "4 prompts of 1,000 tokens x 16 answers of at most 100 tokens, text policy of random weights, coin",
        4, 16, 100, max_prompt_tokens=1100, policy="text", source=f"{__name__}:long_questions", coin=True, steps=6,
    ),
}  # fmt: skip


def config(name: str, kind: str) -> Config:
    """Settings of our side: ``same`` algorithm as TRL's GRPO, or the default's ``whole``.

    ``same`` has rule rewards alone, no buffer, no reward model, no reference, GRPO with the sample standard deviation.
    """
    load, cfg = WORKLOADS[name], Config(name=f"versus-{name}-{kind}")
    cfg.data.source, cfg.data.eval_size = load.source, 16
    cfg.rollout.prompts_per_step, cfg.rollout.samples_per_prompt = load.prompts, load.samples
    cfg.rollout.max_prompt_tokens, cfg.rollout.max_new_tokens = load.max_prompt_tokens, load.max_new_tokens
    cfg.rollout.temperature = load.temperature
    cfg.rollout.num_workers = cfg.reward.num_workers = load.workers
    cfg.digits.text_share = 0.0  # TRL 1.16 can't ask some prompts with a picture and some without in one step
    cfg.learner.lr, cfg.learner.warmup_steps = LR, 0
    cfg.cluster.dashboard = False
    cfg.monitoring.wandb = WandbMode.off
    cfg.checkpoint.export, cfg.checkpoint.every, cfg.evaluation.every = False, 0, 0
    cfg.hallucination.probe_prompts = 0
    cfg.controller.steps = 100_000
    if load.coin:
        cfg.reward.verifiers = {"coin": COIN}
        cfg.reward.answer.at, cfg.reward.answer.think = AnswerPlace.whole, Think.none
    if load.max_new_tokens + load.max_prompt_tokens > 512:
        cfg.rollout.kv_cache_gib = 2
    if kind == "lag":
        cfg.controller.lag = 1
    if kind != "whole":
        from skyrl.settings.algorithm import Stage
        from skyrl.settings.run import KeptSamples

        cfg.algorithm.stage, cfg.algorithm.grpo.std = Stage.grpo, Std.sample
        cfg.buffer.enabled = False
        cfg.model.reward, cfg.reward.model_weight, cfg.reward.format_weight = None, 0.0, 0.0
        cfg.monitoring.samples = KeptSamples.off
    return cfg


def coin(answer: str, truth: str) -> float:
    """A verifier that gives half of all answers a 1, by a hash of their text; ``truth`` is not looked at."""
    return float(zlib.crc32(answer.encode()) & 1)


class Changed:
    """Another data set's prompts, each changed."""

    def __init__(self, prompts: PromptDataset, change: Callable[[Prompt, int], Prompt]) -> None:
        self.prompts, self.change = prompts, change

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, row: int) -> Prompt:
        """The changed prompt of a row."""
        return self.change(self.prompts[row], row)


def _changed(cfg: Config, change: Callable[[Prompt, int], Prompt]) -> dict[str, Changed]:
    from skyrl.digits.scenes import datasets

    return {split: Changed(scenes, change) for split, scenes in datasets(cfg).items()}


def coin_scenes(cfg: Config) -> dict[str, Changed]:
    """The digit scenes with the coin as their verifier."""
    return _changed(cfg, lambda prompt, _: replace(prompt, verifier="coin"))


def large_scenes(cfg: Config) -> dict[str, Changed]:
    """The digit scenes four times as large."""

    def change(prompt: Prompt, row: int) -> Prompt:
        times = PICTURE_PIXELS // prompt.images[0].shape[0]
        large = prompt.images[0].repeat(times, axis=0).repeat(times, axis=1)
        return replace(prompt, verifier="coin", images=(large,))

    return _changed(cfg, change)


def long_questions(cfg: Config) -> dict[str, Changed]:
    """Questions of about 1,000 tokens without a picture."""
    import numpy as np

    def change(prompt: Prompt, row: int) -> Prompt:
        digits = np.random.default_rng([7, row]).integers(0, 10, DIGITS_ASKED)
        return replace(prompt, verifier="coin", images=(), question=f"What is {'+'.join(map(str, digits))}?")

    return _changed(cfg, change)


def step_rows(name: str, steps: int) -> list[tuple[int, ...]]:
    """Rows of the training data that our side asks in each step."""
    from skyrl.data.datasets import build_datasets
    from skyrl.data.stream import PromptStream

    cfg = config(name, "same")
    stream = PromptStream(len(build_datasets(cfg)["train"]), cfg.data.seed)
    return [stream.take(cfg.rollout.prompts_per_step) for _ in range(steps)]


def policy_folder(name: str) -> tuple[str, str | None]:
    """Folders of a workload's policy, and of its reward model if it has one. Made now, unless they are cached."""
    from skyrl.digits.embedded import cache_folder

    load = WORKLOADS[name]
    if load.policy == "digits":
        return embedded_models()
    folder = cache_folder(Config().digits) / f"versus-trl-{load.policy}-1"
    if not (folder / "config.json").is_file():
        _build(load.policy, folder)
    return str(folder), None


def _build(kind: str, folder: Path) -> None:
    """A policy of random weights in the embedded one's shape: for larger pictures, or for text and longer prompts."""
    import torch
    from transformers import Idefics3ForConditionalGeneration, LlamaForCausalLM

    from skyrl.digits import architecture

    torch.manual_seed(0)
    processor: Any = architecture.build_processor()
    made = architecture.build_config(processor.tokenizer)
    if kind == "pictures":
        made.vision_config.image_size = PICTURE_PIXELS
        processor.image_processor.size = processor.image_processor.max_image_size = {"longest_edge": PICTURE_PIXELS}
        processor.image_seq_len = PICTURE_TOKENS
        model: Any = Idefics3ForConditionalGeneration(made)
    else:
        text = made.text_config
        text.max_position_embeddings = 2 * LONG_PROMPT
        text.architectures = ["LlamaForCausalLM"]
        model, template = LlamaForCausalLM(text), processor.chat_template
        processor = processor.tokenizer
        processor.chat_template, processor.model_max_length = template, 2 * LONG_PROMPT
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
