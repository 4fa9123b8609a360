"""python -m ebm index DIR_OR_PATTERN [--verify]"""

import argparse
from typing import get_args

from ebm.commands.shard import add_grouping, grouping_of, tell, tell_next
from ebm.config import ObjectStore
from ebm.data import Access
from ebm.data.indexing import index_shards
from ebm.data.items import LabelTable, read_labels
from ebm.data.manifest import FILE_NAME, load_manifest, verify
from ebm.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "shards",
        metavar="DIR_OR_PATTERN",
        help="a directory of .tar files, or a quoted pattern: 'DIR/a-{000..099}.tar'; with --verify, also a URL",
    )
    parser.add_argument(
        "--verify", action="store_true", help="write nothing: check the shards against the manifest that is there"
    )
    parser.add_argument(
        "--schemes",
        nargs="+",
        default=[],
        choices=get_args(ObjectStore),
        help="URLs to allow beside file, http and https, read through fsspec",
    )
    parser.add_argument("--labels", metavar="FILE", help=".csv (key, label) or .json ({key: label}): classes by key")
    add_grouping(parser)
    parser.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="skip: leave out shards that can't be read, and count samples that training passes over",
    )
    parser.add_argument(
        "--out", metavar="FILE", help="where the manifest goes (default: manifest.json beside the shards)"
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.verify:
        manifest = load_manifest(arguments.shards, Access(schemes=tuple(arguments.schemes)))
        verify(manifest, progress=True)
        print(f"{len(manifest.shards)} shards in {manifest.directory} have the sizes and sha256 of {FILE_NAME}")
        return 0
    labels = read_labels(arguments.labels) if arguments.labels else None
    if labels is not None and not isinstance(labels, LabelTable):
        raise ConfigError(f"--labels {arguments.labels}: shards need a key for each label, a .csv or .json file")
    if labels is not None and arguments.label is not None:
        raise ConfigError("--labels and --label: give one of them")
    manifest = index_shards(
        arguments.shards,
        progress=True,
        labels=labels,
        label=arguments.label,
        grouping=grouping_of(arguments),
        on_error=arguments.on_error,
        out=arguments.out,
    )
    where = str(manifest.directory) if arguments.out is None else arguments.out
    tell(manifest, where)
    tell_next(manifest, where)
    return 0
