"""The command `tdjax decode`: what is refused before anything is loaded."""

import numpy as np
import pytest

from tdjax.generate import decode
from tdjax.pipeline.result import save_latents, sidecar


@pytest.fixture
def latents(tmp_path):
    """Two videos' latents."""
    path = tmp_path / "fox.safetensors"
    save_latents(path, np.zeros((2, 2, 8, 8, 4), np.float32))
    return path


@pytest.mark.parametrize("name", ["fox_0.gif", "fox_1.gif", "fox_1.gif.json"])
def test_each_name_that_is_taken_is_found(latents, tmp_path, capsys, name):
    (tmp_path / name).write_bytes(b"mine")
    assert decode.main([str(latents), "-o", str(tmp_path / "fox.gif")]) == 2
    assert f"{name} exists" in capsys.readouterr().err
    assert (tmp_path / name).read_bytes() == b"mine"


def test_the_latents_are_not_replaced(tmp_path, capsys):
    path = tmp_path / "fox.safetensors"
    save_latents(path, np.zeros((1, 2, 8, 8, 4), np.float32))
    before = path.read_bytes()
    assert decode.main([str(path), "-o", str(path), "--overwrite"]) == 2
    assert "is the input" in capsys.readouterr().err and path.read_bytes() == before


def test_metadata_that_an_editor_has_marked_is_read(latents):
    sidecar(latents).write_bytes(b'\xef\xbb\xbf{"model": "fox"}')
    assert decode._model_of(latents) == "fox"


def test_metadata_that_is_nested_too_deep_is_refused(latents, capsys):
    sidecar(latents).write_text("[" * 200_000)
    assert decode.main([str(latents)]) == 2
    assert "names no model" in capsys.readouterr().err
