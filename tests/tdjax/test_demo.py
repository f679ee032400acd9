"""The packaged model obeys its prompts, in every variant that the command offers; skipped where the package has no weights."""

import numpy as np
import pytest

import tdjax
from tdjax import checkpoint, demo

pytestmark = pytest.mark.skipif(not (demo.PACKAGED / "model.json").is_file(), reason="the trained demo model is not in the package")
PROMPTS = (
    "a small red circle moves left slowly on a gray background",
    "a large green square moves right quickly on a black background",
    "a small white cross moves up quickly on a navy background",
    "a large blue triangle stays still on an olive background",
)


def verdicts(**options) -> list[bool]:
    """For each prompt, whether the detector finds everything that it asks for."""
    from tdjax.train.tiny import captions, detector

    frames = tdjax.load("demo", **options)(list(PROMPTS)).frames
    return detector.correct(detector.measure(frames), captions.parse(PROMPTS))["all"].tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"quant": "none"}, {"attention": "original"}, {"attention": "sagesla"}], ids=lambda o: str(o) if o else "as packaged"
)
def test_it_obeys(options):
    assert sum(verdicts(**options)) >= len(PROMPTS) - 1


def test_it_is_small_and_whole():
    files = [file for file in demo.PACKAGED.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 10_000_000
    kinds = {checkpoint.checked(demo.PACKAGED / name)[0] for name in ("dit", "vae", "text")}
    assert kinds == {"dit", "vae", "text"} and (demo.PACKAGED / "MODEL_CARD.md").is_file()


def test_the_command_has_a_prompt_for_every_seed():
    pipe = tdjax.load("demo")
    assert pipe.trained and len({pipe.default_prompt(seed) for seed in range(20)}) > 15
    assert np.all([pipe.warnings(pipe.request(pipe.default_prompt(seed))) == [] for seed in range(20)])
