"""Rounding errors on purpose: how far two right implementations of a policy may be apart.

vLLM and the learner compute the same numbers with other kernels, which round elsewhere. What comes of that depends on
the model: its depth, its activations, how sure it is. So it is tried: the learner scores a probe once more while each
module's output is off by a rounding error, at random.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

FLIPPED = 1 / 6
"""Share of the outputs in 16 bits that are off by one unit of their last place: their mean square is then twice that of
a rounding error, which is what two implementations that round for themselves are apart."""
ULPS = 8.0
"""Largest error of an output in float32, in units of its last place: a kernel adds the terms of a sum in the order that
it likes. (In 16 bits the sum itself is in float32, and only its end is rounded.)"""


@contextmanager
def rounding_errors(model: Any, seed: int) -> Iterator[None]:
    """Inside, the output of every module of ``model`` is off by a rounding error. Draws nothing from torch's own
    generators; another ``seed`` gives other errors."""
    generators: dict[torch.device, torch.Generator] = {}

    def blurred(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        random = generators.setdefault(tensor.device, torch.Generator(tensor.device).manual_seed(seed))
        noise = 2 * torch.rand(tensor.shape, generator=random, device=tensor.device, dtype=torch.float32) - 1
        # In 16 bits 3/4 of a unit, or up to 3/2 where the mantissa is large, rounds to one.
        flips = 0.75 * noise.sign() * (noise.abs() > 1 - FLIPPED)
        noise = ULPS * noise if tensor.dtype == torch.float32 else flips
        return (tensor.double() * (1 + torch.finfo(tensor.dtype).eps * noise.double())).to(tensor.dtype)

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return blurred(output)
        if isinstance(output, tuple) and output and isinstance(output[0], torch.Tensor):
            return (blurred(output[0]), *output[1:])
        return output

    handles = [module.register_forward_hook(hook) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
