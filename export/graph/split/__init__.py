"""A finished graph in several files: a part for each complementary modality, and the main file that takes them."""

from export.graph.split.parts import PartFile, SplitGraph, part_inputs, split
from export.graph.split.sides import SHARED_BYTES

__all__ = ["SHARED_BYTES", "PartFile", "SplitGraph", "part_inputs", "split"]
