"""What training reads: files found or fetched, rows checked, files decoded, batches made."""

from train.data.batches import Batches, made_by_workers, rows_of
from train.data.media import MediaCache
from train.data.order import EpochOrder
from train.data.sources import find_splits
from train.data.split import Split, drop_bad_files, hold_out, read_split

__all__ = [
    "Batches",
    "EpochOrder",
    "MediaCache",
    "Split",
    "drop_bad_files",
    "find_splits",
    "hold_out",
    "made_by_workers",
    "read_split",
    "rows_of",
]
