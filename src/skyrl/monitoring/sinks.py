"""Where the numbers of each step go: a file, Weights & Biases, TensorBoard, and a fan-out to several sinks."""

from __future__ import annotations

import json
import logging
import netrc
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from skyrl.monitoring.console import ConsoleSink as ConsoleSink
from skyrl.monitoring.metrics import METRICS, MetricInfo, check_names
from skyrl.monitoring.records import jsonable, read_metrics, write_text_atomically
from skyrl.records import ConfigError, Metrics
from skyrl.settings import WandbMode

logger = logging.getLogger(__name__)


class MetricSink(Protocol):
    """Where numbers go."""

    def log(self, step: int, metrics: Metrics) -> None: ...

    def close(self) -> None: ...


class Sinks:
    """Passes every call on to several sinks, after checking that each metric is defined in ``table``
    (:func:`skyrl.monitoring.metrics.metric_table` of the run)."""

    def __init__(self, sinks: Sequence[MetricSink], table: Mapping[str, MetricInfo] = METRICS) -> None:
        self._sinks, self._table = list(sinks), table

    def log(self, step: int, metrics: Metrics) -> None:
        """Log ``metrics`` of ``step`` everywhere.

        Raises:
            MetricError: if a name is not in the table of metrics.
        """
        check_names(metrics, self._table)
        for sink in self._sinks:
            sink.log(step, metrics)

    def close(self) -> None:
        """Close every sink, the later ones also when an earlier one fails."""
        with ExitStack() as stack:
            for sink in reversed(self._sinks):
                stack.callback(sink.close)


class JsonlSink:
    """Appends one JSON object per call to a file, and flushes it, so that a killed run loses nothing. Infinity and NaN,
    which JSON has not, become ``null``."""

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        """Start an empty file. A run that goes on from the checkpoint of step ``resume_step`` keeps what is there, but
        for the later steps, which will be done again."""
        kept: list[dict[str, Any]] = []
        if resume_step is not None and path.exists():
            kept = [record for record in read_metrics(path) if record["step"] <= resume_step]
        write_text_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Metrics) -> None:
        """Write one line."""
        self._file.write(json.dumps({"step": step, **jsonable(metrics)}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def wandb_mode(mode: WandbMode) -> WandbMode:
    """What ``auto`` means here: online with a key in ``WANDB_API_KEY`` or the netrc file, unless ``WANDB_MODE`` forbids
    it, else offline. Asks no server."""
    if mode is not WandbMode.auto:
        return mode
    wish = os.environ.get("WANDB_MODE", "").lower()
    if wish == "disabled":
        return WandbMode.off
    key = os.environ.get("WANDB_API_KEY") or _key_in_netrc()
    return WandbMode.online if key and wish not in ("offline", "dryrun") else WandbMode.offline


def _key_in_netrc() -> bool:
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "")).hostname or "api.wandb.ai"
    path = os.environ.get("NETRC") or str(Path.home() / ".netrc")
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class WandbSink:
    """Logs to Weights & Biases, online or into the run folder (send it later with ``wandb sync``).

    Logging must never stop a run: if no online run can be started it becomes an offline one, and if that fails too the
    sink says so once and then stays quiet.
    """

    def __init__(
        self, run_dir: Path, *, project: str, name: str, mode: WandbMode, config: Any = None, timeout: float = 20.0
    ) -> None:
        """Start the run.

        Args:
            run_dir: its subfolder ``wandb`` is written to.
            config: settings or mapping shown with the run.
            timeout: seconds that starting online, and the last upload, may take.

        Raises:
            ConfigError: if the mode is off.
        """
        mode = wandb_mode(mode)
        if mode is WandbMode.off:
            raise ConfigError("got mode off for WandbSink, allowed are auto, online and offline; leave the sink out")
        # wandb reports its own crashes home; a training run has no business with that. Read at import.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        run_dir.mkdir(parents=True, exist_ok=True)
        arguments = {"dir": str(run_dir), "project": project, "name": name, "config": jsonable(config or {})}
        self._run = _wandb_run("online", arguments, timeout) if mode is WandbMode.online else None
        if self._run is None:
            self._run = _wandb_run("offline", arguments, timeout)
        if self._run is None:
            logger.warning("no Weights & Biases run could be started; metrics.jsonl has every number")

    def log(self, step: int, metrics: Metrics) -> None:
        """Hand the numbers to wandb's own process, which sends them in the background."""
        if self._run is not None:
            self._run.log({"step": step, **metrics})

    def close(self) -> None:
        """End the run; waits at most ``timeout`` seconds for the upload."""
        if self._run is not None:
            self._run.finish()
            self._run = None


