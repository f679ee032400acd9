"""Names to files: presets and hub ids in a hub cache without network, local files and folders,
overrides, and every error."""

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from tdjax.checkpoints import filenames, folders, hub
from tdjax.checkpoints.locate import cache_folder, locate
from tdjax.errors import CheckpointError, UsageError
from tdjax.presets import PRESETS

BASE = "Wan-AI/Wan2.1-T2V-1.3B"
VAE, TEXT, TOKENIZER = (
    "Wan2.1_VAE.pth",
    "models_t5_umt5-xxl-enc-bf16.pth",
    "google/umt5-xxl/tokenizer.json",
)
TURBO = "TurboWan2.1-T2V-1.3B-480P"
HIGH, LOW = "TurboWan2.2-I2V-A14B-high-720P.pth", "TurboWan2.2-I2V-A14B-low-720P.pth"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put(root: Path, *names: str) -> Path:
    """Files whose content is their own name."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def put_repo(cache: Path, repo: str, *names: str, commit=COMMIT, ref="main") -> Path:
    """A repository in the layout of the hub's cache, files linked to blobs."""
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / ref).write_text(commit)
    snapshot = root / "snapshots" / commit
    for name in names:
        blob = (
            put(root / "blobs", f"{commit[:4]}-{name.replace('/', '-')}")
            / f"{commit[:4]}-{name.replace('/', '-')}"
        )
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    return snapshot


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty hub cache; any use of the network fails the test."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


@pytest.fixture
def checkpoints(tmp_path, cache):
    """The folder of the official instructions, with the tokenizer that they leave to the hub."""
    return put(tmp_path / "checkpoints", f"{TURBO}.pth", VAE, TEXT, TOKENIZER)


def message(error) -> str:
    return str(error.value)


# Names of published files
# --------------------------------------------------------------------------------------------------


def test_names_of_presets():
    assert (
        filenames.alias_of(TURBO) == filenames.alias_of(f"TurboDiffusion/{TURBO}") == TURBO.lower()
    )
    assert filenames.alias_of(f"{TURBO}-QUANT") == f"{TURBO.lower()}-quant"
    assert filenames.alias_of("TurboWan2.2-I2V-A14B-low-720P") == "turbowan2.2-i2v-a14b-720p"
    assert filenames.alias_of("wan-ai/wan2.1-t2v-14b") == "wan2.1-t2v-14b"
    assert filenames.alias_of("diffusion_pytorch_model") is None
    for alias in PRESETS:
        assert filenames.alias_of(alias.upper()) == alias


@pytest.mark.parametrize(
    "name, role, two, other",
    [
        (HIGH, "high", True, LOW),
        (
            "low_noise_model/diffusion_pytorch_model.safetensors",
            "low",
            True,
            "high_noise_model/diffusion_pytorch_model.safetensors",
        ),
        ("wan_High-Noise_fp16.safetensors", "high", True, "wan_Low-Noise_fp16.safetensors"),
        ("my-high-quality.pth", "high", False, "my-low-quality.pth"),
        ("flow_highway.pth", None, False, "flow_highway.pth"),
    ],
)
def test_experts_by_name(name, role, two, other):
    assert filenames.expert(name) == role
    assert filenames.needs_two(name) is two
    assert filenames.swap_expert(name) == other


def test_transformers_among_other_files():
    names = [
        f"{TURBO}.pth",
        VAE,
        TEXT,
        "models_clip_vit.pth",
        "my_lora.safetensors",
        "README.md",
        "umt5-xxl/model.safetensors",
    ]
    assert filenames.transformers(names, "x") == ("published", (f"{TURBO}.pth",))
    assert filenames.transformers([HIGH, LOW, VAE], "x") == ("published", (HIGH, LOW))
    sharded = [
        "diffusion_pytorch_model-00001-of-00002.safetensors",
        "diffusion_pytorch_model.safetensors.index.json",
    ]
    assert filenames.transformers(sharded, "x") == ("published", (sharded[1],))
    assert filenames.transformers([VAE], "x") == ("published", ())


# Presets and hub ids from a cache
# --------------------------------------------------------------------------------------------------


