"""The MPO side of the learner tests.

``python learner_mpo_cases.py POLICY_FOLDER WORK_FOLDER RANK WORLD_SIZE`` runs the cases of :mod:`learner_cases`, then
these, and writes ``WORK_FOLDER/results-WORLD-RANK.pkl``: a dictionary from (case, ZeRO stage) to what happened there.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from learner_cases import WHOLE, Cases, counted, groups_of, make_batch, run_cases, settings

from skyrl.settings import Config, DeltaKind, Stage


def refreshing(stage: int, world_size: int) -> Config:
    """Iterated MPO: the reference is replaced after every second step."""
    cfg = settings(stage, world_size)
    cfg.algorithm.mpo.reference_every = 2
    cfg.algorithm.mpo.delta, cfg.algorithm.mpo.delta_decay = DeltaKind.exponential, 0.5
    return cfg


def unrecorded(cases: Cases, stage: int) -> None:
    """Two steps without the log-probabilities of pair members that take no part in GRPO: all of offline MPO, the
    rejected ones of DropoutNTP. One rank at stage 0 also runs them with the policy's own."""
    for name, trained in (("offline", Stage.mpo), ("blind", Stage.joint)):
        for known in (True, False) if (cases.world_size, stage) == (1, 0) else (False,):
            cfg = settings(stage, cases.world_size)
            cfg.algorithm.stage = trained
            learner = cases.make(cfg)
            metrics = []
            for step in (1, 2):
                batch = make_batch(learner.encoder, step, num_prompts=3, per_prompt=2)
                batch.weights = cfg.algorithm.weights(step)
                if trained is Stage.mpo:
                    batch.items = [replace(item, grpo_weight=0.0) for item in batch.items]
                    counted(batch)
                for item, own in zip(batch.items, learner.logprobs(groups_of(batch)), strict=True):
                    if item.grpo_weight == 0:
                        item.sample.logprobs = own if known else None
                metrics.append(learner.train_step(batch))
            result = {"metrics": metrics, "weights": cases.weights(learner)}
            cases.results[f"{name}_{'known' if known else 'unknown'}", stage] = result


def run(cases: Cases) -> None:
    cases.run()
    for stage in WHOLE:
        cases.steps("refresh", refreshing(stage, cases.world_size), 4, resume=True)
        unrecorded(cases, stage)


if __name__ == "__main__":
    run_cases(run, *sys.argv[1:])
