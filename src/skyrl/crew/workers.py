"""The actor classes. Each holds one plain object and forwards calls to it; nothing is decided here.

Heavy libraries are imported inside ``__init__``: by then Ray has set the process's environment variables.
"""

from __future__ import annotations

import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from skyrl.interfaces import Metrics
from skyrl.records import RolloutRequest, SampleGroup, SkyrlError, TrainBatch, WeightSnapshot
from skyrl.settings import Config, ThresholdKind


class RolloutActor:
    """One vLLM engine."""

    def __init__(self, cfg: Config, policy_folder: str) -> None:
        from skyrl.data.datasets import build_datasets
        from skyrl.rollout.vllm_engine import VllmRolloutEngine

        self.engine = VllmRolloutEngine(cfg, policy_folder, build_datasets(cfg.data))
        self._transfer_failure: str | None = None

    def sizes(self) -> dict[str, int]:
        """Rows per split."""
        return {split: len(dataset) for split, dataset in self.engine.datasets.items()}

    def generate(self, request: RolloutRequest, parts: int) -> Any:
        """The groups, dealt into ``parts`` lists of neighbouring rows so that several reward workers can share them."""
        groups = self.engine.generate(request)
        bounds = np.linspace(0, len(groups), parts + 1).astype(int)
        lists = [groups[a:b] for a, b in pairwise(bounds)]
        return lists[0] if parts == 1 else tuple(lists)

    def continue_blind(self, groups: list[SampleGroup], step: int) -> list[SampleGroup]:
        return self.engine.continue_blind(groups, step)

    def load_weights(self, snapshot: WeightSnapshot) -> float:
        """Returns the snapshot's size in megabytes."""
        self.engine.load_weights(snapshot)
        return snapshot.buffer.nbytes / 1e6

    def probe(self) -> list[SampleGroup]:
        return self.engine.probe()

    def transfer_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        self._transfer_failure = None
        try:
            self.engine.transfer_rpc(method, kwargs)
        except Exception as error:
            self._transfer_failure = f"{method}: {type(error).__name__}: {error}"
            raise

    def transfer_failure(self) -> str | None:
        """What ended the last transfer here, if anything did."""
        return self._transfer_failure

    def finish_transfer(self, version: int) -> None:
        self.engine.finish_transfer(version)


class RewardActor:
    """Verifiers, the format reward and, if there is one, the reward model."""

    def __init__(self, cfg: Config, policy_folder: str, reward_folder: str | None, threads: int) -> None:
        from skyrl.rewards.scorer import RewardScorer

        model = None
        if reward_folder is not None:
            import torch

            from skyrl.policy.encode import PromptEncoder
            from skyrl.rewards.group_scorer import GroupScorer
            from skyrl.rewards.reward_model import RewardModel

            torch.set_num_threads(threads)
            body = RewardModel.load(reward_folder, cfg.model.dtype).to(cfg.reward.device)
            model = GroupScorer(body, cfg.reward.model_batch, PromptEncoder.from_pretrained(policy_folder))
        from skyrl.evaluation.monitors import build_monitors

        self.scorer = RewardScorer(cfg.reward, cfg.algorithm.grpo.std, model)
        gate = cfg.algorithm.gate
        fixed = gate.value if gate.kind is ThresholdKind.fixed else None
        self.monitors = build_monitors(cfg.hallucination, fixed)
        self.gallery, self.data = cfg.evaluation.gallery, cfg.data

    def ready(self) -> None:
        """Answers once the actor is up.

        Raises:
            DataError: if a verifier that the data names can't be imported here.
        """
        from skyrl.data.datasets import build_datasets

        self.scorer.check_verifiers(
            name for data in build_datasets(self.data).values() for name in getattr(data, "verifiers", list)()
        )

    def score(self, groups: list[SampleGroup]) -> list[SampleGroup]:
        return self.scorer.score(groups)

    def evaluate(
        self, gallery: list[dict[str, Any]] | None, shown: int, *parts: list[SampleGroup]
    ) -> tuple[Metrics, list[dict[str, Any]]]:
        """The first ``shown`` parts saw the pictures, the others were asked without."""
        from skyrl.evaluation.summary import summarise
        from skyrl.rewards.scorer import refuse_all_failed

        groups = [group for part in parts[:shown] for group in part]
        refuse_all_failed(groups, "evaluation")
        blind = [group for part in parts[shown:] for group in part]
        return summarise(groups, blind, gallery, self.gallery, self.monitors)


