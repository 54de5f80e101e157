"""Writes CRDs, reference pages and the published schemas of plan, forecast and messages from the models in `api/`.

    python crds/generate.py            writes crds/<plural>.llmfleet.io.yaml, docs/reference/<kind>.md
                                       and docs/reference/{plan,forecast,migration}.schema.json
    python crds/generate.py --check    writes nothing; exit code 1 and the names of the files that are not current

The models are the only place where a field, its default and its documentation are written, so nothing here knows a
field. Files that no kind accounts for any more are reported by `--check` and removed otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from llmfleet.api import API_VERSION, KINDS, Forecast, Plan, Resource
from llmfleet.api.document_schema import document_schema
from llmfleet.api.migration_messages import MESSAGES
from llmfleet.api.structural_schema import custom_resource_definition

ROOT = Path(__file__).resolve().parent.parent
CRDS = ROOT / "crds"
REFERENCE = ROOT / "docs" / "reference"
NOTICE = "Generated from api/ by crds/generate.py; do not edit."


def crd_file(kind: type[Resource]) -> str:
    """The CRD of a kind as a YAML file."""
    crd = custom_resource_definition(kind)
    _drop_unused_messages(crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"])
    body = yaml.safe_dump(crd, sort_keys=False, width=120, allow_unicode=True, default_flow_style=False)
    return f"# {NOTICE}\n{body}"


def _drop_unused_messages(node: dict[str, Any]) -> None:
    """Where a rule has an expression for its message, the API server does not say the fixed one, and a CRD has only
    30 KiB: last-applied annotations and the API server's own copies multiply it."""
    for rule in node.get("x-kubernetes-validations", ()):
        if "messageExpression" in rule:
            del rule["message"]
    for field in node.get("properties", {}).values():
        _drop_unused_messages(field)
    for below in ("items", "additionalProperties"):
        if isinstance(node.get(below), dict):
            _drop_unused_messages(node[below])


def reference_page(kind: type[Resource]) -> str:
    """The reference of a kind as a Markdown page: how to list it, what is refused, and a table of every field."""
    crd = custom_resource_definition(kind)
    schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    names = crd["spec"]["names"]
    scope = "namespaced" if kind.NAMESPACED else "cluster-scoped"
    listed = f"`kubectl get {names['plural']}`, in short `{'`, `'.join(names['shortNames'])}`"
    lines = [
        f"<!-- {NOTICE} -->",
        f"# {kind.KIND}",
        "",
        schema["description"],
        "",
        f"`{API_VERSION}`, {scope}. {listed}.",
        "",
    ]
    for part, heading in (("spec", "## Spec"), ("status", "## Status")):
        if part not in schema["properties"]:
            continue
        node = schema["properties"][part]
        lines += [heading, "", node["description"], ""]
        lines += ["| Field | Type | Default | Meaning |", "|---|---|---|---|"]
        lines += [
            f"| `{path}` | {_type(field)} | {default} | {_cell(field)} |" for path, field, default in _fields(node)
        ]
        lines.append("")
    rules = sorted(set(_rules(schema, "")))
    if rules:
        lines += ["## Refused at admission, beside types and ranges", ""]
        lines += [f"* {f'`{path}`: ' if path else ''}{message}" for path, message in rules]
        lines.append("")
    lines += ["## Columns of `kubectl get`", "", "| Column | Value | Shown |", "|---|---|---|"]
    for column in kind.PRINTER_COLUMNS:
        shown = "with `-o wide`" if column.priority else "always"
        unit = f" ({column.description})" if column.description else ""
        lines.append(f"| {column.name} | `{column.json_path}`{unit} | {shown} |".replace("||", "|"))
    return "\n".join(lines) + "\n"


def plan_schema() -> str:
    """The JSON Schema of what `llmfleet plan -o json` writes."""
    return json.dumps({"$comment": NOTICE, **document_schema(Plan)}, indent=2, ensure_ascii=False) + "\n"


def forecast_schema() -> str:
    """The JSON Schema of what `llmfleet plan --forecast` reads."""
    return json.dumps({"$comment": NOTICE, **document_schema(Forecast)}, indent=2, ensure_ascii=False) + "\n"


