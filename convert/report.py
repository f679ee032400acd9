"""What was read, counted and hashed, for people."""

from __future__ import annotations

from typing import Any

_SHOWN = (  # fields of a config
    "dim",
    "ffn_dim",
    "layers",
    "heads",
    "in_channels",
    "out_channels",
    "image_dim",
    "attention",
    "linear",
    "latent_channels",
    "multipliers",
    "res_blocks",
    "temporal_down",
    "vocab",
    "attention_dim",
)


def text(report: dict[str, Any]) -> str:
    """Returns the report of one component in a few lines."""
    config = {name: value for name, value in report["config"].items() if name in _SHOWN}
    counts = ", ".join(
        f"{report[name]} {name}" for name in ("matched", "dropped", "missing", "unexpected")
    )
    dtypes = ", ".join(f"{n} {name}" for name, n in report.get("dtypes", {}).items())
    read = f"{report['tensors']} in {report.get('files', 1)} file(s)"
    lines = [
        f"{report['name']}: {report['what']}",
        f"  config      {_listed(config)}",
        f"  tensors     {read}: {counts} -> {report['leaves']} leaves",
    ]
    if report.get("stripped"):
        prefixes = ", ".join(f"{name} {n} times" for name, n in report["stripped"].items())
        lines.append(f"  prefixes    {prefixes} taken off")
    if report.get("level"):
        lines.append(f"  found       under {report['level']}")
    if report.get("ignored"):
        lines.append(f"  ignored     {report['ignored']} entries that are not its tensors")
    lines += [f"  note        {note}" for note in report.get("notes", ())]
    for change in report.get("changes", ()):
        shown = {name: value for name, value in change.items() if not name.endswith("_keys")}
        lines.append(f"  changed     {_listed(shown)}")
        lines += [f"    left out  {key}" for key in change.get("left_out_keys", ())]
    lines.append(f"  dtypes      {dtypes or 'as stored'} -> {report['param']}")
    lines.append(f"  bytes       {report['bytes']} -> {report['written']}")
    if report.get("sha256"):
        lines.append(f"  sha256      {report['sha256']}")
    return "\n".join(lines)


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
