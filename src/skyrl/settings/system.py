"""Settings of the workers: model, data, rollout, learner; reward.py has those that judge."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat

from skyrl.records import ConfigError
from skyrl.schema import Count, DottedPath, Limit, Problem, Settings, Share, ShareBelowOne
from skyrl.settings.reward_model import is_endpoint, reward_layout

if TYPE_CHECKING:
    from skyrl.settings.run import Config

SHARED_GPU_LIMIT = 0.6
HomePath = Annotated[str, AfterValidator(lambda path: str(Path(path).expanduser()) if path.startswith("~") else path)]
"""``~`` means the home folder."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""How a model of the Hugging Face hub is named: owner/name."""


class Schedule(Enum):
    constant = "constant"
    cosine = "cosine"


class Trainable(Enum):
    all = "all"
    adapter = "adapter"
    language_and_adapter = "language_and_adapter"
    adapter_and_vision = "adapter_and_vision"


class Offload(Enum):
    none = "none"
    optimizer = "optimizer"
    """AdamW's state and gradients; the update happens on the host's cores."""
    all = "all"
    """The parameters too; each layer's come to the GPU when it runs."""


class WeightSync(Enum):
    shm = "shm"
    """skyrl's own, for CPU: Ray's object store, zero-copy on one host."""
    nccl = "nccl"
    ipc = "ipc"


class ModelConfig(Settings):
    policy: HomePath = "digits"
    """``digits`` builds the embedded default and caches it; else a Hugging Face folder, or a name of the hub,
    ``owner/name``, which is downloaded by the process that starts the run."""
    reward: HomePath | None = "digits"
    """``digits``, a folder, a name of the hub or an address (docs/models.md), or null for no reward model."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """On CPU use float32: rollout and learner agree best then."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the model's chat template, such as ``enable_thinking: false``."""
    trust_remote_code: bool = False
    """Run the Python files that the policy's folder may hold, here and in vLLM. Read them first."""


class Layout(Enum):
    auto = "auto"
    """By the names of the columns."""
    skyrl = "skyrl"
    """``question`` or ``messages``, ``answer``, ``verifier``, …"""
    verl = "verl"
    """verl's and EasyR1's: ``prompt`` as messages and ``reward_model.ground_truth``, or ``problem`` and ``answer``."""
    trl = "trl"
    """TRL's: ``prompt`` as text or messages, and any other columns."""
    swift = "swift"
    """ms-swift's: ``messages`` and ``solution``."""


class Overlong(Enum):
    error = "error"
    """The run does not begin; the message names the rows."""
    drop = "drop"
    """They are left out and counted."""
    cut = "cut"
    """The beginning of the last user's turn is cut off, as much as needed; what stands at its end stays."""


class DataConfig(Settings):
    source: Literal["digits", "files"] | DottedPath = "digits"
    """Generated scenes, or files of your own."""
    train_path: str | Annotated[list[str], Field(min_length=1)] | None = None
    """Training prompts: a Parquet, JSONL or JSON file, the folder of a ``datasets`` data set, or a list of those, which
    are mixed; see docs/data.md."""
    eval_path: str | Annotated[list[str], Field(min_length=1)] | None = None
    """Evaluation prompts, likewise."""
    layout: Layout = Layout.auto
    """What the columns of the files mean."""
    weights: list[PositiveFloat] | None = None
    """Share of each file of ``train_path`` in every step, any scale; null means by their numbers of rows."""
    system_prompt: str | None = None
    """System turn of the prompts of files that have none."""
    suffix: str | None = None
    """Text put behind the last user's turn of every prompt of a file, after a line break: the form of the answer, say.
    """
    picture_root: str | None = None
    """Folder of the pictures that files name by path; null means each file's own folder."""
    max_pixels: Count = 50_000_000
    """Most pixels of one picture (width × height); looked at before it is decoded."""
    overlong: Overlong = Overlong.error
    """What happens to prompts of files that are longer than ``rollout.max_prompt_tokens``; all are measured before the
    first step."""
    eval_size: Count = 512
    """Held-out prompts evaluated each time."""
    seed: NonNegativeInt = 0
    """Seed of the scenes and of the shuffling."""
    pool_path: str | None = None
    """Parquet file written by ``python -m skyrl.filter_prompts``: only its prompts are trained on."""
    pool_min: Share = 0.0
    """A prompt of the pool is used if its pass rate is above this …"""
    pool_max: Share = 1.0
    """… and below this. The defaults keep what is neither always wrong nor always right."""
    pairs_path: str | None = None
    """Parquet file of preference pairs: offline MPO, without sampling (docs/data.md). Needs ``algorithm.stage=mpo``."""
    pairs_per_step: Count = 32
    """Pairs of a step of offline MPO."""


