"""One JSON line a report, and TensorBoard where its writer is installed."""

import importlib.util
import json
import sys

import pytest
from PIL import Image
from train_cases import resumed, run

from tdjax.errors import UsageError
from tdjax.train import metrics


def test_reports_after_the_checkpoint_are_forgotten(tmp_path):
    run(tmp_path, steps=4)
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write(
            '{"step": 6, "train/loss": 1.0}\n{"step": 8, "tra'
        )  # a killed run got further than its checkpoint
    resumed(tmp_path)
    assert [row["step"] for row in metrics.read(tmp_path)] == [2, 4, 6, 8]


@pytest.mark.parametrize("line", [b"{", b"[1]", b'{"step": "x"}', b"[" * 100_000, b"\xff", b""])
def test_lines_that_are_damaged_are_left_out(tmp_path, line):
    whole = b'{"step": 1, "a": 0.5}\n', b'{"step": 2, "a": 0.5}\n'
    (tmp_path / "metrics.jsonl").write_bytes(whole[0] + line + b"\n" + whole[1])
    assert [row["step"] for row in metrics.read(tmp_path)] == [1, 2]
    with metrics.Metrics(tmp_path, step=1):
        assert (tmp_path / "metrics.jsonl").read_bytes() == whole[0]


def test_metrics_that_json_does_not_know(tmp_path):
    with metrics.Metrics(tmp_path) as out:
        out.write(3, {"a": 1.5, "b": float("nan"), "c": float("inf")})
    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail) == {
        "step": 3,
        "a": 1.5,
        "b": None,
        "c": None,
    }


def picture(folder):
    """A .png file of 3 rows and 5 columns."""
    Image.new("RGB", (5, 3)).save(folder / "sheet.png")
    return folder / "sheet.png"


def test_tensorboard_where_its_writer_is_installed(tmp_path, monkeypatch):
    with metrics.Metrics(tmp_path / "without") as out:
        assert out.board is None
    package = tmp_path / "packages" / "tensorboardX"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "class SummaryWriter:\n"
        "    def __init__(self, folder, purge_step): self.calls = [(folder, purge_step)]\n"
        "    def add_scalar(self, *row): self.calls.append(row)\n"
        "    def add_image(self, name, pixels, step, dataformats):\n"
        "        self.calls.append((name, pixels.shape, step, dataformats))\n"
        "    def close(self): self.calls.append('closed')\n"
    )
    monkeypatch.syspath_prepend(package.parent)
    with metrics.Metrics(tmp_path / "run", 4) as out:
        out.write(6, {"a": 1.0})
        out.show(6, picture(tmp_path))
    first, *rest = out.board.calls
    assert first == (str(tmp_path / "run" / "tensorboard"), 5)
    assert rest == [("a", 1.0, 6), ("samples", (3, 5, 3), 6, "HWC"), "closed"]
    monkeypatch.delitem(sys.modules, "tensorboardX")


def test_weights_and_biases_where_a_project_is_named(tmp_path, monkeypatch):
    if importlib.util.find_spec("wandb") is None:
        with pytest.raises(UsageError, match="run.wandb is 'mine' and wandb is not installed"):
            metrics.check_wandb("mine")
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "__init__.py").write_text(
        "class Run:\n"
        "    def __init__(self, **given): self.calls = [given]\n"
        "    def log(self, values, step): self.calls.append((values, step))\n"
        "    def finish(self): self.calls.append('finished')\n"
        "init = Run\n"
        "Image = lambda path: ('image', path)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    metrics.check_wandb("")
    with metrics.Metrics(tmp_path / "run", 4, "mine", {"run.seed": "0"}) as out:
        out.write(6, {"a": 1.0})
        out.show(6, picture(tmp_path))
    given, *rest = out.wandb.calls
    shown = {"samples": ("image", str(tmp_path / "sheet.png"))}
    assert rest == [({"a": 1.0}, 6), (shown, 6), "finished"]
    assert (given["project"], given["id"], given["resume"]) == ("mine", "run", "allow")
    assert given["config"] == {"run.seed": "0"}
    monkeypatch.delitem(sys.modules, "wandb")
