"""Small checkpoints of every kind under published names, and files that hold them."""

import io
import json
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

BF16 = ml_dtypes.bfloat16


@pytest.fixture(scope="session")
def states(golden, manifest):
    """states(kind) -> {key: float32 array} of a tiny model: "dit", "i2v", "clip", "sla", "vae",
    "text", under official names, or "diffusers", "diffusers_vae", "transformers", the same values
    under theirs by the published name maps."""
    files = {
        "dit": "dit_t2v_tiny",
        "i2v": "dit_i2v22_tiny",
        "clip": "dit_i2v21_tiny",
        "sla": "dit_sla_tiny",
        "vae": "vae_tiny",
        "text": "umt5_tiny",
    }
    maps = {
        "diffusers": ("dit", "diffusers_Wan2.1-T2V-1.3B_transformer"),
        "diffusers_vae": ("vae", "diffusers_Wan2.1_VAE"),
        "transformers": ("text", "transformers_umt5-xxl-encoder"),
    }

    def state(kind):
        if kind in maps:
            original, name = maps[kind]
            return renamed(golden(files[original]).weights(), manifest("name_maps")[name])
        return golden(files[kind]).weights()

    return state


def renamed(weights, table):
    """The weights under the names of the table, which lists block 0 alone."""
    out = {}
    for key, value in weights.items():
        parts = key.split(".")
        number = parts[1] if parts[0] == "blocks" else None
        new = table[key if number is None else ".".join([parts[0], "0", *parts[2:]])]
        if number is not None:
            new = new.replace("blocks.0.", f"blocks.{number}.").replace(
                "encoder.block.0.", f"encoder.block.{number}."
            )
        if new == "patch_embedding.weight":
            value = value.reshape(value.shape[0], -1, 1, 2, 2)
        out[new] = value
    return out


@pytest.fixture(scope="session")
def write_safetensors():
    """write(path, {key: array}, metadata=None): by the library, not by our writer."""
    from safetensors.numpy import save_file

    def write(path, tensors, metadata=None):
        save_file({k: np.array(v, order="C") for k, v in tensors.items()}, path, metadata)
        return path

    return write


@pytest.fixture(scope="session")
def write_pickle():
    """write(path, data.pkl bytes, storages={key: bytes}): a torch zip file with any pickle
    inside."""

    def write(path, data, storages=None, root="archive", compression=zipfile.ZIP_STORED, extra=()):
        with zipfile.ZipFile(path, "w", compression) as z:
            z.writestr(f"{root}/data.pkl", data)
            z.writestr(f"{root}/byteorder", "little")
            for key, content in (storages or {}).items():
                z.writestr(f"{root}/data/{key}", content)
            for name, content in extra:
                z.writestr(name, content)
        return path

    return write


class Named:
    """Pickles as a global name, whether or not the thing exists here."""

    def __init__(self, module, name, args=()):
        self.module, self.name, self.args = module, name, args


class StoragePickler(pickle._Pickler):
    """Writes Named calls and ("storage", ...) references as torch does."""

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Named):
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
            if obj.args is not None:
                super().save(obj.args)
                self.write(pickle.REDUCE)
            return
        if isinstance(obj, tuple) and obj[:1] == ("storage",):
            super().save(obj, save_persistent_id)
            self.write(pickle.BINPERSID)
            return
        super().save(obj, save_persistent_id)


@pytest.fixture(scope="session")
def torch_pickle_bytes():
    """dumps(obj): obj may hold Named(module, name, args) and ("storage", Named(...), key, "cpu", n)
    tuples."""

    def dumps(obj):
        out = io.BytesIO()
        StoragePickler(out, protocol=2).dump(obj)
        return out.getvalue()

    dumps.Named = Named
    return dumps


@pytest.fixture(scope="session")
def published(manifest):
    """published(name) -> {key: an object with the shape and dtype of the published file, and no
    data}."""

    class Shape:
        def __init__(self, shape, dtype):
            self.shape, self.dtype = tuple(shape), np.dtype(dtype or "float32")

    def load(name):
        return {key: Shape(t["shape"], t["dtype"]) for key, t in manifest(name)["tensors"].items()}

    load.Shape = Shape
    return load


@pytest.fixture
def as_json(capsys):
    """The JSON line that a command has just printed."""
    return lambda: json.loads(capsys.readouterr().out)
