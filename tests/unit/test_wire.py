"""A picture travels once for all the answers to it."""

from __future__ import annotations

from benchmarks.memory import ANSWERS, SIDE, wire


def test_a_group_and_a_batch_hold_each_picture_once_also_a_replayed_one() -> None:
    picture, steps = SIDE * SIDE * 3 / 1e6, wire()
    for one in steps.values():
        assert one["groups_mb"] < 2 * 1.1 * picture and one["pictures"] == one["prompts"]
        assert one["batch_mb"] < one["pictures"] * 1.1 * picture
        assert one["groups_copied_mb"] > 2 * ANSWERS * picture and one["batch_copied_mb"] > ANSWERS * picture
    assert steps["step 3"]["prompts"] > 1  # some were replayed
