"""One learner rank: a plain class round a DeepSpeed engine. Knows nothing of Ray, vLLM or rewards.

A step is: plan the micro-batches, score the pair members with the reference policy, update δ, then one forward
and backward pass per micro-batch that serves GRPO and MPO together, and one optimizer step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist

from skyrl.algorithms.mpo import RunningDelta
from skyrl.algorithms.objective import finalise
from skyrl.config import Config
from skyrl.data.encode import EncodedBatch, PromptEncoder
from skyrl.data.packing import plan_micro_batches
from skyrl.interfaces import Metrics
from skyrl.learner.deepspeed_config import deepspeed_config, learning_rate
from skyrl.learner.losses import MicroLoss, add_stats, micro_loss, pair_sums, reduce_stats
from skyrl.learner.process_group import join_ranks
from skyrl.models.freezing import freeze
from skyrl.models.policy import PolicyModule, load_policy
from skyrl.models.snapshot import parameters_of, take_snapshot
from skyrl.types import SampleGroup, SkyrlError, TrainBatch, WeightSnapshot

TAG = "deepspeed"


class DeepSpeedLearner:
    """Trains the policy on whole-step batches.

    Args:
        cfg: The whole configuration.
        policy_folder: Hugging Face folder of the starting policy, which is also the reference policy π_0.
        rank: This rank.
        world_size: ``learner.num_workers``. The process group must be reachable through MASTER_ADDR and MASTER_PORT.
    """

    def __init__(self, cfg: Config, policy_folder: str, rank: int, world_size: int) -> None:
        self.cfg, self.rank, self.world_size = cfg, rank, world_size
        on_gpu = cfg.learner.device == "cuda"
        if on_gpu and not torch.cuda.is_available():
            raise SkyrlError("learner.device=cuda, but this process sees no CUDA device; use learner.device=cpu")
        self.device = torch.device("cuda" if on_gpu else "cpu")
        join_ranks(cfg.learner.device, rank, world_size, cfg.controller.timeout)
        torch.manual_seed(cfg.controller.seed)
        self.encoder = PromptEncoder.from_pretrained(policy_folder)
        self.delta = RunningDelta()
        settings = deepspeed_config(cfg.learner, cfg.model.dtype)
        module = self._module(policy_folder)
        freeze(module.model.named_parameters(), cfg.learner.trainable)
        if cfg.learner.gradient_checkpointing:
            module.model.gradient_checkpointing_enable({"use_reentrant": False})
        trained = [p for p in module.parameters() if p.requires_grad]
        self.engine, *_ = deepspeed.initialize(model=module, model_parameters=trained, config=settings)
        self.engine.train()
        self.reference = self._reference(policy_folder, settings) if self.needs_reference else None

    @property
    def needs_reference(self) -> bool:
        """True if π_0 is used: by MPO's pairs or by a KL penalty."""
        return self.cfg.algorithm.mpo.weight > 0 or self.cfg.algorithm.grpo.kl_weight > 0

    def _module(self, folder: str) -> PolicyModule:
        model = load_policy(folder, self.cfg.model.dtype).to(self.device)
        for part in model.modules():  # dropout would make the ratio differ from 1 on the first step
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        module = PolicyModule(model, self.encoder.forbidden_token_ids(), self.cfg.rollout.temperature)
        return module.to(self.device)

    def _reference(self, folder: str, settings: dict[str, Any]) -> torch.nn.Module:
        module = self._module(folder).requires_grad_(False).eval()
        if self.cfg.learner.zero_stage < 3:
            return module
        # Sharded like the policy, without an optimizer.
        config = {key: value for key, value in settings.items() if key != "optimizer"}
        return deepspeed.initialize(model=module, config=config)[0].eval()

    # ------------------------------------------------------------ one step

    def train_step(self, batch: TrainBatch) -> Metrics:
        """One optimizer step on the whole batch; every rank must be given the same one.

        Returns:
            Metrics over all ranks (the same on each). An empty batch trains nothing and says so by
            ``learner/tokens`` 0.
        """
        if not batch.items:
            return {"learner/tokens": 0.0, "learner/micro_batches": 0.0, "mpo/pairs": 0.0}
        lengths = [len(item.prompt_ids) + len(item.sample.token_ids) for item in batch.items]
        plan = plan_micro_batches(lengths, batch.pairs, self.world_size, self.cfg.learner.micro_batch_tokens)
        mine = plan[self.rank]
        encoded = [self._encode(batch, part) for part in mine]
        references = [self._reference_logprobs(rows, part, batch) for rows, part in zip(encoded, mine, strict=True)]
        if batch.pairs:
            sums = [pair_sums(batch, part, ref, self.cfg.algorithm.mpo.beta) for part, ref in zip(mine, references)]
            self.delta.update(self._sum_over_ranks(sum(sums)) / (2 * len(batch.pairs)))
        lr = learning_rate(self.cfg.learner, batch.step, self.cfg.controller.steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        stats: dict[str, torch.Tensor] = {}
        for i, (rows, part, reference) in enumerate(zip(encoded, mine, references, strict=True)):
            self.engine.set_gradient_accumulation_boundary(i == len(mine) - 1)
            add_stats(stats, self._backward(batch, rows, part, reference))
        self.engine.step()
        return self._metrics(batch, stats, lr, len(mine))

    def _encode(self, batch: TrainBatch, part: list[int]) -> EncodedBatch:
        # An empty micro-batch keeps the collective calls in step: it runs one row and its loss is multiplied by 0.
        rows = [batch.items[i] for i in part or [0]]
        return self.encoder.collate([(r.prompt, r.prompt_ids, r.sample.token_ids) for r in rows]).to(self.device)

    @torch.no_grad()
    def _reference_logprobs(self, rows: EncodedBatch, part: list[int], batch: TrainBatch) -> torch.Tensor | None:
        """log π_0 of the micro-batch's answer tokens [N], or None if nothing in the whole step needs them."""
        if self.reference is None or not (batch.pairs or self.cfg.algorithm.grpo.kl_weight > 0):
            return None
        paired = {i for pair in batch.pairs for i in (pair.chosen, pair.rejected)}
        needed = [self.cfg.algorithm.grpo.kl_weight > 0 or i in paired for i in part]
        if self.cfg.learner.zero_stage < 3 and not any(needed):
            return None
        if self.cfg.learner.zero_stage == 3 or all(needed):
            return self.reference(rows)[0]
        # Pair members only: the others' entries are never read.
        keep = [k for k, flag in enumerate(needed) if flag]
        items = [batch.items[part[k]] for k in keep]
        some = self.encoder.collate([(r.prompt, r.prompt_ids, r.sample.token_ids) for r in items]).to(self.device)
        kept_rows = torch.zeros(len(part), dtype=torch.bool, device=self.device)
        kept_rows[keep] = True
        token_rows = rows.answer_mask.nonzero()[:, 0]
        filled = torch.zeros(len(token_rows), device=self.device)
        filled[kept_rows[token_rows]] = self.reference(some)[0]
        return filled

    def _backward(
        self, batch: TrainBatch, rows: EncodedBatch, part: list[int], reference: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        logprobs, entropy = self.engine(rows, with_entropy=True)
        if part:
            result = micro_loss(batch, part, logprobs, entropy, reference, self.delta.value, self.cfg.algorithm)
        else:
            result = MicroLoss(logprobs.sum() * 0.0, {})
        # DeepSpeed averages gradients over ranks; the loss is already normalised over the whole step.
        self.engine.backward(result.loss * self.world_size)
        return result.stats

    def _metrics(self, batch: TrainBatch, stats: dict[str, torch.Tensor], lr: float, micro_batches: int) -> Metrics:
        totals = reduce_stats(stats, self.device, self.world_size)
        entropy, tokens = totals.pop("entropy"), totals.pop("tokens")
        gap = totals.pop("fresh_gap_max")
        metrics = finalise(
            totals, self.cfg.algorithm, batch.grpo_samples, batch.grpo_tokens, len(batch.pairs), self.delta.value
        )
        return metrics | {
            "learner/grad_norm": float(self.engine.get_global_grad_norm() or 0.0),
            "learner/lr": lr,
            "learner/entropy": entropy / tokens,
            "learner/tokens": tokens,
            "learner/micro_batches": float(micro_batches * self.world_size),
            "learner/logprob_gap_fresh": gap,
        }

    def _sum_over_ranks(self, value: float) -> float:
        total = torch.tensor([float(value)], dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(total)
        return float(total)

    # ------------------------------------------------------------ weights and probe

    @torch.no_grad()
    def logprobs(self, groups: list[SampleGroup]) -> list[np.ndarray]:
        """log π_θ float32 [T] of every sample of the groups, in order. Collective under ZeRO-3."""
        rows = [(g.prompt, g.prompt_ids, s.token_ids) for g in groups for s in g.samples]
        flat = self.engine.module(self.encoder.collate(rows).to(self.device))[0].float().cpu().numpy()
        return np.split(flat, np.cumsum([len(ids) for _, _, ids in rows])[:-1])

    def snapshot(self, version: int) -> WeightSnapshot | None:
        """All parameters on rank 0, None elsewhere. Collective under ZeRO-3."""
        named = list(self.engine.module.model.named_parameters())
        if self.cfg.learner.zero_stage < 3:
            return take_snapshot(named, version) if self.rank == 0 else None
        gathered = []
        for name, parameter in named:  # one at a time: the whole model never stands on one GPU
            with deepspeed.zero.GatheredParameters([parameter]):
                if self.rank == 0:
                    gathered.append((name, parameter.detach().cpu().clone()))
        return take_snapshot(gathered, version) if self.rank == 0 else None

    # ------------------------------------------------------------ files

    def save(self, folder: Path) -> None:
        """Policy, optimizer and δ into ``folder``; every rank must call it."""
        self.engine.save_checkpoint(str(folder), tag=TAG, client_state={"delta": self.delta.state_dict()})

    def load(self, folder: Path) -> None:
        """Continue from what :meth:`save` wrote.

        Raises:
            SkyrlError: if there is no such checkpoint.
        """
        path, state = self.engine.load_checkpoint(str(folder), tag=TAG)
        if path is None:
            raise SkyrlError(f"no learner state in {folder}")
        self.delta.load_state_dict(state["delta"])

    def export(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder that transformers and vLLM load; every rank must call it."""
        snapshot = self.snapshot(version=0)
        if snapshot is not None:
            self.engine.module.model.save_pretrained(folder, state_dict=dict(parameters_of(snapshot)))
            self.encoder.processor.save_pretrained(folder)
