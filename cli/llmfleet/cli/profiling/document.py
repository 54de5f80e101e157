"""A measurement or an architecture as YAML: by itself, or put in its place in a ModelProfile."""

from __future__ import annotations

from typing import Any

import yaml
from pydantic import ValidationError

from llmfleet.api import (
    DEFAULT_CONFIGURATION,
    Architecture,
    Buckets,
    Configuration,
    Measurement,
    ModelProfile,
)
from llmfleet.cli.refused import RefusedError


def measurement_yaml(measurement: Measurement) -> str:
    """A list with one item, as it stands under `spec.measurements` of a ModelProfile."""
    return _dump([measurement.to_wire()])


def buckets_of(profile_yaml: str, name: str) -> Buckets:
    """The buckets that a ModelProfile wants to be measured. `name`: how errors call the file.

    Raises RefusedError if the text is not one valid ModelProfile.
    """
    return _parsed(_document(profile_yaml, name), name).spec.buckets


def merge_measurement(profile_yaml: str, measurement: Measurement, name: str) -> str:
    """The ModelProfile with this measurement in place of the one of the same variant, or added to the others.

    Comments above the document stay; those inside it do not survive. Raises RefusedError if the text is not one
    valid ModelProfile, does not have the measurement's configuration, or has a bucket that was not measured.
    """
    document = _document(profile_yaml, name)
    profile = _parsed(document, name)
    measured = {(point.input_tokens, point.output_tokens) for point in measurement.points}
    buckets = profile.spec.buckets
    if missing := [corner for corner in map(buckets.edges, range(buckets.count)) if corner not in measured]:
        listed = ", ".join(f"input {i} output {o}" for i, o in missing)
        raise RefusedError(f"{name}: spec.buckets has corners that were not measured: {listed}")
    chosen_configuration(profile, measurement.configuration, name)
    others = [m.to_wire() for m in profile.spec.measurements if _variant(m) != _variant(measurement)]
    document["spec"]["measurements"] = [*others, measurement.to_wire()]
    return _leading_comments(profile_yaml) + _dump(document)


def configuration_of(profile_yaml: str, configuration: str, name: str) -> Configuration | None:
    """The ModelProfile's configuration of this name, None for the default one. Raises RefusedError as `buckets_of`, and
    where the profile does not have it."""
    return chosen_configuration(_parsed(_document(profile_yaml, name), name), configuration, name)


def model_of(profile_yaml: str, name: str) -> str:
    """The model that a ModelProfile is about. Raises RefusedError as `buckets_of`."""
    return _parsed(_document(profile_yaml, name), name).spec.model


def chosen_configuration(profile: ModelProfile, configuration: str, name: str) -> Configuration | None:
    """The same of a profile that was read."""
    try:
        return profile.spec.configuration(configuration)
    except KeyError:
        known = ", ".join([DEFAULT_CONFIGURATION, *(one.name for one in profile.spec.configurations)])
        raise RefusedError(
            f"{name}: spec.configurations has no {configuration!r}; accepted are {known}. Write it there first, with "
            "its weightsGib"
        ) from None


def merge_architecture(profile_yaml: str, architecture: Architecture, name: str) -> str:
    """The ModelProfile with this architecture in place of the one it has, or added.

    Comments as in `merge_measurement`. Raises RefusedError if the text is not one valid ModelProfile.
    """
    document = _document(profile_yaml, name)
    _parsed(document, name)
    document["spec"]["architecture"] = architecture.to_wire()
    return _leading_comments(profile_yaml) + _dump(document)


def architecture_yaml(architecture: Architecture) -> str:
    """The architecture as it stands under `spec.architecture` of a ModelProfile."""
    return _dump(architecture.to_wire())


def _variant(measurement: Measurement) -> tuple[str, int, int, str]:
    one = measurement
    return one.gpu_type, one.tensor_parallel, one.pipeline_parallel, one.configuration


def _document(text: str, name: str) -> dict[str, Any]:
    try:
        documents = [document for document in yaml.safe_load_all(text) if document is not None]
    except yaml.YAMLError as error:
        raise RefusedError(f"{name}: not YAML: {' '.join(str(error).split())}") from error
    if len(documents) != 1 or not isinstance(documents[0], dict) or documents[0].get("kind") != ModelProfile.KIND:
        kinds = [d.get("kind") if isinstance(d, dict) else type(d).__name__ for d in documents]
        raise RefusedError(f"{name}: accepted is one ModelProfile, got {kinds}")
    return documents[0]


def _parsed(document: dict[str, Any], name: str) -> ModelProfile:
    try:
        return ModelProfile.parse(document, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise RefusedError(f"{name}: {field}: {first['msg']}") from error


def _leading_comments(text: str) -> str:
    lines = []
    for line in text.splitlines(keepends=True):
        if not line.startswith("#"):
            break
        lines.append(line)
    return "".join(lines)


def _dump(value: Any) -> str:
    text: str = yaml.safe_dump(value, sort_keys=False, default_flow_style=None, width=120)
    return text
