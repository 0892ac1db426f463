"""Everything that one learner rank does: a train step, log-probabilities, snapshots, checkpoints, export.

A step is: plan the micro-batches, score what is compared with the reference policy, update δ, then one forward and
backward pass per micro-batch that serves all terms of the loss together, one optimizer step, and a refresh of the
reference if one is due. Training library: :class:`skyrl.learner.backend.Backend`. What needs torch is imported where it
is used, so that the driver can name these methods without it.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from skyrl.learner.files import export_policy, read_state, write_state
from skyrl.learner.schedule import learning_rate, refresh_due, stage_progress
from skyrl.objective.hybrid import active_terms, hybrid_loss, imported, merge_stats, run_terms, step_metrics
from skyrl.objective.mpo import Mpo, RunningDelta, pair_members, uses_delta
from skyrl.objective.term import Counts, Stats, Term, recorded_on_policy
from skyrl.policy.packing import plan_micro_batches
from skyrl.records import Metrics, SampleGroup, SkyrlError, TrainBatch, WeightSnapshot
from skyrl.settings import Config

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from skyrl.learner.backend import Backend
    from skyrl.learner.passes import Forward, Share
    from skyrl.learner.reference import Reference
    from skyrl.policy.encode import PromptEncoder
    from skyrl.policy.module import PolicyModule
    from skyrl.sync.snapshot import Layout


class LearnerStep:
    """One rank of the learner. It can do nothing before :meth:`join`.

    Args:
        cfg: The whole configuration; ``learner.backend`` names the training library's class.
        policy_folder: Hugging Face folder of the starting policy, which is also the first reference policy π_0.
        rank: This rank, 0 … ``learner.num_workers`` - 1.
        threads: Torch threads of this process.
    """

    def __init__(self, cfg: Config, policy_folder: str, rank: int, threads: int) -> None:
        self.cfg, self.policy_folder, self.rank, self.threads = cfg, policy_folder, rank, threads
        self.delta = RunningDelta(cfg.algorithm.mpo.delta, cfg.algorithm.mpo.delta_decay)
        self.terms: list[Term] = []
        self.encoder: PromptEncoder
        self.backend: Backend
        self.reference: Reference | None = None

    # ------------------------------------------------------------ start

    def free_port(self) -> int:
        """A port that is free on this host; asked of rank 0, where the ranks will meet."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return probe.getsockname()[1]

    def join(self, host: str, port: int) -> None:
        """Meet the other ranks and build the backend; all ranks at the same time.

        Raises:
            ConfigError: if the backend or a term of the loss can't be built, ``learner.trainable`` names modules that
                the policy lacks, or its architecture is not supported.
        """
        import torch

        from skyrl.learner.reference import Reference
        from skyrl.policy.encode import PromptEncoder

        torch.set_num_threads(self.threads)
        torch.manual_seed(self.cfg.controller.seed)
        self.terms = run_terms(self.cfg.algorithm)
        self.encoder = PromptEncoder.configured(self.policy_folder, self.cfg)
        # Not before: it imports transformers, which must find what the encoder put in the place of torchvision.
        from skyrl.sync.saved_form import SavedForm

        compares = any(term.uses_reference for term in self.terms)
        backend = imported(self.cfg.learner.backend, "learner.backend")
        self.backend = backend(self.cfg, self._start, self.rank, host, port, compares)
        self.reference = Reference(self.backend) if compares else None
        self._saved_form = SavedForm(self.backend.model, self._own_layout())

    def _start(self) -> PolicyModule:
        """The starting policy, with what is not trained frozen."""
        from skyrl.policy.lora import add_lora
        from skyrl.policy.module import TRAINED, PolicyModule, freeze, load_policy

        model = load_policy(self.policy_folder, self.cfg.model.dtype, self.cfg.model.trust_remote_code)
        freeze(model.named_parameters(), self.cfg.learner.trainable)
        if self.cfg.learner.lora.rank:
            add_lora(model, self.cfg.learner.lora, TRAINED[self.cfg.learner.trainable])
        if self.cfg.learner.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return PolicyModule(model, self.encoder.forbidden_token_ids(), self.cfg.rollout.temperature)

    # ------------------------------------------------------------ one step

    def train_step(self, batch: TrainBatch) -> Metrics:
        """One optimizer step on the whole batch; every rank must be given the same one.

        Returns:
            Metrics over all ranks (the same on each). A batch without a token to train on changes nothing and says so
            by ``learner/tokens`` 0.

        Raises:
            SkyrlError: on every rank, if a loss, a statistic or the gradient is not finite; the policy stays as it was.
                Also for a batch that can't be trained on as it is.
        """
        from skyrl.learner.passes import Share, distinct_share

        counts = Counts.of(batch, self.cfg.rollout.max_new_tokens)
        if counts.tokens == 0:
            return {"learner/tokens": 0.0, "learner/micro_batches": 0.0, "mpo/pairs": float(counts.pairs)}
        _require_records(batch)
        active = active_terms(self.terms, batch)
        trained = [term for term, _ in active]
        lengths = [len(item.prompt_ids) + len(item.sample.token_ids) for item in batch.items]
        world_size, budget = self.cfg.learner.num_workers, self.cfg.learner.micro_batch_tokens
        plan = plan_micro_batches(lengths, batch.pairs, world_size, budget)[self.rank]
        share = Share.of(batch, plan, self.encoder, self.backend.device)
        compared = set().union(*(term.compared(batch) for term in trained))
        references = self._score(partial(self.backend.score, reference=True), share, compared)
        metrics = self._update_delta(share, references, trained)
        found, has_gradient = [], False
        for place in range(len(share.parts)):
            stats, has_gradient = self._backward(share, place, references[place], counts, active)
            found += [stats] if stats else []
        totals = merge_stats(found, active, self.backend.device, self.backend.reduce)
        metrics |= step_metrics(active, totals, counts)
        # Before the optimizer sees the gradient. The metrics are sums over ranks, so all of them stop here.
        for name, value in metrics.items():
            _require_finite(batch.step, name, value)
        lr = learning_rate(self.cfg.learner, batch.step, self.cfg.controller.steps)
        norm = self.backend.update(lr) if has_gradient else 0.0
        if self.cfg.model.dtype != "float16":  # float16 has a loss scale that is found by stepping over overflows
            _require_finite(batch.step, "the gradient norm", norm)
        metrics |= self._refresh_reference(batch.step, trained, metrics.get("mpo/kl_reference"))
        return metrics | {
            "mpo/pairs": float(counts.pairs),
            "learner/grad_norm": norm,
            "learner/lr": lr,
            "learner/tokens": float(counts.tokens),
            "learner/distinct_share": distinct_share(batch),
            "learner/micro_batches": float(len(share.parts)),
        }

    def _score(self, forward: Forward, share: Share, wanted: set[int]) -> list[Tensor | None]:
        from skyrl.learner.passes import score_share

        return score_share(forward, share, wanted, self.encoder, self.backend.device, self.backend.collective)

    def _update_delta(self, share: Share, references: list[Tensor | None], trained: list[Term]) -> Metrics:
        """Take this step into δ, if it trains pairs and their quality."""
        import torch

        from skyrl.learner.views import reward_sum

        batch, mpo = share.batch, self.cfg.algorithm.mpo
        members = pair_members(batch)
        if not members or not uses_delta(mpo) or not any(isinstance(term, Mpo) for term in trained):
            return {}
        # Where the rollout's record is missing or not the learner's own log π_θ (16 bit, top-p, an older policy), it
        # takes a forward pass: the mean of log π_rollout − log π_0 over sampled tokens would be too high by a KL
        # divergence.
        exact = self.cfg.model.dtype == "float32" and self.cfg.rollout.top_p == 1
        unknown = {i for i in members if not exact or not recorded_on_policy(batch, batch.items[i])}
        starts = self._score(self.backend.score, share, unknown)
        if mpo.reference_free:
            references = [None] * len(share.parts)
        parts = zip(share.parts, references, starts, strict=True)
        own = sum(reward_sum(batch, part, reference, mpo.beta, start, unknown) for part, reference, start in parts)
        total = torch.tensor([own], dtype=torch.float64, device=self.backend.device)
        mean = float(self.backend.reduce(total, "sum")) / (2 * len(batch.pairs))
        _require_finite(batch.step, "the mean implicit reward", mean)
        return {"mpo/delta": self.delta.update(mean)}

    def _backward(
        self, share: Share, place: int, reference: Tensor | None, counts: Counts, active: list[tuple[Term, float]]
    ) -> tuple[Stats, bool]:
        """Forward and backward pass of one micro-batch.

        Returns:
            Its statistics, ``{}`` if it has but a ghost; and whether anything of it reaches a trained module: it does
            not if only an adapter is trained and the step has no picture.
        """
        from skyrl.learner.views import batch_view

        batch, part, rows = share.batch, share.parts[place], share.rows[place]
        logprobs, entropy = self.backend.forward(rows.encoded)
        stats: Stats = {}
        loss = logprobs[:0].sum()  # of a ghost alone: in the graph, without any weight
        if part:
            own = rows.places[: share.tokens(part)]  # a ghost's tokens come last
            progress, delta = stage_progress(self.cfg, batch.step), self.delta.value
            view = batch_view(batch, part, logprobs[own], entropy[own], reference, counts, progress, delta)
            loss, stats = hybrid_loss(view, active)
        if loss.requires_grad:
            self.backend.backward(loss, place == len(share.parts) - 1)
        return stats, loss.requires_grad

    def _refresh_reference(self, step: int, trained: list[Term], kl: float | None) -> Metrics:
        """Age of the reference that the step compared with; afterwards, if it is due, the new policy takes its place.
        Only steps that train the MPO term do so; a KL penalty of GRPO then has the new reference too."""
        if self.reference is None or not any(isinstance(term, Mpo) and term.uses_reference for term in trained):
            return {}
        age = step - 1 - self.reference.step
        if refresh_due(self.cfg.algorithm.mpo, age + 1, kl):
            self.reference.replace(self.backend.parameters(self.reference.trained), step)
        return {"mpo/reference_age": float(age)}

    # ------------------------------------------------------------ log-probabilities and weights

    def logprobs(self, groups: list[SampleGroup]) -> list[np.ndarray]:
        """log π_θ float32 [T] of every sample, in order. Collective under ZeRO-3: the same groups on every rank."""
        from skyrl.learner.passes import score_groups

        budget = self.cfg.learner.micro_batch_tokens
        return score_groups(self.backend.score, groups, self.encoder, self.backend.device, budget)

    def policy_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The whole tensors of a saved checkpoint of the policy, by name. Collective under ZeRO-3: every rank must run
        through all of them."""
        return self._saved_form.of(self._own_parameters())

    def policy_layout(self) -> Layout:
        """Names, types and whole shapes of :meth:`policy_parameters`; gathers nothing."""
        return self._saved_form.layout

    def snapshot(self, version: int) -> WeightSnapshot | None:
        """A saved checkpoint's tensors on rank 0, None elsewhere. Collective under ZeRO-3."""
        return self._taken(self.policy_parameters(), self.policy_layout(), version)

    def _own_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Whole parameters as the model holds and names them, those of LoRA merged."""
        from skyrl.policy.lora import merged

        return merged(self.backend.parameters(), self.cfg.learner.lora)

    def _own_layout(self) -> Layout:
        from skyrl.policy.lora import plain_name
        from skyrl.sync.snapshot import layout_of

        layout = layout_of(self.backend.model.named_parameters())
        return [(plain, dtype, shape) for name, dtype, shape in layout if (plain := plain_name(name)) is not None]

    def _taken(self, parameters: Iterator[tuple[str, Tensor]], layout: Layout, version: int) -> WeightSnapshot | None:
        from skyrl.sync.snapshot import take_snapshot

        if self.rank == 0:
            return take_snapshot(parameters, layout, version)
        if self.backend.collective:
            for _ in parameters:  # takes part in the gathering
                pass
        return None

    # ------------------------------------------------------------ files

    def save(self, folder: Path) -> None:
        """Policy, optimizer, δ and a refreshed reference into ``folder``; every rank must call it."""
        self.backend.save(folder)
        if self.reference is not None:
            self.reference.save(folder, self.rank)
        if self.rank == 0:
            refreshed = 0 if self.reference is None else self.reference.step
            delta = {"value": self.delta.value, "updates": self.delta.updates}
            write_state(folder, self.cfg, {"delta": delta, "reference_step": refreshed})

    def load(self, folder: Path) -> None:
        """Continue from what :meth:`save` wrote; every rank must call it.

        Raises:
            SkyrlError: if there is no such checkpoint, or it was written by another version of skyrl or with settings
                that cut it differently.
        """
        state = read_state(folder, self.cfg)
        self.backend.load(folder)
        self.delta = replace(self.delta, **state["delta"])
        if self.reference is not None:
            self.reference.load(folder, state["reference_step"], lambda: self._start().model.named_parameters())

    def export(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder that transformers and vLLM load, and with LoRA its factors alone
        into ``adapter`` in it, for peft; every rank must call it."""
        # In the model's own form: save_pretrained turns it back itself.
        snapshot = self._taken(self._own_parameters(), self._own_layout(), version=0)
        if snapshot is not None:
            export_policy(folder, self.backend.model, snapshot, self.encoder.processor)
        if self.cfg.learner.lora.rank:
            from skyrl.policy.lora import save_adapter

            save_adapter(folder / "adapter" if self.rank == 0 else None, self.backend)


def _require_records(batch: TrainBatch) -> None:
    for item in batch.items:
        if item.grpo_weight != 0 and item.sample.logprobs is None:
            raise SkyrlError(
                f"step {batch.step}: sample {item.sample.index} of prompt {item.prompt.id!r} has grpo_weight "
                f"{item.grpo_weight:g}, but its log-probabilities were not recorded; allowed: a record, or weight 0"
            )


def _require_finite(step: int, what: str, value: float) -> None:
    if not math.isfinite(value):
        raise SkyrlError(
            f"step {step}: {what} is {value}, so the policy was not updated; continue from the last checkpoint "
            "with a smaller learner.lr, or look at the batch for log-probabilities that are not finite"
        )
