"""What an installation gets: a wheel with every module and every file that is no module, the
embedded model among them."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("tdjax", "pallas_kernels", "convert")


@pytest.mark.slow
def test_a_wheel_has_everything(tmp_path):
    pytest.importorskip("setuptools", minversion="77", reason="the test extra is not installed")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    files = {
        str(file.relative_to(tmp_path))
        for name in PACKAGES
        for file in (tmp_path / name).rglob("*")
        if file.is_file()
    }
    code = "from setuptools import build_meta; print(build_meta.build_wheel('made'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "made").glob("*.whl")
    assert not files - set(zipfile.ZipFile(wheel).namelist())
    assert {
        "tdjax/assets/demo/model.json",
        "tdjax/assets/demo/MODEL_CARD.md",
        "tdjax/assets/demo/dit/params/_METADATA",
    } <= files
    assert wheel.stat().st_size < 12_000_000
