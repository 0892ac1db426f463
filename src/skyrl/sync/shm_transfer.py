"""Weight transfer for CPU and shared memory, as a backend of vLLM's own weight-transfer API.

Ray's object store takes the parameters out of the learner's own memory and maps them into the rollout process (one copy
on one host, one network transfer across hosts), and vLLM's ``load_weights`` reads straight from there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from skyrl.records import SyncError

BACKEND = "skyrl_shm"


@dataclass
class ShmInitInfo(WeightTransferInitInfo):
    """Nothing to agree on: the buffer comes with each update."""


@dataclass
class ShmUpdateInfo(WeightTransferUpdateInfo):
    """See :meth:`skyrl.rollout.engine.Engine.load`."""

    parameters: Iterable[tuple[str, torch.Tensor]]
    version: int
    whole: bool


class ShmWeightTransferEngine(WeightTransferEngine[ShmInitInfo, ShmUpdateInfo]):
    """Worker side of the backend. An update that fails leaves the weights as they were, except whole layers."""

    init_info_cls = ShmInitInfo
    update_info_cls = ShmUpdateInfo
    _shared: dict[str, set[str]] | None = None
    _usual: dict[nn.Module, int]
    """Elements that a whole update brings to each layer that has more of its own, padding."""
    _moe_kernels: dict[Any, Any]

    def init_transfer_engine(self, init_info: ShmInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        if self._shared is None:  # reloading takes shared parameters apart, until it has succeeded
            self._shared = shared_names(self.model)
        initialize_layerwise_reload(self.model)
        # vLLM packs the experts of a layer for its CPU kernel when it makes that kernel, and at no later update.
        methods: list[Any] = [getattr(module, "quant_method", None) for module in self.model.modules()]
        self._moe_kernels = {m: m.moe_kernel for m in methods if getattr(m, "moe_kernel", None) is not None}
        for method in self._moe_kernels:
            method.moe_kernel = None

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # vLLM's own ends with torch.accelerator.synchronize(), and there is no accelerator here.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: ShmUpdateInfo) -> None:
        try:
            loaded = self.model.load_weights(update_info.parameters)
            if update_info.whole:
                self._usual = {layer: loaded for layer, (loaded, _) in self._layers_in_part().items()}
                self._require_all(update_info.version, loaded)
            else:
                self._require_whole_layers(update_info.version)
        except BaseException:
            self._drop_parts()
            self.finish_weight_update()
            raise

    def _require_all(self, version: int, loaded: set[str] | None) -> None:
        if loaded is None:  # some architectures do not report; the probe after the sync still proves the result
            return
        shared = self._shared or {}
        covered = {same for name in loaded for same in shared.get(name, {name})}
        missing = sorted({name for name, _ in self.model.named_parameters()} - covered)
        if missing:
            raise SyncError(
                f"weight snapshot {version} left {len(missing)} parameter(s) of the rollout policy unchanged, first "
                f"{missing[0]!r}: the sync is partial"
            )

    def _require_whole_layers(self, version: int) -> None:
        """vLLM would fill the rest of a layer with whatever stands in memory."""
        names = {layer: name for name, layer in self.model.named_modules()}
        for layer, (loaded, total) in self._layers_in_part().items():
            if loaded != self._usual.get(layer):
                raise SyncError(
                    f"weight snapshot {version} has {loaded} of the {self._usual.get(layer, total)} elements of layer "
                    f"{names[layer]!r}: its parts must come together"
                )

    def _layers_in_part(self) -> dict[nn.Module, tuple[int, int]]:
        """Layer → how many elements came for it, and how many it has; only those to which some came, and not all."""
        infos = {layer: get_layerwise_info(layer) for layer in self.model.modules()}
        return {layer: (i.load_numel, i.load_numel_total or 0) for layer, i in infos.items() if i.load_numel > 0}

    def _drop_parts(self) -> None:
        for layer in self._layers_in_part():
            info = get_layerwise_info(layer)
            info.loaded_weights, info.load_numel = [], 0

    def finish_weight_update(self) -> None:
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        infos = {layer: get_layerwise_info(layer) for layer in self.model.modules()}
        untouched = {layer for layer, info in infos.items() if info.can_load() and info.load_numel == 0}
        finalize_layerwise_reload(self.model, self.model_config)
        for method, kernel in self._moe_kernels.items():
            if method.moe_kernel is None:  # nothing came for its layer
                method.moe_kernel = kernel
        # With tied embeddings the head computes from a packed copy that layerwise reloading leaves stale.
        tables = [m for m in self.model.modules() if isinstance(m, VocabParallelEmbedding) and hasattr(m, "cpu_linear")]
        for table in tables if any(table not in untouched for table in tables) else []:
            if table in untouched:
                dispatch_cpu_unquantized_gemm(table, remove_weight=False)

    def shutdown(self) -> None:
        pass


def shared_names(model: Any) -> dict[str, set[str]]:
    """Name of each parameter that has several → all of them: tied embeddings are sent, and loaded, under one name.

    The model is asked, not its configuration: of ``tie_word_embeddings`` the text part and the top level may say
    different things or nothing, and vLLM unties a model whose checkpoint has a head of its own.
    """
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {name: same for same in names.values() if len(same) > 1 for name in same}


def register() -> None:
    """Make the backend known to vLLM; harmless when called again."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, ShmWeightTransferEngine)
