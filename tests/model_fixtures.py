"""Model folders of random weights, each written once by a process."""

import dataclasses
import json
import shutil

import pytest
import random_model


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