def test_a_preset_comes_from_two_repositories(cache):
    dit = put_repo(cache, f"TurboDiffusion/{TURBO}", f"{TURBO}.pth", f"{TURBO}-quant.pth")
    base = put_repo(cache, BASE, VAE, TEXT, TOKENIZER)
    for name in (TURBO, TURBO.upper(), f"turbodiffusion/{TURBO}"):
        got = locate(name)
        assert got.dit == (dit / f"{TURBO}.pth",) and got.dit[0].read_text().endswith(
            f"{TURBO}.pth"
        )
        assert (got.vae, got.text, got.tokenizer) == (base / VAE, base / TEXT, base / TOKENIZER)
        assert (got.preset, got.name, got.layout, got.distilled) == (
            TURBO.lower(),
            TURBO.lower(),
            "published",
            True,
        )
    assert locate(f"{TURBO}-quant").dit == (dit / f"{TURBO}-quant.pth",)


def test_a_preset_with_two_experts_and_only_a_sentencepiece_tokenizer(cache):
    dit = put_repo(cache, "TurboDiffusion/TurboWan2.2-I2V-A14B-720P", HIGH, LOW)
    base = put_repo(cache, BASE, VAE, TEXT, "google/umt5-xxl/spiece.model")
    got = locate("TurboWan2.2-I2V-A14B-high-720P")
    assert (
        got.dit == (dit / HIGH, dit / LOW)
        and got.tokenizer == base / "google/umt5-xxl/spiece.model"
    )
    assert got.warnings == ()


def test_sharded_weights_bring_their_shards(cache):
    index, shards = (
        "diffusion_pytorch_model.safetensors.index.json",
        [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)],
    )
    root = put_repo(cache, "Wan-AI/Wan2.1-T2V-14B", index, shards[0])
    put_repo(cache, BASE, VAE, TEXT, TOKENIZER)
    (root / index).write_text(json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}}))
    with pytest.raises(CheckpointError, match=f"{shards[1]} is not available"):
        locate("wan2.1-t2v-14b")
    put_repo(cache, "Wan-AI/Wan2.1-T2V-14B", shards[1])
    got = locate("wan2.1-t2v-14b")
    assert got.dit == (root / index,) and got.distilled is False
    (root / index).write_text("{}")
    with pytest.raises(CheckpointError, match="is no safetensors index"):
        locate("wan2.1-t2v-14b")


def test_revisions(cache):
    repo, other = f"TurboDiffusion/{TURBO}", "f" * 40
    put_repo(cache, repo, f"{TURBO}.pth")
    old = put_repo(cache, repo, f"{TURBO}.pth", commit=other, ref="v1")
    put_repo(cache, BASE, VAE, TEXT, TOKENIZER)
    for revision in (
        "v1",
        other,
    ):  # the revision is the transformer's: the other repository stays at main
        assert locate(TURBO, revision=revision).dit == (old / f"{TURBO}.pth",)
    with pytest.raises(CheckpointError, match=f"{TURBO} at v2: {TURBO}.pth is not available"):
        locate(TURBO, revision="v2")


def test_a_diffusers_repository(cache):
    files = ("config.json", "diffusion_pytorch_model.safetensors")
    names = [f"{part}/{file}" for part in ("transformer", "transformer_2", "vae") for file in files]
    root = put_repo(
        cache,
        "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
        "model_index.json",
        *names,
        "text_encoder/config.json",
        "tokenizer/tokenizer.json",
    )
    for model in ("Wan-AI/Wan2.2-I2V-A14B-Diffusers", str(root)):
        got = locate(model)
        assert (
            got.dit == (root / "transformer", root / "transformer_2") and got.layout == "diffusers"
        )
        assert (got.vae, got.text, got.tokenizer) == (
            root / "vae",
            root / "text_encoder",
            root / "tokenizer/tokenizer.json",
        )
        assert got.preset == "wan2.2-i2v-a14b" and got.distilled is False


def test_another_repository_borrows_what_it_lacks(cache):
    root = put_repo(cache, "someone/wan-rcm", "a.safetensors", "b.safetensors")
    base = put_repo(cache, BASE, VAE, TEXT, TOKENIZER)
    with pytest.raises(
        CheckpointError,
        match=(
            "(?s)several transformers.*a.safetensors; b.safetensors.*someone/wan-rcm/a.safetensors"
        ),
    ):
        locate("someone/wan-rcm")
    got = locate("someone/wan-rcm/b.safetensors")
    assert (
        got.dit == (root / "b.safetensors",)
        and got.vae == base / VAE
        and got.preset is None
        and got.distilled
    )
    with pytest.raises(
        CheckpointError, match="(?s)has no file c.safetensors.*close names there: .*b.safetensors"
    ):
        locate("someone/wan-rcm/c.safetensors")


