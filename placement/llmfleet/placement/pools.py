"""Pools of the same hardware: what was measured in one holds in the others.

    GPUTypes, some of them with spec.sameHardwareAs --with_figures--> hardware and watts filled in from the other type
    ModelProfiles --with_measurements--> measurements and corrections repeated under the names of such pools

A pool is a GPUType: nodes with a price, a limit and an inventory of their own, such as the spot nodes of one zone. The
planner knows types only, so what pools share is copied to each of them once, before anything else looks at it, and
nothing after that needs to know. What a pool has itself goes before what it takes over.

Nothing is taken over from a type with other memory (more memory holds more requests: the measurement would promise too
much) or from one that is itself a pool of another. Of a type that is gone, the measurements still count: they are the
profile's, and engines must not be lost with an object that nobody needs any more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from llmfleet.api import GPUType, Measurement, ModelProfile
from llmfleet.api.gputype import objection
from llmfleet.api.modelprofile import Correction

_Entry = TypeVar("_Entry", Measurement, Correction)


def with_figures(gpu_types: Sequence[GPUType]) -> list[GPUType]:
    """The types, pools with the published figures and the power of their hardware where they have none of their own."""
    by_name = {gpu_type.metadata.name: gpu_type for gpu_type in gpu_types}
    found = []
    for gpu_type in gpu_types:
        other = by_name.get(_hardware(gpu_type, by_name))
        if other is not None and other is not gpu_type:
            spec = gpu_type.spec
            figures = {"hardware": spec.hardware or other.spec.hardware, "watts": spec.watts or other.spec.watts}
            gpu_type = gpu_type.model_copy(update={"spec": spec.model_copy(update=figures)})
        found.append(gpu_type)
    return found


def with_measurements(profiles: Sequence[ModelProfile], gpu_types: Iterable[GPUType]) -> list[ModelProfile]:
    """The profiles, with what they have of some hardware under the name of each of its pools as well."""
    by_name = {gpu_type.metadata.name: gpu_type for gpu_type in gpu_types}
    pools: dict[str, list[str]] = {}
    for name, gpu_type in sorted(by_name.items()):
        hardware = _hardware(gpu_type, by_name)
        if hardware != name:
            pools.setdefault(hardware, []).append(name)
    return [_repeated(profile, pools) for profile in profiles] if pools else list(profiles)


def _hardware(gpu_type: GPUType, by_name: Mapping[str, GPUType]) -> str:
    same = gpu_type.spec.same_hardware_as
    return gpu_type.metadata.name if same is None or objection(gpu_type, by_name) else same


def _repeated(profile: ModelProfile, pools: Mapping[str, Sequence[str]]) -> ModelProfile:
    measured = [*profile.spec.measurements, *_others(profile.spec.measurements, pools)]
    learnt = [*profile.status.corrections, *_others(profile.status.corrections, pools)]
    if (len(measured), len(learnt)) == (len(profile.spec.measurements), len(profile.status.corrections)):
        return profile
    spec = profile.spec.model_copy(update={"measurements": measured})
    status = profile.status.model_copy(update={"corrections": learnt})
    return profile.model_copy(update={"spec": spec, "status": status})


def _others(entries: Sequence[_Entry], pools: Mapping[str, Sequence[str]]) -> list[_Entry]:
    """The entries of hardware that has pools, under the pools' names, but for what these have themselves."""

    def key(entry: _Entry, name: str) -> tuple[str, int, int, str]:
        return name, entry.tensor_parallel, entry.pipeline_parallel, entry.configuration

    own = {key(entry, entry.gpu_type) for entry in entries}
    return [
        entry.model_copy(update={"gpu_type": name})
        for entry in entries
        for name in pools.get(entry.gpu_type, ())
        if key(entry, name) not in own
    ]
