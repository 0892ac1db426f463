"""A Grafana board over the gauges that a run exports through Ray (``monitoring.ray_metrics``), and the few files that
make Prometheus and Grafana show it. ``python -m skyrl.grafana`` writes them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from skyrl.monitoring.records import write_text_atomically

UID = "skyrl-runs"
SERVICE_DISCOVERY = "/tmp/ray/prom_metrics_service_discovery.json"
"""Where a Ray head writes the addresses of the hosts' metrics."""
WIDTH, HEIGHT = 8, 7
"""Of a panel, in Grafana's grid of 24 columns."""


def gauge_name(metric: str) -> str:
    """The gauge of a metric, as the run names it: ``skyrl_reward_rule``. Ray puts ``ray_`` before it."""
    return "skyrl_" + re.sub(r"\W", "_", metric)


@dataclass(slots=True, frozen=True)
class Panel:
    """One chart."""

    title: str
    series: dict[str, str]
    """Legend → metric of the table (:mod:`skyrl.monitoring.metrics`), or a query of Ray's own gauges."""
    unit: str = "short"
    """Grafana's name of it."""
    stacked: bool = False
    log: bool = False
    limits: dict[str, float] = field(default_factory=dict)
    """``min`` and ``max`` of the axis."""


def _share(title: str, **series: str) -> Panel:
    return Panel(title, series, "percentunit", limits={"min": 0, "max": 1})


ROWS: dict[str, list[Panel]] = {
    "Learning": [
        Panel("Reward", {"total": "reward/total", "rule": "reward/rule", "format": "reward/format"}),
        _share("Accuracy", sampled="reward/accuracy", evaluation="eval/accuracy"),
        _share("Answers with a false claim", sampled="hallucination/rate", evaluation="eval/hallucination"),
        Panel("Reward model (raw)", {"sampled": "reward/model", "evaluation": "eval/reward_model"}),
        Panel("Answer tokens", {"sampled": "response/length_mean", "evaluation": "eval/length_mean"}),
        _share("Cut off by the limit", sampled="response/truncated_share", evaluation="eval/truncated_share"),
        Panel("Loss", {"total": "loss/total", "GRPO": "loss/grpo", "MPO": "loss/mpo"}),
        Panel("Entropy, KL to the sampling policy", {"entropy": "learner/entropy", "KL": "grpo/kl_behaviour"}),
        Panel("Gradient norm", {"norm": "learner/grad_norm"}),
    ],
    "Where the time goes": [
        Panel(
            "Laps of a step",
            {lap: f"time/{lap}" for lap in ("rollout", "reward", "blind", "buffer", "learner", "sync")},
            "s",
            stacked=True,
        ),
        Panel("Sampling beside the learner", {"seconds": "overlap/rollout"}, "s"),
        Panel("Throughput", {"tokens/s": "throughput/tokens_per_second", "samples/s": "throughput/samples_per_second"}),
    ],
    "Selective Sample Buffer and lag": [
        _share("Effective share", fresh="buffer/effective_share_fresh", with_SSB="buffer/effective_share"),
        Panel("Samples", {"in the buffer": "buffer/size", "replayed": "buffer/replayed", "batch": "batch/items"}),
        Panel(
            "Age in policy versions",
            {"replayed, mean": "buffer/age_mean", "replayed, oldest": "buffer/age_max", "fresh": "batch/lag_mean"},
        ),
    ],
    "Weight sync": [
        Panel("Gap on the probe, nats", {"largest": "sync/logprob_gap", "limit": "sync/logprob_gap_limit"}, log=True),
        Panel("Time and size", {"seconds": "sync/seconds", "MB": "sync/megabytes"}),
        Panel("Sent a second time; not scored", {"syncs": "sync/retries", "answers": "reward/errors"}),
    ],
    "Cluster (all runs on it)": [
        Panel("CPU", {"{{instance}}": "ray_node_cpu_utilization"}, "percent", limits={"min": 0, "max": 100}),
        Panel("Memory used", {"{{instance}}": "ray_node_mem_used / ray_node_mem_total"}, "percentunit"),
        Panel("GPU", {"{{instance}} {{GpuIndex}}": "ray_node_gpus_utilization"}, "percent"),
        Panel("Object store", {"{{Location}}": "sum by (Location) (ray_object_store_memory)"}, "bytes", stacked=True),
        Panel("Free disk", {"{{instance}}": "ray_node_disk_free"}, "bytes"),
        Panel("Actors", {"{{State}}": "sum by (State) (ray_actors)"}, stacked=True),
    ],
}
NOW = {
    "Step": ("step", "none"),
    "Alarms on": ("alarms", "none"),
    "Seconds a step": ("time/step", "s"),
    "Evaluation": ("eval/accuracy", "percentunit"),
    "Effective with SSB": ("buffer/effective_share", "percentunit"),
    "Tokens a second": ("throughput/tokens_per_second", "none"),
    "Sync gap, nats": ("sync/logprob_gap", "sci"),
}
"""Title → metric and unit, of the numbers on top."""


