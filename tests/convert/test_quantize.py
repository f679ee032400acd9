"""bf16 to 8 bits: the numbers of the operation's own quantiser, the published form of files, the
error table."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from convert import quantize
from pallas_kernels.int8_matmul import quantize as op_quantize
from tdjax.checkpoints import orbax
from tdjax.checkpoints.published.checkpoint import open_checkpoint
from tdjax.models.wan_dit import with_linear


@pytest.fixture
def source(tmp_path, states, write_safetensors):
    state = {k: v.astype(ml_dtypes.bfloat16) for k, v in states("sla").items()}
    return write_safetensors(tmp_path / "base.safetensors", state), state


@pytest.mark.slow
def test_to_a_file_in_the_published_form(tmp_path, source, as_json, published):
    path, state = source
    assert quantize.main([str(path), str(tmp_path / "q.safetensors"), "--json"]) == 0
    report = as_json()
    file = open_checkpoint(tmp_path / "q.safetensors")
    assert (file.config.linear, file.config.attention) == ("int8", "sla")
    form = lambda keys: {key.split(".", 2)[-1] for key in keys if key.startswith("blocks.")}
    assert form(file.tensors) == form(published("TurboWan2.1-T2V-1.3B-480P-quant"))
    for key, value in state.items():
        stem = key.removesuffix(".weight")
        if f"{stem}.int8_weight" in file.tensors:
            want = op_quantize(jnp.asarray(value, jnp.float32))
            np.testing.assert_array_equal(file.tensors[f"{stem}.int8_weight"].read(), want.values)
            np.testing.assert_array_equal(file.tensors[f"{stem}.scale"].read(), want.scale)
        else:
            np.testing.assert_array_equal(
                file.tensors[key].read().astype(np.float32), value.astype(np.float32)
            )
    errors = report["errors"]["blocks.up"]
    weight = state["blocks.0.ffn.0.weight"].astype(np.float32)
    q = op_quantize(jnp.asarray(weight))
    got = (
        np.asarray(q.values, np.float32)
        * np.repeat(np.repeat(q.scale, 128, 0), 128, 1)[: weight.shape[0], : weight.shape[1]]
    )
    np.testing.assert_allclose(
        errors["relative"], [np.linalg.norm(got - weight) / np.linalg.norm(weight)], rtol=1e-4
    )
    np.testing.assert_allclose(errors["largest"], [np.abs(got - weight).max()], rtol=1e-4)
    assert len(report["errors"]) == 10 and report["bytes"]["after"] < report["bytes"]["before"]


@pytest.mark.slow
def test_to_our_folder_and_from_it(tmp_path, source, capsys):
    path, _ = source
    from convert.__main__ import main

    assert main([str(path), str(tmp_path / "ours"), "--no-hash"]) == 0
    assert quantize.main([str(tmp_path / "ours"), str(tmp_path / "q")]) == 0
    out, err = capsys.readouterr()
    assert out.split() == [str(tmp_path / "ours"), str(tmp_path / "q")]
    assert "blocks.self_attn.q" in err and "GiB ->" in err
    direct = tmp_path / "direct"
    assert quantize.main([str(path), str(direct)]) == 0
    a, b = (orbax.named_leaves(orbax.restore(folder)[1]) for folder in (tmp_path / "q", direct))
    for name in a:
        np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]), err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["int8_channel", "fp8"])
def test_by_token_and_channel(tmp_path, source, as_json, capsys, quant):
    """The folder, and the file under the names of others, hold what a load would have made of the
    float file."""
    path, _ = source
    assert quantize.main([str(path), str(tmp_path / "q"), "--quant", quant, "--json"]) == 0
    assert 1e-3 < as_json()["errors"]["blocks.up"]["relative"][0] < 0.04
    cfg, module = orbax.restore(tmp_path / "q")
    assert cfg.linear == quant
    made = orbax.named_leaves(with_linear(open_checkpoint(path).load(), quant))
    for name, leaf in orbax.named_leaves(module).items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(made[name]), err_msg=name)
    assert quantize.main([str(path), str(tmp_path / "q.safetensors"), "--quant", quant]) == 0
    file = open_checkpoint(tmp_path / "q.safetensors")
    assert file.linear == quant
    scale = file.tensors["blocks.0.ffn.0.weight_scale"]
    assert (scale.shape, scale.dtype) == ((made["blocks.up.bias"].shape[1], 1), np.float32)
    for name, leaf in orbax.named_leaves(file.load(cfg)).items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(made[name]), err_msg=name)
    assert quantize.main([str(tmp_path / "q"), str(tmp_path / "again")]) == 3
    assert f"its linears are {quant}" in capsys.readouterr().err


def test_what_is_refused(tmp_path, source, states, write_safetensors, capsys):
    path, _ = source
    assert quantize.main([str(path), str(tmp_path / "q.safetensors")]) == 0
    assert quantize.main([str(path), str(tmp_path / "q.safetensors")]) == 2
    assert "exists" in capsys.readouterr().err
    assert quantize.main([str(tmp_path / "q.safetensors"), str(tmp_path / "again")]) == 3
    assert "quantised already" in capsys.readouterr().err
    text = write_safetensors(tmp_path / "text.safetensors", states("text"))
    assert quantize.main([str(text), str(tmp_path / "again")]) == 3
    assert "only the transformer has layers of 8 bits" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()
