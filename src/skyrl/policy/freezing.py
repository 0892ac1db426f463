"""Which modules are trained: the paper's Table 4 as a setting."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from skyrl.records import ConfigError
from skyrl.settings import Trainable

VISION = ("vision_model.", "vision_tower.", "visual.", "image_encoder.", "vision_encoder.")
ADAPTER = (
    *("connector.", "modality_projection.", "projector.", "mlp1.", "resampler", "aligner.", "vision_adapter."),
    *("vision_projection.", "embed_vision.", "visual_embeddings_table.", "image_newline"),
    *("visual.merger.", "visual.deepstack_merger_list.", "visual.downsample."),
)


def module_of(name: str) -> str:
    """``vision``, ``adapter`` or ``language`` for a parameter name.

    Adapters are looked for first: some architectures keep theirs inside the vision module.
    """
    if any(part in name for part in ADAPTER):
        return "adapter"
    return "vision" if any(part in name for part in VISION) else "language"


TRAINED = {
    Trainable.all: {"vision", "adapter", "language"},
    Trainable.adapter: {"adapter"},
    Trainable.language_and_adapter: {"language", "adapter"},
    Trainable.adapter_and_vision: {"adapter", "vision"},
}


def freeze(parameters: Iterable[tuple[str, torch.nn.Parameter]], trainable: Trainable) -> dict[str, int]:
    """Set ``requires_grad`` of every parameter and count the trained ones per module.

    Raises:
        ConfigError: if some modules shall be trained and others not, but one of the three has no parameters: the policy
            is a text-only model, or its modules have names that are not known here.
    """
    counts = dict.fromkeys(("adapter", "language", "vision"), 0)
    for name, parameter in parameters:
        part = module_of(name)
        parameter.requires_grad_(part in TRAINED[trainable])
        counts[part] += getattr(parameter, "ds_numel", parameter.numel())
    empty = [part for part, count in counts.items() if count == 0]
    if empty and trainable is not Trainable.all:
        raise ConfigError(
            f"learner.trainable={trainable.value}: the policy has no {' and no '.join(empty)} parameters; "
            "use learner.trainable=all"
        )
    return {part: counts[part] for part in TRAINED[trainable]}
