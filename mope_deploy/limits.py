"""Limits of what is read, in one place; checked before memory or time is taken."""

from __future__ import annotations

# what engines load
MAX_GRAPH_FIELDS = 1_000_000  # protobuf fields of an ONNX file, a weight is about ten; 4,000 nodes have 41,000
MAX_NAME_BYTES = 512  # of a name in it that is compared; a longer one is none of ours
