"""What the Selective Sample Buffer holds: numbered places (leaves) for entries, with counts by policy version."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from skyrl.records import Prompt, Sample, SampleGroup

NO_VERSION = np.iinfo(np.int64).max
"""Version of an empty leaf: never too old."""


@dataclass(slots=True)
class StoredPrompt:
    """A prompt with its pictures, kept once for all samples of its group."""

    prompt: Prompt
    prompt_ids: np.ndarray
    members: int = 0
    """Samples in the buffer that refer to it; at 0 it is no longer held."""


@dataclass(slots=True)
class Entry:
    """What is drawn and evicted as a whole: one sample, or all kept samples of a group."""

    stored: StoredPrompt
    samples: tuple[Sample, ...]
    priority: float
    """|A|^alpha, the mean over the samples."""
    version: int
    """Policy version of the oldest of them."""
    eviction_key: float
    """The smallest goes first, among equals the one that came first."""


class Store:
    """Entries at the leaves 0 … capacity-1, each with one sample or more, together at most ``capacity`` samples."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._entries: list[Entry | None] = [None] * capacity
        self.free = list(range(capacity - 1, -1, -1))
        """Empty leaves; the next one is taken from the end."""
        self._versions = np.full(capacity, NO_VERSION)
        self._counts: dict[int, int] = {}
        self.size = 0
        """Samples held."""
        self.prompts = 0
        """Stored prompts that they refer to."""

    def __getitem__(self, leaf: int) -> Entry:
        entry = self._entries[leaf]
        assert entry is not None, f"leaf {leaf} is empty"
        return entry

    def put(self, leaf: int, entry: Entry) -> None:
        """Fill a leaf that the caller has taken off ``free``."""
        count = len(entry.samples)
        self._entries[leaf] = entry
        self._versions[leaf] = entry.version
        self._counts[entry.version] = self._counts.get(entry.version, 0) + count
        self.size += count
        self.prompts += entry.stored.members == 0
        entry.stored.members += count

    def release(self, leaf: int) -> None:
        """Empty a leaf."""
        entry = self[leaf]
        count = len(entry.samples)
        self._entries[leaf] = None
        self._versions[leaf] = NO_VERSION
        self.free.append(leaf)
        self._counts[entry.version] -= count
        if not self._counts[entry.version]:
            del self._counts[entry.version]
        self.size -= count
        entry.stored.members -= count
        self.prompts -= entry.stored.members == 0

    def older_than(self, version: int) -> list[int]:
        """Leaves of entries from before ``version``. Looks at the leaves only if there is one."""
        if not self._counts or min(self._counts) >= version:
            return []
        return np.flatnonzero(self._versions < version).tolist()

    def ages(self, version: int) -> dict[str, float]:
        """``age_mean`` and ``age_max`` of the samples at the current ``version``; empty if there are none."""
        if not self.size:
            return {}
        mean = sum((version - old) * count for old, count in self._counts.items()) / self.size
        return {"age_mean": mean, "age_max": float(version - min(self._counts))}

    def records(self, leaves: list[int]) -> dict[str, Any]:
        """The entries of these leaves as plain lists, each prompt once; holds the samples themselves."""
        entries = [self[leaf] for leaf in leaves]
        prompts = {id(entry.stored): entry.stored for entry in entries}
        number = {key: place for place, key in enumerate(prompts)}
        return {
            "counts": [len(entry.samples) for entry in entries],
            "unit_prompts": [number[id(entry.stored)] for entry in entries],
            "samples": [sample for entry in entries for sample in entry.samples],
            "prompts": [(stored.prompt, stored.prompt_ids) for stored in prompts.values()],
        }


Record = tuple[StoredPrompt, tuple[Sample, ...]]
"""A prompt and samples of it."""


def read_records(state: dict[str, Any]) -> list[Record]:
    """Prompt and samples of each entry of :meth:`Store.records`, in order."""
    prompts = [StoredPrompt(prompt, ids) for prompt, ids in state["prompts"]]
    samples = iter(state["samples"])
    return [
        (prompts[place], tuple(next(samples) for _ in range(count)))
        for place, count in zip(state["unit_prompts"], state["counts"], strict=True)
    ]


def by_prompt(records: list[Record]) -> list[Record]:
    """All samples of each prompt together, in the order of the prompts' first records."""
    joined: dict[int, Record] = {}
    for stored, samples in records:
        _, before = joined.get(id(stored), (stored, ()))
        joined[id(stored)] = (stored, before + samples)
    return list(joined.values())


def _own(array: np.ndarray) -> np.ndarray:
    """The array itself, or a copy if it is a view: a view into shared memory or into a batch would keep all of
    that alive for as long as the sample stays in the buffer."""
    return array if array.flags.owndata else array.copy()


def own_prompt(group: SampleGroup) -> StoredPrompt:
    images = tuple(_own(image) for image in group.prompt.images)
    return StoredPrompt(replace(group.prompt, images=images), _own(group.prompt_ids))


def own_sample(sample: Sample) -> Sample:
    if sample.token_ids.flags.owndata and sample.logprobs.flags.owndata:
        return sample
    return replace(sample, token_ids=_own(sample.token_ids), logprobs=_own(sample.logprobs))
