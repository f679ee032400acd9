"""`python -m tdjax.cache ls|rm`: what tdjax keeps on this machine, and how to be rid of it."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

from tdjax.checkpoints.locate import cache_folder
from tdjax.errors import TdjaxError, UsageError
from tdjax.text.prompt_cache import FOLDER, SUFFIX, PromptCache, prompt_of

KINDS = {
    "weights": "model folders",
    "compiled": "compiled programs",
    "prompts": "prompt embeddings",
}
MIB = 2**20


def contents(root: Path) -> dict[str, list[Path]]:
    """What each kind consists of: files of `compiled` and `prompts`, and every model folder beside
    them. Nothing else is ours."""
    inside = lambda name: sorted(p for p in (root / name).rglob("*") if p.is_file())
    models = [
        p
        for p in sorted(root.glob("*"))
        if p.is_dir() and p.name not in ("compiled", FOLDER) and is_weights(p)
    ]
    return {"weights": models, "compiled": inside("compiled"), "prompts": inside(FOLDER)}


def is_weights(folder: Path) -> bool:
    """A model folder, or one component of it, in tdjax's own layout."""
    return (
        (folder / "model.json").is_file()
        or (folder / "manifest.json").is_file()
        or any(folder.glob("*/manifest.json"))
    )


def size(path: Path) -> int:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files)


def age(path: Path) -> float:
    """Days since the last use of an entry that is touched when used, else since it was written."""
    return (time.time() - path.stat().st_mtime) / 86400


def listing(root: Path) -> dict:
    """All of it as JSON values."""
    found = contents(root)
    kinds = {
        kind: {"entries": len(paths), "bytes": sum(map(size, paths))}
        for kind, paths in found.items()
    }
    kinds["weights"]["names"] = [p.name for p in found["weights"]]
    entries = PromptCache(root / FOLDER).entries()[::-1]
    prompts = [
        {"key": p.name.removesuffix(SUFFIX), "bytes": s.st_size, "prompt": prompt_of(p)}
        for p, s in entries
    ]
    return {"folder": str(root), "kinds": kinds, "prompts": prompts}


def table(found: dict, shown: int) -> str:
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
        chosen += [p for p in paths if p not in chosen and age(p) >= older_than]
    freed = sum(map(size, chosen))
    for path in chosen:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return len(chosen), freed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tdjax.cache", description=__doc__.splitlines()[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    ls = commands.add_parser("ls", help="entries and bytes of each kind")
    ls.add_argument("--json", action="store_true")
    ls.add_argument("--all", action="store_true", help="every prompt, not the latest ten")
    rm = commands.add_parser("rm", help="remove entries")
    rm.add_argument(
        "what",
        nargs="+",
        help=f"{', '.join(KINDS)}, the name of a model folder, or the beginning of a prompt's key",
    )
    rm.add_argument(
        "--older_than",
        "--older-than",
        type=float,
        default=0.0,
        metavar="DAYS",
        help="only what was not used for so long",
    )
    args, root = parser.parse_args(argv), cache_folder()
    try:
        if args.command == "ls":
            found = listing(root)
            print(
                json.dumps(found, indent=1)
                if args.json
                else table(found, len(found["prompts"]) if args.all else 10)
            )
        else:
            count, freed = remove(root, args.what, args.older_than)
            print(f"removed {count} entries, {freed / MIB:.1f} MiB")
    except TdjaxError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(
            f"error: {error.filename}: {error.strerror}\nthe file system refused it",
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
