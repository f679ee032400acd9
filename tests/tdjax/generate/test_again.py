"""A video's metadata as options: the request that they make is the one that it came from."""

import json

import numpy as np
import pytest

import tdjax
from tdjax.errors import UsageError
from tdjax.generate import __main__ as generate
from tdjax.generate.again import _loras
from tdjax.generate.arguments import parse
from tdjax.generate.jobs import read_jobs
from tdjax.pipeline.result import metadata_of


@pytest.fixture(scope="module")
def pipe():
    return tdjax.load("demo", prompt_cache=False)


def saved(pipe, path, index=0, **arguments):
    """The metadata of a request, as it is written beside a video."""
    request = pipe.request(**arguments)
    about = metadata_of(pipe.name, request, pipe.components) | {"index": index, "fps": request.fps}
    path.write_text(json.dumps(about))
    return about


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompt": "a red circle on blue"},
        {"prompt": "-5 'quotes' = \n", "seed": 7, "fps": 12, "num_samples": 2, "num_frames": 17},
        {"prompt": "a", "sampler": "ode", "num_steps": 2, "mid_t": (1.2,), "sigma_max": 40.0},
        {"prompt": "a", "sampler": "unipc", "num_steps": 9, "guidance_scale": 3.0, "shift": 2.0},
    ],
)
def test_a_sidecar_makes_the_same_request(pipe, tmp_path, arguments):
    path = tmp_path / "v.mp4.json"
    about = saved(pipe, path, **arguments)
    args = parse(["--config", str(path)])
    (job,) = read_jobs(args)
    request = pipe.request(job.prompt, **generate._call_arguments(args, job))
    again = metadata_of(pipe.name, request, pipe.components)
    if not request.sampler.few_step:  # read by nobody there
        again["sampler"] = again["sampler"] | {"mid_t": about["sampler"]["mid_t"]}
    assert again == {name: about[name] for name in again}


def test_the_words_beside_it_win(pipe, tmp_path):
    path = tmp_path / "v.mp4.json"
    saved(pipe, path, prompt=["a red circle", "a blue square"], index=1)
    assert parse(["--config", str(path)]).prompt == "a blue square"
    args = parse(["a green cross", "--config", str(path), "--seed", "3"])
    assert (args.prompt, args.seed, args.num_steps) == ("a green cross", 3, 4)


def test_what_metadata_has_as_a_digest_only_is_asked_for(pipe, tmp_path):
    path = tmp_path / "v.mp4.json"
    latents = np.zeros(pipe.latent_shape(pipe.request("a")), np.float32)
    saved(pipe, path, prompt="a", latents=latents)
    with pytest.raises(UsageError, match="latents of its own(.|\n)*--latents FILE"):
        parse(["--config", str(path)])
    assert parse(["--config", str(path), "--latents=x.npy"]).latents == "x.npy"
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about | {"given": {}, "seed": None}))
    with pytest.raises(UsageError, match="random key"):
        parse(["--config", str(path)])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"sampler": None}, "sampler is None, not a table"),
        ({"size": {"frames": 5}}, "has no height"),
        ({"transformer": {}}, "has no attention"),
        ({"prompts": "a"}, "prompts"),
        ({"prompts": []}, "it has no prompt"),
        ({"seed": "x"}, "seed"),
        ({"seed": [1]}, "seed"),
        ({"fps": True}, "fps"),
        ({"num_samples": 1.5}, "num_samples"),
        ({"lora": {"dit": ["x"]}}, "lora"),
        ({"given": 3}, "given"),
        ({"index": "x"}, "index"),
    ],
)
def test_metadata_that_is_not_whole_is_refused(pipe, tmp_path, change, why):
    path = tmp_path / "v.mp4.json"
    path.write_text(json.dumps(saved(pipe, path, prompt="a") | change))
    with pytest.raises(UsageError) as error:
        parse(["--config", str(path)])
    assert "no whole metadata" in error.value.what and why in error.value.why


def test_loras_go_to_their_experts():
    a, b = ["a.safetensors", 1.0], ["b.safetensors", 0.8]
    assert _loras({"dit": [a, b]}) == {"lora": ["a.safetensors:1", "b.safetensors:0.8"]}
    assert _loras({"dit": [a, b], "dit_low": [a]}) == {
        "lora": ["a.safetensors:1"],
        "lora_high": ["b.safetensors:0.8"],
        "lora_low": [],
    }
