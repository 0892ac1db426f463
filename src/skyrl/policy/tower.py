"""A frozen vision tower runs once for each picture: what it makes of one is kept in host memory.

Nothing here knows an architecture. The tower is the module that holds all parameters of the vision part and no others,
and its forward gets a memory; adapters, which are trained, come behind it. Qwen-VL keeps its adapter inside the vision
module, which is left as it is.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from skyrl.policy.module import module_of

Inputs = dict[int | str, Any]
"""Arguments of a call by place or name."""
Output = tuple[list[Tensor | None], TreeSpec]
"""What a tower returned for one picture: tensors [1, …] in host memory, None for what nobody reads, and their form."""
SHARED = (bool, int, float, str, type(None), torch.dtype)
"""Arguments of a tower, beside tensors, that mean the same for every picture."""
ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Type → what pictures run apart and together may differ by, as a share of the largest number; else 0.05."""

logger = logging.getLogger(__name__)


class TowerFeatures:
    """What a frozen tower made of the pictures that were seen last. One memory serves policy and reference: their
    towers are the same, and neither ever changes.

    A picture runs through the tower alone, so that its features do not depend, not even in rounding, on which others
    came with it. Whether that is the same as running them together is tried on the first ones that come together.

    Args:
        capacity: Most bytes of features that are kept; the least recently used go first.
    """

    def __init__(self, capacity: float) -> None:
        self.capacity = capacity
        self.kept: OrderedDict[bytes, Output] = OrderedDict()
        """By digest of all that the tower was told of a picture."""
        self.bytes = 0
        self.asked = self.ran = 0
        """Pictures asked for since :meth:`counts`, and those of them that went through the tower."""
        self._tried = self._refused = False

    def serve(self, model: Any) -> bool:
        """Put this memory before the tower of ``model``, if that is frozen and apart from the adapter. Says in the log
        if it is frozen, but not apart."""
        vision = {id(p): p.requires_grad for name, p in model.named_parameters() if module_of(name) == "vision"}
        if not vision or any(vision.values()):
            return False
        tower = next((m for m in model.modules() if {id(p) for p in m.parameters()} == vision.keys()), None)
        if tower is None:
            self._refuse("it is not a module apart from the adapter")
            return False
        layers = getattr(model.config, "vision_feature_layer", None)
        read = None if layers is None else [layers] if isinstance(layers, int) else list(layers)
        tower.forward = partial(self._forward, tower, tower.forward, read)
        return True

    def counts(self) -> tuple[int, int]:
        """``(asked, ran)`` since the last call."""
        found, self.asked, self.ran = (self.asked, self.ran), 0, 0
        return found

    # ------------------------------------------------------------ one call

    def _forward(self, tower: nn.Module, plain: Any, read: list[int] | None, *args: Any, **kwargs: Any) -> Any:
        """The forward of ``tower``, whose own one is ``plain``; ``read``: the layers whose states the model reads."""
        inputs: Inputs = dict(enumerate(args)) | kwargs
        pictures = _pictures(inputs)
        if not pictures:
            self._refuse("it does not get a row for each picture")
        if self._refused or _watched(tower):
            return plain(*args, **kwargs)
        keys, found = _digests(inputs, pictures), dict[bytes, Output]()
        for at, key in enumerate(keys):
            if key in found:
                continue
            if key in self.kept:
                self.kept.move_to_end(key)
                found[key] = self.kept[key]
                continue
            output = _alone(plain, inputs, at, read)
            if output is None:
                return self._instead(plain(*args, **kwargs), "what it returns has no row for each picture")
            found[key] = output
            self._keep(key, output)
            self.ran += 1
        self.asked += pictures
        device = next(value.device for value in inputs.values() if isinstance(value, Tensor))
        joined = _joined([found[key][0] for key in keys], device)
        if pictures > 1 and not self._tried:
            self._tried = len(found) > 1
            whole = plain(*args, **kwargs)
            if not _agree(joined, tree_flatten(whole)[0]):
                return self._instead(whole, "it does not see each picture by itself")
        return tree_unflatten(joined, found[keys[0]][1])

    def _keep(self, key: bytes, output: Output) -> None:
        self.kept[key] = output
        self.bytes += _size(output)
        while self.bytes > self.capacity:
            self.bytes -= _size(self.kept.popitem(last=False)[1])

    def _instead(self, output: Any, reason: str) -> Any:
        self._refuse(reason)
        return output

    def _refuse(self, reason: str) -> None:
        if not self._refused:
            logger.warning("learner.tower_cache_gib: the frozen vision tower runs for every picture anew: %s", reason)
        self._refused = True
        self.kept.clear()
        self.bytes = 0


