"""The description against the server: the same routes, and answers that are as it says."""

import re

import pytest

from tdjax.server.app import App
from tdjax.server.keys import Keys
from tdjax.server.limits import Limits
from tdjax.server.openapi import description

DESCRIBED = description()
NAMES = {"string": str, "integer": int, "object": dict, "array": list, "boolean": bool}
NAMES |= {"null": type(None), "number": int | float}


def mismatch(value, schema, where="it"):
    """Where a value differs from a schema of the kinds that are used here, or None."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return mismatch(value, DESCRIBED["components"]["schemas"][name], name)
    if "anyOf" in schema:
        found = [mismatch(value, each, where) for each in schema["anyOf"]]
        return found[0] if all(found) else None
    if "const" in schema or "enum" in schema:
        allowed = schema.get("enum", [schema.get("const")])
        return None if value in allowed else f"{where} is {value!r}"
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    is_flag = isinstance(value, bool) and "boolean" not in types
    if is_flag or not any(isinstance(value, NAMES[name]) for name in types):
        return f"{where} is {value!r}, not {types}"
    if isinstance(value, list):
        inside = [mismatch(each, schema["items"], where) for each in value]
        return next(filter(None, inside), None)
    if isinstance(value, dict) and "properties" in schema:
        if set(value) != set(schema["properties"]):
            return f"{where}: {set(value) ^ set(schema['properties'])}"
        inside = [mismatch(value[name], each, name) for name, each in schema["properties"].items()]
        return next(filter(None, inside), None)
    return None


def schema_of(path, method="get", status=200, kind="application/json"):
    return DESCRIBED["paths"][path][method]["responses"][str(status)]["content"][kind]["schema"]


def test_every_route_is_described(served):
    assert served.client.get("/openapi.json").json() == DESCRIBED
    app = App(served.service, Keys(), Limits(), None).build()
    real = {
        (re.sub(r":path", "", route.path), method.lower())
        for route in app.routes
        for method in route.methods - {"HEAD"}
        if route.path.startswith("/v1")
    }
    told = {(path, method) for path, each in DESCRIBED["paths"].items() for method in each}
    assert real == told


def test_answers_are_as_described(served):
    client, states = served.client, []
    for prompt in ("a fox", "fail"):
        created = client.post("/v1/videos", json={"prompt": prompt}).json()
        states += [created, served.ended(created["id"])]
    for state in states:
        assert not mismatch(state, schema_of("/v1/videos", "post"))
        assert not mismatch(state, schema_of("/v1/videos/{id}"))
    assert not mismatch(client.get("/v1/videos").json(), schema_of("/v1/videos"))
    assert not mismatch(client.get("/v1/models").json(), schema_of("/v1/models"))
    assert not mismatch(client.get("/v1/models/stub").json(), schema_of("/v1/models/{id}"))
    wrong = client.post("/v1/videos", json={"prompt": ""}).json()
    assert not mismatch(wrong, schema_of("/v1/videos", "post", 400))
    content = client.get(f"/v1/videos/{states[0]['id']}/content")
    assert schema_of("/v1/videos/{id}/content", kind=content.headers["content-type"])
    for state in states[::2]:
        deleted = client.delete(f"/v1/videos/{state['id']}").json()
        assert not mismatch(deleted, schema_of("/v1/videos/{id}", "delete"))


@pytest.mark.parametrize("change", [{"status": "done"}, {"seed": "3"}, {"seed": True}, {"x": 1}])
def test_another_answer_would_be_found(served, change):
    state = served.client.post("/v1/videos", json={"prompt": "a fox"}).json()
    assert mismatch(state | change, schema_of("/v1/videos", "post"))
    served.ended(state["id"])
