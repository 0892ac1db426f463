"""Settings of the workers: model, data, rollout, reward, learner."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from skyrl.records import ConfigError


class Squash(Enum):
    """What is done to the reward model's raw score before it is added to the rule reward."""

    none = "none"
    """The paper's raw sum (Eq. 7)."""
    sigmoid = "sigmoid"
    """1 / (1 + exp(-score / scale)), in (0, 1)."""
    tanh = "tanh"
    """tanh(score / scale), in (-1, 1)."""
    group_standardise = "group_standardise"
    """(score - group mean) / (group std + 1e-6)."""


class Schedule(Enum):
    constant = "constant"
    cosine = "cosine"


class Trainable(Enum):
    """Which modules are trained (the paper's Table 4)."""

    all = "all"
    adapter = "adapter"
    language_and_adapter = "language_and_adapter"
    adapter_and_vision = "adapter_and_vision"


class WeightSync(Enum):
    """Backend of vLLM's weight-transfer API."""

    shm = "shm"
    """skyrl's own, for CPU: Ray's object store, zero-copy on one host."""
    nccl = "nccl"
    ipc = "ipc"


@dataclass
class ModelConfig:
    policy: str = "digits"
    """``digits`` builds the embedded default and caches it; anything else is a Hugging Face folder."""
    reward: str | None = "digits"
    """``digits``, a folder written by ``RewardModel.save``, or null for no reward model."""
    dtype: str = "float32"
    """``float32``, ``bfloat16`` or ``float16``; on CPU float32 keeps rollout and learner within 1e-6."""
    cache_dir: str | None = None
    """Where embedded models are kept; null means ``~/.cache/skyrl`` (or ``$SKYRL_CACHE``)."""
    warm_start_steps: int = 320
    """Supervised steps of the embedded policy."""
    reward_body_steps: int = 100
    """Further supervised steps of the embedded reward model's body."""
    reward_steps: int = 40
    """Bradley-Terry steps of the embedded reward model."""
    seed: int = 0
    """Seed of both embedded models."""


@dataclass
class DataConfig:
    source: str = "digits"
    """``digits`` (generated scenes) or ``parquet``."""
    train_path: str | None = None
    """Parquet file of training prompts; see docs/data.md for its columns."""
    eval_path: str | None = None
    """Parquet file of evaluation prompts."""
    train_size: int = 20_000
    """Scenes generated for training (``digits``)."""
    eval_size: int = 512
    """Held-out prompts evaluated each time."""
    text_share: float = 0.15
    """Share of digit prompts that are arithmetic without a picture."""
    kinds: list[str] = field(default_factory=lambda: ["sum", "max", "min", "count", "row_difference"])
    """Questions about pictures. With ``max``, ``min`` and ``count`` alone a right answer does not need every digit
    read right, so a reward for the answer alone leaves room to hallucinate."""
    seed: int = 0
    """Seed of the scenes and of the shuffling."""
    pool_path: str | None = None
    """Parquet file written by ``python -m skyrl.filter_prompts``: only its prompts are trained on."""
    pool_min: float = 0.0
    """A prompt of the pool is used if its pass rate is above this …"""
    pool_max: float = 1.0
    """… and below this. The defaults keep what is neither always wrong nor always right."""
    pairs_path: str | None = None
    """Parquet file of preference pairs: offline MPO, without sampling (docs/data.md). Needs ``algorithm.stage=mpo``."""
    pairs_per_step: int = 32
    """Pairs of a step of offline MPO."""


