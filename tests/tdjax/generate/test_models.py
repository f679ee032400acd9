"""The list of models: sizes against the manifests of the files, and every preset in the table."""

import json
import math
from pathlib import Path

import pytest

from tdjax.generate import models
from tdjax.presets import PRESETS, SHARED_GB

MANIFESTS = Path(__file__).resolve().parents[2] / "manifests"
WAN = {"wan2.2-t2v-a14b": "Wan-AI_Wan2.1-T2V-14B"}
OTHERS = {
    "wan2.2-i2v-a14b-lightx2v": "Wan-AI_Wan2.2-I2V-A14B",
    "wan2.2-i2v-a14b-lightx2v-int8": "TurboWan2.2-I2V-A14B-high-720P-quant",
    "rcm-wan2.1-t2v-1.3b-480p": "Wan-AI_Wan2.1-T2V-1.3B",
    "rcm-wan2.1-t2v-14b-480p": "Wan-AI_Wan2.1-T2V-14B",
    "rcm-wan2.1-t2v-14b-720p": "Wan-AI_Wan2.1-T2V-14B",
}
WIDTHS = {"int8": 1, "bfloat16": 2, "float32": 4}


def gigabytes(name, default="bfloat16"):
    """Size of a file from the shapes and dtypes of its tensors; default: where none is known."""
    tensors = json.loads((MANIFESTS / f"{name}.json").read_text())["tensors"].values()
    return sum(math.prod(t["shape"]) * WIDTHS[t["dtype"] or default] for t in tensors) / 1e9


@pytest.mark.parametrize("name", PRESETS)
def test_sizes_are_those_of_the_tensors(name):
    preset = PRESETS[name]
    if name.startswith("turbo"):
        total = sum(gigabytes(Path(file).stem) for file in preset.dit)
    elif name in OTHERS:  # networks of Wan in bfloat16, or in the 8 bits of a -quant file
        total = gigabytes(OTHERS[name]) * len(preset.dit)
    else:  # Wan's own transformers are published in float32
        total = gigabytes(WAN.get(name, preset.repo.replace("/", "_")), "float32")
        total *= len(preset.dit)
    assert preset.gigabytes == pytest.approx(total, abs=0.06)
    shared = gigabytes(Path(preset.vae).stem) + gigabytes(Path(preset.text).stem)
    assert pytest.approx(shared, abs=0.06) == SHARED_GB


def test_the_table_and_its_json_have_every_model(capsys):
    assert models.main([]) == 0
    table = capsys.readouterr().out
    assert models.main(["--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == set(PRESETS)
    for name, preset in PRESETS.items():
        (line,) = [line for line in table.splitlines() if line.startswith(f"{name} ")]
        assert preset.repo in line and all(file in line for file in preset.dit)
        assert f"{rows[name]['gigabytes']:.1f}" in line
