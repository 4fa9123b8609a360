"""python -m ebm shard --source SOURCE --out DIR"""

from ebm.data.decode import describe
from ebm.data.shards import write_shards
from ebm.data.sources import KINDS, open_source
from ebm.errors import ConfigError


def add_arguments(parser) -> None:
    parser.add_argument("--source", required=True, help=KINDS)
    parser.add_argument("--out", required=True, metavar="DIR", help="gets shard-000000.tar ... and manifest.json")
    parser.add_argument(
        "--split", default="train", help="the data set's, or a folder's subdirectory of that name (default: train)"
    )
    parser.add_argument("--samples-per-shard", type=int, default=1000, metavar="N", help="default: 1000")
    parser.add_argument("--workers", type=int, metavar="N", help="encoding processes (default: the CPUs)")
    parser.add_argument("--size", type=int, metavar="N", help="resize the shorter side, then cut the centre square")
    channels = parser.add_mutually_exclusive_group()
    channels.add_argument("--grayscale", dest="mode", action="store_const", const="L", help="one channel")
    channels.add_argument("--rgb", dest="mode", action="store_const", const="RGB", help="three channels")
    parser.add_argument(
        "--format", choices=("png", "jpg"), help="default: PNG and JPEG files as they are, PNG for all else"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace shards that are in DIR")


def run(arguments) -> int:
    for name in ("samples_per_shard", "workers", "size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    manifest = write_shards(
        open_source(arguments.source, arguments.split),
        arguments.out,
        samples_per_shard=arguments.samples_per_shard,
        workers=arguments.workers,
        format=arguments.format,
        size=arguments.size,
        mode=arguments.mode,
        overwrite=arguments.overwrite,
    )
    classes = f", {manifest.num_classes} classes" if manifest.num_classes else ""
    shards = f"{len(manifest.shards)} shards -> {arguments.out}"
    print(f"{manifest.samples} {describe(manifest.shape)}{classes} in {shards}")
    shape = ",".join(map(str, manifest.shape))
    print(f"next: accelerate launch train.py data.source=null data.shards={arguments.out} 'data.shape=[{shape}]'")
    return 0