class WorkerConfig(Settings):
    """What each role has that runs as several workers."""

    num_workers: Count = 1
    """Workers, each in a Ray actor of its own. ``model=digits``, the default, has 2 for rollouts and 2 for rewards."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where their models run."""
    num_cpus: NonNegativeFloat = 0.25
    """Ray CPUs that one worker reserves. At ``controller.lag=0`` the roles take turns, so the sum over all workers may
    stay below the number of cores while each uses ``threads`` of them in its turn."""
    threads: NonNegativeInt = 0
    """OpenMP threads of one worker; 0 means the cores of a node, or half of them with a lag, when two roles work at
    once, shared by the node's workers of this role."""


class RolloutConfig(WorkerConfig):
    engine: DottedPath = "skyrl.rollout.vllm_engine:VllmEngine"
    """Class of the engine that samples; docs/architecture.md says what one of your own has to write."""
    prompts_per_step: Count = 64
    """Prompts sampled in a step, shared evenly by the workers."""
    oversample: Share = 0.0
    """Further prompts that are sampled at the same time, as a share of ``prompts_per_step``. A step ends when
    ``prompts_per_step`` groups are complete; the others are stopped, and the next step goes on with them where they
    are. Long answers then hold up no step, and have tokens of several policy versions. ``max_num_seqs`` must have room
    for all of them, or they wait. 0 waits for all (docs/results/long_tail.md)."""
    max_carried: Count = 4
    """Steps in a row that may be ended without a group that they sampled; the next one waits for it. Only with
    ``oversample``."""
    samples_per_prompt: Annotated[int, Field(ge=2)] = 8
    """G, the group size. An advantage is a comparison within the group, so a group of one has none."""
    temperature: Annotated[float, Field(ge=0.01, le=2)] = 1.0
    """Sampling temperature; the learner applies it too. vLLM refuses more than 2, and samples at 0.01 instead of at
    anything lower."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling. Below 1 the recorded log-probabilities are those of the cut distribution, so the ratio to the
    learner starts between ``top_p`` and 1, and δ of MPO takes a forward pass of its own."""
    max_prompt_tokens: Count = 96
    """Longest prompt, pictures' placeholders included; ``data.overlong`` says what happens to a longer one."""
    max_new_tokens: Count = 64
    """Longest answer; ``reward.truncated`` says what happens to one that reaches it."""
    tensor_parallel_size: Count = 1
    """GPUs of one engine."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.85
    """Share of a GPU's memory that vLLM takes."""
    kv_cache_gib: Count = 1
    """Key-value cache of one CPU engine, GiB; raise it if vLLM says that the longest answer does not fit."""
    max_num_seqs: Count = 512
    """Sequences that one engine decodes together."""
    weight_sync: WeightSync = WeightSync.shm
    """How weights reach the engines: backend of vLLM's weight-transfer API."""
    probe_prompts: Count = 8
    """Prompts that prove each weight sync."""
    probe_new_tokens: Count = 8
    """Tokens sampled for each of them."""
    logprob_gap_limit: Limit | None = None
    """Limit of the largest and of the mean |log π_rollout − log π_learner| on the probe. null measures both where the
    gap is above 1e-4: 3 and 2 times what rounding errors do to the learner. Infinity turns it off."""

    @property
    def in_flight(self) -> int:
        """Groups that one worker samples at the same time."""
        share = self.prompts_per_step // self.num_workers
        return share + math.ceil(round(share * self.oversample, 9))


class LoraSync(Enum):
    merged = "merged"
    """The weights that have factors, merged: nothing but them is kept in the rollout workers."""
    adapter = "adapter"
    """The factors alone, some hundredths of that; a rollout worker keeps the starting weights in shared memory and
    merges them itself."""


