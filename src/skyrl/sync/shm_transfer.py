"""Weight transfer for CPU and shared memory, as a backend of vLLM's own weight-transfer API.

The learner lays all parameters into one flat buffer; Ray's object store maps it into the rollout process
(no copy on one host, one network transfer across hosts), and vLLM's ``load_weights`` reads straight from there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo

from skyrl.records import SyncError, WeightSnapshot
from skyrl.sync.snapshot import parameters_of

BACKEND = "skyrl_shm"


@dataclass
class ShmInitInfo(WeightTransferInitInfo):
    """Nothing to agree on: the buffer comes with each update."""


@dataclass
class ShmUpdateInfo(WeightTransferUpdateInfo):
    """One full set of parameters."""

    snapshot: WeightSnapshot


class ShmWeightTransferEngine(WeightTransferEngine[ShmInitInfo, ShmUpdateInfo]):
    """Worker side of the backend."""

    init_info_cls = ShmInitInfo
    update_info_cls = ShmUpdateInfo
    _shared: dict[str, set[str]] | None = None

    def init_transfer_engine(self, init_info: ShmInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        if self._shared is None:  # reloading takes shared parameters apart, until it has succeeded
            self._shared = shared_names(self.model)
        initialize_layerwise_reload(self.model)
        # vLLM packs the experts of a layer for its CPU kernel when it makes that kernel, and at no later update.
        for module in self.model.modules():
            if getattr(getattr(module, "quant_method", None), "moe_kernel", None) is not None:
                module.quant_method.moe_kernel = None

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # vLLM's own ends with torch.accelerator.synchronize(), and there is no accelerator here.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: ShmUpdateInfo) -> None:
        loaded = self.model.load_weights(parameters_of(update_info.snapshot))
        if loaded is None:  # some architectures do not report; the probe after the sync still proves the result
            return
        shared = self._shared or {}
        covered = {same for name in loaded for same in shared.get(name, {name})}
        missing = sorted({name for name, _ in self.model.named_parameters()} - covered)
        if missing:
            raise SyncError(
                f"weight snapshot {update_info.snapshot.version} left {len(missing)} parameter(s) of the rollout "
                f"policy unchanged, first {missing[0]!r}: the sync is partial"
            )

    def finish_weight_update(self) -> None:
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        # With tied embeddings the head computes from a packed copy that layerwise reloading leaves stale.
        for module in self.model.modules():
            if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
                dispatch_cpu_unquantized_gemm(module, remove_weight=False)

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
