"""Loading a policy for ZeRO-3: each rank keeps its share of every parameter only, from the moment it is made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deepspeed.runtime.zero import partition_parameters
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config


class _ZeroThree:
    """What transformers asks of its own DeepSpeed configuration, which would need another package."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.config = settings

    def is_zero3(self) -> bool:
        return True


@contextmanager
def sharded_loading(settings: dict[str, Any]) -> Iterator[None]:
    """Inside, ``from_pretrained`` of transformers makes parameters that are cut over the ranks. Collective.

    Args:
        settings: DeepSpeed configuration of the learner.
    """
    overrides = partition_parameters.DEFAULT_TENSOR_OVERRIDES
    before = list(overrides)
    # DeepSpeed would make every tensor in the parameters' type while it builds the model, also the frequencies of
    # rotary positions, which transformers computes in float32: in 16 bits they are wrong by turns far along.
    overrides[:] = [kind for kind in before if kind is not partition_parameters.DeepSpeedTensorOverride.dtype]
    config = _ZeroThree(settings)  # transformers keeps a weak reference
    set_hf_deepspeed_config(config)
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        overrides[:] = before
