"""Picture metrics written out in numpy, float64, from their papers. Pictures are uint8 (H, W, 3), features (n, d).

FID 1706.08500, KID 1801.01401 and Gretton et al. 2012, LPIPS 1801.03924 version 0.1, MS-SSIM Wang et al. 2003,
Inception-v3 1512.00567 with the poolings of the TensorFlow file that FID is defined by.
"""

import math

import numpy as np
import scipy.linalg


def fid(x, y):
    (m1, c1), (m2, c2) = ((z.mean(0), np.cov(z, rowvar=False)) for z in (x, y))
    return fid_of_moments(m1, c1, m2, c2)


def fid_of_moments(m1, c1, m2, c2):
    root = scipy.linalg.sqrtm(c1 @ c2).real
    return ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * root)


def kernel(a, b):
    return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3


def kid(x, y, paired=False):
    """Unbiased; `paired`: row i of both is dependent, so only i != j is compared across, too."""
    n, m = len(x), len(y)
    xx = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    across = [kernel(x[i], y[j]) for i in range(n) for j in range(m) if not (paired and i == j)]
    return xx + yy - 2 * sum(across) / len(across)


def jackknife(values):
    """Standard error from the values without one unit each."""
    n = len(values)
    middle = sum(values) / n
    return math.sqrt((n - 1) / n * sum((v - middle) ** 2 for v in values))


def sharpness(picture):
    """Mean of |pixel - mean of its eight neighbours|, borders mirrored, over places and channels."""
    h, w, _ = picture.shape
    padded = np.pad(picture / 255, ((1, 1), (1, 1), (0, 0)), mode="reflect")
    total = 0.0
    for i in range(1, h + 1):
        for j in range(1, w + 1):
            around = padded[i - 1 : i + 2, j - 1 : j + 2].sum((0, 1)) - padded[i, j]
            total += np.abs(padded[i, j] - around / 8).sum()
    return total / (h * w * 3)


