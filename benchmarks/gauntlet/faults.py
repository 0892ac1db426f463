"""All faults: the 24 that were chosen before the first run, and those beyond."""

from __future__ import annotations

from benchmarks.gauntlet import learner, prompts, rewards, rollout, weights
from benchmarks.gauntlet.fault import Fault

FAULTS: list[Fault] = [*weights.FAULTS, *rollout.FAULTS, *prompts.FAULTS, *rewards.FAULTS, *learner.FAULTS]
CHOSEN = [fault for fault in FAULTS if not fault.further]
BY_NAME = {fault.name: fault for fault in FAULTS}
