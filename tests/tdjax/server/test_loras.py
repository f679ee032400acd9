"""LoRA files of a folder by names, and what requests say of them."""

import pytest
from server_cases import serving

from tdjax.errors import UsageError
from tdjax.server.loras import arguments_of, checked_loras, lora_files


@pytest.fixture
def folder(tmp_path):
    for name in ("sketch", "wan.v1.high", "wan.v1.low", ".hidden", "low"):
        (tmp_path / f"{name}.safetensors").touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "folder.safetensors").mkdir()
    return tmp_path


def test_names_are_those_of_files_without_their_ends(folder):
    found = lora_files(folder)
    assert set(found) == {"sketch", "wan.v1", "low"}
    assert found["sketch"] == {"lora": f"{folder}/sketch.safetensors"}
    assert set(found["wan.v1"]) == {"lora_high", "lora_low"}
    assert lora_files(None) == lora_files(folder / "gone") == {}


def test_names_become_arguments_of_the_pipeline(folder):
    chosen = [("sketch", 0.5), ("wan.v1", 2.0), ("gone", 1.0)]
    assert arguments_of(chosen, folder) == {
        "lora": [(f"{folder}/sketch.safetensors", 0.5), (f"{folder}/gone.safetensors", 1.0)],
        "lora_high": [(f"{folder}/wan.v1.high.safetensors", 2.0)],
        "lora_low": [(f"{folder}/wan.v1.low.safetensors", 2.0)],
    }


def test_a_list_of_names_and_weights():
    given = [{"name": "a"}, {"name": "b", "weight": -0.5}]
    assert checked_loras(given, ("a", "b")) == [("a", 1.0), ("b", -0.5)]
    assert checked_loras([], ()) == []


@pytest.mark.parametrize(
    "given, said",
    [
        ([{"name": "skech"}], "nearest: sketch"),
        ([{"name": "sketch"}] * 2, "twice"),
        ([{"name": "sketch", "weight": 11}], "-10 to 10"),
        ([{"name": "sketch", "weight": float("nan")}], "-10 to 10"),
        ([{"name": "sketch", "weight": True}], "a number"),
        ([{"name": "../sketch"}], "not known"),
    ],
    ids=str,
)
def test_what_is_wrong_is_refused(given, said):
    with pytest.raises(UsageError, match=said) as error:
        checked_loras(given, ("sketch", "other"))
    assert str(error.value).count("\n") == 2


def test_a_request_names_them_and_those_alike_run_in_a_row(folder, tmp_path_factory):
    sketch, text = [{"name": "sketch", "weight": 0.5}], '[{"name": "low"}]'
    with serving(tmp_path_factory.mktemp("s"), loras=folder) as server:
        (model,) = server.client.get("/v1/models").json()["data"]
        assert model["loras"] == ["low", "sketch", "wan.v1"]
        job = server.ended(server.add(lora=sketch))
        assert job["lora"] == sketch and f"{folder}/sketch.safetensors" in str(job["warnings"])
        form = {"prompt": (None, "a"), "lora": (None, text)}
        answer = server.client.post("/v1/videos", files=form)
        assert answer.json()["lora"] == [{"name": "low", "weight": 1.0}]
        plain, again = server.add(), server.add(lora=sketch)
        ids = (job["id"], answer.json()["id"], plain, again)
        shapes = [server.service.store.get(id).shape for id in ids]
        assert shapes[0] == shapes[3] and len(set(shapes)) == 3
        (folder / "sketch.safetensors").unlink()
        assert "nearest: " in server.post(lora=sketch).json()["error"]["message"]
        for bad in ("[", '{"name": "low"}', '[{"name": "low", "name": "low"}]'):
            form["lora"] = (None, bad)
            assert server.client.post("/v1/videos", files=form).status_code == 400
        for id in ids:
            server.ended(id)
