"""What the operators are held to, in numpy."""

import numpy as np
import torch

from penumbra.serving.engine import operators, windows

Maps = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def softmax(logits_hKw: np.ndarray) -> np.ndarray:
    powers = np.exp(logits_hKw - logits_hKw.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def read_out(prob_hKw: np.ndarray, expected_hw: np.ndarray) -> Maps:
    """Labels, confidence, margin, entropy, and the entropy beyond the expected one."""
    labels = prob_hKw.argmax(1).astype(np.uint8)
    ranked = np.sort(prob_hKw, axis=1)
    confidence = ranked[:, -1].copy()
    second = ranked[:, -2] if ranked.shape[1] > 1 else np.zeros_like(confidence)
    positive = np.where(prob_hKw > 1e-37, prob_hKw, 1)
    entropy = -(prob_hKw * np.log(positive)).sum(1)
    return labels, confidence, confidence - second, entropy, np.maximum(entropy - expected_hw, 0)


def read_out_here(prob_hKw: np.ndarray, expected_hw: np.ndarray) -> Maps:
    """The same by the operator."""
    rows, num_classes, width = prob_hKw.shape
    canvas = torch.from_numpy(np.concatenate((prob_hKw, expected_hw[:, None]), axis=1).astype(np.float32))
    size, out = rows * width, torch.empty(20 * rows * width, dtype=torch.uint8)
    offsets = [16 * size, *(4 * size * plane for plane in range(3)), -1, 12 * size, -1, -1, -1]
    operators.read_out(
        [canvas], out, [([0, 0, rows, *offsets], [np.inf] * num_classes)], num_classes=num_classes, softmax=False
    )
    maps = out.numpy()[: 16 * size].view(np.float32).reshape(4, rows, width)
    return (out.numpy()[16 * size : 17 * size].reshape(rows, width), *maps)  # type: ignore[return-value]


def stitched(stats_BhCw: np.ndarray, plan: windows.WindowPlan, num_sums: int, scale: float) -> np.ndarray:
    """All windows of an image, added up where they lie, float64 [H, C, W]."""
    whole = np.zeros((plan.height, stats_BhCw.shape[2], plan.width))
    scales = np.where(np.arange(stats_BhCw.shape[2]) < num_sums, scale, 1)[:, None]
    for piece_hCw, place in zip(stats_BhCw, plan, strict=True):
        rows, columns, _ = windows.clip(place, plan)
        inside_y = slice(rows.start - place.y0, rows.stop - place.y0)
        inside_x = slice(columns.start - place.x0, columns.stop - place.x0)
        weights = plan.weights_y[place.row][inside_y, None, None] * plan.weights_x[place.column][inside_x]
        whole[rows, :, columns] += scales * weights * piece_hCw[inside_y, :, inside_x]
    return whole