def test_parts_that_are_not_asked_for_are_not_needed(cache):
    dit = put_repo(cache, f"TurboDiffusion/{TURBO}", f"{TURBO}.pth")
    got = locate(TURBO, parts=("dit",))
    assert (
        got.dit == (dit / f"{TURBO}.pth",)
        and got.vae is None
        and got.text is None
        and got.tokenizer is None
    )


def test_offline_lists_all_that_is_missing(cache):
    put_repo(cache, f"TurboDiffusion/{TURBO}", f"{TURBO}-quant.pth")
    with pytest.raises(CheckpointError) as error:
        locate(TURBO)
    text = message(error)
    assert (
        "4 parts missing" in text
        and "HF_HUB_OFFLINE" in text
        and "run once without `offline`" in text
    )
    for part in (f"{TURBO}.pth", VAE, TEXT, TOKENIZER, f"TurboDiffusion/{TURBO}", BASE):
        assert part in text
    with pytest.raises(CheckpointError, match="(?s)is not in the cache.*offline.*run once without"):
        locate("someone/nothing", offline=True)


def test_the_environment_is_honoured(tmp_path):
    """HF_HOME and HF_HUB_OFFLINE in a fresh process, which also shows that locating imports neither
    jax nor the hub."""
    dit = put_repo(tmp_path / "hub", f"TurboDiffusion/{TURBO}", f"{TURBO}.pth")
    code = (
        "import sys; from tdjax.checkpoints.locate import locate\n"
        "assert 'jax' not in sys.modules and"
        f" 'huggingface_hub' not in sys.modules\nprint(locate({TURBO!r}, parts=('dit',)).dit[0])"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
    }
    run = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60
    )
    assert run.stdout.strip() == str(dit / f"{TURBO}.pth"), run.stderr


# The hub, with its functions replaced
# --------------------------------------------------------------------------------------------------


class FakeApi:
    sizes = {f"{TURBO}.pth": 2_800_000_000, f"{TURBO}-quant.pth": 1_500_000_000}

    def get_paths_info(self, repo, paths, revision=None):
        return [
            type("Info", (), {"path": p, "size": self.sizes[p]}) for p in paths if p in self.sizes
        ]

    def list_repo_files(self, repo, revision=None):
        return list(self.sizes)


