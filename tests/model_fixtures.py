"""Model folders of random weights, each written once by a process, and how pipelines compile."""

import dataclasses
import json
import shutil

import pytest
import random_model
from compiling import AS_USERS

from tdjax.pipeline.executables import Asked


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A text-to-video model folder."""
    return random_model.write(tmp_path_factory.mktemp("models") / "random")


@pytest.fixture(scope="session")
def dense_model(model, tmp_path_factory):
    """The same with a transformer of one layer, dense."""
    cfg = dataclasses.replace(random_model.DIT, layers=1, attention="dense")
    return random_model.with_dit(model, tmp_path_factory.mktemp("models") / "dense", cfg)


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


LOOP = ("start", "denoise", "denoise_guided")  # functions whose programs are the sampling loop's


@pytest.fixture(scope="module")
def as_users():
    """Programs of the sampling loop have the bits that users have: where those of two are compared.
    They take five times as long to compile."""
    make = Asked.compile

    def compile_(asked, **options):
        return make(asked, **options, **(AS_USERS if asked.function.__name__ in LOOP else {}))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Asked, "compile", compile_)
        yield
