"""The keys of a published file, as tests/manifests/ has them: its shapes and dtypes, no values.

python docs/scripts/manifest.py FILE.safetensors tests/manifests/NAME.json
"""

import json
import sys
from pathlib import Path

from tdjax.checkpoints.published.files import open_source
from tdjax.files import write_text


def main(source: Path, target: Path) -> None:
    """Writes the list; no tensor data is read."""
    opened = open_source(source)
    rows = {
        key: {"shape": list(tensor.shape), "dtype": str(tensor.dtype)}
        for key, tensor in opened.tensors.items()
    }
    header = {"file": source.name, "bytes": opened.nbytes}
    write_text(target, json.dumps({"header": header, "tensors": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