def _wandb_run(mode: Literal["online", "offline"], arguments: Mapping[str, Any], timeout: float) -> Any:
    """A run; None, with a warning, if it can't be started."""
    import wandb
    import wandb.errors

    limits = {f"{what}_timeout": timeout for what in ("init", "login", "finish")}
    own_files = {"save_code": False, "disable_code": True, "disable_git": True}
    settings = wandb.Settings(silent=True, console="off", **own_files, **limits)
    try:
        run = wandb.init(mode=mode, settings=settings, **arguments)
    except (wandb.errors.Error, OSError, RuntimeError, ValueError) as error:
        logger.warning("no %s Weights & Biases run: %s: %s", mode, type(error).__name__, error)
        return None
    # An axis of our own: wandb's counter refuses the steps that a resumed run does again.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def check_tensorboard(wanted: bool) -> None:
    """Raises:
    ConfigError: if event files are ``wanted`` and the package that writes them is not installed.
    """
    if wanted and find_spec("tensorboardX") is None:
        raise ConfigError(
            "monitoring.tensorboard=True: must be false without the package tensorboardX; install it with pip install "
            "tensorboardX"
        )


class TensorboardSink:
    """Event files in the run's folder, one value of a metric a step: ``tensorboard --logdir RUN/tensorboard``."""

    def __init__(
        self, run_dir: Path, resume_step: int | None = None, history: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """Start a file.

        Args:
            resume_step: A run that goes on from the checkpoint of this step purges it and the later ones from what the
                files before show.
            history: Records of :func:`read_metrics`; the one of ``resume_step`` is written once more, with what the
                resumed run measures of that step anew in the place of the old.
        """
        from tensorboardX import SummaryWriter

        purge = {} if resume_step is None else {"purge_step": resume_step}
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), **purge)
        again = [record for record in history if record["step"] == resume_step]
        self._held: Metrics = {k: v for record in again for k, v in record.items() if k != "step" and v is not None}
        self._held_step = resume_step

    def log(self, step: int, metrics: Metrics) -> None:
        """Hand the numbers to the writer's own thread."""
        if step != self._held_step:
            self._write_held()
        for name, value in metrics.items():
            self._held.pop(name, None)
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left."""
        self._write_held()
        self._writer.close()

    def _write_held(self) -> None:
        for name, value in self._held.items():
            self._writer.add_scalar(name, value, self._held_step)
        self._held = {}


class RayGaugeSink:
    """Metrics as Ray gauges, for the Ray dashboard and any Prometheus that scrapes the cluster: ``reward/rule`` becomes
    ``skyrl_reward_rule``, tagged with the run."""

    def __init__(self, run: str) -> None:
        self.tags = {"run": run}
        self._gauges: dict[str, Any] = {}

    def log(self, step: int, metrics: Metrics) -> None:
        from ray.util.metrics import Gauge

        for name, value in ({"step": float(step)} | metrics).items():
            if name not in self._gauges:
                self._gauges[name] = Gauge("skyrl_" + re.sub(r"\W", "_", name), tag_keys=("run",))
            self._gauges[name].set(value, tags=self.tags)

    def close(self) -> None:
        """Gauges end with the process."""