def ms_ssim(a, b, betas):
    """Contrast and structure at every scale, at the coarsest times luminance; each to the power of its beta.

    As torchmetrics has it: borders are mirrored, and but at the coarsest scale places whose window crosses a border are
    left out; halving takes means of 2 x 2 pixels; what is negative counts as 0.
    """
    place = np.arange(11) - 5
    window = np.exp(-(place**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2
    x, y = a / 255, b / 255
    product = 1.0
    for scale, beta in enumerate(betas):
        whole, structure = [], []
        for channel in range(3):
            p, q = (
                np.lib.stride_tricks.sliding_window_view(np.pad(v[..., channel], 5, mode="reflect"), (11, 11))
                for v in (x, y)
            )
            mp, mq = (p * window).sum((-1, -2)), (q * window).sum((-1, -2))
            vp, vq = (p * p * window).sum((-1, -2)) - mp**2, (q * q * window).sum((-1, -2)) - mq**2
            cov = (p * q * window).sum((-1, -2)) - mp * mq
            cs = (2 * cov + 0.03**2) / (vp + vq + 0.03**2)
            structure.append(cs[5:-5, 5:-5])
            whole.append((2 * mp * mq + 0.01**2) / (mp**2 + mq**2 + 0.01**2) * cs)
        value = np.mean(whole) if scale == len(betas) - 1 else np.mean(structure)
        product *= max(value, 0) ** beta
        h, w = x.shape[0] // 2, x.shape[1] // 2
        x, y = (v[: 2 * h, : 2 * w].reshape(h, 2, w, 2, 3).mean((1, 3)) for v in (x, y))
    return product


def convolve(x, weight, bias=None, stride=1, padding=(0, 0)):
    """x (C, H, W), weight (O, C, h, w)."""
    padded = np.pad(x, ((0, 0), (padding[0],) * 2, (padding[1],) * 2))
    windows = np.lib.stride_tricks.sliding_window_view(padded, weight.shape[2:], axis=(1, 2))[:, ::stride, ::stride]
    out = np.einsum("chwij,ocij->ohw", windows, weight, optimize=True)
    return out if bias is None else out + bias[:, None, None]


def pool(x, size, stride, padding=0, mean=False):
    """Maximum, or mean of what lies inside; the border is padded with nan, which neither sees."""
    padded = np.pad(x, ((0, 0), (padding,) * 2, (padding,) * 2), constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(1, 2))[:, ::stride, ::stride]
    return (np.nanmean if mean else np.nanmax)(windows, axis=(-1, -2))


# (number in torchvision's `features`, stride, padding) of convolutions; "pool" and its size; "compare".
ALEXNET = [(0, 4, 2), "compare", ("pool", 3), (3, 1, 2), "compare", ("pool", 3), (6, 1, 1), "compare"]
ALEXNET += [(8, 1, 1), "compare", (10, 1, 1), "compare"]
VGG16 = [(0, 1, 1), (2, 1, 1), "compare", ("pool", 2), (5, 1, 1), (7, 1, 1), "compare", ("pool", 2)]
VGG16 += [(10, 1, 1), (12, 1, 1), (14, 1, 1), "compare", ("pool", 2), (17, 1, 1), (19, 1, 1), (21, 1, 1), "compare"]
VGG16 += [("pool", 2), (24, 1, 1), (26, 1, 1), (28, 1, 1), "compare"]


def stages(layers, state, picture):
    """Activations to be compared, of a picture; `state`: torchvision's keys."""
    x = (picture / 127.5 - 1 - np.array([-0.030, -0.088, -0.188])) / np.array([0.458, 0.448, 0.450])
    x, found = x.transpose(2, 0, 1), []
    for layer in layers:
        if layer == "compare":
            found.append(x)
        elif layer[0] == "pool":
            x = pool(x, layer[1], 2)
        else:
            number, stride, padding = layer
            weight, bias = state[f"features.{number}.weight"], state[f"features.{number}.bias"]
            x = np.maximum(convolve(x, weight, bias, stride, (padding, padding)), 0)
    return found


def lpips(layers, state, heads, a, b):
    """The mean over places of the squared difference of unit activations, each channel times its head's weight."""
    total = 0.0
    for head, x, y in zip(heads, stages(layers, state, a), stages(layers, state, b), strict=True):
        _, h, w = x.shape
        for i in range(h):
            for j in range(w):
                p, q = (v[:, i, j] / (np.sqrt((v[:, i, j] ** 2).sum()) + 1e-10) for v in (x, y))
                total += (head * (p - q) ** 2).sum() / (h * w)
    return total


def tf1_resize(picture, side):
    """TensorFlow 1's bilinear `(H, W, C)`: pixel i is read at i * old / new, between it and the next one."""
    h, w, c = picture.shape
    out = np.zeros((side, side, c))
    for i in range(side):
        for j in range(side):
            y, x = i * h / side, j * w / side
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
            top = picture[y0, x0] * (1 - (x - x0)) + picture[y0, x1] * (x - x0)
            bottom = picture[y1, x0] * (1 - (x - x0)) + picture[y1, x1] * (x - x0)
            out[i, j] = top * (1 - (y - y0)) + bottom * (y - y0)
    return out


def inception(state, picture):
    """The 2048 features of one picture of 299 x 299; `state`: arrays under the weight file's keys."""

    def conv(name, x, stride=1, padding=(0, 0)):
        y = convolve(x, state[f"{name}.conv.weight"], None, stride, padding)
        mean, var, gain, shift = (state[f"{name}.bn.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        y = (y - mean[:, None, None]) / np.sqrt(var + 0.001)[:, None, None] * gain[:, None, None] + shift[:, None, None]
        return np.maximum(y, 0)

    def chain(block, x, *steps):
        for name, padding in steps:
            x = conv(f"{block}.{name}", x, 1, padding)
        return x

    flat, three, five, wide, tall = (0, 0), (1, 1), (2, 2), (0, 3), (3, 0)
    x = ((picture.astype(np.float64) - 128) / 128).transpose(2, 0, 1)
    x = conv("Conv2d_2b_3x3", conv("Conv2d_2a_3x3", conv("Conv2d_1a_3x3", x, 2)), 1, three)
    x = pool(conv("Conv2d_4a_3x3", conv("Conv2d_3b_1x1", pool(x, 3, 2))), 3, 2)
    for b in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        branches = [chain(b, x, ("branch1x1", flat)), chain(b, x, ("branch5x5_1", flat), ("branch5x5_2", five))]
        branches.append(chain(b, x, ("branch3x3dbl_1", flat), ("branch3x3dbl_2", three), ("branch3x3dbl_3", three)))
        x = np.concatenate([*branches, conv(f"{b}.branch_pool", pool(x, 3, 1, 1, mean=True))])
    b = "Mixed_6a"
    double = chain(b, x, ("branch3x3dbl_1", flat), ("branch3x3dbl_2", three))
    x = np.concatenate([conv(f"{b}.branch3x3", x, 2), conv(f"{b}.branch3x3dbl_3", double, 2), pool(x, 3, 2)])
    for b in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        branches = [chain(b, x, ("branch1x1", flat))]
        branches.append(chain(b, x, ("branch7x7_1", flat), ("branch7x7_2", wide), ("branch7x7_3", tall)))
        paddings = enumerate((flat, tall, wide, tall, wide), 1)
        branches.append(chain(b, x, *[(f"branch7x7dbl_{i}", padding) for i, padding in paddings]))
        x = np.concatenate([*branches, conv(f"{b}.branch_pool", pool(x, 3, 1, 1, mean=True))])
    b = "Mixed_7a"
    once = conv(f"{b}.branch3x3_2", chain(b, x, ("branch3x3_1", flat)), 2)
    seven = chain(b, x, ("branch7x7x3_1", flat), ("branch7x7x3_2", wide), ("branch7x7x3_3", tall))
    x = np.concatenate([once, conv(f"{b}.branch7x7x3_4", seven, 2), pool(x, 3, 2)])
    for b in ("Mixed_7b", "Mixed_7c"):
        once = chain(b, x, ("branch3x3_1", flat))
        twice = chain(b, x, ("branch3x3dbl_1", flat), ("branch3x3dbl_2", three))
        branches = [chain(b, x, ("branch1x1", flat))]
        branches += [conv(f"{b}.branch3x3_2a", once, 1, (0, 1)), conv(f"{b}.branch3x3_2b", once, 1, (1, 0))]
        branches += [conv(f"{b}.branch3x3dbl_3a", twice, 1, (0, 1)), conv(f"{b}.branch3x3dbl_3b", twice, 1, (1, 0))]
        x = np.concatenate([*branches, conv(f"{b}.branch_pool", pool(x, 3, 1, 1, mean=b == "Mixed_7b"))])
    return x.mean((1, 2))
