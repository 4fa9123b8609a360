"""Data: shards and their manifest, the resumable reader, and what is done to a batch on the device."""

from ebm.data import augment
from ebm.data.manifest import Manifest, load_manifest
from ebm.data.reader import Batch, ShardReader

__all__ = ["Batch", "Manifest", "ShardReader", "augment", "load_manifest"]
