"""What rollout processes and vLLM's trainer side are told before a GPU transfer; nothing is sent."""

from __future__ import annotations

import pytest
import torch

from skyrl.rollout.engine import rollout_environment
from skyrl.settings import Config, WeightSync


@pytest.mark.parametrize("sync", list(WeightSync))
def test_only_ipc_lets_the_engine_core_unpickle(sync: WeightSync) -> None:
    cfg = Config().rollout
    cfg.weight_sync = sync
    allowed = "VLLM_ALLOW_INSECURE_SERIALIZATION" in rollout_environment(cfg, 1)
    assert allowed == (sync is WeightSync.ipc)


def test_a_parameter_of_the_layout_is_what_vllm_is_told() -> None:
    from skyrl.sync.gpu_transfer import LearnerSource

    weight = torch.zeros(2, 3, dtype=torch.bfloat16)
    source = LearnerSource(lambda: iter([("w", weight)]), [("w", torch.bfloat16, (2, 3))])
    (told,) = source.metadata()
    assert (told.name, told.dtype, tuple(told.shape)) == ("w", torch.bfloat16, (2, 3))
    assert [name for name, _ in source] == ["w"]


@pytest.mark.parametrize(("rows", "buffer"), [(10, 2**30), (2**20, 2**31)])
def test_the_ipc_buffer_holds_the_largest_parameter(rows: int, buffer: int) -> None:
    from skyrl.sync.gpu_transfer import _init_info

    cfg = Config()
    cfg.rollout.weight_sync = WeightSync.ipc
    layout = [("small", torch.float32, (3,)), ("embedding", torch.bfloat16, (rows, 1024))]  # 2 GiB at most
    info = _init_info(cfg, 1, "host", layout)
    assert (info.rank, info.packed, info.packed_buffer_size_bytes) == (1, True, buffer)


def test_the_nccl_group_has_the_sender_and_every_gpu_of_every_engine() -> None:
    from skyrl.sync.gpu_transfer import _init_info

    cfg = Config()
    cfg.rollout.weight_sync, cfg.rollout.num_workers, cfg.rollout.tensor_parallel_size = WeightSync.nccl, 3, 4
    info = _init_info(cfg, 0, "10.0.0.7", [("w", torch.float32, (3,))])
    assert (info.world_size, info.master_address, info.rank) == (13, "10.0.0.7", 0)
