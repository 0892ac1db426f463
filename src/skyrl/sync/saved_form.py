"""A model's parameters under the names, and cut, as ``save_pretrained`` writes them.

transformers holds some architectures otherwise than their checkpoints do: LLaVA's ``model.language_model.…`` is
``language_model.model.…`` in a file, and the experts of a layer of Qwen3-MoE are one parameter that a file holds expert
by expert. vLLM loads checkpoints, so it must be sent what a checkpoint holds. transformers can turn a whole state
dictionary back when it saves; here it is asked once what becomes of each parameter, so that a sync renames most of them
and has only those turned back that are really cut or joined, one after the other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion

from skyrl.records import SkyrlError
from skyrl.sync.snapshot import Layout, with_neighbours

Named = Iterable[tuple[str, torch.Tensor]]


@dataclass(slots=True)
class _Group:
    """Parameters that are turned back together."""

    members: tuple[str, ...]
    saved: Layout
    """What becomes of them."""
    renamed: bool
    """It is one, and only its name changes."""


class SavedForm:
    """How the parameters of ``model`` are saved.

    Args:
        model: A model of transformers; it is asked for its conversions, not for its parameters, which may be cut over
            ranks.
        held: Layout of its parameters as it holds them.

    Raises:
        SkyrlError: if they can't be turned back one after the other.
    """

    def __init__(self, model: Any, held: Layout) -> None:
        self._model = model
        empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, dtype, shape in held}
        alone = {name: self._turned_back({name: tensor}) for name, tensor in empty.items()}
        self._group_of: dict[str, _Group] = {}
        for members in _that_share_names({name: list(saved) for name, saved in alone.items()}):
            first = members[0]
            saved = alone[first] if len(members) == 1 else self._turned_back({name: empty[name] for name in members})
            renamed = len(members) == 1 and [id(tensor) for tensor in saved.values()] == [id(empty[first])]
            group = _Group(tuple(members), [(n, t.dtype, tuple(t.shape)) for n, t in saved.items()], renamed)
            self._group_of |= dict.fromkeys(members, group)
        self._order = [name for name, _, _ in held]
        self.layout = self.layout_of(self._order)
        """Name, type and shape of each saved tensor, in the order in which :meth:`of` gives them."""
        whole = {(name, tuple(tensor.shape)) for name, tensor in self._turned_back(empty).items()}
        if whole != {(name, shape) for name, _, shape in self.layout}:
            raise SkyrlError(
                f"model.policy: transformers turns the parameters of {type(model).__name__} into those of a checkpoint "
                "in a way that skyrl does not know; such architectures are not supported"
            )

    def layout_of(self, names: Collection[str]) -> Layout:
        """The saved tensors that come of the parameters ``names``, all of those that belong together."""
        last = [
            self._group_of[name] for name in self._order if name in names and name == self._group_of[name].members[-1]
        ]
        return [saved for group in last for saved in group.saved]

    def with_neighbours(self, names: Collection[str]) -> set[str]:
        """``names`` and the parameters that must be sent with them: what is turned back together, and what engines join
        (:func:`skyrl.sync.snapshot.with_neighbours`)."""
        saved_of = {name: {saved for saved, _, _ in group.saved} for name, group in self._group_of.items()}
        wanted, found = set(names), set[str]()
        while wanted != found:
            found = wanted
            saved = with_neighbours([name for name, _, _ in self.layout], set().union(*(saved_of[n] for n in found)))
            wanted = {name for name, own in saved_of.items() if own & saved}
        return wanted

    def of(self, parameters: Named) -> Iterator[tuple[str, torch.Tensor]]:
        """The saved tensors of whole parameters that come in the model's order. Holds no more of them at a time than
        belong together."""
        waiting: dict[str, torch.Tensor] = {}
        for name, tensor in parameters:
            group = self._group_of[name]
            if group.renamed:
                yield group.saved[0][0], tensor
                continue
            waiting[name] = tensor
            if name == group.members[-1]:
                made = self._turned_back({member: waiting.pop(member) for member in group.members})
                for saved, _, _ in group.saved:
                    yield saved, made[saved].contiguous()

    def _turned_back(self, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict(revert_weight_conversion(self._model, parameters))


def _that_share_names(saved: dict[str, list[str]]) -> list[list[str]]:
    """The keys in groups: those of which two give the same name are in one, in their order."""
    groups: dict[str, list[str]] = {}
    """Of each name."""
    for key, names in saved.items():
        met = {id(group): group for name in names if (group := groups.get(name))}
        members = [*(member for group in met.values() for member in group), key]
        others = [name for name, group in groups.items() if id(group) in met]
        groups |= dict.fromkeys([*others, *names], members)
    order = list(saved)
    return [sorted(group, key=order.index) for group in {id(g): g for g in groups.values()}.values()]
