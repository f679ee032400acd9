"""The video VAE against the official code (golden vectors), against diffusers, and its own
identities."""

import dataclasses
import functools
import re

import described
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import put
from einops import rearrange
from tolerances import assert_close

from pallas_kernels import tuning
from tdjax.config import VAEConfig
from tdjax.errors import UsageError
from tdjax.models import wan_vae
from tdjax.models.abstract import as_shapes
from tdjax.models.wan_vae import VAE, attend, cache_bytes, intermediates
from tdjax.precision import FLOAT32

TINY = VAEConfig(dim=8, policy=FLOAT32)
MEAN, STD = np.linspace(-1, 1, 5), np.linspace(0.5, 2, 5)
# Of the oracle: other widths, one residual block, one halving of the space fewer.
SMALL = VAEConfig(
    dim=6,
    latent_channels=5,
    multipliers=(1, 3, 2),
    res_blocks=1,
    temporal_down=(True, True),
    policy=FLOAT32,
    mean=tuple(MEAN),
    std=tuple(STD),
)
LAYOUT = {1: "o -> o", 4: "o i h w -> h w i o", 5: "o i t h w -> t h w i o"}
OFFICIAL = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"coder\.conv1\.", "coder.conv_in."),
    (r"\.(down|up)samples\.", r".\1."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.resample\.1\.", ".conv."),
    (r"\.to_qkv\.", ".qkv."),
    (r"\.head\.0\.", ".norm_out."),
    (r"\.head\.2\.", ".conv_out."),
    (r"\.gamma$", ".scale"),
    (r"\.weight$", ".kernel"),
)


def rename(key, rows):
    for pattern, new in rows:
        key = re.sub(pattern, new, key)
    return key


