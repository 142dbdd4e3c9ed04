"""Limits that are checked before memory or time is taken, in one place."""

# golden samples
MAX_REPLAY_BYTES = 256 * 2**20  # of the input arrays of one batch of golden samples
