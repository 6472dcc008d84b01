"""Writes the schemas beside this file, from the makers' own packages, which are too large to be test dependencies.

SkyPilot 0.14.1 (Apache-2.0), in an environment of its own, since it pins other versions than this project:

    python -m venv sky && sky/bin/pip install skypilot==0.14.1 && sky/bin/python tests/schemas/make.py skypilot

Vertex AI's CustomJob, from the discovery document that google-api-python-client 2.202.0 (Apache-2.0) carries:

    pip download --no-deps google-api-python-client==2.202.0
    python tests/schemas/make.py vertex google_api_python_client-2.202.0-py3-none-any.whl
"""

import json
import sys
import zipfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DOCUMENT = "googleapiclient/discovery_cache/documents/aiplatform.v1.json"
ROOT = "GoogleCloudAiplatformV1CustomJob"
KEPT = ("type", "enum", "format")


def skypilot() -> dict[str, Any]:
    """The two schemas that a task file is held against, as strict as SkyPilot's server is."""
    from sky.utils import schemas

    schemas._allow_additional_properties = lambda: False
    return {"task": schemas.get_task_schema(), "resources": schemas.get_resources_schema()}


def vertex(wheel: str) -> dict[str, Any]:
    """The discovery document's schemas that a CustomJob consists of, as JSON Schema without unknown names."""
    with zipfile.ZipFile(wheel) as archive:
        schemas = json.loads(archive.read(DOCUMENT))["schemas"]
    found: dict[str, Any] = {}
    todo = [ROOT]
    while todo:
        name = todo.pop()
        if name not in found:
            found[name] = converted(schemas[name])
            todo += [part["$ref"] for part in parts(schemas[name]) if "$ref" in part]
    return {"$ref": f"#/$defs/{ROOT}", "$defs": found}


def parts(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """A schema and all that it contains."""
    inner = [*schema.get("properties", {}).values(), schema.get("items"), schema.get("additionalProperties")]
    return [schema, *(part for each in inner if isinstance(each, dict) for part in parts(each))]


def converted(schema: dict[str, Any]) -> dict[str, Any]:
    """One discovery schema as JSON Schema."""
    if "$ref" in schema:
        return {"$ref": f"#/$defs/{schema['$ref']}"}
    result = {name: schema[name] for name in KEPT if name in schema}
    if schema.get("format") == "google-duration":
        result = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?s$"}
    if schema.get("type") == "any":
        return {}
    if "items" in schema:
        result["items"] = converted(schema["items"])
    if schema.get("type") == "object":
        more = schema.get("additionalProperties")
        result["properties"] = {name: converted(part) for name, part in schema.get("properties", {}).items()}
        result["additionalProperties"] = converted(more) if more else False
    return result


if __name__ == "__main__":
    made = skypilot() if sys.argv[1] == "skypilot" else vertex(sys.argv[2])
    text = json.dumps(made, indent=1, sort_keys=True)
    (HERE / f"{sys.argv[1]}.json").write_text(text + "\n")
