"""Which layers' routed experts stay in main memory beside a card, and the way to them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from fastdeploy_lite import formats
from fastdeploy_lite.checkpoint.linears import model_linears
from fastdeploy_lite.config import ExpertOffloadConfig, RuntimeConfig
from fastdeploy_lite.model_executor.backend import paddle
from fastdeploy_lite.model_executor.ops import ExpertWeight, HostLink, HostWeight
from fastdeploy_lite.model_executor.workspace import Workspace
from fastdeploy_lite.models.family import ModelConfig
from fastdeploy_lite.utils.errors import ConfigError

log = logging.getLogger(__name__)
GIB = 1 << 30
NO_LINKS: Mapping[int, HostLink] = MappingProxyType({})
GRAPH_SIZES = tuple(range(1, 9))
"""Batches worth a graph. Each by itself, since the CPU would read a padding row's experts, too;
larger steps keep it busy for so long that launching kernels one by one does not count."""


def host_links(config: RuntimeConfig, place: Any) -> dict[int, HostLink]:
    """Return the layers whose routed experts stay in main memory, each with the way there.

    Empty where none do, or where `place` is main memory.

    Raises:
        ConfigError: the model has no experts, or fewer layers with experts than are to stay.
    """
    if config.expert_offload is None:
        return {}
    layers = host_layers(config.expert_offload, config.model)
    link = open_link(place) if layers else None  # a large budget leaves none
    if link is None:
        return {}
    log.info(
        "routed experts of layers %d to %d stay in main memory, computed by the CPU",
        layers[0], layers[-1],
    )  # fmt: skip
    return dict.fromkeys(layers, link)


def open_link(place: Any) -> HostLink | None:
    """Return the link of a card's place to main memory, None for main memory itself."""
    if place.is_cpu_place():
        return None
    from fastdeploy_lite.model_executor.cuda_host_link import CudaHostLink  # noqa: PLC0415

    return CudaHostLink(Workspace(paddle.CPUPlace()))


@contextlib.contextmanager
def muted(links: Mapping[int, HostLink]) -> Iterator[None]:
    """Leave the host's work out meanwhile."""
    for link in links.values():
        link.is_mute = True
    try:
        yield
    finally:
        for link in links.values():
            link.is_mute = False


def host_layers(wanted: ExpertOffloadConfig, model: ModelConfig) -> list[int]:
    """Return the layers whose experts stay in main memory, ascending.

    Raises:
        ConfigError: see `host_links`.
    """
    sizes = expert_nbytes(model)
    if not sizes:
        raise ConfigError(f"moe_device cpu: {model.source}: this model has no routed experts")
    layers = sorted(sizes)
    if wanted.cpu_layers is not None and wanted.cpu_layers > len(layers):
        raise ConfigError(
            f"cpu_moe_layers must be at most {len(layers)}, the layers of this model that have "
            f"experts, got {wanted.cpu_layers}"
        )
    if wanted.card_gib is None:
        return layers[: wanted.cpu_layers]
    room = wanted.card_gib * GIB
    while layers and sizes[layers[-1]] <= room:
        room -= sizes[layers.pop()]
    return layers


def expert_nbytes(model: ModelConfig) -> dict[int, int]:
    """Return the bytes of all routed experts of each layer that has some, as files keep them.

    A card's layout takes up to 2 % more.
    """
    sizes: dict[int, int] = {}
    for linear in model_linears(model):
        if linear.expert is not None:
            nbytes = formats.get(linear.kind).nbytes(linear.in_features, linear.out_features)
            sizes[linear.layer] = sizes.get(linear.layer, 0) + nbytes
    return sizes


def offloaded_nbytes(model: ModelConfig, layers: Iterable[int]) -> int:
    """Return the bytes of the routed experts of `layers`."""
    sizes = expert_nbytes(model)
    return sum(sizes[layer] for layer in layers)


def by_place(weights: Iterable[ExpertWeight]) -> tuple[list[ExpertWeight], list[ExpertWeight]]:
    """Return the experts that are where the layers are, and those in main memory beside a card."""
    here: list[ExpertWeight] = []
    offloaded: list[ExpertWeight] = []
    for weight in weights:
        (offloaded if isinstance(weight, HostWeight) else here).append(weight)
    return here, offloaded
