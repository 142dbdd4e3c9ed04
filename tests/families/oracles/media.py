"""wav2vec 2.0 and HuBERT, the Whisper encoder, and VideoMAE by loops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.oracle import Array, Weights, attention, gelu, layer_norm


class Wav2Vec2Oracle:
    """One clip through a wav2vec 2.0 or HuBERT of either kind of norm, in the convolutions and in the layers."""

    def __init__(self, weights: Weights, encoder: Any) -> None:
        self.w = weights
        self.config = encoder.config
        self.pre_norm = encoder.config.do_stable_layer_norm

    def embed(self, sample: Mapping[str, Array]) -> Array:
        w, config = self.w, self.config
        x = sample["audio_values"][None]  # (channels, time)
        for i, stride in enumerate(config.conv_stride):
            c = f"feature_extractor.conv_layers.{i}."
            x = convolve(x, w[c + "conv.weight"], w.get(c + "conv.bias"), stride)
            if c + "layer_norm.weight" in w:
                scale, shift = w[c + "layer_norm.weight"], w[c + "layer_norm.bias"]
                # Layer norm runs over the channels of one moment; group norm here over all time of one channel.
                if config.feat_extract_norm == "layer":
                    x = layer_norm(x.T, scale, shift, 1e-5).T
                else:
                    x = np.array([layer_norm(row, a, b, 1e-5) for row, a, b in zip(x, scale, shift, strict=True)])
            x = gelu(x)
        p = "feature_projection."
        x = layer_norm(x.T, w[p + "layer_norm.weight"], w[p + "layer_norm.bias"], config.layer_norm_eps)
        x = x @ w[p + "projection.weight"].T + w[p + "projection.bias"]  # (N, D)
        x = x + self.positions(x)
        return x if self.pre_norm else self.norm("encoder.layer_norm.", x)

    def positions(self, x: Array) -> Array:
        """A convolution in groups over the frames, with filters g · v / |v| for every tap; frames outside are 0."""
        w, c = self.w, "encoder.pos_conv_embed.conv."
        g, v = (w[c + f"parametrizations.weight.original{i}"] for i in (0, 1))
        filters = g * v / np.sqrt((v**2).sum(axis=(0, 1), keepdims=True))
        taps, groups = self.config.num_conv_pos_embeddings, self.config.num_conv_pos_embedding_groups
        size = len(filters) // groups
        out = np.zeros_like(x)
        for n in range(len(x)):
            for channel in range(len(filters)):
                first = channel // size * size
                for tap in range(taps):
                    m = n + tap - taps // 2
                    if 0 <= m < len(x):
                        out[n, channel] += filters[channel, :, tap] @ x[m, first : first + size]
        return gelu(out + w[c + "bias"])

    def norm(self, name: str, x: Array) -> Array:
        return layer_norm(x, self.w[name + "weight"], self.w[name + "bias"], self.config.layer_norm_eps)

    def layer(self, i: int, x: Array, prompts: Array | None) -> Array:
        w, b = self.w, f"encoder.layers.{i}."

        def linear(name: str, x: Array) -> Array:
            return x @ w[f"{b}{name}.weight"].T + w[f"{b}{name}.bias"]

        tokens = x if prompts is None else np.concatenate([x, prompts])
        if self.pre_norm:
            tokens = self.norm(b + "layer_norm.", tokens)
        q, k, v = (linear(f"attention.{part}_proj", tokens) for part in "qkv")
        x = x + linear("attention.out_proj", attention(q[: len(x)], k, v, self.config.num_attention_heads))
        if not self.pre_norm:
            x = self.norm(b + "layer_norm.", x)
        hidden = self.norm(b + "final_layer_norm.", x) if self.pre_norm else x
        x = x + linear("feed_forward.output_dense", gelu(linear("feed_forward.intermediate_dense", hidden)))
        return x if self.pre_norm else self.norm(b + "final_layer_norm.", x)

    def pool(self, x: Array) -> Array:
        return x.mean(axis=0)

    def finish(self, x: Array) -> Array:
        return (self.norm("encoder.layer_norm.", x) if self.pre_norm else x).mean(axis=0)


class WhisperOracle:
    """One spectrogram through a Whisper encoder."""

    def __init__(self, weights: Weights, encoder: Any) -> None:
        self.w = weights
        self.heads = encoder.config.encoder_attention_heads

    def embed(self, sample: Mapping[str, Array]) -> Array:
        w = self.w
        x = sample["audio_features"]  # (bands, frames)
        for name, stride in (("conv1.", 1), ("conv2.", 2)):
            x = gelu(convolve(np.pad(x, ((0, 0), (1, 1))), w[name + "weight"], w[name + "bias"], stride))
        return x.T + w["embed_positions.weight"]

    def layer(self, i: int, x: Array, prompts: Array | None) -> Array:
        w, b = self.w, f"layers.{i}."

        def linear(name: str, x: Array) -> Array:
            return x @ w[f"{b}{name}.weight"].T + w.get(f"{b}{name}.bias", 0.0)

        def norm(name: str, x: Array) -> Array:
            return layer_norm(x, w[f"{b}{name}.weight"], w[f"{b}{name}.bias"], 1e-5)

        tokens = norm("self_attn_layer_norm", x if prompts is None else np.concatenate([x, prompts]))
        q, k, v = (linear(f"self_attn.{part}_proj", tokens) for part in "qkv")
        x = x + linear("self_attn.out_proj", attention(q[: len(x)], k, v, self.heads))
        return x + linear("fc2", gelu(linear("fc1", norm("final_layer_norm", x))))

    def pool(self, x: Array) -> Array:
        return x.mean(axis=0)

    def finish(self, x: Array) -> Array:
        return layer_norm(x, self.w["layer_norm.weight"], self.w["layer_norm.bias"], 1e-5).mean(axis=0)


class VideoMAEOracle:
    """One clip through a VideoMAE, fine-tuned (a norm behind the mean) or not."""

    def __init__(self, weights: Weights, encoder: Any) -> None:
        self.w = weights
        self.config = encoder.config
        self.prefix = "videomae." if "fc_norm.weight" in weights else ""

    def embed(self, sample: Mapping[str, Array]) -> Array:
        name = self.prefix + "embeddings.patch_embeddings.projection."
        kernel = self.w[name + "weight"]  # (D, 3, frames, height, width)
        frames, height, width = kernel.shape[2:]
        clip = sample["video_values"].transpose(1, 0, 2, 3)  # (3, F, H, W)
        tubes = []
        for t in range(0, clip.shape[1], frames):
            for top in range(0, clip.shape[2], height):
                for left in range(0, clip.shape[3], width):
                    tube = clip[:, t : t + frames, top : top + height, left : left + width]
                    tubes.append((kernel * tube).sum(axis=(1, 2, 3, 4)) + self.w[name + "bias"])
        D = len(kernel)
        angles = np.array([[n / 10000 ** (2 * (d // 2) / D) for d in range(D)] for n in range(len(tubes))])
        positions = np.where(np.arange(D) % 2 == 0, np.sin(angles), np.cos(angles))
        return np.array(tubes) + positions.astype(np.float32)  # the library's table is float32

    def layer(self, i: int, x: Array, prompts: Array | None) -> Array:
        w, b, eps = self.w, f"{self.prefix}encoder.layer.{i}.", self.config.layer_norm_eps

        def linear(name: str, x: Array) -> Array:
            return x @ w[f"{b}{name}.weight"].T + w.get(f"{b}{name}.bias", 0.0)

        def norm(name: str, x: Array) -> Array:
            return layer_norm(x, w[f"{b}{name}.weight"], w[f"{b}{name}.bias"], eps)

        tokens = norm("layernorm_before", x if prompts is None else np.concatenate([x, prompts]))
        q, k, v = (linear(f"attention.attention.{part}", tokens) for part in ("query", "key", "value"))
        x = x + linear("attention.output.dense", attention(q[: len(x)], k, v, self.config.num_attention_heads))
        return x + linear("output.dense", gelu(linear("intermediate.dense", norm("layernorm_after", x))))

    def pool(self, x: Array) -> Array:
        return x.mean(axis=0)

    def finish(self, x: Array) -> Array:
        w = self.w
        if not self.config.use_mean_pooling:
            x = layer_norm(x, w["layernorm.weight"], w["layernorm.bias"], self.config.layer_norm_eps)
        y = x.mean(axis=0)
        return layer_norm(y, w["fc_norm.weight"], w["fc_norm.bias"], 1e-5) if "fc_norm.weight" in w else y


def convolve(x: Array, kernel: Array, bias: Array | None, stride: int) -> Array:
    """x (channels, time), kernel (out, channels, taps) → (out, time), without padding."""
    taps = kernel.shape[2]
    starts = range(0, x.shape[1] - taps + 1, stride)
    out = np.array([[(filter_ * x[:, t : t + taps]).sum() for t in starts] for filter_ in kernel])
    return out if bias is None else out + bias[:, None]
