"""The accelerator's way of filling a leaf, run on the CPU device: the same bits as the host's
way."""

import jax
import numpy as np
import pytest

from tdjax.checkpoints.published import upload as room
from tdjax.checkpoints.published.checkpoint import open_checkpoint, targets


@pytest.mark.parametrize("piece_bytes", [2**27, 100])
def test_pieces_give_the_leaf(tmp_path, monkeypatch, piece_bytes):
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    state = {"token_embedding.weight": (37, 24), "norm.weight": (24,)}
    for i in range(2):
        block = {
            "norm1.weight": (24,),
            "norm2.weight": (24,),
            "pos_embedding.embedding.weight": (32, 3),
        }
        block |= {f"attn.{p}.weight": (24, 24) for p in "qkvo"}
        block |= {
            "ffn.gate.0.weight": (40, 24),
            "ffn.fc1.weight": (40, 24),
            "ffn.fc2.weight": (24, 40),
        }
        state |= {f"blocks.{i}.{key}": shape for key, shape in block.items()}
    path = tmp_path / "models_t5.safetensors"
    save_file(
        {key: rng.normal(size=shape).astype(np.float32) for key, shape in state.items()}, path
    )
    file = open_checkpoint(path)
    monkeypatch.setattr(room, "PIECE_BYTES", piece_bytes)
    for name, target in targets("text", file.config).items():
        claim = file.binding(file.config).claims[name]
        expected = file.final(claim, tuple(target.shape), np.dtype(target.dtype))
        got = room.upload(
            [file.tensors[key] for key in claim.keys], claim.row, target, jax.devices()[0]
        )
        assert got.dtype == expected.dtype and np.array_equal(np.asarray(got), expected), name


def test_reads_run_ahead_in_order():
    started = []
    reads = [lambda i=i: started.append(i) or i for i in range(9)]
    for i, value in enumerate(room.ahead(iter(reads), readers=2)):
        assert value == i and len(started) <= i + 3
    assert sorted(started) == list(range(9))


def test_a_read_that_fails_is_raised_in_its_place():
    def bad():
        raise OSError("gone")

    values = room.ahead(iter([lambda: 1, lambda: 2, bad, lambda: 4]))
    assert [next(values), next(values)] == [1, 2]
    with pytest.raises(OSError, match="gone"):
        next(values)


def test_a_published_file_into_the_memory_of_the_host(tmp_path, monkeypatch):
    """As an accelerator does it: through the device, which transposes, into page-locked memory."""
    from safetensors.numpy import save_file

    from tdjax.checkpoints.published import checkpoint as reader

    rng = np.random.default_rng(0)
    block = {
        "norm1.weight": (24,),
        "norm2.weight": (24,),
        "pos_embedding.embedding.weight": (32, 3),
    }
    block |= {f"attn.{p}.weight": (24, 24) for p in "qkvo"} | {
        f"ffn.{p}.weight": (40, 24) for p in ("gate.0", "fc1")
    }
    block |= {"ffn.fc2.weight": (24, 40)}
    shapes = {
        "token_embedding.weight": (37, 24),
        "norm.weight": (24,),
        **{f"blocks.0.{key}": shape for key, shape in block.items()},
    }
    save_file(
        {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()},
        tmp_path / "models_t5.safetensors",
    )
    file = open_checkpoint(tmp_path / "models_t5.safetensors")
    expected = jax.tree.leaves(file.load())
    monkeypatch.setattr(reader, "HOST", ())
    monkeypatch.setattr(reader, "ON_DEVICE", 0)
    there = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    for where, kind in ((there, "pinned_host"), (None, jax.devices()[0].default_memory().kind)):
        got = jax.tree.leaves(file.load(device=where))
        assert {leaf.sharding.memory_kind for leaf in got} == {kind}
        assert all(np.array_equal(a, b) for a, b in zip(expected, got, strict=True))
