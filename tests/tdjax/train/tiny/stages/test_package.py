"""The folder that ships: read by our own reader, used by the pipeline, honest about what it
knows."""

import numpy as np
import pytest
import tiny_cases

import tdjax
from tdjax.checkpoints import orbax
from tdjax.train.tiny import configs, work
from tdjax.train.tiny.stages import package

pytestmark = pytest.mark.slow

SMALL = {"num_frames": 5, "width": 32, "height": 32}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tiny_cases.finished_run(tmp_path_factory.mktemp("run"))
    package.run_stage(run)
    return run


def test_our_reader_reads_it(run):
    folder = run.folder / "demo"
    assert sorted(path.name for path in folder.iterdir()) == [
        "MODEL_CARD.md",
        "dit",
        "model.json",
        "text",
        "tokenizer.json",
        "vae",
    ]
    kind, cfg = orbax.checked(folder / "dit")
    assert (kind, cfg.linear, cfg.attention, cfg.policy.param, cfg.remat) == (
        "dit",
        "int8",
        "sla",
        "bfloat16",
        "block",
    )
    weight = orbax.read(folder / "dit", "blocks.up.int8_weight")
    scale = orbax.read(folder / "dit", "blocks.up.scale")
    kernel = np.asarray(orbax.named_leaves(work.load(run, "merged"))["blocks.up.kernel"])
    assert (
        np.abs(weight[0].T * scale.reshape(1, 1) - kernel[0]).max() <= 1.0001 * scale.max()
    )  # the largest, 128, becomes 127


def test_the_pipeline_uses_it(run):
    pipe = tdjax.load(run.folder / "demo")
    assert pipe.sampler.mid_t == (1.3, 1.0, 0.6)
    assert (pipe.size.frames, pipe.size.height) == (33, 64)
    assert pipe.default_prompt(0) == package.PROMPT
    assert "quickly" in pipe.default_prompt(3) and "still" not in pipe.default_prompt(3)
    assert pipe(pipe.default_prompt(1), **SMALL).frames.shape == (1, 5, 32, 32, 3)


def test_it_says_what_it_does_not_know(run):
    pipe = tdjax.load(run.folder / "demo")
    told = pipe.warnings(pipe.request("A fox and a RED circle", **SMALL))
    (line,) = [line for line in told if "'fox'" in line]
    assert (
        "'red'" not in line.lower().split("knows only")[0]
        and "shape: circle, square, triangle, cross" in line
    )
    assert pipe.warnings(pipe.request(package.PROMPT)) == []
    assert pipe.warnings(pipe.request("")) == ["the prompt is empty: the video follows no text"]


def test_the_card(run):
    text = (run.folder / "demo" / "MODEL_CARD.md").read_text()
    assert (
        "VAE 3 steps" in text
        and "of update 7" in text
        and "- speed: slowly, quickly" in text
        and "(not evaluated)" in text
    )


def test_a_package_that_is_too_large_is_not_left(run, monkeypatch):
    monkeypatch.setattr(package, "LIMIT", 1000)
    monkeypatch.setattr(package, "PROMPTS", 2)
    before = (run.folder / "demo" / "model.json").read_text()
    with pytest.raises(ValueError, match="at most 1000"):
        package.run_stage(run)
    assert (run.folder / "demo" / "model.json").read_text() == before


def test_the_real_sizes_pass_the_limit():
    assert package.LIMIT > 9_300_000 and configs.stored(configs.DIT_SLA).remat == "block"
