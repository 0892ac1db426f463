"""Where the numbers of each step go: a file, Weights & Biases, TensorBoard, and a fan-out to several sinks."""

from __future__ import annotations

import json
import logging
import netrc
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from skyrl.monitoring.board import gauge_name
from skyrl.monitoring.console import ConsoleSink as ConsoleSink
from skyrl.monitoring.events import ALARM, OVER
from skyrl.monitoring.lines import LineFile
from skyrl.monitoring.metrics import METRICS, MetricInfo, check_names
from skyrl.monitoring.records import jsonable, read_metrics, write_text_atomically
from skyrl.monitoring.sink import MetricSink as MetricSink
from skyrl.records import ConfigError, Event, Metrics
from skyrl.redaction import redacted
from skyrl.settings import WandbMode

logger = logging.getLogger(__name__)


class Sinks(MetricSink):
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

    def event(self, event: Event) -> None:
        """Pass it on to every sink."""
        for sink in self._sinks:
            sink.event(event)

    def rewind(self, step: int) -> None:
        """Let every sink go back to ``step``."""
        for sink in self._sinks:
            sink.rewind(step)

    def close(self) -> None:
        """Close every sink, the later ones also when an earlier one fails."""
        with ExitStack() as stack:
            for sink in reversed(self._sinks):
                stack.callback(sink.close)


class JsonlSink(MetricSink):
    """Appends one JSON object per call to a :class:`LineFile`: neither a killed run nor one on a full disk loses any.
    Infinity and NaN, which JSON has not, become ``null``."""

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        """Start an empty file. A run that goes on from the checkpoint of step ``resume_step`` keeps what is there, but
        for the later steps, which will be done again."""
        self._path = path
        self._open(-1 if resume_step is None else resume_step)

    def _open(self, last_step: int) -> None:
        """Begin with what is there of the steps up to ``last_step``."""
        kept = read_metrics(self._path) if last_step >= 0 and self._path.exists() else []
        lines = (json.dumps(record) + "\n" for record in kept if record["step"] <= last_step)
        write_text_atomically(self._path, "".join(lines))
        self._file = LineFile(self._path)

    def rewind(self, step: int) -> None:
        """Let go of the later steps."""
        self._file.cut(lambda line: bool(json.loads(line)["step"] <= step))

    def log(self, step: int, metrics: Metrics) -> None:
        """Write one line."""
        self._file.write(json.dumps({"step": step, **jsonable(metrics)}, allow_nan=False))

    def close(self) -> None:
        """Close the file; SkyrlError if it lacks lines."""
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


class WandbSink(MetricSink):
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
        told = redacted({"project": project, "name": name, "config": jsonable(config or {})})
        arguments = {"dir": str(run_dir), **told}
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
    # Its metadata would hold the command line.
    own_files = {"save_code": False, "disable_code": True, "disable_git": True, "x_disable_meta": True}
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


class TensorboardSink(MetricSink):
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
        self._folder = run_dir / "tensorboard"
        self._open(resume_step)
        again = [record for record in history if record["step"] == resume_step]
        self._held: Metrics = {k: v for record in again for k, v in record.items() if k != "step" and v is not None}
        self._held_step = resume_step

    def _open(self, purge_step: int | None) -> None:
        from tensorboardX import SummaryWriter

        others = set(threading.enumerate())
        purge = {} if purge_step is None else {"purge_step": purge_step}
        # A queue without end: one that is full would block this process for good when the writer's thread has died.
        self._writer: Any = SummaryWriter(str(self._folder), max_queue=0, **purge)
        self._threads = set(threading.enumerate()) - others

    def rewind(self, step: int) -> None:
        """Start another file, which purges the later steps from those before."""
        self.close()
        self._open(step + 1)

    def log(self, step: int, metrics: Metrics) -> None:
        """Hand the numbers to the writer's own thread."""
        if step != self._held_step:
            self._write_held()
        for name in metrics:
            self._held.pop(name, None)
        self._write(step, metrics)

    def close(self) -> None:
        """Write what is left."""
        self._write_held()
        if self._writes():
            self._writer.close()
        self._writer = None

    def _write_held(self) -> None:
        self._write(self._held_step, self._held)
        self._held = {}

    def _write(self, step: int | None, metrics: Metrics) -> None:
        for name, value in metrics.items() if self._writes() else ():
            self._writer.add_scalar(name, value, step)

    def _writes(self) -> bool:
        """False, and a warning at first, when the writer's thread has died: it does so on a full disk."""
        if self._writer is not None and not all(thread.is_alive() for thread in self._threads):
            logger.warning("nothing more is written to %s: its disk is full; metrics.jsonl has all", self._folder)
            # Else the end of this process would wait until somebody has read what is queued.
            self._writer.file_writer.event_writer._event_queue.cancel_join_thread()
            self._writer = None
        return self._writer is not None


class RayGaugeSink(MetricSink):
    """Metrics as Ray gauges, for the Ray dashboard and any Prometheus that scrapes the cluster: ``reward/rule`` becomes
    ``skyrl_reward_rule``, tagged with the run."""

    def __init__(self, run: str) -> None:
        self.tags = {"run": run}
        self._gauges: dict[str, Any] = {}
        self._alarms: set[str] = set()

    def event(self, event: Event) -> None:
        """``skyrl_alarms`` is how many are on."""
        if event.kind in (ALARM, OVER):
            (self._alarms.add if event.kind == ALARM else self._alarms.discard)(event.member)
            self._set({"alarms": float(len(self._alarms))})

    def log(self, step: int, metrics: Metrics) -> None:
        """Set a gauge for each."""
        self._set({"step": float(step), "alarms": float(len(self._alarms))} | metrics)

    def _set(self, values: Metrics) -> None:
        from ray.util.metrics import Gauge

        for name, value in values.items():
            if name not in self._gauges:
                self._gauges[name] = Gauge(gauge_name(name), tag_keys=("run",))
            self._gauges[name].set(value, tags=self.tags)
