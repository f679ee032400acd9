"""`python -m tdjax.cache ls|rm`: what tdjax keeps on this machine, and how to be rid of it."""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import time
from pathlib import Path

from tdjax import cli

if __name__ == "__main__":
    cli.heed_signals()

from tdjax.checkpoints.folders import is_model
from tdjax.checkpoints.locate import cache_folder
from tdjax.errors import UsageError
from tdjax.text.prompt_cache import FOLDER, SUFFIX, PromptCache, prompt_of

KINDS = {
    "weights": "model folders",
    "compiled": "compiled programs",
    "prompts": "prompt embeddings",
}
MIB = 2**20


# Names that JAX and `tdjax.pipeline.executables` give to compiled programs, and XLA to folders of
# what it tunes on a GPU.
_PROGRAM = re.compile(r".+-[0-9a-f]{64}(-cache|-atime|\.executable|\.passed)")
_TUNED = "xla_gpu_*/**/*"
_PROMPT = re.compile(rf"[0-9a-f]{{64}}{re.escape(SUFFIX)}")


def contents(root: Path) -> dict[str, list[Path]]:
    """What each kind consists of: programs in `compiled`, embeddings in `prompts`, and the model
    folders beside them. Nothing else is tdjax's, whatever its name: the cache may be a folder that
    holds other things. Links are neither listed nor followed."""
    compiled, prompts = root / "compiled", root / FOLDER
    programs = [p for p in _files(compiled, "*") if _PROGRAM.fullmatch(p.name)]
    embeddings = [p for p in _files(prompts, "*") if _PROMPT.fullmatch(p.name)]
    models = [p for p in root.glob("*") if is_model(p)]
    return {
        "weights": sorted(models),
        "compiled": sorted([*programs, *_files(compiled, _TUNED)]),
        "prompts": sorted(embeddings),
    }


def _files(folder: Path, pattern: str) -> list[Path]:
    if folder.is_symlink():
        return []
    return [p for p in folder.glob(pattern) if p.is_file() and not p.is_symlink()]


def _size(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files)


def _age(path: Path) -> float:
    """Days since the last use of an entry that is touched when used, else since it was written; 0
    for what the clock says will be."""
    return max(0.0, time.time() - path.stat().st_mtime) / 86400


def listing(root: Path) -> dict:
    """All of it as JSON values."""
    found = contents(root)
    kinds = {
        kind: {"entries": len(paths), "bytes": sum(map(_size, paths))}
        for kind, paths in found.items()
    }
    kinds["weights"]["names"] = [p.name for p in found["weights"]]
    entries = PromptCache(root / FOLDER).entries()[::-1]
    prompts = [
        {"key": p.name.removesuffix(SUFFIX), "bytes": s.st_size, "prompt": prompt_of(p)}
        for p, s in entries
    ]
    return {"folder": str(root), "kinds": kinds, "prompts": prompts}


def _table(found: dict, shown: int) -> str:
    """The listing for people, with so many prompts at most."""
    lines = [f"folder     {found['folder']}"]
    for kind, row in found["kinds"].items():
        names = f": {', '.join(row['names'])}" if row.get("names") else ""
        lines.append(
            f"{kind:10} {row['entries']:5} entries {row['bytes'] / MIB:10.1f} MiB "
            f" {KINDS[kind]}{names}"
        )
    for row in found["prompts"][:shown]:
        text = row["prompt"] if len(row["prompt"]) <= 80 else row["prompt"][:77] + "..."
        lines.append(f"  {row['key'][:12]} {row['bytes'] / MIB:6.2f} MiB  {text}")
    if len(found["prompts"]) > shown:
        lines.append(f"  and {len(found['prompts']) - shown} more prompts (--all)")
    return "\n".join(lines)


def remove(root: Path, what: list[str], older_than: float) -> tuple[int, int]:
    """(entries, bytes) removed. what: kinds, names of model folders, beginnings of prompt keys (8
    characters or more)."""
    if not 0 <= older_than < math.inf:
        raise UsageError(
            f"older_than is {older_than:g}", "it is a number of days, not negative", "such as 30"
        )
    found = contents(root)
    chosen: list[Path] = []
    for name in what:
        if name in found:
            paths = found[name]
        else:
            paths = [p for p in found["weights"] if p.name == name]
            paths += [p for p in found["prompts"] if len(name) >= 8 and p.name.startswith(name)]
            if not paths:
                kinds = ", ".join(KINDS)
                raise UsageError(
                    f"{name!r} is not in the cache",
                    f"kinds are {kinds}; or the name of a model folder, or a prompt's key",
                    "see ls",
                )
        chosen += [p for p in paths if p not in chosen and _age(p) >= older_than]
    freed = sum(map(_size, chosen))
    for path in chosen:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return len(chosen), freed


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        "tdjax cache",
        description="What tdjax keeps on this machine, and how to be rid of it.",
        epilog="`tdjax cache rm --help` says what can be removed.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    ls = commands.add_parser("ls", help="entries and bytes of each kind")
    ls.add_argument("--json", action="store_true", help="the same as one JSON object")
    ls.add_argument("--all", action="store_true", help="every prompt, not the latest ten")
    rm = commands.add_parser("rm", help="remove entries")
    rm.add_argument(
        "what",
        nargs="+",
        help=f"{', '.join(KINDS)}, the name of a model folder, or the beginning of a prompt's key",
    )
    rm.add_argument(
        "--older_than",
        type=float,
        default=0.0,
        metavar="DAYS",
        help="only what was not used for so long",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 ok, 2 usage, 130 interrupted."""
    return cli.main(_command, argv, parser=build_parser, interrupted="what was removed is gone")


def _command(argv: list[str]) -> int:
    args, root = build_parser().parse_args(argv), cache_folder()
    if args.command == "rm":
        count, freed = remove(root, args.what, args.older_than)
        print(f"removed {count} entries, {freed / MIB:.1f} MiB")
        return 0
    found = listing(root)
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        print(_table(found, len(found["prompts"]) if args.all else 10))
    return 0


if __name__ == "__main__":
    cli.run(main)
