"""Data: shards and their manifest, the resumable reader, and what is done to a batch on the device."""

from ebm.data.manifest import Manifest, load_manifest
from ebm.data.reader import Batch, ShardReader
from ebm.data.transfer import Access

__all__ = ["Access", "Batch", "Manifest", "ShardReader", "augment", "load_manifest"]
