"""python -m ebm index DIR_OR_PATTERN [--verify]"""

from typing import get_args

from ebm.config import ObjectStore
from ebm.data import Access
from ebm.data.decode import describe
from ebm.data.manifest import FILE_NAME, index_shards, load_manifest, verify


def add_arguments(parser) -> None:
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


def run(arguments) -> int:
    if arguments.verify:
        manifest = load_manifest(arguments.shards, Access(schemes=tuple(arguments.schemes)))
        verify(manifest, progress=True)
        print(f"{len(manifest.shards)} shards in {manifest.directory} have the sizes and sha256 of {FILE_NAME}")
        return 0
    manifest = index_shards(arguments.shards, progress=True)
    shape = ",".join(map(str, manifest.shape))
    print(f"{manifest.samples} {describe(manifest.shape)} in {len(manifest.shards)} shards -> ", end="")
    print(manifest.directory / FILE_NAME)
    print(f"next: accelerate launch train.py data.source=null data.shards={manifest.directory} 'data.shape=[{shape}]'")
    return 0
