"""The command line: official spellings, contradictions, and answers before jax is imported."""

import json
import os
import subprocess
import sys
import time
from typing import get_args

import pytest

from tdjax.errors import UsageError
from tdjax.generate import __main__ as generate
from tdjax.generate.arguments import parse
from tdjax.pipeline.options import Quant


def fails(capsys, *argv):
    """The message of a command that must stop with exit code 2."""
    assert generate.main(list(argv)) == 2
    out = capsys.readouterr()
    assert out.out == ""
    return out.err


def test_the_official_command_parses():
    """The commands of thu-ml/TurboDiffusion's README, with other paths."""
    t2v = """--model Wan2.1-1.3B --dit_path a.pth --resolution 480p --prompt p --num_samples 1
        --num_steps 4 --quant_linear --attention_type sagesla --sla_topk 0.1"""
    args = parse(t2v.split())
    assert (args.official_model, args.dit_path, args.quant, args.attention_type) == (
        "Wan2.1-1.3B",
        "a.pth",
        "int8",
        "sagesla",
    )
    i2v = """--model Wan2.2-A14B --low_noise_model_path l --high_noise_model_path h
        --adaptive_resolution --ode --image_path i"""
    args = parse(i2v.split())
    assert (args.fit, args.sampler) == ("adaptive", "ode")


def test_every_kind_of_linear_layer_can_be_asked_for():
    assert [parse(["--quant", kind]).quant for kind in get_args(Quant)] == list(get_args(Quant))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--num_frames 80", ["num_frames is 80", "4k+1", "77 and 81"]),
        ("--height 500 --width 832", ["height is 500", "multiple of 16", "496 and 512"]),
        ("--width 832", ["height is not given"]),
        ("--num_steps 5", ["num_steps is 5", "1 to 4"]),
        ("--num_steps 0", ["num_steps is 0"]),
        ("--sigma_max -3", ["sigma_max is -3", "80"]),
        ("--mid_t 1.0 1.4", ["mid times", "fall"]),
        ("--sla_topk 0", ["sla_topk is 0", "0.15"]),
        ("--sla_topk 1.5", ["sla_topk is 1.5"]),
        ("--num_samples 0", ["--num_samples is 0"]),
        ("--resolution 1080p", ["1080p", "480p", "720p"]),
        ("--aspect_ratio 21:9", ["21:9", "16:9"]),
        ("--image_path missing.png", ["missing.png does not exist"]),
        ("--prompt_file missing.txt", ["missing.txt does not exist"]),
        ("--save_path out_{colour}.mp4", ["colour", "prompt_slug"]),
        ("--save_path take_{2}.mp4", ["{2}", "{{ and }}"]),
        ("--save_path v_{seed.x}.mp4", ["seed.x", "fields are"]),
        ("--save_path v_{seed:s}.mp4", ["'s'", "{index:03d}"]),
        ("--save_path open{.mp4", ["{{ and }}"]),
        ("--prompt_file .", [". is a folder"]),
        ("--ode --sampler sde", ["contradict"]),
        ("--quant_linear --quant none", ["contradict"]),
        ("--seconds 5 --num_frames 81", ["both give the length"]),
        ("--model Wan2.1-1.3B", ["names a network size", "--dit_path"]),
        ("--nun_steps 4", ["--nun_steps", "did you mean --num_steps?"]),
        ("--seconds nan", ["--seconds is nan"]),
        ("--mid_t nan", ["mid times"]),
        ("--boundary nan --num_steps 2", ["boundary is nan"]),
        ("--format gif --save_path a.mp4", ["another format"]),
        ("--grid --format latents", ["--grid with latents"]),
        ("--config missing.toml", ["missing.toml cannot be read"]),
    ],
)
def test_usage_errors_name_what_and_what_to_do(capsys, argv, words):
    message = fails(capsys, *argv.split())
    for word in words:
        assert word in message
    assert message.startswith("error: ")


def test_an_existing_file_is_refused_before_anything_runs(capsys, tmp_path):
    path = tmp_path / "v.mp4"
    path.write_bytes(b"mine")
    message = fails(capsys, "--save_path", str(path))
    assert "exists" in message and "--overwrite" in message
    assert path.read_bytes() == b"mine"


def test_embeddings_that_exist_are_refused_before_anything_runs(capsys, tmp_path):
    (tmp_path / "e.safetensors").touch()
    message = fails(capsys, "--save_prompt_embeds", str(tmp_path / "e.safetensors"))
    assert "exists" in message and "--overwrite" in message


