"""`python -m convert.validate`: every golden file passes, a perturbed one does not; values and
outputs against other layouts."""

import json

import ml_dtypes
import numpy as np
import pytest

from convert.__main__ import main as convert
from convert.validate import main
from tdjax.checkpoints import orbax
from tdjax.config import VAEConfig

FILES = (
    "dit_t2v_tiny",
    "dit_i2v22_tiny",
    "dit_i2v21_tiny",
    "dit_sla_tiny",
    "sla_op",
    "vae_tiny",
    "umt5_tiny",
)
WEIGHTS = {
    "dit_t2v_tiny": "w/blocks.1.ffn.0.weight",
    "dit_i2v21_tiny": "w/blocks.0.cross_attn.v_img.bias",
    "dit_sla_tiny": "w/blocks.0.self_attn.attn_op.local_attn.proj_l.bias",
    "sla_op": "w/proj_l.bias",
    "umt5_tiny": "w/blocks.2.ffn.fc2.weight",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_golden_files_pass(golden, name, as_json):
    path = golden(name).path
    assert main(["--golden", str(path), "--json"]) == 0
    values = as_json()[str(path)]["values"]
    targets = {*golden(name).keys("out/"), *golden(name).keys("mid/")}
    assert values.keys() == targets
    skipped = {k for k, v in values.items() if v["error"] is None}
    expected = {"dit_t2v_tiny": {"out/v_fastnorm"}, "dit_i2v22_tiny": {"out/v_fastnorm"}}
    expected["sla_op"] = {k for k in targets if k.endswith("_bf16")} | {
        "out/q64k128_t0.1/sparse_map"
    }
    expected["vae_tiny"] = {k for k in targets if k.endswith("decoder_chunk_frames")}
    assert skipped == expected.get(name, set())
    assert all(values[k]["note"] for k in skipped)
    assert max(v["error"] for v in values.values() if v["error"] is not None) < 1.5e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_perturbed_weight_is_found(tmp_path, golden, name, capsys):
    g = golden(name)
    weight = g[WEIGHTS[name]]
    arrays = g.arrays | {
        WEIGHTS[name]: weight + np.float32(0.05),
        "config": np.frombuffer(json.dumps(g.config).encode(), np.uint8),
    }
    np.savez(tmp_path / "changed.npz", **arrays)
    assert main(["--golden", str(tmp_path / "changed.npz")]) == 3
    assert "OVER" in capsys.readouterr().err


def test_files_that_are_not_golden(tmp_path, golden, capsys):
    (tmp_path / "noise.npz").write_bytes(b"noise")
    np.savez(tmp_path / "plain.npz", a=np.ones(2))
    np.savez(
        tmp_path / "less.npz",
        **{k: v for k, v in golden("umt5_tiny").arrays.items() if k != "in/ids"},
        config=config(golden("umt5_tiny")),
    )
    for path, message in (
        (tmp_path / "absent.npz", "does not exist"),
        (tmp_path / "noise.npz", "not a file of golden vectors"),
        (tmp_path / "plain.npz", "not a kind of golden file"),
        (tmp_path / "less.npz", "lacks in/ids"),
        (golden("sampler").path, "not a kind of golden file"),
    ):
        assert main(["--golden", str(path)]) == 3
        assert message in capsys.readouterr().err
    assert main([]) == 2
    (tmp_path / "empty").mkdir()
    assert main(["--golden", str(tmp_path / "empty")]) == 3


def test_a_folder_of_golden_files(golden, tmp_path, as_json):
    for name in ("umt5_tiny", "sampler"):  # the second has no network and is not run
        (tmp_path / f"{name}.npz").symlink_to(golden(name).path)
    assert main(["--golden", str(tmp_path), "--json"]) == 0
    assert [key for key in as_json() if key.endswith(".npz")] == [str(tmp_path / "umt5_tiny.npz")]


def config(g):
    return np.frombuffer(json.dumps(g.config).encode(), np.uint8)


@pytest.fixture
def layouts(tmp_path, states, write_safetensors):
    """layouts(kind, other, *options) -> the same weights as a file, under other names, and in our
    folder."""

    def make(kind, other, *options):
        files = [
            write_safetensors(
                tmp_path / f"{k}.safetensors",
                {n: v.astype(ml_dtypes.bfloat16) for n, v in states(k).items()},
            )
            for k in (kind, other)
        ]
        assert convert([str(files[0]), str(tmp_path / f"{kind}_ours"), "--no-hash", *options]) == 0
        return *files, tmp_path / f"{kind}_ours"

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, other, options", [("dit", "diffusers", ["--heads", "4"]), ("text", "transformers", [])]
)
def test_against_other_layouts(layouts, kind, other, options, capsys, as_json):
    wan, theirs, ours = layouts(kind, other, *options)
    capsys.readouterr()
    for a, b in ((wan, theirs), (ours, wan)):
        assert main([str(a), "--against", str(b), "--level", "forward", "--json", *options]) == 0
        report = as_json()
        assert report["values"]["worst"] == 0 and report["forward"]["relative_l2"] < 1e-6
        assert report["forward"]["rms"] > 0.01


