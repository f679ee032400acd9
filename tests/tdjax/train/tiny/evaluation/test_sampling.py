"""From captions to the detector's verdict, with an oracle in place of the transformer: samplers,
guidance and decoding lose nothing."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_cases
import train_cases
from arrays import put
from tolerances import assert_close

from tdjax.media.scenes import clips, detector
from tdjax.media.scenes.factors import Attributes, Factors
from tdjax.train.tiny import configs
from tdjax.train.tiny.data import captions, encoded
from tdjax.train.tiny.evaluation import sampling

GUIDANCE = 2.0
NAMES = [field.name for field in dataclasses.fields(Attributes)]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Oracle:
    """Knows the latents of every caption of the batch. Without guidance, its velocity is theirs;
    under it, what guidance must double."""

    x0: jax.Array

    @property
    def cfg(self):
        return types.SimpleNamespace(out_channels=self.x0.shape[-1])

    def __call__(self, x, timestep, rows):
        u = timestep.reshape(-1, 1, 1, 1, 1) / 1000
        if len(x) == len(self.x0):
            return (x - self.x0) / u
        v = (x[: len(self.x0)] - self.x0) / u[: len(self.x0)]
        return jnp.concatenate([v / GUIDANCE, jnp.zeros_like(v)])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Codec:
    """Latents are the factors themselves: eight numbers in the first place of a clip, the heading
    in the second."""

    scale: jax.Array

    def encode(self, factors: Factors):
        numbers = jnp.stack(
            [
                *(put(getattr(factors.said, name), jnp.float32) for name in NAMES),
                *factors.start.T / 32,
            ],
            -1,
        )
        x = jnp.zeros((len(numbers), *configs.SIZE.latent_grid, 8))
        return x.at[:, 0, 0, 0].set(numbers).at[:, 0, 0, 1, 0].set(factors.heading) / self.scale

    def decode(self, x, whole):
        numbers = x[:, 0, 0, 0] * self.scale
        said = Attributes(
            **{name: jnp.round(numbers[:, i]).astype(jnp.int32) for i, name in enumerate(NAMES)}
        )
        return clips.render(
            Factors(said=said, start=numbers[:, 6:] * 32, heading=jnp.sign(x[:, 0, 0, 1, 0]))
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    tokenizer = tiny_cases.tokenizer(tmp_path_factory.mktemp("tokenizer"))
    prompts = sampling.prompts(tokenizer, jax.random.key(4), 12)
    factors = clips.place(jax.random.key(5), prompts.said)
    codec = Codec(jnp.float32(2))
    return tokenizer, prompts, codec, Oracle(codec.encode(factors)), tiny_cases.text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        sampling.teacher(50, "unipc", GUIDANCE, 3.0),
        sampling.teacher(4, "euler", GUIDANCE, 3.0),
        sampling.student(4),
        sampling.student(1),
    ],
    ids=lambda how: f"{how.sampler} {how.num_steps}",
)
def test_an_oracle_gets_everything_right(world, how):
    tokenizer, prompts, codec, oracle, text = world
    x = sampling.latents(
        oracle, text, prompts.tokens, encoded.negative(tokenizer), jax.random.key(6), how
    )
    assert np.abs(np.asarray(x - oracle.x0)).max() < 2e-3
    scores = detector.scores(sampling.measured(codec, x), prompts.said)
    assert scores["all"] == 1.0 and scores["speed_error"] < 0.02


@pytest.mark.slow
def test_devices_make_some_of_the_clips_each(world):
    """From the noise that one device has, and one makes what they do not divide."""
    tokenizer, prompts, _, _, text = world
    dit, vae, mesh = (
        tiny_cases.dit(),
        tiny_cases.vae(tiny_cases.PACKED.vae),
        train_cases.mesh(data=2),
    )
    negative, key = encoded.negative(tokenizer), jax.random.key(6)
    for n, how in ((4, sampling.student(2)), (4, sampling.teacher(2, "euler", 1.5, 3.0))):
        tokens = prompts.tokens[:n]
        one, two = (
            sampling.latents(dit, text, tokens, negative, key, how, m) for m in (None, mesh)
        )
        assert_close(two, one, "float32")
        assert len(two.devices()) == 2
    whole = sampling.videos(vae, one).astype(int)
    for n in (4, 3):
        assert np.abs(sampling.videos(vae, two[:n], mesh) - whole[:n]).max() <= 1
    assert len(sampling.measured(vae, two, mesh).start) == 4


@pytest.mark.slow
def test_prompts_say_what_they_ask_for_and_repeat_in_rows(world):
    tokenizer = world[0]
    prompts = sampling.prompts(tokenizer, jax.random.key(1), 3, repeats=2)
    assert prompts.texts[0] == prompts.texts[1] != prompts.texts[2] and prompts.tokens.shape == (
        6,
        32,
        2,
    )
    assert np.array_equal(captions.parse(prompts.texts).colour, prompts.said.colour)
