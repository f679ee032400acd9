"""The embedded model: it is whole and small, it is what the recipe says, it obeys its prompts in
every variant of the command."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

import tdjax
from tdjax.checkpoints import demo, orbax
from tdjax.generate import __main__ as generate
from tdjax.media.scenes import detector
from tdjax.media.scenes.factors import UNSAID
from tdjax.text.language import caption_of
from tdjax.train.tiny import configs
from tdjax.train.tiny.data import captions
from tdjax.train.tiny.evaluation import sampling
from tdjax.train.tiny.stages import package

pytestmark = pytest.mark.optimized

PROMPTS = (
    package.PROMPT,
    "a large green square moves right quickly on a black background",
    "a small white cross moves up quickly on a navy background",
    "a large blue triangle stays still on an olive background",
    "over black, a yellow disc, tiny, drifting downwards gently",
    "a plain navy background and a big orange box bouncing horizontally fast",
    "the little cyan square slides to the right rapidly, the background is grey",
    "large magenta circle slowly bouncing vertically, plain black background",
)
SOME = PROMPTS[:2]  # of the variants, which must obey both: a clip takes a second
FLAGS = ["--compile_cache_dir", "none"]


@pytest.fixture(scope="module")
def made():
    """Clips of all prompts, of the model as it is packaged."""
    return tdjax.load("demo")(list(PROMPTS), seed=0)


@pytest.fixture(scope="module")
def packaged(made):
    return made.frames


def obeyed(frames, prompts) -> dict[str, bool]:
    """For each prompt, whether the detector finds everything that it asks for in its clip. Clips
    are measured one by one, as for what is told of them: one program."""
    each = [detector.measure(frames[i : i + 1]) for i in range(len(frames))]
    measured = jax.tree.map(lambda *values: np.concatenate(values), *each)
    found = detector.correct(measured, captions.parse(prompts))
    return dict(zip(prompts, np.asarray(found["all"]).tolist(), strict=True))


# -- what it does ----------------------------------------------------------------------------------


def test_the_prompts_ask_for_everything():
    said = captions.parse(PROMPTS)
    unsaid = [
        (factor, i)
        for factor in captions.knows()
        for i in range(len(PROMPTS))
        if getattr(said, factor)[i] == UNSAID
    ]
    assert unsaid == [("speed", 3)]  # of what stays still


@pytest.mark.slow
def test_it_obeys_or_says_that_it_did_not(made):
    found = obeyed(made.frames, PROMPTS)
    assert sum(found.values()) >= 6, found
    for number, right in enumerate(found.values(), 1):
        told = [line for line in made.warnings if line.startswith(f"video {number} of 8: the clip")]
        assert len(told) == (not right), made.warnings


FREE = tuple(captions.free_prompt(seed) for seed in range(4))


@pytest.mark.slow
def test_it_obeys_prompts_of_any_order():
    """What they name, and what was drawn for them; docs/scripts/free_prompts.py tries many."""
    frames = tdjax.load("demo")(list(FREE), seed=list(range(4))).frames
    read = [caption_of(captions.LANGUAGE, prompt) for prompt in FREE]
    assert sum(obeyed(frames, read).values()) >= 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"quant": "none"},
        {"attention": "dense"},
        {"attention": "sagesla", "quant": "int8_channel"},
    ],
    ids=lambda options: " ".join(options.values()),
)
def test_its_variants_obey(options):
    found = obeyed(tdjax.load("demo", **options)(list(SOME), seed=0).frames, SOME)
    assert all(found.values()), found


@pytest.mark.slow
def test_another_seed_is_another_clip_of_the_same_prompt(packaged):
    frames = tdjax.load("demo")(PROMPTS[0], seed=1).frames
    assert all(obeyed(frames, PROMPTS[:1]).values())
    assert np.abs(frames[0].astype(int) - packaged[0]).max() > 50  # an object at another place


# -- the command -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_smallest_command_and_its_repetition(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert generate.main(["--format", "npy", *FLAGS]) == 0
    out = capsys.readouterr()
    assert (
        out.out == "output/demo_0_0.npy\n"
        and "the embedded demo model, 64x64, 33 frames" in out.err
    )
    prompt, seed = re.search(
        r'no prompt was given, this one is drawn: --prompt "(.+)" --seed (\d+)', out.err
    ).groups()
    assert prompt in json.loads((demo.PACKAGED / "model.json").read_text())["prompts"]
    assert (
        generate.main(["--prompt", prompt, "--seed", seed, "--save_path", "again.npy", *FLAGS]) == 0
    )
    assert np.array_equal(np.load("again.npy"), np.load("output/demo_0_0.npy"))


def test_another_prompt_each_time(capsys):
    drawn = set()
    for _ in range(4):
        assert generate.main(["--dry_run", *FLAGS]) == 0
        drawn |= set(re.findall('--prompt "(.+)" --seed 0', capsys.readouterr().err))
    assert len(drawn) > 1  # all four alike: once in 10^6 runs


def test_what_it_does_not_know(capsys):
    assert generate.main(["--prompt", "a red fox in the snow", "--dry_run", *FLAGS]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "has never seen" in line]
    assert "never seen 'fox', 'in', 'snow';" in line
    assert all(", ".join(values) in line for values in captions.knows().values())
    assert generate.main(["--prompt", package.PROMPT, "--dry_run", *FLAGS]) == 0
    assert "has never seen" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "attention", "linear"),
    [
        ([], "sla", "int8"),
        (["--attention_type", "dense"], "dense", "int8"),
        (["--attention_type", "original", "--quant", "none"], "dense", "float"),
        (["--attention_type", "sagesla", "--quant", "int8_channel"], "sagesla", "int8_channel"),
        (["--attention_type", "sla", "--quant", "fp8"], "sla", "fp8"),
        (["--quant_linear"], "sla", "int8"),
    ],
)
def test_variants_are_what_was_asked_for(argv, attention, linear, capsys):
    assert generate.main(["--dry_run", "--prompt", package.PROMPT, *argv, *FLAGS]) == 0
    rows = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines()[:3])
    assert rows["attention"].split(",")[0] == attention and rows["linears"] == linear


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--attention_type", "sparse"], ("auto", "original", "dense", "sla", "sagesla")),
        (["--quant", "int4"], ("auto", "none", "int8", "int8_channel", "fp8")),
    ],
)
def test_other_variants_are_refused_with_a_list(argv, words, capsys):
    assert generate.main(["--dry_run", *argv, *FLAGS]) == 2
    assert f"allowed: {', '.join(words)}\n" in capsys.readouterr().err


def test_an_installation_without_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "PACKAGED", tmp_path)
    (tmp_path / "model.json").touch()
    assert generate.main(["--prompt", "a", *FLAGS]) == 3
    message = capsys.readouterr().err
    assert (
        f"{tmp_path} has no dit, vae, text, tokenizer.json" in message
        and "python -m tdjax.train.tiny" in message
    )


# -- the files -------------------------------------------------------------------------------------


def test_it_is_small_and_whole():
    files = [file for file in demo.PACKAGED.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < package.LIMIT == 10_000_000
    assert {file.relative_to(demo.PACKAGED).parts[0] for file in files} == {
        *demo.PARTS,
        "MODEL_CARD.md",
    }


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("dit", dataclasses.replace(configs.DIT_SLA, linear="int8")),
        ("vae", configs.VAE),
        ("text", configs.TEXT),
    ],
)
def test_it_is_what_the_recipe_makes(name, config):
    kind, cfg = orbax.checked(demo.PACKAGED / name)
    if name == "vae":  # measured on the trained encoder
        assert cfg.std != config.std
        config = dataclasses.replace(config, mean=cfg.mean, std=cfg.std)
    assert kind == name and cfg == configs.stored(config)


def test_its_facts():
    facts = json.loads((demo.PACKAGED / "model.json").read_text())
    assert facts == json.loads(json.dumps(package.metadata()))
    assert facts["language"]["words"] == captions.vocabulary()
    assert (facts["frames"], facts["height"], facts["width"]) == (
        configs.SIZE.frames,
        configs.SIZE.height,
        configs.SIZE.width,
    )
    assert facts["sampler"] == {
        "mid_t": list(sampling.student().mid_t),
        "sigma_max": sampling.student().sigma_max,
    }
    assert (
        facts["prompts"][0] == package.PROMPT and len(set(facts["prompts"])) > 0.8 * package.PROMPTS
    )
    words = {word for prompt in facts["prompts"] for word in captions.words_of(prompt)}
    assert words <= set(captions.vocabulary())


def test_every_word_is_one_token():
    pipe = tdjax.load("demo")
    assert all(pipe.tokenizer.count(word) == 2 for word in captions.vocabulary())  # and the end
    assert max(pipe.tokenizer.count(prompt) for prompt in pipe.info.prompts) <= pipe.info.text_len


def test_no_prompt_of_its_own_is_warned_of():
    pipe = tdjax.load("demo")
    assert [pipe.warnings(pipe.request(prompt)) for prompt in pipe.info.prompts] == [[]] * len(
        pipe.info.prompts
    )


def test_its_card():
    text = (demo.PACKAGED / "MODEL_CARD.md").read_text()
    assert all(
        f"- {factor}: {', '.join(values)}" in text for factor, values in captions.knows().items()
    )
    assert (
        "## Data" in text
        and "## Recipe" in text
        and "INT8 (packaged)" in text.split("## Results")[1]
    )


def test_nothing_of_the_machine_that_trained_it_is_left():
    names = {file.name for file in demo.PACKAGED.rglob("*")}
    assert not any(name.endswith((".part", ".old", ".lock", ".pyc")) for name in names)
    for name in ("dit", "vae", "text"):
        source = orbax.inspect(demo.PACKAGED / name)["source"]
        assert source["name"] == "tdjax tiny recipe" and not re.search(r"/\w+/", json.dumps(source))
