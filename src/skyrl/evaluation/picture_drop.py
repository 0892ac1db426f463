"""The masked-picture probe: do the answers depend on the picture at all?

PAPO (arXiv 2507.06448) compares the policy on a picture and on the same one with random patches blackened. A policy
that looks finds its own answers less likely then; one that guesses from the question does not mind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from skyrl.data.pictures import mask_picture
from skyrl.interfaces import Metrics
from skyrl.records import SampleGroup
from skyrl.settings import HallucinationConfig


def probed_groups(groups: Sequence[SampleGroup], cfg: HallucinationConfig) -> list[SampleGroup]:
    """The first ``probe_prompts`` groups that have pictures."""
    return [group for group in groups if group.prompt.images][: cfg.probe_prompts]


def masked_group(group: SampleGroup, cfg: HallucinationConfig) -> SampleGroup:
    """The same answers to the same question, with most of each picture black. The prompt gets an id of its own, because
    encodings are cached by id."""
    prompt = group.prompt
    images = tuple(
        mask_picture(picture, f"{prompt.id}/{place}", cfg.mask_share, cfg.mask_patch)
        for place, picture in enumerate(prompt.images)
    )
    return replace(group, prompt=replace(prompt, id=f"{prompt.id}#masked", images=images))


def picture_drop_metrics(true: Sequence[np.ndarray], masked: Sequence[np.ndarray]) -> Metrics:
    """``eval/picture_drop`` from the log-probabilities [T] of every answer, with the true and with the masked picture:
    the mean difference over all answer tokens; nothing if there are none."""
    drops = [a.astype(np.float64) - b for a, b in zip(true, masked, strict=True)]
    tokens = sum(len(drop) for drop in drops)
    return {"eval/picture_drop": float(sum(drop.sum() for drop in drops) / tokens)} if tokens else {}