def migration_schema() -> str:
    """The JSON Schema of what engines, stream owners and coordinators say to each other (RFC 2)."""
    return json.dumps({"$comment": NOTICE, **document_schema(MESSAGES)}, indent=2, ensure_ascii=False) + "\n"


def _fields(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any], str]]:
    """Every field below a node as (path, schema, default in words), parents before children."""
    for name, field in node.get("properties", {}).items():
        path = f"{prefix}{name}"
        default = ""
        if name in node.get("required", ()):
            default = "required"
        elif field.get("default") not in (None, {}):
            default = f"`{json.dumps(field['default']).strip(chr(34))}`"
        yield path, field, default
        yield from _fields(field, f"{path}.")
        yield from _fields(field.get("items", {}), f"{path}[].")


def _type(field: dict[str, Any]) -> str:
    """Type and accepted values in words."""
    if "enum" in field:
        return " \\| ".join(f"`{value}`" for value in field["enum"])
    kind = str(field["type"])
    if kind == "array":
        return f"list of {_type(field['items'])}" + (f", {_range(field, 'Items')}" if _range(field, "Items") else "")
    if "additionalProperties" in field:
        return f"map of {_type(field['additionalProperties'])}"
    if kind == "string":
        if field.get("format") == "date-time":
            return "time"
        length = _range(field, "Length")
        pattern = f", `{field['pattern']}`".replace("|", "\\|") if "pattern" in field else ""
        return "string" + (f", {length} characters" if length else "") + pattern
    lower, upper = field.get("minimum"), field.get("maximum")
    bounds = []
    if lower is not None:
        bounds.append(f"{'>' if field.get('exclusiveMinimum') else '>='} {lower}")
    if upper is not None:
        bounds.append(f"{'<' if field.get('exclusiveMaximum') else '<='} {upper}")
    return " ".join([kind, " and ".join(bounds)]).strip()


def _range(field: dict[str, Any], what: str) -> str:
    lower, upper = field.get(f"min{what}"), field.get(f"max{what}")
    if lower is None and upper is None:
        return ""
    return f"at most {upper}" if not lower else f"at least {lower}" if upper is None else f"{lower} to {upper}"


def _cell(field: dict[str, Any]) -> str:
    return " ".join(field.get("description", "").split()).replace("|", "\\|")


def _rules(node: dict[str, Any], path: str) -> Iterator[tuple[str, str]]:
    for rule in node.get("x-kubernetes-validations", ()):
        yield path, rule["message"]
    for name, field in node.get("properties", {}).items():
        yield from _rules(field, f"{path}.{name}".lstrip("."))
    if "items" in node:
        yield from _rules(node["items"], f"{path}[]")


def wanted_files() -> dict[Path, str]:
    """Every generated file with its content."""
    files = {CRDS / f"{custom_resource_definition(kind)['metadata']['name']}.yaml": crd_file(kind) for kind in KINDS}
    files |= {REFERENCE / f"{kind.KIND.lower()}.md": reference_page(kind) for kind in KINDS}
    return files | {
        REFERENCE / "plan.schema.json": plan_schema(),
        REFERENCE / "forecast.schema.json": forecast_schema(),
        REFERENCE / "migration.schema.json": migration_schema(),
    }


def main() -> int:
    """Writes or checks; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write CRDs, reference pages and the plan's schema from api/.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file is not current")
    check: bool = parser.parse_args().check

    wanted = wanted_files()
    present = {*CRDS.glob("*.yaml"), *REFERENCE.glob("*.md"), *REFERENCE.glob("*.schema.json")}
    stale = sorted(path for path, text in wanted.items() if not path.exists() or path.read_text() != text)
    orphans = sorted(path for path in present - wanted.keys() if NOTICE in path.read_text())
    if check:
        for path in stale + orphans:
            print(f"{path.relative_to(ROOT)} is not current: run `python crds/generate.py`", file=sys.stderr)
        return 1 if stale or orphans else 0
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(wanted[path])
        print(f"wrote {path.relative_to(ROOT)}")
    for path in orphans:
        path.unlink()
        print(f"removed {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