def test_embeddings_are_not_written_over_what_they_are_made_of(capsys, tmp_path):
    rows = tmp_path / "rows.txt"
    rows.write_text("a fox")
    words = ("--prompt_file", str(rows), "--save_prompt_embeds", str(rows), "--overwrite")
    assert "is the input" in fails(capsys, *words)
    words = ("--prompt_embeds", str(rows), "--save_prompt_embeds", str(tmp_path / "e"))
    assert "nothing to encode" in fails(capsys, *words)
    assert rows.read_text() == "a fox" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["-", "pipe"])
@pytest.mark.parametrize("option", ["--save_path", "--save_prompt_embeds"])
def test_a_stream_is_no_place_for_a_file(capsys, tmp_path, monkeypatch, option, name):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    message = fails(capsys, option, name, "--overwrite")
    assert "give the name of a file" in message and "whole, under a name" in message
    assert os.listdir() == ["pipe"]


def test_every_path_takes_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = "dit_path high_noise_model_path low_noise_model_path vae_path text_encoder_path"
    words += " tokenizer_path prompt_file prompt_embeds save_prompt_embeds image_path latents"
    words += " save_path compile_cache_dir profile"
    names = words.split()
    args = parse([f"--{name}=~/x" for name in names])
    assert {getattr(args, name) for name in names} == {f"{tmp_path}/x"}
    assert parse(["--lora=~/x:0.5"]).lora == [f"{tmp_path}/x:0.5"]
    (tmp_path / "run.json").write_text('{"save_path": "~/v.gif"}')
    assert parse(["--config=~/run.json"]).save_path == f"{tmp_path}/v.gif"


def test_attention_and_impl_by_both_names(tmp_path):
    for name in ("attention", "attention_type"):
        assert parse([f"--{name}", "sla"]).attention_type == "sla"
        (tmp_path / "run.json").write_text(json.dumps({name: "sla"}))
        assert parse(["--config", str(tmp_path / "run.json")]).attention_type == "sla"
    assert parse(["--impl", "triton"]).attention_impl == "triton"


def test_missing_file_names_its_neighbour(capsys, tmp_path):
    (tmp_path / "photo.jpg").touch()
    assert "photo.jpg" in fails(capsys, "--image_path", str(tmp_path / "phot.jpg"))


