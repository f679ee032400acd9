"""bf16 weights to W8A8: `python -m convert.quantize IN OUT`. Every Linear of the blocks; by default
in 128 x 128 tiles, as published."""

from __future__ import annotations

import argparse

from convert.cli import INTERRUPTED, check_target, finish, known, reading, save
from tdjax import cli
from tdjax.config import LINEAR


def build_parser() -> argparse.ArgumentParser:
    """Every option of the command."""
    p = cli.Parser("tdjax quantize", usage="%(prog)s IN OUT [options]", description=__doc__)
    p.add_argument(
        "source",
        metavar="IN",
        type=cli.path,
        help="a published transformer file, or a folder that python -m convert wrote",
    )
    p.add_argument(
        "target",
        metavar="OUT",
        type=cli.path,
        help="a folder in our layout, or a .safetensors file under the published names",
    )
    p.add_argument(
        "--quant",
        choices=LINEAR[1:],
        default="int8",
        help=(
            "int8: tiles, as published; int8_channel, fp8: a scale for each token and output"
            " channel, into a folder only"
        ),
    )
    p.add_argument(
        "--heads", type=int, metavar="N", help="attention heads, where the head width is not 128"
    )
    p.add_argument("--overwrite", action="store_true", help="replace OUT")
    p.add_argument(
        "--json", action="store_true", help="one JSON line on stdout, with the error of every layer"
    )
    return p


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 ok, 2 usage, 3 checkpoint, 130 interrupted, 143 terminated."""
    return cli.main(
        lambda words: quantize_file(build_parser().parse_args(words)),
        argv,
        parser=build_parser,
        interrupted=INTERRUPTED,
    )


def quantize_file(args) -> int:
    """Writes the file with layers of 8 bits, and reports the error of each."""
    from convert.leaves import open_leaves
    from convert.quantized import error_table, quantized

    known(args)
    check_target(args.target, args.overwrite, [args.source])
    before = open_leaves(args.source, **known(args))
    after, errors = quantized(before, args.quant)
    with reading(after, args.source.name) as after:
        save(after, args.target, None, args.overwrite)
    size = {
        name: sum(x.nbytes for x in leaves.lazy.values())
        for name, leaves in (("before", before), ("after", after))
    }
    text = (
        f"{error_table(errors)}\n{size['before'] / 2**30:.3f} GiB ->"
        f" {size['after'] / 2**30:.3f} GiB"
    )
    return finish(
        args, {"out": str(args.target), "bytes": size, "errors": errors}, text, [args.target]
    )


if __name__ == "__main__":
    cli.run(main)
