"""Encoder families once more, in float64 numpy, written from their definitions; nothing is shared with the library.

An oracle is one encoder and runs one sample at a time, without padding and one query at a time:

    Oracle(weights, encoder)      weights: the encoder's own tensors by their state-dict names; encoder: the library's
                                  module, read for plain numbers only (heads, window sizes, epsilons)
    .embed(sample) → x            sample: {input name: array without batch axis, real tokens only}; x (N, D)
    .layer(i, x, prompts) → x     prompts (P, D), or None
    .pool(x) → (D,)               what a router reads
    .finish(x) → (D_y,)           the pooled feature
"""
