"""What a stranger's input may cost: every limit, with its unit, and why it is where it is. It imports nothing of ours.

A limit is checked before memory is taken for what it bounds. Each is far beyond what anyone needs and far below what
hurts a small device; none is a setting.
"""

from __future__ import annotations

# Bundles

MAX_MANIFEST_BYTES = 16 * 2**20  # bytes; 100,000 labels of a usual length take a fifth of it
MAX_TOKENIZER_BYTES = 256 * 2**20  # bytes; the largest vocabularies in use take 30 MB
MAX_GOLDEN_BYTES = 2**30  # bytes of one .npz once unpacked; eight samples of video take a tenth of it
MAX_REPLAY_BYTES = 256 * 2**20  # bytes of the input arrays of one batch of golden samples
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

MAX_IMAGE_BYTES = 512 * 2**20  # bytes of a picture's file, which is read whole
MAX_HEADER_READS = 10_000  # pieces that a picture's reader asks for before the pixels; a page of tags takes 300
MAX_IMAGE_READS = 1_000_000  # and until it is decoded; each takes two microseconds
MAX_TAG_VALUES = 2**20  # numbers of one TIFF tag; 100 megapixels in tiles of 16 x 16 are 390,625
MAX_SLOW_BYTES = 8 * 2**20  # bytes of a PPM in digits or to be scaled, or a BMP in runs: Python takes 1 s for 2 MB
MAX_SCANS = 100  # of a JPEG; progressive ones have about 10, the most thrifty encoders write 30
MAX_SCANNED_PIXELS = 12 * MAX_PIXELS  # pixels times scans: each scan passes over the whole picture
MAX_VIDEO_PIXELS = 36_000_000  # pixels of a frame; 8K has 33 million
MAX_DECODED_PIXELS = 16_000_000_000  # pixels of all frames that are decoded: a minute of 4K at 30 Hz
MAX_SOUND_VALUES = 2**28  # samples of all channels that are read of a clip, 1 GiB as float32
MAX_PEAK = 2.0  # of sound, whose full scale is 1; lossy decoders overshoot by less

# Rows

MAX_LABEL_CHARS = 256  # characters of a label; bundles hold no longer ones

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
MAX_DIGITS = 300  # of an integer in JSON and YAML; a float holds 308

# Engines

MAX_CACHE_MB = 2**20  # MiB for rows that parts of a split graph made; more than any device has
MAX_GRAPH_FIELDS = 1_000_000  # protobuf fields of an ONNX file, a weight is about ten; 4,000 nodes have 41,000
MAX_NAME_BYTES = 512  # of a name in it that is compared; a longer one is none of ours
