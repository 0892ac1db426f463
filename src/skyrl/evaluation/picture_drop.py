"""The masked-picture probe: do the answers depend on the picture at all?

PAPO (arXiv 2507.06448) compares the policy on a picture and on the same one with random patches blackened. A policy
that looks finds its own answers less likely then; one that guesses from the question does not mind.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from skyrl.data.pictures import mask_picture
from skyrl.records import Metrics, SampleGroup
from skyrl.settings import HallucinationConfig

if TYPE_CHECKING:
    from skyrl.learner.step import LearnerStep


def picture_drop(learner: LearnerStep, *parts: list[SampleGroup]) -> Metrics:
    """``eval/picture_drop`` of the first ``hallucination.probe_prompts`` groups that have pictures: the mean over all
    answer tokens of the log-probability with the true picture minus that with the masked one, nats. Nothing without
    such tokens. Every rank of the learner must run it with the same groups.
    """
    cfg = learner.cfg.hallucination
    groups = [group for part in parts for group in part if group.prompt.images][: cfg.probe_prompts]
    true, masked = learner.logprobs(groups), learner.logprobs([masked_group(group, cfg) for group in groups])
    drops = [a.astype(np.float64) - b for a, b in zip(true, masked, strict=True)]
    tokens = sum(len(drop) for drop in drops)
    return {"eval/picture_drop": float(sum(drop.sum() for drop in drops) / tokens)} if tokens else {}


def masked_group(group: SampleGroup, cfg: HallucinationConfig) -> SampleGroup:
    """The same answers to the same question, with most of each picture black."""
    prompt = group.prompt
    named = [(picture, f"{prompt.id}/{place}") for place, picture in enumerate(prompt.images)]
    images = tuple(mask_picture(picture, name, cfg.mask_share, cfg.mask_patch) for picture, name in named)
    return replace(group, prompt=replace(prompt, images=images, variant="masked"))