@pytest.fixture
def online(cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    return cache


def test_downloads_say_their_size_first(online, monkeypatch, capsys):
    asked = []

    def snapshot_download(repo, revision, allow_patterns):
        asked.append((repo, revision, allow_patterns, capsys.readouterr().err))
        return str(put_repo(online, repo, *allow_patterns))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    got = locate(TURBO, parts=("dit",), revision="main")
    assert got.dit[0].is_file()
    [(repo, revision, names, said)] = asked
    assert (repo, revision, names) == (f"TurboDiffusion/{TURBO}", "main", [f"{TURBO}.pth"])
    assert "downloading 2.80 GB" in said and str(online) in said and f"{TURBO}.pth" in said
    assert locate(TURBO, parts=("dit",)).dit == got.dit and len(asked) == 1  # now from the cache


def test_a_file_that_the_repository_lacks(online, monkeypatch):
    monkeypatch.setattr(FakeApi, "sizes", {f"{TURBO}-quant.pth": 1})
    with pytest.raises(
        CheckpointError,
        match=(
            f"(?s){TURBO}.pth is not available.*no such file.*close names there: {TURBO}-quant.pth"
        ),
    ):
        locate(TURBO, parts=("dit",))


def hub_error(cls):
    """An error as the hub raises it for an HTTP answer."""
    return cls(
        "401 Client Error",
        response=type("Response", (), {"headers": {}, "request": None, "status_code": 401})(),
    )


@pytest.mark.parametrize(
    "error, expected",
    [
        (
            lambda: hub_error(errors.GatedRepoError),
            "(?s)is gated.*accept them at https://huggingface.co/.*HF_TOKEN",
        ),
        (
            lambda: hub_error(errors.RepositoryNotFoundError),
            "(?s)was not found.*or it is private.*HF_TOKEN",
        ),
        (
            lambda: hub_error(errors.RevisionNotFoundError),
            "(?s)has no revision 'v9'.*leave `revision` away",
        ),
        (
            lambda: errors.HTTPError("no route"),
            "(?s)cannot be read.*HTTPError: no route.*check the connection",
        ),
        (lambda: OSError(28, "No space left on device"), "(?s)the disk is full.*HF_HOME"),
        (lambda: errors.HFValidationError("bad id"), "(?s)is no hub id.*organisation/name"),
    ],
)
def test_errors_of_the_hub(online, monkeypatch, error, expected):
    def fail(*args, **kwargs):
        raise error()

    monkeypatch.setattr(FakeApi, "get_paths_info", fail)
    with pytest.raises(CheckpointError, match=expected):
        locate(TURBO, revision="v9")
    monkeypatch.setattr(FakeApi, "list_repo_files", fail)
    with pytest.raises(CheckpointError, match=expected):
        locate("someone/else", revision="v9")


def test_sizes_for_people():
    assert hub.gigabytes(2_800_000_000) == "2.80 GB" and hub.gigabytes(17_000_000) == "17.0 MB"


# Local files and folders
# --------------------------------------------------------------------------------------------------


def test_the_official_folder(checkpoints, monkeypatch):
    for model in (checkpoints / f"{TURBO}.pth", checkpoints):
        got = locate(model)
        assert got.dit == (checkpoints / f"{TURBO}.pth",) and got.layout == "published"
        assert (got.vae, got.text, got.tokenizer) == (
            checkpoints / VAE,
            checkpoints / TEXT,
            checkpoints / TOKENIZER,
        )
        assert got.preset == TURBO.lower() and got.distilled and got.warnings == ()
    monkeypatch.chdir(checkpoints)
    assert locate(f"{TURBO}.pth") == locate(checkpoints / f"{TURBO}.pth")
    assert locate(None, dit_path=f"{TURBO}.pth").dit == (checkpoints / f"{TURBO}.pth",)


def test_parts_one_folder_up(checkpoints):
    put(checkpoints / "mine", "tuned.safetensors", "tokenizer.json")
    got = locate(checkpoints / "mine" / "tuned.safetensors")
    assert got.vae == checkpoints / VAE and got.tokenizer == checkpoints / "mine" / "tokenizer.json"
    assert got.preset is None and got.name == "tuned" and got.distilled


def test_both_experts_are_found_from_either(tmp_path, cache):
    flat = put(tmp_path / "flat", HIGH, LOW, VAE, TEXT, TOKENIZER)
    for model in (flat / HIGH, flat / LOW, flat):
        assert locate(model).dit == (flat / HIGH, flat / LOW)
        assert locate(model).preset == "turbowan2.2-i2v-a14b-720p"
    file = "diffusion_pytorch_model.safetensors"
    tree = put(
        tmp_path / "Wan2.2-I2V-A14B",
        f"high_noise_model/{file}",
        f"low_noise_model/{file}",
        VAE,
        TEXT,
        TOKENIZER,
    )
    expected = (tree / f"high_noise_model/{file}", tree / f"low_noise_model/{file}")
    for model in (tree, tree / "low_noise_model", expected[0]):
        got = locate(model)
        assert (
            got.dit == expected
            and got.preset == "wan2.2-i2v-a14b"
            and got.distilled is False
            and got.vae == tree / VAE
        )


def test_our_folder(tmp_path, cache):
    root = put(
        tmp_path / "model",
        "dit/manifest.json",
        "vae/manifest.json",
        "text/manifest.json",
        "tokenizer.json",
    )
    (root / "dit/manifest.json").write_text(json.dumps({"source": {"name": f"{TURBO}-quant.pth"}}))
    (root / "model.json").write_text(json.dumps({"name": "mine", "frames": 33}))
    got = locate(root)
    assert (got.dit, got.layout) == ((root / "dit",), "ours")
    assert (got.vae, got.text, got.tokenizer) == (
        root / "vae",
        root / "text",
        root / "tokenizer.json",
    )
    assert got.facts == {"name": "mine", "frames": 33} and got.preset == f"{TURBO.lower()}-quant"
    assert locate(root / "dit").vae == root / "vae"  # one component of it
    put(root, "dit_high/manifest.json", "dit_low/manifest.json")
    for name in ("dit_high", "dit_low"):
        (root / name / "manifest.json").write_text("{}")
        assert locate(root / name).dit == (root / "dit_high", root / "dit_low")


def test_several_transformers_in_a_folder(checkpoints):
    put(checkpoints, HIGH, LOW)
    with pytest.raises(CheckpointError) as error:
        locate(checkpoints)
    assert "several transformers" in message(
        error
    ) and f"{HIGH} with {LOW}; {TURBO}.pth" in message(error)
    assert locate(checkpoints / f"{TURBO}.pth").dit == (checkpoints / f"{TURBO}.pth",)


def test_missing_parts_are_listed(tmp_path, cache):
    put(tmp_path / "weights", f"{TURBO}.pth")
    with pytest.raises(CheckpointError) as error:
        locate(tmp_path / "weights" / f"{TURBO}.pth")
    text = message(error)
    assert f"{TURBO}: 3 parts missing" in text
    for word in (
        VAE,
        TEXT,
        "tokenizer.json",
        str(tmp_path / "weights"),
        f"https://huggingface.co/{BASE}",
        "vae_path",
        "text_encoder_path",
    ):
        assert word in text
    with pytest.raises(
        CheckpointError, match="(?s)1 part missing.*transformer: looked in .*dit_path"
    ):
        locate(put(tmp_path / "rest", VAE, TEXT, "tokenizer.json"))


def test_the_other_expert_is_missing(tmp_path, cache):
    root = put(tmp_path / "weights", HIGH, VAE, TEXT, "tokenizer.json")
    with pytest.raises(
        CheckpointError,
        match=f"low-noise expert: looked for weights/{LOW} in .*low_noise_model_path",
    ):
        locate(root / HIGH)
    put(root, "my-high-quality.pth")
    assert len(locate(root / "my-high-quality.pth").dit) == 1


def test_local_weights_take_the_tokenizer_from_the_cache(tmp_path, cache):
    base = put_repo(cache, BASE, TOKENIZER)
    root = put(tmp_path / "weights", f"{TURBO}.pth", VAE, TEXT)
    assert locate(root).tokenizer == base / TOKENIZER


@pytest.mark.parametrize(
    "model, error, expected",
    [
        (
            "turbowan2.1-t2v-1.3b",
            UsageError,
            (
                "(?s)unknown model.*did you mean turbowan2.1-t2v-1.3b-480p.*known names:"
                " .*wan2.2-i2v-a14b"
            ),
        ),
        (
            "checkpoints/TurboWan2.1-T2V-1.3B-480.pth",
            CheckpointError,
            f"(?s)does not exist .given as .model.*close names.*{TURBO}.pth",
        ),
        (
            "nowhere/TurboWan2.1-T2V-1.3B-480P.pth",
            CheckpointError,
            f"(?s)nearest folder that exists.*{TURBO.lower()} as .model",
        ),
        ("./checkpoints/nothing", CheckpointError, "does not exist"),
        (
            "checkpoints/google/umt5-xxl/tokenizer.json",
            CheckpointError,
            "(?s)no weight file by its name.*allowed: .pth",
        ),
    ],
)
def test_names_that_lead_nowhere(checkpoints, monkeypatch, model, error, expected):
    monkeypatch.chdir(checkpoints.parent)
    with pytest.raises(error, match=expected):
        locate(model)


# Overrides
# --------------------------------------------------------------------------------------------------


def test_overrides_replace_parts_and_save_their_download(tmp_path, cache):
    put_repo(cache, f"TurboDiffusion/{TURBO}", f"{TURBO}.pth")
    own = put(tmp_path / "own", "v.safetensors", "t.safetensors", "spiece.model", "tuned.pth")
    rest = {
        "vae_path": own / "v.safetensors",
        "text_encoder_path": str(own / "t.safetensors"),
        "tokenizer_path": own,
    }
    got = locate(TURBO, **rest)
    assert (got.vae, got.text, got.tokenizer) == (own / "v.safetensors", own / "t.safetensors", own)
    got = locate("turbowan2.1-t2v-14b-720p", dit_path=own / "tuned.pth", **rest)
    assert (
        got.dit == (own / "tuned.pth",)
        and got.preset == "turbowan2.1-t2v-14b-720p"
        and got.name == "tuned"
    )


def test_an_override_that_does_not_exist(checkpoints):
    with pytest.raises(
        CheckpointError,
        match=f"(?s)Wan2.1_VAE.pt does not exist .given as vae_path.*close names in .*: .*{VAE}",
    ):
        locate(checkpoints, vae_path=checkpoints / "Wan2.1_VAE.pt")
    with pytest.raises(UsageError, match="(?s)no model.*dit_path FILE"):
        locate(None, vae_path=checkpoints / VAE)
    with pytest.raises(UsageError, match="both give the transformer"):
        locate(None, dit_path=checkpoints / VAE, low_noise_model_path=checkpoints / VAE)


def test_experts_given_one_by_one(tmp_path, cache):
    root = put(tmp_path / "weights", HIGH, LOW, VAE, TEXT, "tokenizer.json")
    paths = {"high_noise_model_path": root / HIGH, "low_noise_model_path": root / LOW}
    assert (
        locate("demo", **paths).dit == (root / HIGH, root / LOW)
        and locate("demo", **paths).warnings == ()
    )
    tuned = put(tmp_path / "tuned", "ours.pth") / "ours.pth"
    assert locate(root, low_noise_model_path=tuned).dit == (root / HIGH, tuned)
    assert locate(root, high_noise_model_path=tuned).dit == (tuned, root / LOW)


def test_swapped_experts_are_used_as_given_with_a_warning(tmp_path, cache):
    root = put(tmp_path / "weights", HIGH, LOW, VAE, TEXT, "tokenizer.json")
    got = locate(None, high_noise_model_path=root / LOW, low_noise_model_path=root / HIGH)
    assert got.dit == (root / LOW, root / HIGH)
    assert (
        len(got.warnings) == 3
        and "given as the high-noise expert, but its name says low" in got.warnings[0]
    )
    assert "swap high_noise_model_path" in got.warnings[2]


def test_the_same_weights_twice(tmp_path, cache):
    root = put(tmp_path / "weights", HIGH, VAE, TEXT, "tokenizer.json")
    (root / LOW).write_bytes(bytes(range(256)) * 5000)
    with pytest.raises(
        CheckpointError, match="(?s)are the same weights.*two different transformers"
    ):
        locate(None, high_noise_model_path=root / LOW, low_noise_model_path=root / LOW)
    (root / "copy.pth").write_bytes((root / LOW).read_bytes())
    with pytest.raises(CheckpointError, match="are the same weights"):
        locate(None, high_noise_model_path=root / "copy.pth", low_noise_model_path=root / LOW)
    (root / "copy.pth").write_bytes((root / LOW).read_bytes()[:-1] + b"x")
    assert (
        len(
            locate(
                None, high_noise_model_path=root / "copy.pth", low_noise_model_path=root / LOW
            ).dit
        )
        == 2
    )


# The cache folder
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "system, variables, expected",
    [
        ("linux", {"TDJAX_CACHE": "/data/own"}, "/data/own"),
        ("linux", {"XDG_CACHE_HOME": "/data/xdg"}, "/data/xdg/tdjax"),
        ("linux", {}, "/data/home/.cache/tdjax"),
        ("darwin", {}, "/data/home/Library/Caches/tdjax"),
        ("win32", {"LOCALAPPDATA": "/data/local"}, "/data/local/tdjax/Cache"),
    ],
)
def test_cache_folder(monkeypatch, system, variables, expected):
    for name in ("TDJAX_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/data/home")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", system)
    assert cache_folder() == Path(expected)