class BufferActor:
    """The Selective Sample Buffer and the assembly of train batches."""

    def __init__(self, cfg: Config, policy_folder: str) -> None:
        from skyrl.batch.batcher import BufferService

        self.service = BufferService(
            cfg.buffer, cfg.algorithm, cfg.controller.seed, cfg.data, policy_folder, cfg.rollout
        )

    def ready(self) -> None:
        """Answers once the actor is up."""

    def exchange(self, step: int, version: int, *parts: list[SampleGroup]) -> tuple[TrainBatch, Metrics]:
        from skyrl.rewards.scorer import refuse_all_failed, reward_metrics

        groups = [group for part in parts for group in part]
        refuse_all_failed(groups, f"step {step}")
        batch, metrics = self.service.exchange(groups, step, version)
        samples = [sample for group in groups for sample in group.samples]
        counts = {"rollout_samples": len(samples), "rollout_tokens": sum(len(s.token_ids) for s in samples)}
        return batch, metrics | reward_metrics(groups) | counts

    def offline(self, step: int) -> tuple[TrainBatch, Metrics]:
        return self.service.offline(step)

    def save(self, path: Path) -> None:
        path.write_bytes(pickle.dumps(self.service.state_dict()))

    def load(self, path: Path) -> None:
        self.service.load_state_dict(pickle.loads(path.read_bytes()))


class LearnerActor:
    """One rank of the DeepSpeed learner."""

    def __init__(self, cfg: Config, policy_folder: str, rank: int, threads: int) -> None:
        self.cfg, self.policy_folder, self.rank, self.threads = cfg, policy_folder, rank, threads
        self.learner: Any = None
        self.sender: Any = None

    def address(self) -> tuple[str, int]:
        """Host and a free port for the process group; asked of rank 0."""
        import socket

        import ray

        with socket.socket() as free:
            free.bind(("", 0))
            return ray.util.get_node_ip_address(), free.getsockname()[1]

    def start(self, host: str, port: int) -> None:
        """Join the process group and build the DeepSpeed engine; all ranks at the same time."""
        import os

        world = self.cfg.learner.num_workers
        os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port), RANK=str(self.rank), WORLD_SIZE=str(world))
        # Ray shows each rank only its own GPU, which is therefore number 0.
        os.environ["LOCAL_RANK"] = "0"
        import torch

        torch.set_num_threads(self.threads)
        from skyrl.learner.engine import DeepSpeedLearner

        self.learner = DeepSpeedLearner(self.cfg, self.policy_folder, self.rank, world)

    def train_step(self, batch: TrainBatch) -> Metrics:
        return self.learner.train_step(batch)

    def picture_drop(self, *parts: list[SampleGroup]) -> Metrics:
        return self.learner.picture_drop([group for part in parts for group in part])

    def probe_gap(self, *parts: list[SampleGroup]) -> dict[str, float]:
        """``largest`` and ``mean`` |log π_rollout − log π_learner| over the tokens of the probe."""
        groups = [group for part in parts for group in part]
        recorded = [sample.logprobs for group in groups for sample in group.samples]
        own = self.learner.logprobs(groups)
        gaps = np.concatenate([np.empty(0), *(np.abs(a - b) for a, b in zip(recorded, own, strict=True))])
        if not len(gaps):
            raise SkyrlError("the sync probe has no tokens; raise rollout.probe_new_tokens")
        # Of numpy: max() over Python floats would lose a nan, and a nan must not pass for a small gap.
        return {"largest": float(np.max(gaps)), "mean": float(np.mean(gaps))}

    def snapshot(self, version: int) -> WeightSnapshot | None:
        return self.learner.snapshot(version)

    def send_weights(self, rollouts: list[Any], version: int) -> None:
        """Push weights by vLLM's own trainer side (nccl, ipc)."""
        import ray

        from skyrl.sync.gpu_control import RolloutControl
        from skyrl.sync.gpu_transfer import LearnerSource, VllmSender

        if self.sender is None:
            source = LearnerSource(self.learner.policy_parameters, self.learner.policy_layout())
            host = ray.util.get_node_ip_address()
            self.sender = VllmSender(self.cfg, RolloutControl(rollouts), source, self.rank, host)
        self.sender.send()

    def save(self, folder: Path) -> None:
        self.learner.save(folder)

    def load(self, folder: Path) -> None:
        self.learner.load(folder)

    def export(self, folder: Path) -> None:
        self.learner.export(folder)
