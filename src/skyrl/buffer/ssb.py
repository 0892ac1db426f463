"""The Selective Sample Buffer (Skywork R1V2): effective samples of earlier steps, drawn with P ∝ |advantage|^alpha."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from skyrl.buffer.priorities import SumTree
from skyrl.types import Prompt, Sample, SampleGroup

NO_VERSION = np.iinfo(np.int64).max
"""Version of an empty slot: never too old."""


@dataclass(slots=True)
class StoredPrompt:
    """A prompt with its pictures, kept once for all samples of its group."""

    prompt: Prompt
    prompt_ids: np.ndarray
    members: int = 0
    """Samples in the buffer that refer to it; at 0 it is no longer held."""


@dataclass(slots=True, frozen=True)
class Drawn:
    """One sample out of the buffer."""

    stored: StoredPrompt
    sample: Sample
    probability: float
    """|A|^alpha / Σ |A|^alpha over the whole buffer: its chance of being drawn first."""


class SelectiveSampleBuffer:
    """Keeps effective samples, drops the oldest at capacity and the outdated by age, and draws by |advantage|.

    The age of a sample is the current policy version minus the version that drew it. Samples may arrive in any order
    of versions. Equal seeds and equal calls give equal draws, also across ``state_dict``.
    """

    def __init__(self, capacity: int, max_age: int, alpha: float, seed: int) -> None:
        """
        Args:
            capacity: samples kept, at least 1.
            max_age: policy versions after which a sample is dropped, 0 or more.
            alpha: exponent of the priority, 0 (uniform) or more.
            seed: of the buffer's own random generator.

        Raises:
            ValueError: for a value outside these limits.
        """
        if capacity < 1 or max_age < 0 or not (math.isfinite(alpha) and alpha >= 0):
            raise ValueError(
                f"capacity is {capacity}, max_age {max_age}, alpha {alpha}; allowed: 1 or more, 0 or more, 0 or more"
            )
        self.capacity = capacity
        self.max_age = max_age
        self.alpha = alpha
        self._rng = np.random.default_rng(seed)
        self._clear()

    def __len__(self) -> int:
        return len(self._live)

    def add(self, groups: list[SampleGroup], version: int) -> int:
        """Keep the effective samples of ``groups`` that can be drawn; at capacity the oldest make room.

        Passed over: samples that are not effective, whose hybrid advantage (hence priority) is 0, or that are
        already older than ``max_age``.

        Args:
            groups: scored groups.
            version: the current policy version.

        Returns:
            The number of samples kept.

        Raises:
            ValueError: for an advantage that is not finite, or a sample newer than ``version``. Nothing is
                added then.
        """
        wanted = [(group, self._select(group, version)) for group in groups]
        changed: dict[int, float] = {}
        kept = 0
        for group, samples in wanted:
            if not samples:
                continue
            stored = _own_prompt(group)
            for sample, priority in samples:
                slot = self._free.pop() if self._free else self._release(next(iter(self._live)))
                self._put(slot, stored, _own_sample(sample))
                changed[slot] = priority
            kept += len(samples)
        self._set_priorities(changed)
        return kept

    def draw(self, n: int, version: int) -> list[Drawn]:
        """Drop what is older than ``max_age``, then draw ``n`` samples without replacement, P ∝ |A|^alpha.

        The drawn samples stay in the buffer. Fewer than ``n`` come back if fewer are there.

        Args:
            n: samples wanted, 0 or more.
            version: the current policy version.

        Raises:
            ValueError: for a negative ``n``.
        """
        self._expire(version)
        slots = self._tree.draw(n, self._rng)
        probabilities = self._tree.get(slots) / self._tree.total if slots.size else np.zeros(0)
        return [
            Drawn(*self._live[slot], probability)
            for slot, probability in zip(slots.tolist(), probabilities.tolist(), strict=True)
        ]

    def stats(self, version: int) -> dict[str, float]:
        """``size`` (samples), ``prompts`` (groups they belong to), ``priority_mass`` (Σ |A|^alpha), and, unless
        empty, ``age_mean`` and ``age_max`` in policy versions."""
        size = len(self._live)
        stats = {"size": float(size), "prompts": float(self._prompts), "priority_mass": self._tree.total}
        if size:
            ages = {version - old: count for old, count in self._version_counts.items()}
            stats["age_mean"] = sum(age * count for age, count in ages.items()) / size
            stats["age_max"] = float(max(ages))
        return stats

    def state_dict(self) -> dict[str, Any]:
        """Everything that later draws depend on, each prompt once; picklable, holding the records themselves."""
        prompts = {id(stored): stored for stored, _ in self._live.values()}
        number = {key: place for place, key in enumerate(prompts)}
        return {
            "capacity": self.capacity,
            "slots": np.fromiter(self._live, dtype=np.int64, count=len(self._live)),
            "free": np.array(self._free, dtype=np.int64),
            "samples": [sample for _, sample in self._live.values()],
            "sample_prompts": [number[id(stored)] for stored, _ in self._live.values()],
            "prompts": [(stored.prompt, stored.prompt_ids) for stored in prompts.values()],
            "rng": self._rng.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the whole content by that of :meth:`state_dict`.

        With the same settings the following draws are those that the saved buffer would have made. ``alpha`` and
        ``max_age`` may differ. So may ``capacity``: then the newest samples that fit are kept.

        Raises:
            ValueError: if a key is missing.
        """
        missing = {"capacity", "slots", "free", "samples", "sample_prompts", "prompts", "rng"} - state.keys()
        if missing:
            raise ValueError(f"buffer state lacks {sorted(missing)}")
        self._clear()
        slots = state["slots"].tolist()
        if state["capacity"] == self.capacity:
            self._free = state["free"].tolist()
        else:
            slots = list(range(min(len(slots), self.capacity)))
            self._free = list(range(self.capacity - 1, len(slots) - 1, -1))
        prompts = [StoredPrompt(prompt, ids) for prompt, ids in state["prompts"]]
        skipped = len(state["samples"]) - len(slots)
        changed: dict[int, float] = {}
        for slot, sample, place in zip(
            slots, state["samples"][skipped:], state["sample_prompts"][skipped:], strict=True
        ):
            self._put(slot, prompts[place], sample)
            changed[slot] = self._priority(sample)
        self._set_priorities(changed)
        self._rng.bit_generator.state = state["rng"]

    # ------------------------------------------------------------------ inside

    def _clear(self) -> None:
        # Slot → record in order of arrival. An OrderedDict takes from the front and from the middle in O(1).
        self._live: OrderedDict[int, tuple[StoredPrompt, Sample]] = OrderedDict()
        self._free = list(range(self.capacity - 1, -1, -1))
        self._tree = SumTree(self.capacity)
        self._versions = np.full(self.capacity, NO_VERSION)
        self._version_counts: dict[int, int] = {}
        self._prompts = 0

    def _priority(self, sample: Sample) -> float:
        # Python's pow on one float: numpy's vectorised one may differ in the last bit with the place in the array.
        return abs(sample.advantage) ** self.alpha if sample.advantage else 0.0

    def _select(self, group: SampleGroup, version: int) -> list[tuple[Sample, float]]:
        """The samples of a group worth keeping, with their priorities."""
        selected = []
        for sample in group.samples:
            if not sample.effective:
                continue
            where = f"prompt {group.prompt.id}, sample {sample.index}"
            if not math.isfinite(sample.advantage):
                raise ValueError(f"{where}: advantage is {sample.advantage}; allowed: finite")
            if sample.policy_version > version:
                raise ValueError(
                    f"{where}: policy version {sample.policy_version}; allowed: up to {version}, the current"
                )
            priority = self._priority(sample)
            if priority > 0 and version - sample.policy_version <= self.max_age:
                selected.append((sample, priority))
        return selected

    def _put(self, slot: int, stored: StoredPrompt, sample: Sample) -> None:
        self._live[slot] = (stored, sample)
        self._versions[slot] = sample.policy_version
        self._version_counts[sample.policy_version] = self._version_counts.get(sample.policy_version, 0) + 1
        self._prompts += stored.members == 0
        stored.members += 1

    def _release(self, slot: int) -> int:
        """Forget the record of a slot; its priority is the caller's to change."""
        stored, sample = self._live.pop(slot)
        self._versions[slot] = NO_VERSION
        left = self._version_counts[sample.policy_version] - 1
        if left:
            self._version_counts[sample.policy_version] = left
        else:
            del self._version_counts[sample.policy_version]
        stored.members -= 1
        self._prompts -= stored.members == 0
        return slot

    def _expire(self, version: int) -> None:
        """Drop every sample older than ``max_age``. Looks at the slots only if there is one."""
        limit = version - self.max_age
        if not self._live or min(self._version_counts) >= limit:
            return
        slots = np.flatnonzero(self._versions < limit)
        for slot in slots.tolist():
            self._free.append(self._release(slot))
        self._tree.set(slots, np.zeros(slots.size))

    def _set_priorities(self, changed: dict[int, float]) -> None:
        self._tree.set(np.array(list(changed), dtype=np.int64), np.array(list(changed.values())))


def _own(array: np.ndarray) -> np.ndarray:
    """The array itself, or a copy if it is a view: a view into shared memory or into a batch would keep all of
    that alive for as long as the sample stays in the buffer."""
    return array if array.flags.owndata else array.copy()


def _own_prompt(group: SampleGroup) -> StoredPrompt:
    images = tuple(_own(image) for image in group.prompt.images)
    return StoredPrompt(replace(group.prompt, images=images), _own(group.prompt_ids))


def _own_sample(sample: Sample) -> Sample:
    if sample.token_ids.flags.owndata and sample.logprobs.flags.owndata:
        return sample
    return replace(sample, token_ids=_own(sample.token_ids), logprobs=_own(sample.logprobs))
