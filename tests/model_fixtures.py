"""Model folders of random weights, each written once by a process, and how pipelines compile."""

import dataclasses
import functools
import json
import shutil

import jax
import pytest
import random_model
from compiling import AS_USERS


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A text-to-video model folder."""
    return random_model.write(tmp_path_factory.mktemp("models") / "random")


@pytest.fixture(scope="session")
def i2v_model(model, tmp_path_factory):
    """Two image-to-video experts over the same VAE and text encoder: 8 latent channels + 4 mask + 8
    image latents."""
    folder = tmp_path_factory.mktemp("models") / "i2v"
    shutil.copytree(model, folder)
    shutil.rmtree(folder / "dit")
    cfg = dataclasses.replace(random_model.DIT, in_channels=20, attention="dense", layers=2)
    random_model.dit_folder(folder / "dit_high", cfg, 1)
    random_model.dit_folder(folder / "dit_low", cfg, 2)
    (folder / "model.json").write_text(json.dumps({**random_model.FACTS, "name": "i2v-test"}))
    return folder


@pytest.fixture(scope="module")
def as_users():
    """Programs of pipelines have the bits that users have: where those of two are compared."""
    lowered = jax.stages.Lowered
    with pytest.MonkeyPatch.context() as patch:
        options = {"compiler_options": AS_USERS} if AS_USERS else {}
        patch.setattr(lowered, "compile", functools.partialmethod(lowered.compile, **options))
        yield