def _pictures(inputs: Inputs) -> int:
    """Pictures of a call: the rows that all its tensors have; 0 if it can't be cut into pictures."""
    tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
    rows = {len(tensor) if tensor.ndim else 0 for tensor in tensors}
    plain = all(isinstance(value, (Tensor, *SHARED)) for value in inputs.values())
    return rows.pop() if len(rows) == 1 and plain and not any(tensor.requires_grad for tensor in tensors) else 0


def _watched(tower: nn.Module) -> bool:
    """There are hooks within the tower that watch or change what it computes, as rounding errors on purpose do. Those
    of transformers collect hidden states, which are kept too."""
    hooks = [hook for part in tower.modules() if part is not tower for hook in part._forward_hooks.values()]
    return any(not str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks)


def _digests(inputs: Inputs, pictures: int) -> list[bytes]:
    """Of each picture: everything that is said of it, types and shapes too."""
    head = [(k, (v.dtype, tuple(v.shape[1:])) if isinstance(v, Tensor) else v) for k, v in inputs.items()]
    start = hashlib.blake2b(repr(head).encode(), digest_size=16)
    digests = [start.copy() for _ in range(pictures)]
    for value in inputs.values():
        if isinstance(value, Tensor):
            rows = value.detach().cpu().contiguous().view(pictures, -1).view(torch.uint8).numpy()
            for digest, row in zip(digests, rows, strict=True):
                digest.update(row)
    return [digest.digest() for digest in digests]


@torch.no_grad()
def _alone(plain: Any, inputs: Inputs, at: int, read: list[int] | None) -> Output | None:
    """The run of one picture; None if the tower does not return tensors [1, …]."""
    told = {name: value[at : at + 1] if isinstance(value, Tensor) else value for name, value in inputs.items()}
    named = {name: value for name, value in told.items() if isinstance(name, str)}
    output = plain(*(told[place] for place in range(len(told) - len(named))), **named)
    states = getattr(output, "hidden_states", None)
    useless = set[int]()
    if read is not None and isinstance(states, tuple):  # of all the layers that some models ask for, they read a few
        used = {id(states[layer]) for layer in read} | {id(getattr(output, "last_hidden_state", None))}
        useless = {id(state) for state in states} - used
    leaves, form = tree_flatten(output)
    if not all(isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == 1 for leaf in leaves):
        return None
    return [None if id(leaf) in useless else leaf.cpu() for leaf in leaves], form


def _joined(outputs: list[list[Tensor | None]], device: torch.device) -> list[Tensor | None]:
    """The outputs of all pictures one below the other; ``[]`` if their shapes differ."""
    joined: list[Tensor | None] = []
    for column in zip(*outputs, strict=True):
        some = [part for part in column if part is not None]
        if len({part.shape for part in some}) > 1:
            return []
        joined.append(torch.cat(some).to(device) if some else None)
    return joined


def _agree(joined: list[Tensor | None], whole: list[Any]) -> bool:
    if len(joined) != len(whole):
        return False
    for mine, other in zip(joined, whole, strict=True):
        if mine is None:
            continue
        if mine.shape != other.shape:
            return False
        limit = ROUNDING.get(other.dtype, 0.05) * other.abs().max()
        if not bool((mine - other).abs().max() <= limit):
            return False
    return True


def _size(output: Output) -> int:
    return sum(leaf.nbytes for leaf in output[0] if leaf is not None)
