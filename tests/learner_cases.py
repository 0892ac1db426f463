"""What the learner tests run in processes of their own, one per rank (:mod:`learner_mpo_cases` starts them), and the
batches that they run on."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from skyrl.digits.scenes import DigitScenes
from skyrl.evaluation.picture_drop import picture_drop
from skyrl.learner.step import LearnerStep
from skyrl.policy.encode import PromptEncoder
from skyrl.records import PreferencePair, Prompt, Sample, SampleGroup, SkyrlError, TrainBatch, TrainItem
from skyrl.settings import Config, Offload, Trainable

WHOLE, SHORT = (0, 3), (1, 2)
"""ZeRO stages: of the second our own code knows nothing, so one step of each is enough."""
WEIGHTS = {"grpo": 1.0, "mpo": 0.25}
"""Of the default settings."""
SMALL, LARGE = 42, 100_000
"""Token budgets: several micro-batches, with a text-only one and parts of one group among them; a single one."""


def settings(stage: int, world_size: int = 1, micro_batch_tokens: int = SMALL) -> Config:
    """Every term and knob of the learner is on: KL penalty, MPO with smoothed labels and a moving weight, weight decay,
    warm-up, a clip that acts."""
    cfg = Config()
    cfg.learner.zero_stage, cfg.learner.num_workers = stage, world_size
    cfg.learner.micro_batch_tokens = micro_batch_tokens
    cfg.learner.lr, cfg.learner.warmup_steps, cfg.learner.weight_decay = 5e-5, 2, 0.1
    cfg.learner.max_grad_norm = 0.5
    cfg.algorithm.grpo.kl_weight = 0.05
    cfg.algorithm.mpo.label_smoothing, cfg.algorithm.mpo.generation_weight_end = 0.1, 0.2
    cfg.controller.steps = 5
    cfg.hallucination.probe_prompts = 4
    cfg.rollout.temperature = 0.8
    cfg.controller.timeout = 60.0  # ranks that wait for each other in vain fail soon
    return cfg


def tiny_model() -> tuple[Any, Any]:
    """A random policy of the embedded architecture and its processor; its output is far from uniform, so that gradients
    are not tiny."""
    from transformers import Idefics3ForConditionalGeneration

    from skyrl.digits.architecture import build_config, build_processor

    torch.set_num_threads(1)
    torch.manual_seed(0)
    processor = build_processor()
    model = Idefics3ForConditionalGeneration(build_config(processor.tokenizer)).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(4)
    return model, processor


def build_policy(folder: Path) -> None:
    """:func:`tiny_model` as a Hugging Face folder."""
    for part in tiny_model():
        part.save_pretrained(folder)


def prompts(count: int, text_only: bool = False) -> list[Prompt]:
    """Scenes; the last third (or all) are text."""
    pictures, text = DigitScenes("train", 100, 0.0, 0), DigitScenes("train", 100, 1.0, 1)
    first_text = 0 if text_only else count - count // 3
    return [replace((text if i >= first_text else pictures)[i], id=f"p{i}") for i in range(count)]


def make_batch(
    encoder: PromptEncoder, step: int, num_prompts: int = 6, per_prompt: int = 3, text_only: bool = False
) -> TrainBatch:
    """Random answers. Per prompt: a chosen one, a rejected one that is here for its pair only, and (from the third on)
    replayed ones of weight 0.5. Step k trains version k - 1."""
    rng = np.random.default_rng(step)
    allowed = np.setdiff1d(np.arange(len(encoder.tokenizer)), encoder.forbidden_token_ids())
    items, pairs = [], []
    for prompt in prompts(num_prompts, text_only):
        for g in range(per_prompt):
            length = int(rng.integers(3, 12))
            sample = Sample(
                index=g,
                token_ids=rng.choice(allowed, length).astype(np.int32),
                logprobs=rng.normal(-6, 0.3, length).astype(np.float32),
                text="",
                truncated=False,
                policy_version=step - 2 if g > 1 else step - 1,
                advantage=float(rng.normal()),
            )
            items.append(TrainItem(prompt, encoder.encode(prompt)[0], sample, (1.0, 0.0, 0.5)[min(g, 2)]))
        if per_prompt > 1:
            pairs.append(PreferencePair(len(items) - per_prompt, len(items) - per_prompt + 1, 2.0))
    return counted(TrainBatch(step, step - 1, dict(WEIGHTS), items, pairs, 0, 0))


def counted(batch: TrainBatch) -> TrainBatch:
    """The same batch with its counts of GRPO samples and tokens."""
    tokens = [item.sample.trained_tokens for item in batch.items if item.grpo_weight != 0]
    batch.grpo_samples, batch.grpo_tokens = len(tokens), sum(tokens)
    return batch


def groups_of(batch: TrainBatch) -> list[SampleGroup]:
    return [SampleGroup(item.prompt, item.prompt_ids, [item.sample]) for item in batch.items]


def record_gradients(learner: Any) -> list[dict[str, np.ndarray]]:
    """Whole gradients (before clipping) of every optimizer step from now on."""
    from deepspeed.utils import safe_get_full_grad

    steps: list[dict[str, np.ndarray]] = []
    engine = learner.backend.engine
    original = engine.step

    def step() -> None:
        named = [(name, p) for name, p in learner.backend.model.named_parameters() if p.requires_grad]
        gradients = {name: safe_get_full_grad(p) for name, p in named}  # collective under ZeRO-3
        if learner.rank == 0:
            steps.append({name: g.numpy().copy() for name, g in gradients.items() if g is not None})
        original()

    engine.step = step
    return steps


class Cases:
    """The runs of one rank."""

    def __init__(self, policy: str, work: Path, rank: int, world_size: int) -> None:
        self.policy, self.work, self.rank, self.world_size = policy, work, rank, world_size
        self.results: dict[tuple[str, int], Any] = {}

    def make(self, cfg: Config) -> LearnerStep:
        learner = LearnerStep(cfg, self.policy, self.rank, threads=1)
        learner.join(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        return learner

    def weights(self, learner: Any) -> dict[str, np.ndarray] | None:
        from skyrl.sync.snapshot import parameters_of

        snapshot = learner.snapshot(1)
        return None if snapshot is None else {name: p.numpy().copy() for name, p in parameters_of(snapshot)}

    def steps(self, name: str, cfg: Config, count: int, resume: bool = False, **batch: Any) -> None:
        """``count`` steps; with ``resume`` the last one again from a checkpoint in a new engine."""
        learner = self.make(cfg)
        gradients = record_gradients(learner)
        out: dict[str, Any] = {"start": self.weights(learner), "metrics": [], "weights": [], "gradients": gradients}
        parts = learner.backend.engine.module.modules()
        out["checkpointed_layers"] = sum(getattr(p, "gradient_checkpointing", False) and p.training for p in parts)
        folder = self.work / f"checkpoint-{name}-{cfg.learner.zero_stage}-{self.world_size}"
        for step in range(1, count + 1):
            if resume and step == count:
                learner.save(folder)
            out["metrics"].append(learner.train_step(make_batch(learner.encoder, step, **batch)))
            out["weights"].append(self.weights(learner))
        out["delta"] = asdict(learner.delta)
        out["has_reference"] = learner.reference is not None
        if resume:
            again = self.make(cfg)
            again.load(folder)
            out["resumed_metrics"] = again.train_step(make_batch(again.encoder, count, **batch))
            out["resumed_weights"] = self.weights(again)
            out["resumed_delta"] = asdict(again.delta)
            saved, cfg.learner.weight_decay = cfg.learner.weight_decay, 0.7
            again.load(folder)
            out["resumed_decay"] = {group["weight_decay"] for group in again.backend.engine.optimizer.param_groups}
            cfg.learner.weight_decay = saved
        self.results[name, cfg.learner.zero_stage] = out

    def on_policy(self, stage: int) -> None:
        """A first step whose behaviour log-probabilities are the learner's own; then export; also an empty batch."""
        cfg = settings(stage, self.world_size)
        learner = self.make(cfg)
        batch = make_batch(learner.encoder, 1)
        own = learner.logprobs(groups_of(batch))
        for item, logprobs in zip(batch.items, own, strict=True):
            item.sample.logprobs = logprobs
        before = self.weights(learner)
        empty = learner.train_step(TrainBatch(1, 0, dict(WEIGHTS), [], [], 0, 0))
        after_empty = self.weights(learner)
        metrics = learner.train_step(batch)
        after = learner.logprobs(groups_of(batch))
        folder = self.work / f"export-{stage}-{self.world_size}"
        learner.export(folder)
        self.results["on_policy", stage] = {
            "logprobs": own, "before": before, "empty": empty, "after_empty": after_empty, "metrics": metrics,
            "after": after, "folder": str(folder), "weights": self.weights(learner),
            "picture_drop": picture_drop(learner, groups_of(batch)),
            "text_drop": picture_drop(learner, groups_of(make_batch(learner.encoder, 1, text_only=True))),
        }  # fmt: skip

    def not_finite(self, stage: int) -> None:
        """A nan in the loss, then one in the gradient only, then one among the pair members' log-probabilities."""
        errors = []
        for where in ("loss", "gradient", "delta"):
            learner = self.make(settings(stage, self.world_size))
            before = self.weights(learner)
            batch = make_batch(learner.encoder, 7)
            if where == "loss":
                batch.items[2].sample.logprobs[0] = np.nan
            elif where == "delta":
                batch.items[0].sample.logprobs[0] = np.nan
            else:
                norm = learner.backend.model.base_model.text_model.norm
                norm.register_full_backward_hook(lambda _module, inner, _outer: (torch.full_like(inner[0], torch.nan),))
            try:
                learner.train_step(batch)
                errors.append("no error")
            except SkyrlError as error:
                errors.append(str(error))
            after = self.weights(learner)
            if before is not None and after is not None:
                errors += [name for name in before if not np.array_equal(before[name], after[name])]
        self.results["not_finite", stage] = errors

    def half_precision(self, stage: int) -> None:
        """Two steps in each type. The batches' records are made up, and in 16 bits δ does not use them; with top-p it
        does not in float32 either."""
        for dtype in ("bfloat16", "float32"):
            cfg = settings(stage, self.world_size)
            cfg.model.dtype, cfg.rollout.top_p = dtype, 0.9
            learner = self.make(cfg)
            metrics = [learner.train_step(make_batch(learner.encoder, step)) for step in (1, 2)]
            self.results["half_precision", dtype, stage] = metrics

    def run(self) -> None:
        """Everything that differs between the ranks and the ZeRO stages; what does not is tested over the plain backend
        (``tests/unit/test_learner_step.py``)."""
        for stage in SHORT:
            self.steps("train", settings(stage, self.world_size), 1)
        for stage in WHOLE:
            cfg = settings(stage, self.world_size)
            self.steps("train", cfg, 3, resume=True)
            cfg = settings(stage, self.world_size)
            cfg.learner.trainable = Trainable.adapter
            self.steps("adapter", cfg, 2, resume=True)
            self.not_finite(stage)
            self.on_policy(stage)
            if self.world_size == 1:
                self.steps("large", settings(stage, 1, LARGE), 1)
                self.half_precision(stage)
            else:
                self.steps("few", settings(stage, 2), 1, num_prompts=1, per_prompt=1)
        if self.world_size > 1:
            self.sharded()
            return
        self.steps("few", settings(0), 1, num_prompts=1, per_prompt=1)
        for stage, offload in ((2, Offload.optimizer), (3, Offload.all)):
            cfg = settings(stage)
            cfg.learner.offload = offload
            self.steps("offload", cfg, 1)
        cfg = settings(1)
        cfg.learner.gradient_checkpointing = True
        self.steps("checkpointing", cfg, 1)

    def sharded(self) -> None:
        """Elements that a rank holds of a policy loaded for ZeRO-3 in bfloat16, of how many, and its buffers, also of
        one loaded whole; then a frozen and checkpointed one under ZeRO-3, as large policies are trained."""
        from skyrl.learner.deepspeed_config import deepspeed_config
        from skyrl.learner.sharded_loading import sharded_loading
        from skyrl.policy import module
        from skyrl.policy.module import load_policy

        cfg = settings(3, self.world_size)
        with sharded_loading(deepspeed_config(cfg.learner, "bfloat16")):
            loaded = load_policy(self.policy, "bfloat16")
        parameters, buffers = list(loaded.parameters()), dict(loaded.named_buffers())
        whole = dict(load_policy(self.policy, "bfloat16").named_buffers())
        self.results["sharded_load", 3] = {
            "held": sum(p.numel() + p.ds_tensor.numel() for p in parameters),
            "whole": sum(p.ds_numel for p in parameters),
            "types": {str(p.dtype) for p in parameters},
            "buffers": {name: (str(b.dtype), b.float().numpy()) for name, b in buffers.items()},
            "plain_buffers": {name: (str(b.dtype), b.float().numpy()) for name, b in whole.items()},
        }
        cfg.learner.trainable, cfg.learner.gradient_checkpointing = Trainable.adapter, True
        cut: list[bool] = []

        def watched(folder: str, dtype: str, *more: Any) -> Any:
            model = load_policy(folder, dtype, *more)
            cut.append(all(hasattr(p, "ds_tensor") for p in model.parameters()))
            return model

        module.load_policy = watched
        self.steps("adapter_checkpointing", cfg, 1)
        module.load_policy = load_policy
        self.results["sharded_load", 3]["by_learner"] = cut


def run_cases(run: Callable[[Cases], None], policy: str, work: str, rank: str, world_size: str) -> None:
    """The process of one rank: run the cases and write their results."""
    torch.set_num_threads(1)
    cases = Cases(policy, Path(work), int(rank), int(world_size))
    run(cases)
    with (Path(work) / f"results-{world_size}-{rank}.pkl").open("wb") as file:
        pickle.dump(cases.results, file)
