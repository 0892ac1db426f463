"""Everything that one learner rank does: a train step, log-probabilities, snapshots, checkpoints, export.

A step is: plan the micro-batches, score what is compared with the reference policy, update δ, then one forward and
backward pass per micro-batch that serves all terms of the loss together, one optimizer step, and a refresh of the
reference if one is due. Training library: :class:`skyrl.learner.backend.Backend`. What needs torch is imported where it
is used, so that the driver can name these methods without it.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from skyrl.learner.files import export_policy, read_state, write_state
from skyrl.learner.requirements import require_finite, require_records
from skyrl.learner.schedule import learning_rate, refresh_due, stage_progress
from skyrl.objective.hybrid import (
    active_terms,
    check_weights,
    hybrid_loss,
    imported,
    merge_stats,
    run_terms,
    step_metrics,
)
from skyrl.objective.mpo import Mpo, RunningDelta, pair_members, uses_delta
from skyrl.objective.term import Counts, Stats, Term, recorded_on_policy
from skyrl.records import Metrics, SampleGroup, TrainBatch, WeightSnapshot
from skyrl.settings import Config

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from skyrl.learner.backend import Backend
    from skyrl.learner.passes import Forward, Share
    from skyrl.learner.reference import Reference
    from skyrl.policy.encode import PromptEncoder
    from skyrl.policy.module import PolicyModule
    from skyrl.policy.tower import TowerFeatures
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
        self.forests = False
        """Answers to a prompt share its row (:mod:`skyrl.policy.forest`); found out by :meth:`join`."""
        self.reference: Reference | None = None
        self.features: TowerFeatures | None = None

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
        from skyrl.learner.motion import Motion
        from skyrl.policy.tower import TowerFeatures
        from skyrl.policy.trial import forests_agree
        from skyrl.sync.outgoing import Outgoing

        if self.cfg.learner.zero_stage < 3 and (room := self.cfg.learner.tower_cache_gib):
            self.features = TowerFeatures(room * 2**30)
        compares = any(term.uses_reference for term in self.terms)
        backend = imported(self.cfg.learner.backend, "learner.backend")
        self.backend = backend(self.cfg, self._start, self.rank, host, port, compares)
        shared = self.cfg.learner.shared_rows
        self.forests = shared and forests_agree(self.backend, self.encoder, "learner.shared_rows: the policy")
        self.reference = Reference(self.backend) if compares else None
        self._outgoing = Outgoing(self.backend.model, self.cfg.learner.lora)
        self._motion = Motion(self.backend.model.named_parameters(), self.cfg.learner)

    def _start(self) -> PolicyModule:
        """The starting policy, with what is not trained frozen."""
        from skyrl.policy.attention import share_prompts
        from skyrl.policy.lora import add_lora
        from skyrl.policy.module import TRAINED, PolicyModule, freeze, load_policy

        model = load_policy(self.policy_folder, self.cfg.model.dtype, self.cfg.model.trust_remote_code)
        freeze(model.named_parameters(), self.cfg.learner.trainable)
        if self.cfg.learner.lora.rank:
            add_lora(model, self.cfg.learner.lora, TRAINED[self.cfg.learner.trainable])
        if self.cfg.learner.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if self.cfg.learner.shared_rows:
            share_prompts(model)
        if self.features is not None:
            self.features.serve(model)
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
        from skyrl.learner.passes import Share, distinct_share, plan_rows, row_of

        counts = Counts.of(batch, self.cfg.rollout.max_new_tokens)
        if counts.tokens == 0:
            return {"learner/tokens": 0.0, "learner/micro_batches": 0.0, "mpo/pairs": float(counts.pairs)}
        require_records(batch)
        active = active_terms(self.terms, batch)
        trained = [term for term, _ in active]
        rows = [row_of(item) for item in batch.items]
        world_size, budget = self.cfg.learner.num_workers, self.cfg.learner.micro_batch_tokens
        plan = plan_rows(rows, batch.pairs, world_size, budget, self.forests)[self.rank]
        share = Share.of(batch, plan, self.encoder, self.backend.device, self.forests)
        compared = set().union(*(term.compared(batch) for term in trained))
        references = self._score(partial(self.backend.score, reference=True), share, compared)
        metrics = self._update_delta(share, references, trained)
        found, has_gradient = [], False
        for place in range(len(share.parts)):
            stats, has_gradient = self._backward(share, place, references[place], counts, active)
            found += [stats] if stats else []
        totals = merge_stats(found, active, self.backend.device, self.backend.reduce)
        metrics |= step_metrics(active, totals, counts)
        check_weights(active, totals, metrics, stage_progress(self.cfg, batch.step))
        # Before the optimizer sees the gradient. The metrics are sums over ranks, so all of them stop here.
        for name, value in metrics.items():
            require_finite(batch.step, name, value)
        lr = learning_rate(self.cfg.learner, batch.step, self.cfg.controller.steps)
        before = self._motion.look()
        norm = self.backend.update(lr) if has_gradient else 0.0
        if self.cfg.model.dtype != "float16":  # float16 has a loss scale that is found by stepping over overflows
            require_finite(batch.step, "the gradient norm", norm)
        metrics |= self._refresh_reference(batch.step, trained, metrics.get("mpo/kl_reference"))
        metrics |= self._tower_hits() | self._motion.since(before, lr, self._over_ranks)
        return metrics | {
            "mpo/pairs": float(counts.pairs),
            "learner/grad_norm": norm,
            "learner/lr": lr,
            "learner/tokens": float(counts.tokens),
            "learner/pictures": float(sum(len(item.prompt.images) for item in batch.items)),
            "learner/distinct_share": distinct_share(batch),
            "learner/shared_rows": float(self.forests),
            "learner/micro_batches": float(len(share.parts)),
        }

    def _over_ranks(self, counts: Tensor) -> Tensor:
        return self.backend.reduce(counts.to(self.backend.device), "sum")

    def _tower_hits(self) -> Metrics:
        """Of the pictures asked for since the last step. Nothing where no tower was asked."""
        import torch

        if self.features is None:
            return {}
        own = torch.tensor(self.features.counts(), dtype=torch.float64, device=self.backend.device)
        asked, ran = self.backend.reduce(own, "sum").tolist()
        return {"learner/tower_hits": 1 - ran / asked} if asked else {}

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
        require_finite(batch.step, "the mean implicit reward", mean)
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
        """log π_θ float32 [T] of every sample, in order, by the weights that a rollout worker gets (with ZeRO-3, whose
        weights are cut, factors of LoRA stay beside theirs). Collective under ZeRO-3: the same groups on every rank."""
        from skyrl.learner.passes import score_groups
        from skyrl.policy.lora import computing_merged

        budget, lora = self.cfg.learner.micro_batch_tokens, self.cfg.learner.lora
        apart = lora.rank > 0 and not self.backend.collective
        with computing_merged(self.backend.model, lora) if apart else nullcontext():
            return score_groups(self.backend.score, groups, self.encoder, self.backend.device, budget, self.forests)

    def policy_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The whole tensors of a saved checkpoint of the policy, by name. Collective under ZeRO-3: every rank must run
        through all of them."""
        return self._outgoing.saved(self.backend.parameters())

    def policy_layout(self) -> Layout:
        """Names, types and whole shapes of :meth:`policy_parameters`; gathers nothing."""
        return self._outgoing.saved_layout

    def snapshot(self, version: int, base: int | None = None) -> WeightSnapshot | None:
        """A saved checkpoint's tensors on rank 0, None elsewhere; with ``learner.lora.sync=adapter`` factors are apart.
        Collective under ZeRO-3.

        Args:
            base: A version that the receivers hold: only what training can have changed since is taken. None: all.
        """
        out = self._outgoing
        part = base is not None and not out.all_change
        parameters = out.sent(self.backend.parameters(out.changing if part else None))
        return self._taken(parameters, out.sent_layout(part), version, base if part else None)

    def _taken(
        self, parameters: Iterator[tuple[str, Tensor]], layout: Layout, version: int, base: int | None = None
    ) -> WeightSnapshot | None:
        from skyrl.sync.snapshot import take_snapshot

        if self.rank == 0:
            return take_snapshot(parameters, layout, version, base)
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
        snapshot = self._taken(self._outgoing.own(self.backend.parameters()), self._outgoing.own_layout, version=0)
        if snapshot is not None:
            export_policy(folder, self.backend.model, snapshot, self.encoder.processor)
        if self.cfg.learner.lora.rank:
            from skyrl.policy.lora import save_adapter

            save_adapter(folder / "adapter" if self.rank == 0 else None, self.backend)