def test_config_file_under_the_command_line(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('num-steps = 2\nprompt = "a fox"\n')
    args = parse(["--config", str(path), "--num_steps", "3"])
    assert (args.num_steps, args.prompt) == (3, "a fox")
    path.write_text("overwrite = true\nmid_t = [1.5, 1.2]\n")
    args = parse(["--config", str(path)])
    assert args.overwrite and args.mid_t == [1.5, 1.2]
    for bad in ('overwrite = "no"\n', "nun_steps = 2\n"):
        path.write_text(bad)
        with pytest.raises(UsageError):
            parse(["--config", str(path)])
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(UsageError, match="not a table"):
        parse(["--config", str(tmp_path / "list.json")])
    path.write_text("nun_steps = 2\n")
    with pytest.raises(UsageError, match="num_steps"):
        parse(["--config", str(path)])


@pytest.mark.parametrize(
    ("file", "words", "expected"),
    [
        ('{"num_frames": 81}', "--seconds 1", {"num_frames": 17}),
        ('{"seconds": 1}', "--num_frames=5", {"num_frames": 5}),
        ('{"sampler": "sde"}', "--ode", {"sampler": "ode"}),
        ('{"ode": true}', "--sampler sde", {"sampler": "sde"}),
        ('{"fit": "crop"}', "--adaptive_resolution", {"fit": "adaptive"}),
        ('{"quant": "none"}', "--quant_linear", {"quant": "int8"}),
        ('{"width": 64, "height": 64}', "--resolution 480p", {"width": None, "height": None}),
        ('{"prompt": "a fox"}', "--prompt_file x.txt", {"prompt": None}),
        ('{"prompt": "a fox"}', "--serve", {"prompt": None}),
    ],
)
def test_the_command_line_wins_also_under_another_name(tmp_path, file, words, expected):
    path = tmp_path / "run.json"
    path.write_text(file)
    args = vars(parse([f"--config={path}", *words.split()]))
    assert {name: args[name] for name in expected} == expected


def test_the_last_setting_of_a_session_wins_also_under_another_name():
    args = parse(["--seed", "3", "--width", "64", "--height", "64", "--sampler", "ode"])
    settings: dict[str, list[str]] = {}
    lines = ("seconds 1", "num_frames 5", "num_frames 9", "sampler sde", "resolution 480p")
    for line in lines:
        settings = generate._changed(settings, *generate._setting(f":set {line}"))
    now = generate._parse_settings(args, settings)
    assert (now.num_frames, now.sampler, now.resolution, now.seed) == (9, "sde", "480p", 3)
    assert now.width is None and now.height is None


def test_a_session_takes_a_size_side_by_side_and_settings_after_its_files_are_there(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    settings: dict[str, list[str]] = {}
    for line in ("width 128", "height 64", "save_path fox.mp4"):
        settings = generate._changed(settings, *generate._setting(f":set {line}"))
    (tmp_path / "fox.mp4").touch()
    settings = generate._changed(settings, *generate._setting(":set seed 4"))
    now = generate._parse_settings(parse([]), settings)
    assert (now.width, now.height, now.save_path, now.seed) == (128, 64, "fox.mp4", 4)
    for line in ("height 65", "height 0", "save_path fox.mp4"):
        with pytest.raises(UsageError):
            generate._changed(settings, *generate._setting(f":set {line}"))


def test_seconds_become_legal_frames():
    assert [parse(["--seconds", s]).num_frames for s in ("5", "0.01", "5.1")] == [81, 1, 81]


@pytest.mark.slow
@pytest.mark.parametrize("argv", [["--help"], ["--num_frames", "80"]])
def test_answers_come_before_jax_is_imported(argv):
    code = (
        "import sys; from tdjax.generate import __main__ as generate\n"
        f"try: generate.main({argv!r})\nexcept SystemExit: pass\nassert 'jax' not in sys.modules"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (
        time.perf_counter() - start < 5
    )  # under 0.5 s on an idle machine; the bound here only catches a jax import


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        (":set image_path my photo.png", "image_path", "my photo.png"),
        (':set image_path "my photo.png"', "image_path", "my photo.png"),
        (":set image-path  'my photo.png' ", "image_path", "my photo.png"),
        (":set mid_t 1.5 1.2", "mid_t", [1.5, 1.2]),
        (":set seed -1", "seed", -1),
        (":set cfg 1", "guidance_scale", 1.0),
    ],
)
def test_settings_of_a_session(tmp_path, monkeypatch, line, field, value):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my photo.png").touch()
    args = parse(["--seed", "3", "--fps", "20"])
    settings = generate._changed({}, *generate._setting(line))
    now = generate._parse_settings(args, settings)
    assert getattr(now, field) == value and now.fps == 20
    settings = generate._changed(settings, *generate._setting(":set seed 0"))
    later = generate._parse_settings(args, settings)
    assert later.seed == 0 and (field == "seed" or getattr(later, field) == value)


@pytest.mark.parametrize(
    "line",
    [
        ":set seed",
        ":set quant int8",
        ":set attention dense",
        ":set",
        ":odd seed 3",
        ":set sede 3",
        ":set seed x",
        ":set mid_t 1 --help",
        ":set prompt a fox",
        ":set config run.toml",
        ":set help 1",
    ],
)
def test_settings_that_are_not_taken(line, capsys):
    with pytest.raises(UsageError):
        generate._changed({}, *generate._setting(line))


def test_a_prompt_needs_no_option(capsys, tmp_path):
    for words in (["a fox", "--seed", "3"], ["--seed", "3", "a fox"], ["--prompt=a fox"]):
        assert parse(words).prompt == "a fox"
    (tmp_path / "run.toml").write_text('prompt = "a cat"\nmid_t = [1.5, 1.2]\n')
    args = parse(["--config", str(tmp_path / "run.toml"), "a fox"])
    assert (args.prompt, args.mid_t) == ("a fox", [1.5, 1.2])
    assert "both are the prompt" in fails(capsys, "a fox", "--prompt", "a cat")
    assert "'fox' is surplus" in fails(capsys, "a", "fox")


def test_short_words_for_options():
    args = parse(["-o", "v.gif", "--image", "photo.png", "--cfg=4", "--num_inference_steps=3"])
    assert (args.save_path, args.image_path) == ("v.gif", "photo.png")
    assert (args.guidance_scale, args.num_steps) == (4.0, 3)


@pytest.mark.parametrize(("quiet", "verbose"), [(True, False), (True, True), (False, True)])
def test_quiet_and_verbose(capsys, quiet, verbose):
    stages = generate.command_stages(quiet, verbose)
    stages.note("give `image`")
    with stages("open"):
        pass
    err = capsys.readouterr().err
    assert (err == "") if quiet else ("give --image_path" in err and "open: " in err)
