"""The description of the routes that programs read (OpenAPI 3.1), as one JSON value."""

from __future__ import annotations

from typing import Any

import tdjax
from tdjax.server.asking import FIELDS, FORMATS, IMAGE
from tdjax.server.limits import SEARCH
from tdjax.server.store import COMPLETED, ENDED, RUNNING, WAITING
from tdjax.server.webhooks import ADDRESS

Schema = dict[str, Any]

_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}
_TEXT: Schema = {"type": "string"}
_WHOLE: Schema = {"type": "integer"}
_TIME: Schema = {"type": ["integer", "null"], "description": "seconds since 1970"}
_ERROR = {"code": _TEXT, "message": _TEXT}


def _object(properties: Schema, required: list[str] | None = None, **more: Any) -> Schema:
    """A table whose names are all there, unless some are named."""
    needed = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": needed, **more}


def _refer(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _fields() -> Schema:
    fields: Schema = {
        name: {"type": [_TYPES[kind], "null"]} for name, kind in FIELDS.items() if kind in _TYPES
    }
    fields["prompt"] = {"type": "string", "minLength": 1}
    fields["seconds"] = {"type": ["number", "string", "null"]}
    fields["webhook"] = {"type": ["string", "null"], "maxLength": ADDRESS}
    fields["format"] = {"enum": [*FORMATS, None]}
    return fields


def _schemas() -> Schema:
    image = {"image_url": {"type": "string", "pattern": "^data:image/"}}
    lora = _object({"name": _TEXT, "weight": {"type": "number"}})
    loras = {"type": "array", "items": lora}
    chosen = {**lora, "required": ["name"], "additionalProperties": False}
    fields = {**_fields(), "lora": {"type": ["array", "null"], "items": chosen}}
    form = {**_fields(), "lora": _TEXT, IMAGE: {"type": "string", "format": "binary"}}
    closed = {"additionalProperties": False}
    return {
        "Request": _object({**fields, IMAGE: _object(image)}, ["prompt"], **closed),
        "Form": _object(form, ["prompt"], **closed),
        "Video": _object(
            {
                "id": _TEXT,
                "object": {"const": "video"},
                "model": _TEXT,
                "status": {"enum": [WAITING, RUNNING, *ENDED]},
                "progress": {"type": "integer", "minimum": 0, "maximum": 100},
                "created_at": _WHOLE,
                "completed_at": _TIME,
                "expires_at": _TIME,
                "prompt": _TEXT,
                "seconds": _TEXT,
                "size": _TEXT,
                "remixed_from_video_id": {"type": "null"},
                "error": {"anyOf": [_object(_ERROR), {"type": "null"}]},
                "stage": _TEXT,
                "preview": {"type": "integer", "minimum": 0},
                "seed": _WHOLE,
                "num_frames": _WHOLE,
                "num_steps": _WHOLE,
                "fps": _WHOLE,
                "format": {"enum": [*FORMATS]},
                "lora": loras,
                "webhook": {"type": ["string", "null"]},
                "warnings": {"type": "array", "items": _TEXT},
                "timings": {"type": "object", "additionalProperties": {"type": "number"}},
            }
        ),
        "Videos": _object(
            {
                "object": {"const": "list"},
                "data": {"type": "array", "items": _refer("Video")},
                "first_id": {"type": ["string", "null"]},
                "last_id": {"type": ["string", "null"]},
                "has_more": {"type": "boolean"},
            }
        ),
        "Deleted": _object(
            {"id": _TEXT, "object": {"const": "video.deleted"}, "deleted": {"const": True}}
        ),
        "Model": _object(
            {
                "id": _TEXT,
                "object": {"const": "model"},
                "created": _WHOLE,
                "owned_by": _TEXT,
                "task": {"enum": ["t2v", "i2v"]},
                "size": _TEXT,
                "num_frames": _WHOLE,
                "num_steps": _WHOLE,
                "prompts": {"type": "array", "items": _TEXT},
                "loras": {"type": "array", "items": _TEXT},
            }
        ),
        "Models": _object(
            {"object": {"const": "list"}, "data": {"type": "array", "items": _refer("Model")}}
        ),
        "Error": _object(
            {
                "error": _object(
                    {
                        "message": _TEXT,
                        "type": _TEXT,
                        "param": {"type": "null"},
                        "code": {"type": ["string", "null"]},
                    }
                )
            }
        ),
    }


def _operation(
    summary: str,
    answer: Schema,
    *errors: int,
    body: bool = False,
    part: bool = False,
    **more: Any,
):
    """One route. answer: {media type: schema}; errors: statuses beside 400, 401 and 404. part: a
    range of the answer may be asked for."""
    media = {kind: {"schema": schema} for kind, schema in answer.items()}
    answers: Schema = {"200": {"description": "as asked", "content": media}}
    wrong = {"application/json": {"schema": _refer("Error")}}
    for status in sorted({400, 401, 404, *errors}):
        answers[str(status)] = {"description": "refused", "content": wrong}
    if part:
        answers["206"] = {"description": "a part, as Range asks", "content": media}
        answers["416"] = {"description": "there is no such part"}
    out: Schema = {"summary": summary, "responses": answers, **more}
    if body:
        kinds = {"application/json": "Request", "multipart/form-data": "Form"}
        content = {kind: {"schema": _refer(name)} for kind, name in kinds.items()}
        out["requestBody"] = {"required": True, "content": content}
    return out


def _parameter(name: str, place: str, schema: Schema) -> Schema:
    return {"name": name, "in": place, "schema": schema, "required": place == "path"}


def description() -> Schema:
    """Returns the whole of it."""
    id = [_parameter("id", "path", _TEXT)]
    once = [_parameter("Idempotency-Key", "header", {"type": "string", "maxLength": 200})]
    limit = {"type": "integer", "minimum": 1, "maximum": 100, "default": 20}
    order = {"enum": ["asc", "desc"], "default": "desc"}
    search = {"type": "string", "maxLength": SEARCH}
    page = [("limit", limit), ("after", _TEXT), ("order", order), ("search", search)]
    variant = {"enum": ["video", "thumbnail"], "default": "video"}
    video = {"application/json": _refer("Video")}
    file = {kind: {"type": "string", "format": "binary"} for kind in FORMATS.values()}
    busy = (408, 409, 413, 415, 429, 503)
    make = {"body": True, "parameters": once}
    return {
        "openapi": "3.1.0",
        "info": {"title": "tdjax", "version": tdjax.__version__},
        "security": [{}, {"key": []}],
        "paths": {
            "/v1/videos": {
                "post": _operation("Queues a video", video, *busy, **make),
                "get": _operation(
                    "A page of the key's videos",
                    {"application/json": _refer("Videos")},
                    parameters=[_parameter(name, "query", schema) for name, schema in page],
                ),
            },
            "/v1/videos/sync": {
                "post": _operation("Makes a video and returns the file", file, *busy, 500, **make)
            },
            "/v1/videos/{id}": {
                "get": _operation("A video's state", video, parameters=id),
                "delete": _operation(
                    "Removes a video", {"application/json": _refer("Deleted")}, parameters=id
                ),
            },
            "/v1/videos/{id}/cancel": {
                "post": _operation("Ends a video", video, 409, parameters=id)
            },
            "/v1/videos/{id}/content": {
                "get": _operation(
                    f"The file of a {COMPLETED} video",
                    {**file, "image/jpeg": {"type": "string", "format": "binary"}},
                    409,
                    part=True,
                    parameters=[*id, _parameter("variant", "query", variant)],
                )
            },
            "/v1/videos/{id}/events": {
                "get": _operation(
                    "The states as they change", {"text/event-stream": _TEXT}, 429, parameters=id
                )
            },
            "/v1/models": {
                "get": _operation("The model", {"application/json": _refer("Models")}, 503)
            },
            "/v1/models/{id}": {
                "get": _operation(
                    "The same, by its name",
                    {"application/json": _refer("Model")},
                    503,
                    parameters=id,
                )
            },
        },
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
