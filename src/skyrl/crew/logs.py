"""What a dead member's process wrote, kept in the run's folder. Ray's own session folder, where it lies, is on the
member's host and goes with that host."""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path
from typing import Any

import ray
from ray._private.state import state
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from skyrl.redaction import redact

logger = logging.getLogger(__name__)
TAIL = 64 * 1024
"""Bytes kept of each stream; what a process says of its end stands last."""
MOST = 1024 * 1024
"""Characters of one file: a member that dies often loses the oldest of its logs."""
ANSWER_SECONDS = 20.0
"""For another host to send its part."""


def keep_log(actor_id: str, folder: Path) -> Path | None:
    """Append the end of what the process of a dead actor wrote to ``folder/logs/MEMBER.log``, without secrets. vLLM and
    DeepSpeed write there too. Needs no Ray dashboard.

    Args:
        actor_id: Ray's id, hexadecimal.
        folder: The run's.

    Returns:
        The file; None if the actor never had a process, or nothing can be written there. Where the log can't be had,
        the file says where it lies and why.
    """
    about = state.actor_table(actor_id)
    if not about or not about["Pid"]:
        return None
    pid, address = about["Pid"], about["Address"]
    name = re.sub(r"\.\d+$", "", about["Name"] or actor_id)  # the second life of rollout-0 is called rollout-0.2
    when = time.strftime("%Y-%m-%d %H:%M:%S")
    text = f"===== {name}: process {pid} on {address['IPAddress']}, kept at {when}\n{_text(pid, address)}\n"
    file = folder / "logs" / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.log"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        before = file.read_text(encoding="utf-8") if file.is_file() else ""
        file.write_text((before + redact(text))[-MOST:], encoding="utf-8")
    except OSError as error:  # a full disk: whoever replaces the member must not fail for that
        logger.warning("the log of %s could not be kept: %s", name, error)
        return None
    return file


def _text(pid: int, address: dict[str, Any]) -> str:
    if address["NodeID"] == ray.get_runtime_context().get_node_id():
        return log_tail(pid)
    there = NodeAffinitySchedulingStrategy(address["NodeID"], soft=False)
    asked = ray.remote(log_tail).options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote(pid)
    try:
        return str(ray.get(asked, timeout=ANSWER_SECONDS))
    except ray.exceptions.RayError as error:
        ray.cancel(asked, force=True)
        why = " ".join(str(error).split()) or type(error).__name__
        lies = f"{_logs_folder()}/worker-*-{pid}.out and .err"
        return f"its log lies on {address['IPAddress']} as {lies}; that host did not send it: {why}"


def log_tail(pid: int) -> str:
    """The end of what a worker process of this host wrote, without this host's secrets."""
    logs, parts = _logs_folder(), []
    for stream in ("out", "err"):
        # A number that another process had before: the newest file counts.
        files = sorted(logs.glob(f"worker-*-{pid}.{stream}"), key=lambda file: file.stat().st_mtime)
        if files:
            parts.append(f"----- {files[-1].name}\n{_end(files[-1])}")
    return redact("\n".join(parts)) if parts else f"no log of process {pid} in {logs}"


def _logs_folder() -> Path:
    """Of the Ray session, on this host."""
    return Path(ray._private.worker._global_node.get_logs_dir_path())


def _end(file: Path) -> str:
    with file.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(max(0, size - TAIL))
        text = stream.read().decode("utf-8", errors="replace")
    return text if size <= TAIL else f"(the last {TAIL} of {size} bytes)\n{text}"
