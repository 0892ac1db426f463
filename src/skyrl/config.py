"""Every setting, with its default, its meaning and its limits. Imports neither torch, ray nor vllm.

Defaults stand here and nowhere else; the YAML files in ``conf/`` hold only what differs from them.
``launch.py`` turns Hydra's tree into :class:`Config` once, calls :func:`skyrl.validation.validate`, and
hands the dataclass on: no ``DictConfig`` lives beyond that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


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


class Std(Enum):
    """Divisor of the group advantage."""

    population = "population"
    sample = "sample"
    none = "none"
    """No division (Dr. GRPO)."""


class Aggregation(Enum):
    """How token terms become one loss."""

    sample = "sample"
    """Mean over a sample's tokens, then over samples (Eq. 8)."""
    token = "token"
    """Mean over all tokens of the step."""


class GrpoFilter(Enum):
    """Which fresh samples the GRPO term sees."""

    effective = "effective"
    """Those whose rule advantage is not 0."""
    all = "all"
    """Every scored sample: in groups that are all right or all wrong the reward model alone speaks."""


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


class WandbMode(Enum):
    auto = "auto"
    """Online when logged in, else offline."""
    online = "online"
    offline = "offline"
    off = "off"


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
    seed: int = 0
    """Seed of the scenes and of the shuffling."""


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
    learner starts below 1."""
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
    """Largest |log π_rollout − log π_learner| on the probe; null means 1e-4 for float32, 0.1 for 16-bit."""


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
    """Samples that the reward model scores in one forward pass."""
    device: str = "cpu"
    """``cpu`` or ``cuda``, of the reward model."""
    num_cpus: float = 0.25
    """Ray CPUs that one worker reserves."""
    threads: int = 0
    """As in rollout."""


@dataclass
class BufferConfig:
    enabled: bool = True
    """False turns the Selective Sample Buffer off: only fresh samples are trained on."""
    capacity: int = 4096
    """Samples kept; the oldest go first."""
    max_age: int = 8
    """Policy versions after which a sample is no longer drawn and is dropped."""
    alpha: float = 1.0
    """P ∝ |A|^alpha."""
    mix: float = 0.25
    """Largest share of the rollout batch that replayed samples may fill; they only take places that
    ineffective fresh samples leave free."""
    importance_correction: bool = False
    """Weight a drawn sample by 1/(N·P), normalised to mean 1."""


@dataclass
class GrpoConfig:
    weight: float = 1.0
    """0 turns the GRPO term off."""
    clip_low: float = 0.2
    """ε below 1: the ratio is clipped at 1 - clip_low."""
    clip_high: float = 0.2
    """ε above 1: the ratio is clipped at 1 + clip_high."""
    std: Std = Std.population
    """Divisor of the advantage."""
    aggregation: Aggregation = Aggregation.sample
    """From token terms to one loss."""
    filter: GrpoFilter = GrpoFilter.effective
    """Fresh samples that the term sees."""
    kl_weight: float = 0.0
    """Weight of the k3 penalty to the reference policy; Eq. 8 has none."""


@dataclass
class MpoConfig:
    weight: float = 0.25
    """Multiplies the whole MPO term; 0 turns it off."""
    preference_weight: float = 0.8
    """w1, DPO."""
    quality_weight: float = 0.2
    """w2, BCO."""
    generation_weight: float = 1.0
    """w3, negative log-likelihood of the chosen answer."""
    beta: float = 0.1
    """β of DPO and BCO."""
    margin_threshold: float = 2.0
    """τ: a pair needs r_θ(chosen) − r_θ(rejected) ≥ τ, in raw reward-model units."""
    pairs_per_prompt: int = 1
    """Most pairs formed in one group; a sample is in one pair at most."""


@dataclass
class AlgorithmConfig:
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    mpo: MpoConfig = field(default_factory=MpoConfig)


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
    """Padded tokens (prompt and answer) of one forward pass; memory only, never the result."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time."""
    device: str = "cpu"
    """``cpu`` or ``cuda``."""
    num_cpus: float = 0.25
    """Ray CPUs that one rank reserves."""
    threads: int = 0
    """As in rollout."""

    def __post_init__(self) -> None:
        first, second = self.betas  # YAML has lists only
        self.betas = (first, second)


@dataclass
class EvaluationConfig:
    every: int = 10
    """Steps between evaluations; there is always one before the first step and one after the last.
    0 leaves only those two."""
    gallery: int = 12
    """Scenes shown in the report, before and after."""


@dataclass
class CheckpointConfig:
    every: int = 20
    """Steps between checkpoints; 0 writes none but the final one."""
    keep: int = 2
    """Complete checkpoints kept, the newest ones."""
    export: bool = True
    """Write the final policy as a Hugging Face folder."""


@dataclass
class ControllerConfig:
    steps: int = 60
    """Length of the run."""
    seed: int = 0
    """Seed of sampling, replay and initialisation: the same seed and settings repeat a run."""
    timeout: float = 1800.0
    """Seconds after which a phase that does not end is an error."""


@dataclass
class ClusterConfig:
    address: str | None = None
    """Ray cluster to join; null means ``$RAY_ADDRESS``, and if that is unset a local Ray."""
    num_cpus: int | None = None
    """CPUs of a local Ray; null means all cores."""
    dashboard: bool = True
    """Start the Ray dashboard with a local Ray."""
    dashboard_port: int = 8265
    """Its port; the next free one is taken."""
    spread: bool = True
    """Place the workers of one kind on different nodes where possible."""


@dataclass
class MonitoringConfig:
    console: bool = True
    """Live table in a terminal; plain lines otherwise."""
    wandb: WandbMode = WandbMode.auto
    """Weights & Biases."""
    wandb_project: str = "skyrl"
    """Its project."""
    ray_metrics: bool = True
    """Gauges for the Ray dashboard and Prometheus."""


@dataclass
class Config:
    name: str = "digits"
    """Names the run: its folder, its Ray namespace, its wandb run."""
    run_dir: str = ""
    """Folder of everything that a run writes; set by ``conf/config.yaml``. Every host must see it."""
    resume: str = "no"
    """``no``, ``auto`` (the newest complete checkpoint of any run of this ``name``; a fresh run if there is none) or
    the path of a checkpoint folder. A resumed run goes on in its old ``run_dir``."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    buffer: BufferConfig = field(default_factory=BufferConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    controller: ControllerConfig = field(default_factory=ControllerConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    monitoring: MonitoringConfig = field(default_factory=MonitoringConfig)
