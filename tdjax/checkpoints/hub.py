"""Files of a hub repository as local paths: what is in the hub's cache already, downloads with
sizes first, errors that help.

huggingface_hub does the work, so HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_TOKEN and HF_ENDPOINT
mean what they mean there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import sys
from pathlib import Path

from tdjax.config.parsing import json_object, mismatch
from tdjax.errors import CheckpointError
from tdjax.files import near

INDEX = ".safetensors.index.json"


def _say(text: str) -> None:
    print(f"tdjax: {text}", file=sys.stderr)


@dataclasses.dataclass(frozen=True)
class Repo:
    """A model repository at a revision (None: its main branch)."""

    id: str
    revision: str | None = None
    offline: bool = False

    @property
    def is_offline(self) -> bool:
        from huggingface_hub import constants

        return self.offline or constants.HF_HUB_OFFLINE

    @property
    def page(self) -> str:
        return f"https://huggingface.co/{self.id}/tree/{self.revision or 'main'}"

    def __str__(self):
        return self.id if self.revision is None else f"{self.id} at {self.revision}"

    def cached(self, name: str) -> Path | None:
        """The local file, if the cache holds it at this revision. Never asks the network."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.id, name, revision=self.revision)
        return Path(found) if isinstance(found, str) else None

    def names(self) -> list[str]:
        """All files of the repository; offline, those that the cache holds."""
        if self.is_offline:
            root = self.snapshot()
            return (
                sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
                if root
                else []
            )
        from huggingface_hub import HfApi

        with _explained(self):
            return HfApi().list_repo_files(self.id, revision=self.revision)

    def snapshot(self) -> Path | None:
        """The cache's folder of this revision, or None."""
        from huggingface_hub import constants

        # The layout is documented: huggingface.co/docs/huggingface_hub/guides/manage-cache
        repo = Path(constants.HF_HUB_CACHE) / f"models--{self.id.replace('/', '--')}"
        ref = repo / "refs" / (self.revision or "main")
        commit = ref.read_text().strip() if ref.is_file() else self.revision
        return (
            repo / "snapshots" / commit
            if commit and (repo / "snapshots" / commit).is_dir()
            else None
        )

    def fetch(self, names: list[str]) -> Path:
        """The local folder that holds all of `names`, and the shards of every index among them.

        Files that are all in the cache are used as they are, without asking the network whether
        there are newer ones.
        """
        root = self.fetch_named(names)
        shards = [
            shard for name in names if name.endswith(INDEX) for shard in _shards_of(root, name)
        ]
        return self.fetch_named([*names, *shards]) if shards else root

    def fetch_named(self, names: list[str]) -> Path:
        paths = {name: self.cached(name) for name in names}
        missing = [name for name, path in paths.items() if path is None]
        if missing:
            return self.download(names, missing)
        return next(iter(paths.values())).parents[names[0].count("/")]

    def download(self, names: list[str], missing: list[str]) -> Path:
        if self.is_offline:
            raise _absent(
                self,
                missing,
                "this run is offline (`offline` or HF_HUB_OFFLINE), and the cache does not hold it",
            )
        from huggingface_hub import HfApi, constants, snapshot_download

        with _explained(self):
            sizes = {
                info.path: info.size
                for info in HfApi().get_paths_info(self.id, missing, revision=self.revision)
            }
        if len(sizes) < len(missing):
            raise _absent(
                self,
                [name for name in missing if name not in sizes],
                "the repository has no such file",
            )
        _say(
            f"downloading {gigabytes(sum(sizes.values()))} from {self} to {constants.HF_HUB_CACHE}"
        )
        for name, size in sizes.items():
            _say(f"  {gigabytes(size):>9}  {name}")
        with _explained(self):
            root = Path(snapshot_download(self.id, revision=self.revision, allow_patterns=names))
        gone = [name for name in names if not (root / name).is_file()]
        if gone:
            raise _absent(self, gone, "the download did not bring it")
        return root


def _shards_of(root: Path, index: str) -> list[str]:
    """Repository names of the shards that an index (a repository name) lists."""
    try:
        table = json_object((root / index).read_bytes()).get("weight_map")
        wrong = mismatch(table, dict[str, str], "weight_map")
        if wrong:
            raise ValueError(wrong)
    except ValueError as error:
        raise CheckpointError(
            f"{root / index} is no safetensors index",
            repr(error),
            "delete it and download it again",
        ) from error
    folder, files = index.rpartition("/")[0], sorted(set(table.values()))
    return [f"{folder}/{file}" if folder else file for file in files]


def gigabytes(size: int) -> str:
    """Bytes for people: "1.50 GB", "20.0 MB"."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _absent(repo: Repo, names: list[str], why: str) -> CheckpointError:
    """A file that cannot be had, with the names that come closest."""
    have = repo.names()
    near = {match for name in names for match in close(name, have)}
    fix = f"close names there: {', '.join(sorted(near))}" if near else f"see {repo.page}"
    if repo.is_offline:
        held = f"; the cache holds close names: {', '.join(sorted(near))}" if near else ""
        fix = f"run once without `offline`, or copy the file and give its path{held}"
    return CheckpointError(f"hub repository {repo}: {', '.join(names)} is not available", why, fix)


def close(name: str, others: list[str], count: int = 3) -> list[str]:
    """Names near to `name`: by their spelling without case, the file's own name first."""
    lower = {other.rpartition("/")[2].lower(): other for other in others}
    return [lower[match] for match in near(name.rpartition("/")[2].lower(), lower, count)]


@contextlib.contextmanager
def _explained(repo: Repo):
    """Errors of the hub as CheckpointError: what was asked for, why it failed, what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        # of the HTTP library that this version of the hub uses: connection errors are not
        # HfHubHTTPError
        HTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"https://huggingface.co/{repo.id}"
    try:
        yield
    except GatedRepoError as error:
        raise CheckpointError(
            f"hub repository {repo} is gated",
            "its owner asks for an account that accepted the terms",
            f"accept them at {page}, then `hf auth login` or set HF_TOKEN",
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"hub repository {repo} was not found",
            "there is none of this name, or it is private and no token with access is set",
            f"check the id at {page}; for a private one `hf auth login` or set HF_TOKEN",
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"hub repository {repo.id} has no revision {repo.revision!r}",
            "a branch, tag or full commit hash was expected",
            f"see {page}/commits/main, or leave `revision` away",
        ) from error
    except HFValidationError as error:
        raise CheckpointError(
            f"{repo.id!r} is no hub id",
            str(error).splitlines()[0],
            "ids look like organisation/name",
        ) from error
    except (HTTPError, OSError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            what = f"hub repository {repo}: the disk is full"
            raise CheckpointError(
                what,
                str(error),
                "make room (downloads resume); HF_HOME moves the cache to another disk",
            ) from error
        lines = str(error).splitlines() or [""]
        raise CheckpointError(
            f"hub repository {repo} cannot be read",
            f"{type(error).__name__}: {lines[0]}",
            "check the connection and try again (downloads resume); files that are on this"
            " machine can be given as paths",
        ) from error
