"""python -m ebm shard --source SOURCE --out DIR"""

import argparse
import shlex

from ebm.data.decode import describe
from ebm.data.items import Conversion, check_background, parse_levels, select
from ebm.data.manifest import Manifest
from ebm.data.shards import write_shards
from ebm.data.sources import KINDS, Options, open_source
from ebm.data.tars import Grouping
from ebm.errors import ConfigError, printable

SHOWN = 20  # class names
FOR_TRAINING = ("train", "training", "extra", "unlabeled", ".", "")  # splits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", required=True, help=KINDS)
    parser.add_argument("--out", required=True, metavar="DIR", help="gets shard-000000.tar ... and manifest.json")
    parser.add_argument(
        "--split",
        default="train",
        help="of a data set or folder; '.' takes all of a folder, also where class folders are named like splits "
        "(default: train)",
    )
    parser.add_argument("--root", metavar="DIR", help="where a data set's files are, or are downloaded to")
    parser.add_argument("--samples-per-shard", type=int, default=1000, metavar="N", help="default: 1000")
    parser.add_argument("--workers", type=int, metavar="N", help="encoding processes (default: the CPUs)")
    parser.add_argument(
        "--on-error", choices=("fail", "skip"), default="fail", help="skip: leave bad files out, by name"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace shards that are in DIR")
    images = parser.add_argument_group("images")
    images.add_argument("--size", type=int, metavar="N", help="resize the shorter side, then cut the centre square")
    channels = images.add_mutually_exclusive_group()
    channels.add_argument("--grayscale", dest="mode", action="store_const", const="L", help="one channel")
    channels.add_argument("--rgb", dest="mode", action="store_const", const="RGB", help="three channels")
    images.add_argument("--background", metavar="COLOUR", help="put under transparent images: white, black, #808080")
    images.add_argument(
        "--range", metavar="LOW,HIGH", help="of 16-bit images: the values that become 0 and 255 (default: 0,65535)"
    )
    images.add_argument(
        "--format", choices=("png", "jpg"), help="default: PNG and JPEG files as they are, PNG for all else"
    )
    samples = parser.add_argument_group("labels and samples")
    samples.add_argument(
        "--labels", metavar="FILE", help=".csv or .json: file name or key to class; for npy: a .npy array in order"
    )
    add_grouping(samples)
    samples.add_argument("--classes", metavar="A,B", help="keep these classes alone, numbered in this order")
    samples.add_argument("--limit", type=int, metavar="N", help="N samples, evenly spaced")
    samples.add_argument(
        "--holdout",
        type=float,
        metavar="SHARE",
        help="with --split test, about this share of the samples, by a hash of their keys; with train, the rest",
    )


def add_grouping(parser: "argparse._ActionsContainer") -> None:
    """The options that say how a tar's members make samples."""
    parser.add_argument(
        "--label",
        metavar="SUFFIX",
        help="of the member with a sample's class: cls (default), txt, json:FIELD, none; of parquet: a column, or none",
    )
    parser.add_argument(
        "--image",
        metavar="SUFFIX",
        help="of the image, where samples have several: jpg, image.png; of parquet, a column",
    )
    parser.add_argument(
        "--dots", choices=("first", "last"), default="first", help="which dot of a member's name ends its key"
    )


def grouping_of(arguments: argparse.Namespace) -> Grouping:
    """Of shards' members, whose suffixes are read in lower case."""
    image = arguments.image
    return Grouping(arguments.dots, None if image is None else image.lower().removeprefix("."))


def run(arguments: argparse.Namespace) -> int:
    for name in ("samples_per_shard", "workers", "size", "limit"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if arguments.holdout is not None and not 0 < arguments.holdout < 1:
        raise ConfigError(f"--holdout {arguments.holdout}: must be above 0 and below 1")
    if arguments.background is not None:
        check_background(arguments.background)
    columns = arguments.source.startswith("parquet:")
    grouping = Grouping(arguments.dots, arguments.image) if columns else grouping_of(arguments)
    options = Options(arguments.root, arguments.labels, arguments.label, None if grouping == Grouping() else grouping)
    split = arguments.split if arguments.holdout is None else "train"
    source = select(
        open_source(arguments.source, split, options),
        classes=None if arguments.classes is None else arguments.classes.split(","),
        limit=arguments.limit,
        holdout=None if arguments.holdout is None else (arguments.holdout, arguments.split),
    )
    manifest = write_shards(
        source,
        arguments.out,
        samples_per_shard=arguments.samples_per_shard,
        workers=arguments.workers,
        conversion=Conversion(
            arguments.size,
            arguments.mode,
            arguments.format,
            None if arguments.range is None else parse_levels(arguments.range),
            arguments.background,
        ),
        on_error=arguments.on_error,
        overwrite=arguments.overwrite,
    )
    tell(manifest, arguments.out)
    tell_next(manifest, arguments.out)
    return 0


def tell(manifest: Manifest, where: str) -> None:
    """Prints what is in a manifest, and what was left out."""
    classes = f", {manifest.num_classes} classes" if manifest.num_classes else ""
    print(f"{manifest.samples} {describe(manifest.shape)}{classes} in {len(manifest.shards)} shards -> {where}")
    if manifest.classes:
        names = [f"{i}={printable(name)}" for i, name in enumerate(manifest.classes[:SHOWN])]
        more = f" ... and {len(manifest.classes) - SHOWN} more" if len(manifest.classes) > SHOWN else ""
        print(f"classes: {' '.join(names)}{more}")
    for left_out in manifest.left_out:
        print(f"left out: {printable(str(left_out))}")


def tell_next(manifest: Manifest, where: str) -> None:
    """Prints the command that makes a config for these shards. Those of a split that is held out are not trained on."""
    if len(manifest.shape) == 1:
        shape = f"'data.shape=[{manifest.shape[0]}]'"
        settings = f"run.dir=runs/mine data.source=null data.shards={shlex.quote(where)} {shape} evaluate.source=null"
        print(f"next: python -m ebm train --config configs/four_peaks.yaml {settings} evaluate.shards=null")
    elif manifest.source is None or manifest.source.split in FOR_TRAINING:
        print(f"next: python -m ebm init --data {shlex.quote(where)}")
    else:
        print("next: write the split train to shards, too; where TRAIN stands for these:")
        print(f"  python -m ebm init --data TRAIN --val {shlex.quote(where)}")
