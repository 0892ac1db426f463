"""One learner rank: a plain class round a DeepSpeed engine. Knows nothing of Ray, vLLM or rewards.

A step is: plan the micro-batches, score the pair members with the reference policy, update δ, then one forward
and backward pass per micro-batch that serves GRPO and MPO together, and one optimizer step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist

from skyrl.algorithms.mpo import RunningDelta
from skyrl.algorithms.objective import finalise, merge_stats
from skyrl.config import Config
from skyrl.data.encode import EncodedBatch, PromptEncoder
from skyrl.data.packing import MicroBatch, ghost_row, plan_micro_batches
from skyrl.interfaces import Metrics
from skyrl.learner.deepspeed_config import deepspeed_config, learning_rate
from skyrl.learner.losses import micro_loss, pair_sums, reduce_stats
from skyrl.learner.process_group import join_ranks
from skyrl.models.freezing import freeze
from skyrl.models.policy import PolicyModule, load_policy
from skyrl.models.snapshot import parameters_of, take_snapshot
from skyrl.types import SampleGroup, SkyrlError, TrainBatch, WeightSnapshot

TAG = "deepspeed"
LAYOUT_FILE = "learner.json"


class DeepSpeedLearner:
    """Trains the policy on whole-step batches.

    Args:
        cfg: The whole configuration.
        policy_folder: Hugging Face folder of the starting policy, which is also the reference policy π_0.
        rank: This rank.
        world_size: ``learner.num_workers``. The ranks meet at MASTER_ADDR and MASTER_PORT.

    Raises:
        ConfigError: if ``learner.trainable`` names modules that the policy lacks, or its architecture is not supported.
        SkyrlError: if ``learner.device=cuda`` and this process sees no such device.
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
        self.trained = [p for p in module.parameters() if p.requires_grad]
        self.engine, *_ = deepspeed.initialize(model=module, model_parameters=self.trained, config=settings)
        self._without_dropout()
        self.reference = self._reference(policy_folder, settings) if self.needs_reference else None

    @property
    def needs_reference(self) -> bool:
        """True if π_0 is used: by MPO's pairs or by a KL penalty."""
        return self.cfg.algorithm.mpo.weight > 0 or self.cfg.algorithm.grpo.kl_weight > 0

    def _module(self, folder: str) -> PolicyModule:
        model = load_policy(folder, self.cfg.model.dtype)
        module = PolicyModule(model, self.encoder.forbidden_token_ids(), self.cfg.rollout.temperature)
        return module.to(self.device)

    def _without_dropout(self) -> None:
        """Evaluation mode: dropout would make the ratio differ from 1 on the first step."""
        self.engine.eval()
        for part in self.engine.module.modules():
            if getattr(part, "gradient_checkpointing", False):
                part.training = True  # transformers checkpoints layers in training mode only

    def _reference(self, folder: str, settings: dict[str, Any]) -> torch.nn.Module:
        module = self._module(folder).requires_grad_(False).eval()
        if self.cfg.learner.zero_stage < 3:
            return module
        # Sharded like the policy, without an optimizer.
        config = {key: value for key, value in settings.items() if key != "optimizer"}
        engine = deepspeed.initialize(model=module, config=config)[0]
        engine.eval()
        return engine

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
        mine = plan[self.rank]
        encoded = [self._encode(batch, part) for part in mine]
        references = [self._reference_logprobs(rows, part, batch) for rows, part in zip(encoded, mine, strict=True)]
        self._update_delta(batch, mine, references)
        stats = []
        for i, (rows, part, reference) in enumerate(zip(encoded, mine, references, strict=True)):
            self.engine.set_gradient_accumulation_boundary(i == len(mine) - 1)
            stats.append(self._backward(batch, rows, part, reference))
        totals = reduce_stats(merge_stats(stats), self.device, self.world_size)
        metrics = finalise(
            totals, self.cfg.algorithm, batch.grpo_samples, batch.grpo_tokens, len(batch.pairs), self.delta.value
        )
        # Before the optimizer sees the gradient. The metrics are sums over ranks, so all of them stop here.
        self._require_finite(batch.step, "loss", metrics.get("loss/total", 0.0))
        lr = learning_rate(self.cfg.learner, batch.step, self.cfg.controller.steps)
        return metrics | {
            "learner/grad_norm": self._update(batch.step, lr),
            "learner/lr": lr,
            "learner/entropy": totals["entropy"] / totals["tokens"],
            "learner/tokens": totals["tokens"],
            "learner/micro_batches": float(len(mine)),
            "learner/logprob_gap_fresh": totals["fresh_gap_max"],
        }

    def _encode(self, batch: TrainBatch, part: MicroBatch) -> EncodedBatch:
        ghost = ghost_row(batch.items, part)
        rows = [batch.items[i] for i in (part if ghost is None else [*part, ghost])]
        return self.encoder.collate([(r.prompt, r.prompt_ids, r.sample.token_ids) for r in rows]).to(self.device)

    @torch.no_grad()
    def _reference_logprobs(self, rows: EncodedBatch, part: MicroBatch, batch: TrainBatch) -> torch.Tensor | None:
        """log π_0 of the micro-batch's answer tokens [N], or None if nothing in the whole step needs them."""
        with_kl = self.cfg.algorithm.grpo.kl_weight > 0
        if self.reference is None or not (batch.pairs or with_kl):
            return None
        tokens = sum(len(batch.items[i].sample.token_ids) for i in part)
        paired = {i for pair in batch.pairs for i in (pair.chosen, pair.rejected)}
        keep = [k for k, i in enumerate(part) if with_kl or i in paired]
        if self.cfg.learner.zero_stage == 3 or (part and len(keep) == len(part)):
            return self.reference(rows)[0][:tokens]  # collective under ZeRO-3, so it can't be left out
        filled = torch.zeros(tokens, device=self.device)
        if keep:  # pair members only: the others' entries are never read
            kept_rows = torch.zeros(len(rows.input_ids), dtype=torch.bool, device=self.device)
            kept_rows[keep] = True
            items = [batch.items[part[k]] for k in keep]
            some = self.encoder.collate([(r.prompt, r.prompt_ids, r.sample.token_ids) for r in items])
            token_rows = rows.answer_mask.nonzero()[:tokens, 0]
            filled[kept_rows[token_rows]] = self.reference(some.to(self.device))[0]
        return filled

    def _update_delta(self, batch: TrainBatch, mine: list[MicroBatch], references: list[torch.Tensor | None]) -> None:
        if not batch.pairs:
            return
        beta = self.cfg.algorithm.mpo.beta
        own = sum(pair_sums(batch, part, ref, beta) for part, ref in zip(mine, references, strict=True))
        total = torch.tensor([own], dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(total)
        mean = float(total) / (2 * len(batch.pairs))
        self._require_finite(batch.step, "mean implicit reward", mean)
        self.delta.update(mean)

    def _backward(
        self, batch: TrainBatch, rows: EncodedBatch, part: MicroBatch, reference: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        logprobs, entropy = self.engine(rows, with_entropy=True)
        tokens = sum(len(batch.items[i].sample.token_ids) for i in part)
        # A ghost row's tokens come last; they join the graph and weigh nothing.
        loss, stats = logprobs[tokens:].sum() * 0.0, {}
        if part:
            real = micro_loss(
                batch, part, logprobs[:tokens], entropy[:tokens], reference, self.delta.value, self.cfg.algorithm
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

    def _require_finite(self, step: int, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise SkyrlError(
                f"step {step}: the {what} is {value}, so the policy was not updated; continue from the last checkpoint "
                "with a smaller learner.lr, or look at the batch for log-probabilities that are not finite"
            )

    # ------------------------------------------------------------ weights and probe

    @torch.no_grad()
    def logprobs(self, groups: list[SampleGroup]) -> list[np.ndarray]:
        """log π_θ float32 [T] of every sample of the groups, in order. Collective under ZeRO-3: every rank must
        call it with the same groups."""
        rows = [(g.prompt, g.prompt_ids, s.token_ids) for g in groups for s in g.samples]
        if not rows:
            return []
        flat = self.engine.module(self.encoder.collate(rows).to(self.device))[0].cpu().numpy()
        return np.split(flat, np.cumsum([len(ids) for _, _, ids in rows])[:-1])

    def policy_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Hugging Face names and whole parameters, one after the other. Collective under ZeRO-3: every rank must run
        through all of them."""
        for name, parameter in self.engine.module.model.named_parameters():
            if self.cfg.learner.zero_stage < 3:
                yield name, parameter.detach()
            else:
                with deepspeed.zero.GatheredParameters([parameter]):
                    whole = parameter.detach().clone()
                yield name, whole

    def snapshot(self, version: int) -> WeightSnapshot | None:
        """All parameters on rank 0, None elsewhere. Collective under ZeRO-3."""
        if self.rank == 0:
            return take_snapshot(((name, p.cpu()) for name, p in self.policy_parameters()), version)
        if self.cfg.learner.zero_stage == 3:
            for _ in self.policy_parameters():  # takes part in the gathering
                pass
        return None

    # ------------------------------------------------------------ files

    def _layout(self) -> dict[str, object]:
        """What a checkpoint's optimizer states are cut by; another run can only load them with the same settings."""
        learner = self.cfg.learner
        return {
            "learner.num_workers": self.world_size,
            "learner.zero_stage": learner.zero_stage,
            "learner.trainable": learner.trainable.value,
            "model.dtype": self.cfg.model.dtype,
        }

    def save(self, folder: Path) -> None:
        """Policy, optimizer and δ into ``folder``; every rank must call it."""
        self.engine.save_checkpoint(str(folder), tag=TAG, client_state={"delta": self.delta.state_dict()})
        if self.rank == 0:
            (Path(folder) / LAYOUT_FILE).write_text(json.dumps(self._layout(), indent=2))

    def load(self, folder: Path) -> None:
        """Continue from what :meth:`save` wrote; every rank must call it.

        Raises:
            SkyrlError: if there is no such checkpoint, or it was written with settings that cut it differently.
        """
        file = Path(folder) / LAYOUT_FILE
        if not file.is_file():
            raise SkyrlError(f"no learner state in {folder}: it has no {LAYOUT_FILE}")
        saved, own = json.loads(file.read_text()), self._layout()
        other = [f"{key}={value} (here {own[key]})" for key, value in saved.items() if value != own[key]]
        if other:
            raise SkyrlError(f"the learner state in {folder} was saved with {', '.join(other)}; use the same to resume")
        _, state = self.engine.load_checkpoint(str(folder), tag=TAG)
        self.delta.load_state_dict(state["delta"])

    def export(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder that transformers and vLLM load; every rank must call it."""
        snapshot = self.snapshot(version=0)
        if snapshot is not None:
            model = self.engine.module.model
            persistent = model.state_dict().keys()
            buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
            model.save_pretrained(folder, state_dict=dict(parameters_of(snapshot)) | buffers)
            self.encoder.processor.save_pretrained(folder)