def diffusers_rows(res_blocks):
    """Their up blocks are nested: block i holds res_blocks + 1 residual blocks and an upsampler."""
    flat = lambda i, j: int(i) * (res_blocks + 2) + int(j)
    return (
        (r"\.down_blocks\.", ".down."),
        (r"\.up_blocks\.(\d+)\.resnets\.(\d+)\.", lambda m: f".up.{flat(m[1], m[2])}."),
        (r"\.up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f".up.{flat(m[1], res_blocks + 1)}."),
        (r"\.mid_block\.resnets\.(\d)\.", lambda m: f".middle.{2 * int(m[1])}."),
        (r"\.mid_block\.attentions\.0\.", ".middle.1."),
        (r"\.conv_shortcut\.", ".shortcut."),
        *OFFICIAL[8:10],
        *OFFICIAL[12:],
    )


def abstract(cfg):
    return as_shapes(VAE, cfg)


def leaves(module):
    """({leaf name: leaf}, treedef) in flattening order."""
    found, treedef = jax.tree_util.tree_flatten_with_path(module)
    words = lambda path: [
        str(getattr(k, "name", getattr(k, "idx", getattr(k, "key", "")))) for k in path
    ]
    return {".".join(w for w in words(path) if w != "value"): leaf for path, leaf in found}, treedef


def load(cfg, weights, rows):
    """A VAE of `cfg` from a PyTorch state dict; every key and every leaf exactly once."""
    wanted, treedef = leaves(abstract(cfg))
    given = {}
    for key, w in weights.items():
        w = w.reshape(-1) if key.endswith("gamma") else w
        given[rename(key, rows)] = rearrange(w, LAYOUT[w.ndim])
    assert len(given) == len(weights)
    assert {k: v.shape for k, v in given.items()} == {k: v.shape for k, v in wanted.items()}
    return jax.tree.unflatten(
        treedef, [put(given[name].astype(leaf.dtype)) for name, leaf in wanted.items()]
    )


# Half the compile time, which is nearly all the time these tests take.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@jit
def encode(vae, video):
    return vae.encode(video)


@jit
def decode(vae, latents):
    return vae.decode(latents)


def last(x):  # PyTorch's layout to ours
    return rearrange(x, "b c t h w -> b t h w c")


def first(x):
    return rearrange(np.asarray(x), "b t h w c -> b c t h w")


def normal(shape):
    return put(np.random.default_rng(len(shape)).standard_normal(shape), jnp.float32)


@pytest.fixture(scope="module")
def tiny(golden):
    return load(TINY, golden("vae_tiny").weights(), OFFICIAL)


@pytest.mark.slow
@pytest.mark.parametrize("frames", [9, 1, 5])
def test_encode_golden(golden, tiny, frames):
    g = golden("vae_tiny")
    assert_close(
        first(encode(tiny, last(g[f"in/T{frames}/video"]))),
        g[f"out/T{frames}/encoded"],
        "vae",
        "encoded",
    )


@pytest.mark.slow
@pytest.mark.parametrize("frames", [9, 1, 5])
def test_decode_golden(golden, tiny, frames):
    g = golden("vae_tiny")
    video = decode(tiny, last(g[f"in/T{frames}/latent"]))
    assert video.dtype == jnp.float32
    assert_close(first(video), g[f"out/T{frames}/decoded"], "vae", "decoded")


@pytest.mark.slow
@pytest.mark.parametrize("frames", [9, 1])
def test_intermediates_golden(golden, tiny, frames):
    g, prefix = golden("vae_tiny"), f"mid/T{frames}/"
    inside = jit(intermediates)(
        tiny, last(g[f"in/T{frames}/video"]), last(g[f"in/T{frames}/latent"])
    )
    assert {prefix + name for name in inside} == set(g.keys(prefix)) - {
        prefix + "decoder_chunk_frames"
    }
    for name, value in inside.items():
        assert_close(value, g[prefix + name], "vae", name)


@pytest.mark.slow
def test_published_keys_are_the_leaves(manifest):
    """Every tensor of the published file is one leaf of the full-size module, and the other way
    round."""
    shapes = {rename(k, OFFICIAL): t["shape"] for k, t in manifest("Wan2.1_VAE")["tensors"].items()}
    axes = {1: (0,), 4: (2, 3, 1, 0), 5: (2, 3, 4, 1, 0)}
    wanted = {name: leaf.shape for name, leaf in leaves(abstract(VAEConfig()))[0].items()}
    ours = {}
    for name, shape in shapes.items():
        shape = shape[:1] if name.endswith(".scale") else shape
        ours[name] = tuple(shape[axis] for axis in axes[len(shape)])
    assert len(wanted) == 194
    assert ours == wanted


@pytest.mark.slow
def test_diffusers():
    """Other widths, one residual block, two clips, sizes that are no power of two."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    sizes = {
        "z_dim": 5,
        "dim_mult": [1, 3, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [True, True],
    }
    moments = {"latents_mean": [0.0] * 5, "latents_std": [1.0] * 5}
    torch.manual_seed(0)
    oracle = diffusers.AutoencoderKLWan(base_dim=6, **sizes, **moments).eval()
    with torch.no_grad():
        for name, p in oracle.named_parameters():
            if name.endswith(("gamma", "bias")):
                p.uniform_(0.5, 1.5) if name.endswith("gamma") else p.uniform_(-0.3, 0.3)
        video = torch.rand(2, 3, 9, 12, 20) * 2 - 1
        latents = torch.randn(2, 5, 3, 3, 5)
        encoded = oracle.encode(video).latent_dist.mode().numpy()
        decoded = oracle.decode(latents).sample.numpy()
    vae = load(SMALL, {k: v.numpy() for k, v in oracle.state_dict().items()}, diffusers_rows(1))
    assert_close(
        encode(vae, last(video.numpy())), (last(encoded) - MEAN) / STD, "oracle_vae", "encoded"
    )
    ours = decode(vae, ((last(latents.numpy()) - MEAN) / STD).astype(np.float32))
    assert (
        np.mean(np.abs(decoded) < 1) > 0.1
    )  # diffusers clips; enough must lie inside for the comparison to mean something
    assert_close(np.clip(first(ours), -1, 1), decoded, "oracle_vae", "decoded")


@pytest.mark.slow
def test_later_frames_never_change_earlier_ones(golden, tiny):
    g = golden("vae_tiny")
    video, latents = last(g["in/T9/video"]), last(g["in/T9/latent"])
    other_video, other_latents = np.array(video), np.array(latents)
    other_video[:, 5:] = -video[:, 5:]
    other_latents[:, 2:] = -latents[:, 2:]
    a, b = encode(tiny, video), encode(tiny, other_video)
    np.testing.assert_array_equal(a[:, :2], b[:, :2])
    assert np.all(np.any(np.asarray(a[:, 2:] != b[:, 2:]), axis=(0, 2, 3, 4)))
    a, b = decode(tiny, latents), decode(tiny, other_latents)
    np.testing.assert_array_equal(a[:, :5], b[:, :5])
    assert np.all(np.any(np.asarray(a[:, 5:] != b[:, 5:]), axis=(0, 2, 3, 4)))


@pytest.mark.slow
def test_all_frames_at_once_are_the_frames_one_by_one():
    """`whole` is another division of the same work, for both directions; a single frame has one."""
    vae = jax.tree.map(lambda leaf: np.asarray(normal(leaf.shape)) / 5, abstract(SMALL))
    video, latents = normal((1, 9, 12, 20, 3)), normal((1, 3, 3, 5, SMALL.latent_channels))
    for method, one_by_one, x in ((VAE.encode, encode, video), (VAE.decode, decode, latents)):
        at_once = functools.partial(method, whole=True)
        assert_close(jit(at_once)(vae, x), one_by_one(vae, x), "float32", method.__name__)
        shape = lambda f, vae=vae, x=x: jax.eval_shape(f, vae, x[:, :1]).shape
        assert shape(at_once) == shape(one_by_one)


@pytest.mark.slow
@pytest.mark.parametrize("queries", [4, 12, 2048])
def test_attention_by_blocks_of_queries(monkeypatch, queries):
    """30 queries: blocks with a remainder, and fewer queries than one block."""
    monkeypatch.setattr(wan_vae, "QUERIES", queries)
    q, k, v = np.asarray(normal((3, 2, 30, 12)), np.float64)
    weights = np.exp(np.einsum("blc,bsc->bls", q, k) / np.sqrt(12))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bls,bsc->blc", weights, v)
    # A function of its own: QUERIES is read when it is traced.
    made = jit(lambda *args: attend(*args))(*map(jnp.float32, (q, k, v)))
    assert_close(made, expected, "float32", "attention")


@pytest.mark.slow
def test_bfloat16_flows_and_the_doors_are_float32(golden, tiny):
    """Production dtypes on the golden weights (they lie on the bfloat16 grid): no upcast in
    between, close to float32."""
    g = golden("vae_tiny")
    vae = load(dataclasses.replace(TINY, policy=VAEConfig().policy), g.weights(), OFFICIAL)
    x, cache = jax.eval_shape(
        lambda v, x: v.decoder(x, None), vae, jnp.zeros((1, 1, 4, 6, 16), jnp.bfloat16)
    )
    assert {leaf.dtype for leaf in jax.tree.leaves((x, cache, vae))} == {jnp.dtype(jnp.bfloat16)}
    assert jax.eval_shape(encode, vae, last(g["in/T5/video"])).dtype == jnp.float32
    video = decode(vae, last(g["in/T1/latent"]))
    assert video.dtype == jnp.float32
    assert_close(first(video), g["out/T1/decoded"], "vae_bf16", "decoded in bfloat16")


@pytest.mark.slow
def test_lowers_for_cuda_at_full_size():
    """480p, 21 latent frames, from a machine without the device; every convolution is
    two-dimensional."""
    latents = jax.ShapeDtypeStruct((1, 21, 60, 104, 16), jnp.float32)
    text = described.lower(described.trace(decode, abstract(VAEConfig()), latents)).as_text()
    assert "stablehlo.while" in text
    assert "triton" in text  # the taps of convolutions
    assert "stablehlo.convolution" in text
    assert not re.search(r"dim_numbers = \[b, 0, 1, 2, f\]", text)
    assert "tensor<1x81x480x832x3xf32>" in text


@pytest.mark.slow
def test_a_gpu_without_our_kernels_takes_the_reference(monkeypatch):
    """Older than Ampere: "auto" says so, impl="reference" traces without a kernel."""
    refuse = lambda: (_ for _ in ()).throw(
        ValueError("the Triton kernels need 8.0 (Ampere) or newer")
    )
    monkeypatch.setattr(tuning, "family", refuse)
    latents = jax.ShapeDtypeStruct((1, 2, 4, 4, 16), jnp.float32)
    small = VAEConfig(dim=32)
    with pytest.raises(ValueError, match="need 8.0"):
        jax.eval_shape(VAE.decode, abstract(small), latents)
    plain = dataclasses.replace(small, impl="reference")
    assert jax.eval_shape(VAE.decode, abstract(plain), latents).shape == (1, 5, 32, 32, 3)


@pytest.mark.slow
def test_cache_bytes():
    """Two frames of every causal convolution's input (of the last one's taps); the numbers of VAE's
    docstring."""
    assert round(cache_bytes(VAEConfig(), 480, 832) / 1e9, 2) == 1.75
    assert round(cache_bytes(VAEConfig(), 720, 1280) / 1e9, 2) == 4.04
    assert round(cache_bytes(VAEConfig(), 480, 832, encode=True) / 1e9, 2) == 1.12
    assert round(cache_bytes(VAEConfig(), 720, 1280, encode=True) / 1e9, 2) == 2.59


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 8, 32, 48, 3), ["has 8 frames", "must be 4k+1", "5 and 9"]),
        ((1, 0, 32, 48, 3), ["has 0 frames", "1 and 5"]),
        ((1, 5, 36, 48, 3), ["height is 36", "multiple of 8", "32 and 40"]),
        ((1, 5, 32, 4, 3), ["width is 4", "8 and 16"]),
    ],
)
def test_illegal_sizes_name_the_nearest(shape, words):
    with pytest.raises(UsageError) as error:
        jax.eval_shape(encode, abstract(TINY), jax.ShapeDtypeStruct(shape, jnp.float32))
    for word in words:
        assert word in str(error.value)


def test_illegal_layouts():
    with pytest.raises(ValueError, match=r"\(1, 3, 5, 32, 48\); it must be \[b T H W 3\]"):
        jax.eval_shape(encode, abstract(TINY), jax.ShapeDtypeStruct((1, 3, 5, 32, 48), jnp.float32))
    with pytest.raises(ValueError, match=r"\(1, 16, 3, 4, 6\); they must be \[b t h w 16\]"):
        jax.eval_shape(decode, abstract(TINY), jax.ShapeDtypeStruct((1, 16, 3, 4, 6), jnp.float32))


def test_shapes_of_a_cache_are_traced_once():
    shapes = wan_vae.cache_shapes(SMALL, 32, 32)
    assert wan_vae.cache_shapes(SMALL, 32, 32, encode=False) is shapes
    assert wan_vae.cache_shapes(SMALL, 32, 32, encode=True) is not shapes
