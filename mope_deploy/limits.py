"""What a stranger's input may cost: every limit, with its unit, and why it is where it is. It imports nothing of ours.

A limit is checked before memory is taken for what it bounds. Each is far beyond what anyone needs and far below what
hurts a small device; none is a setting.
"""

from __future__ import annotations

# Bundles

MAX_MANIFEST_BYTES = 16 * 2**20  # bytes; 100,000 labels of a usual length take a fifth of it
MAX_TOKENIZER_BYTES = 256 * 2**20  # bytes; the largest vocabularies in use take 30 MB
MAX_GOLDEN_BYTES = 2**30  # bytes of one .npz once unpacked; eight samples of video take a tenth of it
MAX_ARRAYS = 1000  # arrays in one .npz; goldens have one for every input
MAX_FILE_BYTES = 2**40  # bytes that an entry of a manifest may claim; nothing allocates what is claimed
MAX_SIDECAR_BYTES = 2**20  # bytes of the record beside an engine; one has a few kB
MAX_LABELS = 100_000  # names; the largest sets of classes in use have 21,841
MAX_THREADS = 512  # of one operator; far beyond any use, and thousands take minutes to start

# Media

MAX_SIDE = 16_384  # pixels of a picture's longer side; decoders allocate rows of it
MAX_PIXELS = 100_000_000  # pixels of a picture, 300 MB once decoded
MAX_FRAMES = 100_000  # frames of a video file within max_seconds
MAX_CLIP_BYTES = 2**31  # bytes of a clip's .npz once unpacked
MAX_CHANNELS = 64  # channels of a sound file; headers may claim thousands
SAMPLE_RATES = (1_000, 384_000)  # Hz of sound files, least and greatest

# Rows

MAX_LINE_BYTES = 16 * 2**20  # bytes of one line of JSONL; what is longer is another kind of file
MAX_TEXT_CHARS = 1_000_000  # characters of one text; tokenizers take a second for that many
MAX_TEXT_GROWTH = 64  # times as many characters that a tokenizer's rules may make of a text; those in use: 1 to 4
MAX_GROWN_CHARS = 16 * MAX_TEXT_CHARS  # characters of one text afterwards; the library takes 20 bytes for each
MAX_WORD_CHARS = (
    10_000  # characters of a word that WordPiece takes apart, in time that grows with their square; 100 in use
)

# Configurations

MAX_RECORD_BYTES = 64 * 2**20  # bytes of JSON in checkpoints, runs and caches; 100,000 labels take 3 MB
MAX_RECIPE_BYTES = 2**20  # bytes of YAML; a long recipe has 5 kB
MAX_RECIPE_VALUES = 200_000  # values of YAML once its aliases are copied; 100,000 labels are as many
