"""What of the policy travels in a sync, and in which form: all of it, or what training can have changed; with LoRA the
weights with their factors merged in, or the factors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from skyrl.policy.lora import merged, plain_name, weight_of
from skyrl.records import ConfigError
from skyrl.settings.system import LoraConfig, LoraSync
from skyrl.sync.saved_form import SavedForm
from skyrl.sync.snapshot import Layout, layout_of

Named = Iterable[tuple[str, torch.Tensor]]


class Outgoing:
    """The tensors of a saved checkpoint of ``model``, made of its parameters.

    Args:
        model: A model of transformers, with or without factors of LoRA; frozen is what has ``requires_grad`` False.
        lora: ``learner.lora``.

    Raises:
        ConfigError: if ``learner.lora.sync=adapter`` can't name this architecture's factors.
    """

    def __init__(self, model: Any, lora: LoraConfig) -> None:
        held = list(model.named_parameters())
        layout, trained = layout_of(held), {name for name, parameter in held if parameter.requires_grad}
        self._lora = lora
        self.own_layout: Layout = [(n, dtype, shape) for name, dtype, shape in layout if (n := plain_name(name))]
        """Of :meth:`own`."""
        self._form = SavedForm(model, self.own_layout)
        self._apart = lora.rank > 0 and lora.sync is LoraSync.adapter
        self._sent = self._form
        if self._apart:
            self._sent, self.changing = SavedForm(model, layout), trained
            _require_same_names(self._sent.layout, self._form.layout)
        else:
            wanted = self._form.with_neighbours({weight_of(name) for name in trained})
            self.changing = {name for name, _, _ in layout if weight_of(name) in wanted}
        """Names, as the model holds them, of the parameters that a partial sync is made of."""
        self.all_change = len(self.changing) == len(layout)

    @property
    def saved_layout(self) -> Layout:
        """Of :meth:`saved`."""
        return self._form.layout

    def sent_layout(self, part: bool) -> Layout:
        """Of :meth:`sent`."""
        changing = self.changing if self._apart else {weight_of(name) for name in self.changing}
        return self._sent.layout_of(changing) if part else self._sent.layout

    def own(self, parameters: Named) -> Iterator[tuple[str, torch.Tensor]]:
        """All parameters as the model itself names them, factors merged."""
        return merged(parameters, self._lora)

    def saved(self, parameters: Named) -> Iterator[tuple[str, torch.Tensor]]:
        """All parameters as a checkpoint holds them, factors merged."""
        return self._form.of(self.own(parameters))

    def sent(self, parameters: Named) -> Iterator[tuple[str, torch.Tensor]]:
        """The same, for all parameters or for those of :attr:`changing`; with ``learner.lora.sync=adapter`` factors
        and what they belong to are apart."""
        return self._sent.of(parameters) if self._apart else self.saved(parameters)


def _require_same_names(apart: Layout, joined: Layout) -> None:
    """That the factors' layers are named like the layers themselves, so that the receiver can merge them."""
    plain = {name for name, _, _ in joined}
    if {n for name, _, _ in apart if (n := plain_name(name))} != plain or {weight_of(n) for n, _, _ in apart} != plain:
        raise ConfigError(
            "learner.lora.sync=adapter: a checkpoint of this architecture cuts layers that have factors; use merged"
        )