@pytest.mark.slow
def test_the_vae_against_other_layouts(tmp_path, as_json):
    """A smaller one than the golden file's, whose mean and deviation travel in the exported
    file."""
    cfg = VAEConfig(
        dim=4,
        latent_channels=3,
        multipliers=(1, 2),
        temporal_down=(True,),
        res_blocks=1,
        mean=(0.5,) * 3,
        std=(2.0,) * 3,
    )
    rng = np.random.default_rng(0)
    shapes = orbax.named_leaves(orbax.abstract("vae", cfg))
    leaves = {n: (0.2 * rng.standard_normal(x.shape)).astype(x.dtype) for n, x in shapes.items()}
    orbax.save(tmp_path / "ours", leaves, "vae", cfg)
    for naming in ("wan", "diffusers"):
        assert (
            convert(
                [
                    str(tmp_path / "ours"),
                    str(tmp_path / f"{naming}.safetensors"),
                    "--names",
                    naming,
                    "--json",
                ]
            )
            == 0
        )
        as_json()
        argv = [
            str(tmp_path / "ours"),
            "--against",
            str(tmp_path / f"{naming}.safetensors"),
            "--level",
            "forward",
            "--json",
        ]
        assert main(argv) == 0
        report = as_json()
        assert (
            report["values"]["worst"] == 0
            and report["forward"]["largest_error"] == 0
            and report["forward"]["rms"] > 0.01
        )


def test_differences_are_found(tmp_path, states, write_safetensors, capsys, as_json):
    state = dict(states("sla"))
    a = write_safetensors(tmp_path / "a.safetensors", state)
    state["blocks.0.ffn.0.weight"] = state["blocks.0.ffn.0.weight"] + np.float32(0.25)
    b = write_safetensors(tmp_path / "b.safetensors", state)
    assert main([str(a), "--against", str(b), "--level", "forward"]) == 3
    err = capsys.readouterr().err
    assert "1 differ from b.safetensors" in err and "blocks.up.kernel by up to 2.5" in err
    assert "forward" not in err  # deeper levels say nothing more
    assert main([str(a), "--against", str(b), "--atol", "0.3"]) == 0
    capsys.readouterr()
    state["blocks.0.ffn.0.weight"] = np.full_like(state["blocks.0.ffn.0.weight"], np.nan)
    bad = write_safetensors(tmp_path / "nan.safetensors", state)
    assert main([str(bad), "--level", "keys"]) == 0
    assert main([str(bad), "--json"]) == 3
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["values"]["not_finite"] == [
        "blocks.up.kernel"
    ]
    text = write_safetensors(tmp_path / "text.safetensors", states("text"))
    assert main([str(a), "--against", str(text)]) == 3
    assert "is not the same network" in capsys.readouterr().err