def board() -> dict[str, Any]:
    """The board, as Grafana reads it from a file."""
    source = {"type": "prometheus", "uid": "${source}"}
    panels = list(_panels(source))
    for number, panel in enumerate(panels, start=1):
        panel["id"] = number
    return {
        "uid": UID,
        "title": "skyrl",
        "tags": ["skyrl", "ray"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus", "current": {}},
                {
                    "name": "run",
                    "label": "Run",
                    "type": "query",
                    "datasource": source,
                    "query": {"query": "label_values(ray_skyrl_step, run)", "refId": "run"},
                    "refresh": 2,
                    "multi": True,
                    "includeAll": True,
                    "allValue": ".*",
                    "current": {"text": "All", "value": "$__all"},
                },
            ]
        },
        "panels": panels,
    }


def queries(run: str = ".*") -> list[str]:
    """Every query of the board, with the run in its place."""
    found = [target["expr"] for panel in board()["panels"] for target in panel.get("targets", [])]
    return [query.replace("$run", run) for query in found]


def _query(series: str) -> str:
    return series if series.startswith(("ray_", "sum ")) else f'ray_{gauge_name(series)}{{run=~"$run"}}'


def _panels(source: dict[str, str]) -> Iterator[dict[str, Any]]:
    for place, (title, (metric, unit)) in enumerate(NOW.items()):
        yield {
            "type": "stat",
            "title": title,
            "datasource": source,
            "gridPos": {"x": 24 // len(NOW) * place, "y": 0, "w": 24 // len(NOW), "h": 4},
            "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
            "options": {"reduceOptions": {"calcs": ["lastNotNull"]}, "textMode": "value"},
            "targets": [{"refId": "A", "datasource": source, "expr": _query(metric), "legendFormat": "{{run}}"}],
        }
    top = 4
    for row, panels in ROWS.items():
        yield {"type": "row", "title": row, "collapsed": False, "gridPos": {"x": 0, "y": top, "w": 24, "h": 1}}
        for place, panel in enumerate(panels):
            across, down = place % (24 // WIDTH), place // (24 // WIDTH)
            at = {"x": across * WIDTH, "y": top + 1 + down * HEIGHT, "w": WIDTH, "h": HEIGHT}
            yield _chart(panel, source) | {"gridPos": at}
        top += 1 + -(-len(panels) // (24 // WIDTH)) * HEIGHT


def _chart(panel: Panel, source: dict[str, str]) -> dict[str, Any]:
    look: dict[str, Any] = {"lineWidth": 2, "showPoints": "never", "fillOpacity": 30 if panel.stacked else 0}
    look |= {"stacking": {"mode": "normal"}} if panel.stacked else {}
    look |= {"scaleDistribution": {"type": "log", "log": 10}} if panel.log else {}
    targets = [
        {
            "refId": chr(ord("A") + place),
            "datasource": source,
            "expr": (query := _query(series)),
            "legendFormat": f"{legend}, {{{{run}}}}" if "$run" in query else legend,
        }
        for place, (legend, series) in enumerate(panel.series.items())
    ]
    return {
        "type": "timeseries",
        "title": panel.title,
        "datasource": source,
        "fieldConfig": {"defaults": {"unit": panel.unit, "custom": look, **panel.limits}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": targets,
    }


def write_board(folder: Path, prometheus: str, discovery: str = SERVICE_DISCOVERY) -> None:
    """Write everything that Prometheus and Grafana need to show the board.

    Args:
        prometheus: Address at which Grafana finds Prometheus.
        discovery: File in which Ray's head writes whom to scrape.
    """
    folder = folder.absolute()
    source = {"name": "Prometheus", "type": "prometheus", "access": "proxy", "url": prometheus, "isDefault": True}
    provider = {"name": "skyrl", "type": "file", "options": {"path": str(folder / "dashboards")}}
    scrape = {"job_name": "ray", "scrape_interval": "5s", "file_sd_configs": [{"files": [discovery]}]}
    files = {
        "prometheus.yml": _yaml({"scrape_configs": [scrape]}),
        "grafana.ini": f"[server]\nhttp_addr = 127.0.0.1\n\n[paths]\nprovisioning = {folder / 'provisioning'}\n"
        f"data = {folder / 'data'}\n",
        "provisioning/datasources/skyrl.yml": _yaml({"apiVersion": 1, "datasources": [source]}),
        "provisioning/dashboards/skyrl.yml": _yaml({"apiVersion": 1, "providers": [provider]}),
        "dashboards/skyrl.json": json.dumps(board(), indent=2) + "\n",
    }
    for name, text in files.items():
        write_text_atomically(folder / name, text)


def _yaml(value: Any) -> str:
    return str(yaml.safe_dump(value, sort_keys=False))
