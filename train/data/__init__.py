"""What training reads: files found or fetched, rows checked, pictures decoded, batches made."""

from train.data.batches import Batches
from train.data.images import ImageCache
from train.data.sources import SplitFiles, find_splits
from train.data.split import Split, drop_bad_images, hold_out, read_split

__all__ = ["Batches", "ImageCache", "Split", "SplitFiles", "drop_bad_images", "find_splits", "hold_out", "read_split"]