class LoraConfig(Settings):
    """Low-rank adapters (peft) instead of whole weights, in the modules that ``learner.trainable`` names."""

    rank: NonNegativeInt = 0
    """r, columns of each factor; 0 trains the weights themselves."""
    alpha: Count = 32
    """α: the change of a weight is α/r · B·A."""
    targets: list[str] = Field(default_factory=list)
    """Last names of the linear layers that get factors, such as ``q_proj``; none means all but the output layer."""
    sync: LoraSync = LoraSync.merged
    """What travels to the rollout workers after the first weight sync (with ``rollout.weight_sync=shm``)."""


class LearnerConfig(WorkerConfig):
    backend: DottedPath = "skyrl.learner.deepspeed_backend:DeepSpeedBackend"
    """Class that holds the model and its optimizer; docs/architecture.md says what one of your own has to write."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """ZeRO stage. A single rank has nothing to shard; with more, 1 shards the optimizer, 2 also the gradients, 3 also
    the parameters."""
    offload: Offload = Offload.none
    """What DeepSpeed keeps in host memory instead of the GPU's: less memory there, more time. ``optimizer`` needs
    ``zero_stage`` 1 or more, ``all`` needs 3; both also with one worker."""
    trainable: Trainable = Trainable.all
    """Modules that are trained (the paper's Table 4)."""
    lora: LoraConfig = LoraConfig()
    lr: PositiveFloat = 1e-4
    """Peak learning rate of AdamW. The default suits the embedded policy of a million parameters; a model of your own
    wants about 1e-6, which ``model=huggingface`` sets."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.99)
    """Decay rates of AdamW's moments."""
    schedule: Schedule = Schedule.constant
    """Learning rate after the warm-up."""
    warmup_steps: NonNegativeInt = 5
    """Steps of linear warm-up."""
    min_lr_ratio: Share = 0.1
    """End of the cosine, as a share of ``lr``."""
    max_grad_norm: Limit = 1.0
    """The whole step's gradient is clipped to this L2 norm; infinity leaves it alone."""
    micro_batch_tokens: Count = 8192
    """Tokens (prompts and answers) of one forward pass, those of plain rows with their padding; memory only, never the
    result (beyond rounding)."""
    shared_rows: bool = True
    """Run each prompt once for all its answers, without padding. When a run starts it is tried whether the policy then
    gives the same log-probabilities; if it does not, and with False, each answer runs in a row of its own."""
    tower_cache_gib: NonNegativeFloat = 2.0
    """Host memory of each rank, GiB, for what a frozen vision tower makes of pictures: with ``trainable=adapter`` or
    ``language_and_adapter`` each picture goes through it once, for policy and reference, while its features are among
    those used last. 0 keeps none, nor does ``zero_stage=3``, where the ranks must run the same modules together."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time."""


def system_problems(cfg: Config, with_learner: bool, with_files: bool = True) -> Iterator[Problem]:
    """What does not fit together here, and which files are missing."""
    rollout = cfg.rollout
    if with_files:
        yield from _folders(cfg)
        yield from _files(cfg)
    if rollout.prompts_per_step % rollout.num_workers:
        yield "rollout.prompts_per_step rollout.num_workers", "every worker must get the same number of prompts"
    yield from _devices(cfg, with_learner)
    if with_learner:
        yield from _offload(cfg.learner)


def _folders(cfg: Config) -> Iterator[Problem]:
    policy, reward, resume = cfg.model.policy, cfg.model.reward, cfg.resume
    mend = "a Hugging Face folder or a name of the hub, owner/name; no such folder exists"
    if policy != "digits" and not (policy and (Path(policy).is_dir() or HUB_NAME.fullmatch(policy))):  # Path("") is .
        yield "model.policy", f"must be digits, {mend}"
    on_hub = reward is not None and HUB_NAME.fullmatch(reward) is not None and not Path(reward).is_dir()
    if reward not in (None, "digits") and not (reward and (is_endpoint(reward) or Path(reward).is_dir() or on_hub)):
        yield "model.reward", f"must be digits, null, an address http://…, {mend}"
    elif reward not in (None, "digits") and not on_hub:
        try:
            reward_layout(str(reward))
        except ConfigError as error:
            yield "model.reward", str(error)
    if resume not in ("no", "auto") and not (resume and Path(resume).is_dir()):
        yield "resume", "must be no, auto, or the folder of a checkpoint; no such folder exists"


def _files(cfg: Config) -> Iterator[Problem]:
    data = cfg.data
    if data.pool_path is not None and not Path(data.pool_path).is_file():
        yield "data.pool_path", "no such file exists; python -m skyrl.filter_prompts writes one"
    if not data.pool_min < data.pool_max:
        yield "data.pool_min data.pool_max", "the first must be below the second"
    for key, given in (("data.train_path", data.train_path), ("data.eval_path", data.eval_path)):
        missing = [path for path in paths_of(given) or [""] if not (path and Path(path).exists())]
        if data.source == "files" and missing:
            which = f" ({missing[0]})" if isinstance(given, list) else ""
            yield f"{key} data.source", f"must be a file or folder, or a list of those; no such file exists{which}"
    files = paths_of(data.train_path)
    if data.weights is not None and len(data.weights) != len(files):
        yield "data.weights data.train_path", f"there must be one weight for each of the {len(files)} file(s)"
    for key in ("system_prompt", "suffix"):
        if data.source != "files" and getattr(data, key) is not None:
            yield f"data.{key} data.source", "only prompts of files get it; say data=files"
    if data.picture_root is not None and not Path(data.picture_root).is_dir():
        yield "data.picture_root", "no such folder exists"


def paths_of(given: str | list[str] | None) -> list[str]:
    """The files that ``data.train_path`` or ``data.eval_path`` names."""
    return [given] if isinstance(given, str) else given or []


def _offload(learner: LearnerConfig) -> Iterator[Problem]:
    least = {Offload.none: 0, Offload.optimizer: 1, Offload.all: 3}[learner.offload]
    if learner.offload is not Offload.none and learner.device == "cpu":
        yield "learner.offload learner.device", "frees GPU memory; on CPU all is in host memory anyway: use none"
    elif learner.zero_stage < least:
        yield "learner.offload learner.zero_stage", f"needs zero_stage={least} or more, also with one worker"


def _devices(cfg: Config, with_learner: bool) -> Iterator[Problem]:
    rollout, learner, sync = cfg.rollout, cfg.learner, cfg.rollout.weight_sync
    devices = {rollout.device, learner.device} if with_learner else {rollout.device}
    if sync is WeightSync.shm and rollout.tensor_parallel_size > 1:
        yield "rollout.tensor_parallel_size rollout.weight_sync", "shm hands memory to one process; use nccl"
    if sync is WeightSync.shm and rollout.device == "cuda":
        yield "rollout.weight_sync rollout.device", "shm is for rollouts on CPU; use nccl or ipc"
    if sync is not WeightSync.shm and devices != {"cuda"}:
        yield "rollout.weight_sync rollout.device learner.device", "both devices must be cuda; on CPU use shm"
    if sync is not WeightSync.shm and learner.lora.rank and learner.lora.sync is LoraSync.adapter:
        yield "learner.lora.sync rollout.weight_sync", "factors travel by shm only; vLLM's own transfer needs merged"
    if with_learner and cfg.model.dtype != "float32" and learner.zero_stage == 0:
        mend = "gradients of the micro-batches would add up in 16 bits; use zero_stage=1 or more, also with one worker"
        yield "learner.zero_stage model.dtype", mend
    if cfg.model.dtype == "float16" and "cpu" in devices:
        yield "model.dtype", "is for GPUs; on CPU use float32"
    if not with_learner or sync is not WeightSync.ipc:
        return
    # CUDA hands memory over on one GPU only, so each learner rank shares its own with one rollout worker.
    if rollout.num_workers != learner.num_workers or rollout.tensor_parallel_size > 1:
        yield (
            "rollout.weight_sync rollout.num_workers rollout.tensor_parallel_size learner.num_workers",
            "each learner rank shares its GPU with one rollout worker, so the numbers of workers must be equal and "
            "tensor_parallel_size 1; or use nccl",
        )
    if rollout.gpu_memory_utilization > SHARED_GPU_LIMIT:
        most = f"a learner rank has the rest of the same GPU; must be at most {SHARED_GPU_LIMIT:g}"
        yield "rollout.gpu_memory_utilization rollout.weight_sync", most