@dataclass
class RolloutConfig:
    num_workers: int = 1
    """vLLM engines, each in an actor of its own."""
    prompts_per_step: int = 64
    """Prompts sampled in a step, shared by the workers."""
    samples_per_prompt: int = 8
    """G, the group size."""
    temperature: float = 1.0
    """Sampling temperature; the learner applies it too."""
    top_p: float = 1.0
    """Nucleus sampling. Below 1 the recorded log-probabilities are those of the cut distribution, so the ratio to the
    learner starts below 1, and δ of MPO takes a forward pass of its own."""
    max_prompt_tokens: int = 96
    """Longest prompt, pictures' placeholders included; a longer one is an error."""
    max_new_tokens: int = 64
    """Longest answer; one that reaches it is marked as truncated."""
    tensor_parallel_size: int = 1
    """GPUs of one engine."""
    gpu_memory_utilization: float = 0.85
    """Share of a GPU's memory that vLLM takes."""
    kv_cache_gib: int = 1
    """Key-value cache of one CPU engine, GiB."""
    max_num_seqs: int = 256
    """Sequences that one engine decodes together."""
    device: str = "cpu"
    """``cpu`` or ``cuda``."""
    num_cpus: float = 0.25
    """Ray CPUs that one worker reserves. Phases alternate in the synchronous loop, so the sum over all
    actors may stay below the number of cores while each uses ``threads`` of them in its turn."""
    threads: int = 0
    """OpenMP threads of one worker; 0 means the cores of a node shared by its workers."""
    weight_sync: WeightSync = WeightSync.shm
    """How weights reach the engines."""
    probe_prompts: int = 8
    """Prompts that prove each weight sync."""
    probe_new_tokens: int = 8
    """Tokens sampled for each of them."""
    logprob_gap_limit: float | None = None
    """Limit of the largest |log π_rollout − log π_learner| on the probe, of the mean in 16 bits on CUDA. null means
    1e-4 in float32, 0.1 in 16 bits, 0.05 for that mean."""


@dataclass
class RewardConfig:
    num_workers: int = 1
    """Reward actors, each with verifiers and a copy of the reward model."""
    model_weight: float = 1.0
    """w in r = r_rule + w·squash(r_θ) + w_f·r_format."""
    format_weight: float = 0.1
    """w_f."""
    squash: Squash = Squash.sigmoid
    """Brings the raw score into range."""
    squash_scale: float = 0.5
    """Divides the raw score inside the squashing function."""
    verifier_timeout: float = 5.0
    """Seconds that one verifier call may take before it is killed."""
    numeric_tolerance: float = 1e-6
    """Relative and absolute tolerance of the ``numeric`` verifier."""
    model_batch: int = 64
    """Samples that the reward model scores in one forward pass; also the most prompts that it reads in one."""
    device: str = "cpu"
    """``cpu`` or ``cuda``, of the reward model."""
    num_cpus: float = 0.25
    """Ray CPUs that one worker reserves."""
    threads: int = 0
    """As in rollout."""


@dataclass
class LearnerConfig:
    num_workers: int = 1
    """Ranks, one DeepSpeed engine each."""
    zero_stage: int = 0
    """ZeRO stage 0 … 3. A single rank has nothing to shard; with more, 1 shards the optimizer, 2 also the gradients,
    3 also the parameters."""
    trainable: Trainable = Trainable.all
    """Modules that are trained."""
    lr: float = 1e-4
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay rates of AdamW's moments."""
    schedule: Schedule = Schedule.constant
    """Learning rate after the warm-up."""
    warmup_steps: int = 5
    """Steps of linear warm-up."""
    min_lr_ratio: float = 0.1
    """End of the cosine, as a share of ``lr``."""
    max_grad_norm: float = 1.0
    """The whole step's gradient is clipped to this L2 norm."""
    micro_batch_tokens: int = 8192
    """Padded tokens (prompt and answer) of one forward pass; memory only, never the result (beyond rounding)."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time."""
    device: str = "cpu"
    """``cpu`` or ``cuda``."""
    num_cpus: float = 0.25
    """Ray CPUs that one rank reserves."""
    threads: int = 0
    """As in rollout."""

    def __post_init__(self) -> None:
        if len(self.betas) != 2:
            raise ConfigError(f"learner.betas={list(self.betas)}: must be two numbers, each 0 or more and below 1")
        first, second = self.betas  # YAML has lists only
        self.betas = (first, second)