@pytest.mark.parametrize("name", ["a.CKPT", "a.bin", "a.sft", "a.Safetensors", "a.gguf", "a.PT"])
def test_a_file_that_is_named_may_have_any_suffix_of_weights(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    found = folders.local(tmp_path / name)
    assert found.parts["dit"] == tmp_path / name and found.name == "a"


@pytest.mark.parametrize("home", ["diffusion_models", "unet", "diffusion_models/Wan"])
@pytest.mark.parametrize("encoders", ["text_encoders", "clip"])
def test_the_tree_of_comfyui(tmp_path, cache, home, encoders):
    """Among files of other models, and 8-bit copies beside the plain ones."""
    models = put(
        tmp_path / "models",
        f"{home}/wan2.1_t2v_1.3B_fp16.safetensors",
        f"{home}/flux1-dev.safetensors",
        "vae/wan_2.1_vae.safetensors",
        "vae/ae.safetensors",
        "vae/wan2.2_vae.safetensors",
        f"{encoders}/umt5_xxl_fp16.safetensors",
        f"{encoders}/umt5_xxl_fp8_e4m3fn_scaled.safetensors",
        f"{encoders}/t5xxl_fp16.safetensors",
        f"{encoders}/clip_l.safetensors",
    )
    header = b'{"spiece_model":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    text = models / encoders / "umt5_xxl_fp16.safetensors"
    text.write_bytes(len(header).to_bytes(8, "little") + header)
    got = locate(models / home / "wan2.1_t2v_1.3B_fp16.safetensors")
    assert got.vae == models / "vae" / "wan_2.1_vae.safetensors"
    assert got.text == got.tokenizer == text


def test_two_files_that_nothing_tells_apart(tmp_path):
    names = ["a_umt5.safetensors", "b_umt5.safetensors"]
    assert filenames.component(names, "text") is None
    assert filenames.component(["x_vae.safetensors", "y_vae.safetensors"], "vae") is None
