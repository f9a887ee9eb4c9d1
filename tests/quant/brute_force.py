"""AWQ's search for one decoder block of the LLaMA kind, in float64 and as plainly as the paper and its released code
describe it (arXiv 2306.00978): the reference of the tests. It uses NumPy alone.

w: weights by name, x: the block's input [N, S, D]. Everything is computed for all tokens at once.
"""

from __future__ import annotations

import numpy as np

EPS = 1e-6


def rms_norm(x, weight):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * weight


def silu(x):
    return x / (1 + np.exp(-x))


def rotate(x, theta):
    """x [N, H, S, d]: the first half of a head turns against the second."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[2])[:, None] / theta ** (np.arange(half) * 2 / x.shape[-1])
    cos, sin = np.cos(angle), np.sin(angle)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def linear(x, w, name):
    return x @ w[name + ".weight"].T + w.get(name + ".bias", 0)


def heads_output(x, w, heads, kv_heads, theta, window):
    """What o_proj reads."""
    N, S, _ = x.shape

    def split(y, count):
        return y.reshape(N, S, count, -1).transpose(0, 2, 1, 3)

    q = rotate(split(linear(x, w, "self_attn.q_proj"), heads), theta)
    k = rotate(split(linear(x, w, "self_attn.k_proj"), kv_heads), theta)
    v = split(linear(x, w, "self_attn.v_proj"), kv_heads)
    k, v = (np.repeat(y, heads // kv_heads, axis=1) for y in (k, v))
    logits = q @ k.transpose(0, 1, 3, 2) / np.sqrt(q.shape[-1])
    distance = np.arange(S)[:, None] - np.arange(S)[None]
    logits[..., (distance < 0) | (distance >= (window or S))] = -np.inf
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    return (shares @ v).transpose(0, 2, 1, 3).reshape(N, S, -1)


def attention(x, w, **facts):
    return linear(heads_output(x, w, **facts), w, "self_attn.o_proj")


def mlp_inner(x, w):
    return silu(linear(x, w, "mlp.gate_proj")) * linear(x, w, "mlp.up_proj")


def mlp(x, w):
    return linear(mlp_inner(x, w), w, "mlp.down_proj")


def quantized(weight, size):
    g = weight.reshape(len(weight), -1, size)
    low, high = g.min(-1, keepdims=True), g.max(-1, keepdims=True)
    scale = np.maximum(high - low, 1e-5) / 15
    zero = np.clip(-np.round(low / scale), 0, 15)
    code = np.clip(np.round(g / scale) + zero, 0, 15)
    return ((code - zero) * scale).reshape(weight.shape)


def best_scale(x, names, output, w, size):
    """The losses of all ratios and the scale of the best; `output(w)` is what is inspected."""
    mean = np.abs(x).reshape(-1, x.shape[-1]).mean(0)
    whole = output(w)
    losses, scales = [], []
    for ratio in np.arange(20) / 20:
        s = np.maximum(mean**ratio, 1e-4)
        s = s / np.sqrt(s.max() * s.min())
        trial = dict(w)
        for name in names:
            trial[name + ".weight"] = quantized(w[name + ".weight"] * s, size) / s
        losses.append(((whole - output(trial)) ** 2).mean())
        scales.append(s)
    return losses, scales[int(np.argmin(losses))]


def best_limits(x, weight, size):
    x = x.reshape(-1, x.shape[-1])
    x = x[:: max(1, len(x) // 512)]
    out = np.empty((len(weight), weight.shape[1] // size))
    for row in range(out.shape[0]):
        for group in range(out.shape[1]):
            some = slice(group * size, (group + 1) * size)
            w, least = weight[row, some], np.inf
            for step in range(10):
                limit = np.abs(w).max() * (1 - step / 20)
                tried = quantized(np.clip(w, -limit, limit)[None], size)[0]
                error = ((x[:, some] @ (tried - w)) ** 2).mean()
                if error < least:
                    least, out[row, group] = error, limit
    return out


def search(x, w, size, **facts):
    """Scales by what they are folded into, losses likewise, limits by Linear, and the block's own output."""
    w = {name: value.astype(np.float64) for name, value in w.items()}
    q, k, v, o = (f"self_attn.{letter}_proj" for letter in "qkvo")
    gate, up, down = (f"mlp.{name}_proj" for name in ("gate", "up", "down"))
    x = x.astype(np.float64)
    x_qkv = rms_norm(x, w["input_layernorm.weight"])
    x_o = heads_output(x_qkv, w, **facts)
    after = x + linear(x_o, w, o)
    x_mlp = rms_norm(after, w["post_attention_layernorm.weight"])
    x_down = mlp_inner(x_mlp, w)
    output = after + linear(x_down, w, down)
    groups = {
        "input_layernorm": (x_qkv, (q, k, v), lambda w: attention(x_qkv, w, **facts)),
        v: (x_o, (o,), lambda w: linear(x_o, w, o)),
        "post_attention_layernorm": (x_mlp, (gate, up), lambda w: mlp(x_mlp, w)),
        up: (x_down, (down,), lambda w: linear(x_down, w, down)),
    }
    if w[v + ".weight"].shape != w[o + ".weight"].shape:
        del groups[v]
    found = {fold: best_scale(read, names, run, w, size) for fold, (read, names, run) in groups.items()}
    scaled = {v: x_qkv, o: x_o, gate: x_mlp, up: x_mlp, down: x_down}
    for fold, (_, names, _) in groups.items():
        s = found[fold][1]
        w[fold + ".weight"] = (w[fold + ".weight"].T / s).T
        for name in names:
            w[name + ".weight"] = w[name + ".weight"] * s
            if name in scaled:
                scaled[name] = scaled[name] / s
    limits = {name: best_limits(read, w[name + ".weight"], size) for name, read in scaled.items()}
    scales = {fold: s for fold, (_, s) in found.items()}
    return scales, {fold: losses for fold, (losses, _) in found.items()}, limits, output
