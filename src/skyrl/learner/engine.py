"""One learner rank: a plain class round a DeepSpeed engine. Knows nothing of Ray, vLLM or rewards.

A step is: plan the micro-batches, score the pair members with the reference policy, update δ, then one forward
and backward pass per micro-batch that serves GRPO and MPO together, one optimizer step, and a refresh of the reference
if one is due.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist

from skyrl.evaluation.picture_drop import masked_group, picture_drop_metrics, probed_groups
from skyrl.interfaces import Metrics
from skyrl.learner.deepspeed_config import deepspeed_config, learning_rate
from skyrl.learner.files import check_layout, export_policy, write_layout
from skyrl.learner.losses import micro_loss, pair_sums, reduce_stats, unrecorded
from skyrl.learner.passes import Forward, Share, distinct_share, pair_members, score_groups, score_share
from skyrl.learner.process_group import join_ranks
from skyrl.learner.reference import Reference, compared_items, needs_reference, refresh_due, whole_parameters
from skyrl.learner.sharded_loading import sharded_loading
from skyrl.objective.hybrid import finalise, merge_stats
from skyrl.objective.mpo import RunningDelta, compares_with_reference, uses_delta
from skyrl.policy.encode import EncodedBatch, PromptEncoder
from skyrl.policy.freezing import freeze
from skyrl.policy.module import PolicyModule, load_policy
from skyrl.policy.packing import plan_micro_batches
from skyrl.records import SampleGroup, SkyrlError, TrainBatch, WeightSnapshot
from skyrl.settings import Config, Stage
from skyrl.sync.snapshot import Layout, layout_of, take_snapshot

TAG = "deepspeed"


class DeepSpeedLearner:
    """Trains the policy on whole-step batches.

    Args:
        cfg: The whole configuration.
        policy_folder: Hugging Face folder of the starting policy, which is also the first reference policy π_0.
        rank: This rank.
        world_size: ``learner.num_workers``. The ranks meet at MASTER_ADDR and MASTER_PORT.

    Raises:
        ConfigError: if ``learner.trainable`` names modules that the policy lacks, or its architecture is not supported.
        SkyrlError: if ``learner.device=cuda`` and this process sees no such device.
    """

    def __init__(self, cfg: Config, policy_folder: str, rank: int, world_size: int) -> None:
        self.cfg, self.policy_folder, self.rank, self.world_size = cfg, policy_folder, rank, world_size
        on_gpu = cfg.learner.device == "cuda"
        if on_gpu and not torch.cuda.is_available():
            raise SkyrlError("learner.device=cuda, but this process sees no CUDA device; use learner.device=cpu")
        self.device = torch.device("cuda" if on_gpu else "cpu")
        self.sharded = cfg.learner.zero_stage == 3
        join_ranks(cfg.learner.device, rank, world_size, cfg.controller.timeout)
        torch.manual_seed(cfg.controller.seed)
        self.encoder = PromptEncoder.from_pretrained(policy_folder)
        staged = cfg.algorithm.stage is Stage.mpo_then_grpo
        self._mpo_steps = cfg.algorithm.mpo_steps if staged else cfg.controller.steps
        self.delta = RunningDelta(cfg.algorithm.mpo.delta, cfg.algorithm.mpo.delta_decay)
        settings = deepspeed_config(cfg.learner, cfg.model.dtype)
        module = self._module(settings)
        freeze(module.model.named_parameters(), cfg.learner.trainable)
        if cfg.learner.gradient_checkpointing:
            module.model.gradient_checkpointing_enable({"use_reentrant": False})
        trained = {name: p for name, p in module.model.named_parameters() if p.requires_grad}
        self.trained = list(trained.values())
        self.engine, *_ = deepspeed.initialize(model=module, model_parameters=self.trained, config=settings)
        self._without_dropout()
        self.reference: Reference | None = None
        if needs_reference(cfg.algorithm):
            self.reference = Reference(self._module(settings), settings, cfg.learner.zero_stage, trained)

    def _module(self, settings: dict[str, Any]) -> PolicyModule:
        with sharded_loading(settings) if self.sharded else nullcontext():
            model = load_policy(self.policy_folder, self.cfg.model.dtype)
        module = PolicyModule(model, self.encoder.forbidden_token_ids(), self.cfg.rollout.temperature)
        return module.to(self.device)

    def _without_dropout(self) -> None:
        """Evaluation mode: dropout would make the ratio differ from 1 on the first step."""
        self.engine.eval()
        for part in self.engine.module.modules():
            if getattr(part, "gradient_checkpointing", False):
                part.training = True  # transformers checkpoints layers in training mode only

    # ------------------------------------------------------------ one step

    def train_step(self, batch: TrainBatch) -> Metrics:
        """One optimizer step on the whole batch; every rank must be given the same one.

        Returns:
            Metrics over all ranks (the same on each). An empty batch trains nothing and says so by
            ``learner/tokens`` 0.

        Raises:
            SkyrlError: on every rank, if the loss or the gradient is not finite. The policy is left as it was.
        """
        if not batch.items:
            return {"learner/tokens": 0.0, "learner/micro_batches": 0.0, "mpo/pairs": 0.0}
        lengths = [len(item.prompt_ids) + len(item.sample.token_ids) for item in batch.items]
        plan = plan_micro_batches(lengths, batch.pairs, self.world_size, self.cfg.learner.micro_batch_tokens)
        share = Share.of(batch, plan[self.rank], self.encoder, self.device)
        references = self._score(self.reference, share, compared_items(batch, self.cfg.algorithm))
        delta = self._update_delta(share, references)
        stats = []
        for i in range(len(share.parts)):
            self.engine.set_gradient_accumulation_boundary(i == len(share.parts) - 1)
            stats.append(self._backward(share, i, references[i]))
        totals = reduce_stats(merge_stats(stats), self.device, self.world_size)
        metrics = finalise(
            totals,
            self.cfg.algorithm,
            self.cfg.algorithm.weights(batch.step),
            batch.grpo_samples,
            batch.grpo_tokens,
            len(batch.pairs),
            self.cfg.rollout.max_new_tokens,
            delta,
        )
        # Before the optimizer sees the gradient. The metrics are sums over ranks, so all of them stop here.
        self._require_finite(batch.step, "loss", metrics.get("loss/total", 0.0))
        lr = learning_rate(self.cfg.learner, batch.step, self.cfg.controller.steps)
        metrics["learner/grad_norm"] = self._update(batch.step, lr)
        metrics |= self._refresh_reference(batch.step, totals)
        if not all(item.replayed or unrecorded(item.sample) for item in batch.items):
            metrics["learner/logprob_gap_fresh"] = totals["fresh_gap_max"]
        return metrics | {
            "learner/lr": lr,
            "learner/entropy": totals["entropy"] / totals["tokens"],
            "learner/tokens": totals["tokens"],
            "learner/distinct_share": distinct_share(batch),
            "learner/micro_batches": float(len(share.parts)),
        }

    def _score(self, forward: Forward | None, share: Share, wanted: set[int]) -> list[torch.Tensor | None]:
        if forward is None:
            return [None] * len(share.parts)
        return score_share(forward, share, wanted, self.encoder, self.device, self.sharded)

    def _policy_logprobs(self, rows: EncodedBatch) -> torch.Tensor:
        return self.engine.module(rows)[0]

    def _update_delta(self, share: Share, references: list[torch.Tensor | None]) -> float | None:
        """δ of this step, or None if the step does not use it."""
        batch, mpo = share.batch, self.cfg.algorithm.mpo
        members = pair_members(batch, self.cfg.algorithm)
        if not members or not uses_delta(mpo):
            return None
        # Where the rollout's record is missing or not the learner's own log π_θ (16 bit, top-p), it takes a forward
        # pass: the mean of log π_rollout − log π_0 over sampled tokens would be too high by a KL divergence.
        exact = self.cfg.model.dtype == "float32" and self.cfg.rollout.top_p == 1
        unknown = {i for i in members if not exact or unrecorded(batch.items[i].sample)}
        starts = self._score(self._policy_logprobs, share, unknown)
        if mpo.reference_free:
            references = [None] * len(share.parts)
        parts = zip(share.parts, references, starts, strict=True)
        own = sum(pair_sums(batch, part, reference, mpo.beta, start, unknown) for part, reference, start in parts)
        total = torch.tensor([own], dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(total)
        mean = float(total) / (2 * len(batch.pairs))
        self._require_finite(batch.step, "mean implicit reward", mean)
        return self.delta.update(mean)

    def _backward(self, share: Share, place: int, reference: torch.Tensor | None) -> dict[str, torch.Tensor]:
        batch, part = share.batch, share.parts[place]
        rows, tokens = share.rows[place], share.tokens(part)
        distinct_logprobs, distinct_entropy = self.engine(rows.encoded, with_entropy=True)
        logprobs, entropy = distinct_logprobs[rows.places], distinct_entropy[rows.places]
        # A ghost row's tokens come last; they join the graph and weigh nothing.
        loss, stats = logprobs[tokens:].sum() * 0.0, {}
        if part:
            real = micro_loss(
                batch,
                part,
                logprobs[:tokens],
                entropy[:tokens],
                reference,
                self.delta.value,
                self.cfg.algorithm,
                self.cfg.rollout.max_new_tokens,
                min(1.0, (batch.step - 1) / max(1, self._mpo_steps - 1)),
            )
            loss, stats = loss + real.loss, real.stats
        if loss.requires_grad:  # else nothing of the step reaches a trained module: an adapter without any picture
            # DeepSpeed averages gradients over ranks; the loss is already normalised over the whole step.
            self.engine.backward(loss * self.world_size)
        self._has_gradient = loss.requires_grad
        return stats

    def _update(self, step: int, lr: float) -> float:
        """Optimizer step; returns the norm of the whole gradient before clipping."""
        if not self._has_gradient:
            return 0.0
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        if self.cfg.learner.zero_stage == 0 and self.cfg.model.dtype == "float32":
            # Here DeepSpeed neither reports the norm nor refuses a gradient that is not finite.
            norm = float(torch.nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None]))
            self._require_finite(step, "gradient norm", norm)
            self.engine.step()
            return norm
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm() or 0.0)
        if self.cfg.model.dtype != "float16":  # float16 has a loss scale that is found by stepping over overflows
            self._require_finite(step, "gradient norm", norm if self.engine.was_step_applied() else math.inf)
        return norm

    def _refresh_reference(self, step: int, totals: dict[str, float]) -> Metrics:
        """Metrics of the reference that the step compared with; afterwards, if it is due, the new policy takes its
        place. Only steps that train the MPO term do so; a KL penalty of GRPO then has the new reference too."""
        mpo = self.cfg.algorithm.mpo
        trained = self.cfg.algorithm.weights(step)[1] > 0 and compares_with_reference(mpo)
        if self.reference is None or not trained:
            return {}
        age = step - 1 - self.reference.step
        metrics: Metrics = {"mpo/reference_age": float(age)}
        kl = None
        if totals.get("mpo_tokens"):
            metrics["mpo/kl_reference"] = kl = totals["mpo_kl"] / totals["mpo_tokens"]
        if refresh_due(mpo, age + 1, kl):
            new = whole_parameters(self.engine.module.model, self.sharded, self.reference.trained)
            self.reference.replace(new, step)
        return metrics

    def _require_finite(self, step: int, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise SkyrlError(
                f"step {step}: the {what} is {value}, so the policy was not updated; continue from the last checkpoint "
                "with a smaller learner.lr, or look at the batch for log-probabilities that are not finite"
            )

    # ------------------------------------------------------------ weights and probe

    def logprobs(self, groups: list[SampleGroup]) -> list[np.ndarray]:
        """log π_θ float32 [T] of every sample of the groups, in order. Collective under ZeRO-3: every rank must
        call it with the same groups."""
        budget = self.cfg.learner.micro_batch_tokens
        return score_groups(self._policy_logprobs, groups, self.encoder, self.device, budget)

    def picture_drop(self, groups: list[SampleGroup]) -> Metrics:
        """Masked-picture probe on the first ``hallucination.probe_prompts`` groups with pictures:
        ``eval/picture_drop``, nothing if there are none. Collective under ZeRO-3, like :meth:`logprobs`."""
        cfg = self.cfg.hallucination
        probed = probed_groups(groups, cfg)
        return picture_drop_metrics(self.logprobs(probed), self.logprobs([masked_group(g, cfg) for g in probed]))

    def policy_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Hugging Face names and whole parameters, one after the other. Collective under ZeRO-3: every rank must run
        through all of them."""
        return whole_parameters(self.engine.module.model, self.sharded)

    def policy_layout(self) -> Layout:
        """Names, types and whole shapes of :meth:`policy_parameters`; gathers nothing."""
        return layout_of(self.engine.module.model.named_parameters())

    def snapshot(self, version: int) -> WeightSnapshot | None:
        """All parameters on rank 0, None elsewhere. Collective under ZeRO-3."""
        if self.rank == 0:
            return take_snapshot(self.policy_parameters(), self.policy_layout(), version)
        if self.sharded:
            for _ in self.policy_parameters():  # takes part in the gathering
                pass
        return None

    # ------------------------------------------------------------ files

    def save(self, folder: Path) -> None:
        """Policy, optimizer, δ and a refreshed reference into ``folder``; every rank must call it."""
        state = {
            "delta": self.delta.state_dict(),
            "reference_step": 0 if self.reference is None else self.reference.step,
        }
        self.engine.save_checkpoint(str(folder), tag=TAG, client_state=state)
        if self.reference is not None:
            self.reference.save(folder, self.rank)
        if self.rank == 0:
            write_layout(folder, self.cfg)

    def load(self, folder: Path) -> None:
        """Continue from what :meth:`save` wrote; every rank must call it.

        Raises:
            SkyrlError: if there is no such checkpoint, or it was written with settings that cut it differently.
        """
        check_layout(folder, self.cfg)
        _, state = self.engine.load_checkpoint(str(folder), tag=TAG)
        for group in self.engine.optimizer.param_groups:  # the settings of this run, not those of the checkpoint
            group["betas"], group["weight_decay"] = tuple(self.cfg.learner.betas), self.cfg.learner.weight_decay
        self.delta.load_state_dict(state["delta"])
        if self.reference is not None:
            start = lambda: load_policy(self.policy_folder, self.cfg.model.dtype).named_parameters()  # noqa: E731
            self.reference.load(folder, state["reference_step"], start)

    def export(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder that transformers and vLLM load; every rank must call it."""
        snapshot = self.snapshot(version=0)
        if snapshot is not None:
            export_policy(folder, self.engine.module.model, snapshot, self.encoder.processor)
