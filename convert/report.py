"""What was read, counted and hashed, for people."""

from __future__ import annotations


def text(report: dict) -> str:
    """The report of one component in a few lines."""
    lines = [f"{report['name']}: {report['what']}"]
    lines.append(
        f"  config      {', '.join(f'{k} {v}' for k, v in report['config'].items() if k in SHOWN)}"
    )
    lines.append(
        f"  tensors     {report['tensors']} in {report.get('files', 1)} file(s):"
        f" {report['matched']} matched, {report['dropped']} dropped, {report['missing']} missing,"
        f" {report['unexpected']} unexpected -> {report['leaves']} leaves"
    )
    if report.get("stripped"):
        lines.append(
            "  prefixes   "
            f" {', '.join(f'{name} {n} times' for name, n in report['stripped'].items())} taken off"
        )
    if report.get("ignored"):
        lines.append(f"  ignored     {report['ignored']} entries that are not tensors")
    for change in report.get("changes", ()):
        lines.append(
            f"  changed     {', '.join(f'{k} {v}' for k, v in change.items() if k != 'kept_keys')}"
        )
    lines.append(
        "  dtypes     "
        f" {', '.join(f'{n} {name}' for name, n in report.get('dtypes', {}).items()) or 'as stored'}"
        f" -> {report['param']}"
    )
    lines.append(f"  bytes       {report['bytes']} -> {report['written']}")
    if report.get("sha256"):
        lines.append(f"  sha256      {report['sha256']}")
    return "\n".join(lines)


SHOWN = (
    "dim", "ffn_dim", "layers", "heads", "in_channels", "out_channels", "image_dim", "attention", "linear",
    "latent_channels", "multipliers", "res_blocks", "temporal_down", "vocab", "attention_dim",
)  # fmt: skip
