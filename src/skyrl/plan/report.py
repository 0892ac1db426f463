"""The plan as tables for people, and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from skyrl.plan import speed
from skyrl.plan.foretell import Foretold, host_bytes
from skyrl.plan.machines import GIB, Machines
from skyrl.plan.memory import Bill, Figure, total
from skyrl.settings import Config

COLOURS = {"measured": "green", "computed": "cyan", "assumed": "yellow"}


def show(console: Console, cfg: Config, machines: Machines, found: Foretold) -> None:
    """Print everything."""
    console.print(_models(found))
    console.print(_machines(machines), highlight=False)
    for kind, bill in found.bills.items():
        _bill(console, cfg, machines, kind, bill)
    console.print(_places(machines, found))
    for problem in found.problems:
        console.print(Text(f"does not fit: {problem}", "bold red"))
    for one in found.advice:
        console.print(Text(f"what would help: {one}", "yellow"))
    if not found.problems:
        console.print(Text("everything fits", "bold green"))
    if found.step is not None:
        _step(console, cfg, found)
    elif not found.problems:
        console.print(
            "step time: not foretold, for a step on CPUs has no data sheet; --costs names a file of measured ones"
        )


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    for name in columns:
        numbers = name in ("GiB", "parameters", "trained", "seconds")
        table.add_column(name, justify="right" if numbers else "left", no_wrap=numbers)
    return table


def _source(source: str) -> Text:
    return Text(source, COLOURS[source])


def _models(found: Foretold) -> Table:
    table = _table("model", "parameters", "trained", "vision", "adapter", "language", "read from")
    for kind, shape in (("policy", found.models.policy), ("reward model", found.models.judge)):
        if shape is not None:
            parts = (f"{shape.by_part[part]:,}" for part in ("vision", "adapter", "language"))
            table.add_row(kind, f"{shape.parameters:,}", f"{shape.trained:,}", *parts, shape.source)
    return table


def _machines(machines: Machines) -> str:
    cpus = "" if machines.cpus else " (assumed: 12 a GPU)"
    memory = "" if machines.memory_gib else " (assumed: 128 a GPU)"
    said = f"\ncluster: {machines.nodes} nodes of {machines.node_cpus} CPUs{cpus} and "
    said += f"{machines.node_memory / GIB:,.0f} GiB{memory}"
    if machines.gpus:
        card = machines.card
        said += f", {machines.gpus} x {machines.gpu}: {card.memory_gib:g} GiB, {card.tflops:g} TFLOPS in bfloat16, "
        said += f"{card.bandwidth:g} GB/s, {card.link:g} GB/s within a node ({card.source}); "
        said += f"{machines.network_gbit:g} Gbit/s a GPU between nodes"
    return said


def _bill(console: Console, cfg: Config, machines: Machines, kind: str, bill: Bill) -> None:
    count = getattr(cfg, kind).num_workers
    for where, figures in (("GPU", bill.device), ("host", bill.host)):
        if not figures:
            continue
        table = _table(f"{kind}, each of {count}, {where}", "GiB", "", "how")
        for one in figures:
            if one.bytes:
                table.add_row(one.part, f"{one.bytes / GIB:.2f}", _source(one.source), one.how)
        of = f" of {machines.card.memory_gib:g}" if where == "GPU" else ""
        table.add_row("together", f"{total(figures) / GIB:.2f}{of}", Text(""), "", style="bold")
        console.print("", table)


def _places(machines: Machines, found: Foretold) -> Table:
    table = _table("node", "members", "free GPUs", "free CPUs", f"host GiB of {machines.node_memory / GIB:,.0f}")
    table.title = "\nplaces (computed; Ray may number the nodes in another order)"
    table.title_justify = "left"
    rows: dict[tuple[str, ...], list[int]] = {}
    for number, node in enumerate(found.nodes):
        counts = Counter(" + ".join(p.rpartition("-")[0] for p in member.split(" + ")) for member in node.members)
        members = ", ".join(f"{n} {kind}" for kind, n in counts.items())
        host = f"{host_bytes(node, found.bills) / GIB:,.0f}"
        rows.setdefault((members, f"{node.gpus:g}", f"{node.cpus:g}", host), []).append(number)
    for row, numbers in rows.items():
        table.add_row(_ranges(numbers), *row)
    return table


def _ranges(numbers: list[int]) -> str:
    """``[0, 2, 3, 4]`` → ``0, 2-4``."""
    found, start = list[str](), 0
    for end in range(1, len(numbers) + 1):
        if end == len(numbers) or numbers[end] != numbers[end - 1] + 1:
            first, last = numbers[start], numbers[end - 1]
            found.append(str(first) if first == last else f"{first}-{last}")
            start = end
    return ", ".join(found)


def _step(console: Console, cfg: Config, found: Foretold) -> None:
    table = _table("speed", "value", "", "how")
    for one in found.rates:
        table.add_row(one.name, one.value, _source(one.source), one.how)
    console.print("", table)
    assert found.step is not None
    laps = _table("a step", "seconds")
    for name, seconds in found.step.laps.items():
        laps.add_row(name, f"{seconds:.1f}")
    laps.add_row("time/step", f"{found.step.mean_step:.1f}", style="bold")
    console.print("", laps)
    hours = found.step.mean_step * cfg.controller.steps / 3600
    console.print(
        f"{cfg.controller.steps} steps: {hours:,.1f} hours, evaluations and checkpoints not counted. The real loop, "
        f"simulated for {speed.STEPS} steps; engines sample {found.step.rollout_busy:.0%} of the time, the learner "
        f"trains {found.step.learner_busy:.0%}",
        highlight=False,
    )


def as_json(cfg: Config, machines: Machines, found: Foretold) -> dict[str, Any]:
    """Everything, plain."""

    def plain(figures: Iterable[Figure]) -> list[dict[str, Any]]:
        return [one._asdict() for one in figures]

    step = found.step
    return {
        "name": cfg.name,
        "models": {
            kind: None if shape is None else {name: getattr(shape, name) for name in shape.__slots__}
            for kind, shape in (("policy", found.models.policy), ("reward", found.models.judge))
        },
        "cluster": machines.model_dump() | ({"card": machines.card._asdict()} if machines.gpus else {}),
        "members": {
            kind: {"count": getattr(cfg, kind).num_workers, "device": plain(bill.device), "host": plain(bill.host)}
            for kind, bill in found.bills.items()
        },
        "cache_tokens": found.cache.tokens,
        "nodes": [node.members for node in found.nodes],
        "problems": found.problems,
        "advice": found.advice,
        "rates": [one._asdict() for one in found.rates],
        "step": None if step is None else {"seconds": step.mean_step, "laps": step.laps},
    }
