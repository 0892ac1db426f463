"""Environment variables of a rollout process. They must be set before torch and vLLM are imported there."""

from __future__ import annotations

from skyrl.settings import RolloutConfig, WeightSync


def rollout_environment(cfg: RolloutConfig, threads: int) -> dict[str, str]:
    """Variables for one rollout worker that may use ``threads`` cores."""
    env = {
        "VLLM_NO_USAGE_STATS": "1",
        # On a GPU a warning is all that vLLM's own transfer says of layers that received nothing.
        "VLLM_LOGGING_LEVEL": "WARNING" if cfg.device == "cuda" else "ERROR",
        "VLLM_CONFIGURE_LOGGING": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if cfg.weight_sync is WeightSync.ipc:
        # CUDA's memory handles reach the engine core pickled. They come from this run's own learner.
        env["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    if cfg.device == "cpu":
        env |= {
            # The engine core in this process: update_weights then gets shared memory itself, not a pickle of it.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": str(cfg.kv_cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(threads),
            # Compiling the sampler's small helpers takes 30 s and gains nothing measurable on CPU.
            "TORCH_COMPILE_DISABLE": "1",
        }
    return env
