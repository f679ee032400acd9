"""The report of `python -m tdjax.env`: its facts, its reasons, its two forms, and a backend that
does not start."""

import json
import re
import subprocess
import sys

import jax
import pytest

from pallas_kernels.inventory import OPS
from tdjax import env


def test_json_and_text_say_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TDJAX_CACHE", str(tmp_path / "own"))
    assert env.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["jax"] == jax.__version__ and found["versions"]["python"] == ".".join(
        map(str, sys.version_info[:3])
    )
    assert [d["kind"] for d in found["devices"]] == [d.device_kind for d in jax.devices()]
    assert found["folders"]["tdjax"] == {
        "path": str(tmp_path / "own"),
        "exists": False,
        "writable": True,
    }
    assert found["folders"]["compiled"]["path"].startswith(str(tmp_path / "own"))
    assert env.main([]) == 0
    text = capsys.readouterr().out
    for word in (
        jax.__version__,
        jax.devices()[0].device_kind,
        str(tmp_path / "own"),
        "(not there yet)",
        "attention reference: yes",
    ):
        assert word in text


def test_every_op_has_its_reference():
    rows = env.kernels([{"platform": "cpu", "kind": "cpu", "compute_capability": None}])
    reference = {row["op"] for row in rows if row["impl"] == "reference" and row["why_not"] is None}
    assert reference == set(OPS)
    assert not [row for row in rows if row["impl"] == "interpret"]
    assert all(row["why_not"] for row in rows if row["impl"] != "reference")


def test_kernels_for_hopper_are_for_hopper():
    card = {"platform": "gpu", "kind": "card"}
    assert env.why_not("mosaic", card | {"compute_capability": "9.0"}) is None
    for other in ("8.9", "10.0"):
        reason = env.why_not("mosaic", card | {"compute_capability": other})
        assert reason == f"needs compute capability 9.0 (Hopper); card has {other}"


@pytest.mark.parametrize(
    "platform, capability, expected",
    [
        ("cpu", None, "needs an NVIDIA GPU"),
        ("gpu", "7.5", "8.0 .Ampere. or newer; card has 7.5"),
        ("gpu", "9.0", None),
        ("gpu", "12.0", None),
    ],
)
def test_reasons(platform, capability, expected):
    device = {"platform": platform, "kind": "card", "compute_capability": capability}
    reason = env.why_not("cudnn", device)
    assert reason is None if expected is None else re.search(expected, reason)
    assert (
        env.why_not("reference", device) is None and env.why_not("reference", None) == "no device"
    )


def test_a_backend_that_does_not_start_is_reported(monkeypatch, capsys):
    def fail():
        raise RuntimeError("Unable to initialize backend 'cuda'")

    monkeypatch.setattr(jax, "devices", fail)
    assert env.main([]) == 1
    text = capsys.readouterr().out
    assert (
        "devices    none: Unable to initialize backend 'cuda'" in text
        and "attention reference: no: no device" in text
    )


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    assert env.writable(tmp_path / "a" / "b") and not env.writable(tmp_path / "file" / "a")


def test_help_does_not_import_jax():
    code = (
        "import sys; from tdjax import env\ntry: env.main(['--help'])\nexcept SystemExit as e:"
        " print(e.code, 'jax' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stdout.strip().endswith("0 False"), run.stderr
