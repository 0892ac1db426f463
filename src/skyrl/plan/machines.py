"""GPUs by their published figures, and the description of a cluster."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, NamedTuple

import yaml
from pydantic import Field, NonNegativeInt, PositiveFloat, ValidationError

from skyrl.records import ConfigError
from skyrl.schema import Count, Settings
from skyrl.simulate.cost import problems

GIB = 2.0**30


class Card(NamedTuple):
    """A GPU as its maker publishes it. None of these figures was measured here."""

    memory_gib: float
    """What its maker calls GB; NVIDIA's tools show them as GiB, less about 1."""
    tflops: float
    """bfloat16 on tensor cores, without sparsity, 10^12 operations a second."""
    bandwidth: float
    """Of its memory, 10^9 bytes a second."""
    link: float
    """To the other GPUs of its node, one direction, 10^9 bytes a second."""
    source: str


CARDS = {
    "A100-40GB": Card(40, 312, 1555, 300, "NVIDIA A100 datasheet, SXM"),
    "A100-80GB": Card(80, 312, 2039, 300, "NVIDIA A100 datasheet, SXM"),
    "H100-SXM": Card(80, 989, 3350, 450, "NVIDIA H100 datasheet (1,979 with sparsity)"),
    "H100-PCIe": Card(80, 756, 2000, 64, "NVIDIA H100 datasheet (1,513 with sparsity)"),
    "H200": Card(141, 989, 4800, 450, "NVIDIA H200 datasheet, SXM (1,979 with sparsity)"),
    "B200": Card(180, 2250, 8000, 900, "NVIDIA DGX B200 datasheet, an eighth of it"),
    "L40S": Card(48, 362, 864, 32, "NVIDIA L40S datasheet (733 with sparsity); PCIe"),
    "L4": Card(24, 121, 300, 32, "NVIDIA L4 datasheet (242 with sparsity); PCIe"),
    "A10": Card(24, 125, 600, 32, "NVIDIA A10 datasheet; PCIe"),
    "RTX-4090": Card(24, 165, 1008, 32, "NVIDIA Ada architecture white paper; PCIe"),
}
SHORT = re.compile(r"(\d+)x(\d+)x([\w-]+)")
"""``5x8xH100-SXM``: nodes, GPUs of a node, card."""


class Machines(Settings):
    """A cluster of equal nodes."""

    nodes: Count = 1
    gpus: NonNegativeInt = 0
    """GPUs of a node."""
    gpu: str | None = None
    """One of :data:`CARDS`, or any name if the next four are given; null without GPUs."""
    gpu_memory_gib: PositiveFloat | None = None
    """Of one GPU; null means the card's. Likewise the next three."""
    gpu_tflops: PositiveFloat | None = None
    gpu_bandwidth: PositiveFloat | None = None
    gpu_link: PositiveFloat | None = None
    cpus: Count | None = None
    """Cores of a node; null means 12 for each of its GPUs."""
    memory_gib: PositiveFloat | None = None
    """Host memory of a node; null means 128 for each of its GPUs."""
    network_gbit: Annotated[float, Field(gt=0)] = 400.0
    """Between nodes, for each GPU, 10^9 bits a second, one direction."""

    @property
    def card(self) -> Card:
        """Of each GPU. Raises ConfigError for an unknown one."""
        own = self.gpu_memory_gib, self.gpu_tflops, self.gpu_bandwidth, self.gpu_link
        known = CARDS.get(self.gpu or "")
        if known is None and None in own:
            raise ConfigError(
                f"cluster: gpu={self.gpu or ''} is not known; allowed: {', '.join(CARDS)}; or give gpu_memory_gib, "
                "gpu_tflops, gpu_bandwidth and gpu_link of a card of your own"
            )
        base = known or Card(0, 0, 0, 0, "the cluster's description")
        memory, tflops, bandwidth, link = (a if a is not None else b for a, b in zip(own, base[:4], strict=True))
        return Card(memory, tflops, bandwidth, link, base.source)

    @property
    def node_cpus(self) -> int:
        return self.cpus or 12 * self.gpus

    @property
    def node_memory(self) -> float:
        """Bytes of host memory of a node."""
        return (self.memory_gib or 128.0 * self.gpus) * GIB

    def ray_nodes(self) -> list[dict[str, dict[str, float]]]:
        """As ``ray.nodes()`` would list them, as far as placement looks."""
        return [{"Resources": {"CPU": float(self.node_cpus), "GPU": float(self.gpus)}} for _ in range(self.nodes)]


def read_machines(text: str) -> Machines:
    """A cluster by its short form, ``5x8xH100-SXM``, or a YAML file of the fields of :class:`Machines`.

    Raises:
        ConfigError: naming what is wrong, and what is allowed.
    """
    if short := SHORT.fullmatch(text):
        data: object = {"nodes": int(short[1]), "gpus": int(short[2]), "gpu": short[3]}
    elif Path(text).is_file():
        try:
            data = yaml.safe_load(Path(text).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"cluster={text}: no YAML: {' '.join(str(error).split())}") from error
    else:
        raise ConfigError(
            f"cluster={text}: must be nodes x GPUs x card, such as 5x8xH100-SXM, or a YAML file; no such file exists; "
            f"cards: {', '.join(CARDS)}"
        )
    if not isinstance(data, dict):
        raise ConfigError(
            f"cluster={text}: must hold fields such as nodes: 5; allowed: {', '.join(Machines.model_fields)}"
        )
    try:
        found = Machines.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"cluster={text}: {problems(error)}; allowed: {', '.join(Machines.model_fields)}") from error
    if found.gpus:
        found.card  # noqa: B018 -- an unknown one is refused here
    elif found.cpus is None or found.memory_gib is None:
        raise ConfigError(f"cluster={text}: without GPUs, cpus and memory_gib of a node must be given")
    return found
