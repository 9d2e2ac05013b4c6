"""Still plots of the report as SVG: ticks at round values, names and units on both axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from mobile_vla_inference.control.memory import MemorySample

#: Longer lines are thinned out: nobody can see more points.
_LINE_POINTS = 1500
_BINS = 40
#: Width of every still plot in its own units; the style scales it.
_WIDTH = 360.0


def nice_step(span: float, most: int) -> float:
    """Return a step of 1, 2 or 5 times a power of ten, with which a span has at most about `most` ticks."""
    raw = span / most if span > 0.0 else 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))


def ticks(low: float, high: float, most: int) -> list[tuple[float, str]]:
    """Return the round values in a range, each with its text."""
    step = nice_step(high - low, most)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    positions = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [(position * step, f"{position * step:.{decimals}f}") for position in positions]


@dataclass(frozen=True)
class Scale:
    """A plot's place for values: their range on both axes, and its size.

    Attributes:
        x, y: (low, high) of the values.
        height: of the whole figure.
    """

    x: tuple[float, float]
    y: tuple[float, float]
    height: float
    left: float = 46.0
    bottom: float = 36.0
    right: float = 10.0
    top: float = 10.0

    def at_x(self, value: float) -> float:
        """Return where a value of the horizontal axis is drawn."""
        low, high = self.x
        return self.left + (value - low) / ((high - low) or 1.0) * (_WIDTH - self.left - self.right)

    def at_y(self, value: float) -> float:
        """Return where a value of the vertical axis is drawn."""
        low, high = self.y
        return (
            self.height - self.bottom - (value - low) / ((high - low) or 1.0) * (self.height - self.bottom - self.top)
        )

    def axes(self, x_title: str, y_title: str, most_x: int = 5, most_y: int = 4) -> list[str]:
        """Return grid lines, ticks and titles of both axes."""
        floor, right = self.height - self.bottom, _WIDTH - self.right
        drawn = []
        for value, text in ticks(*self.x, most_x):
            x = self.at_x(value)
            drawn.append(f'<path class="axis" d="M{x:.1f} {self.top:g}V{floor:g}"/>')
            drawn.append(f'<text x="{x:.1f}" y="{floor + 14:g}" text-anchor="middle">{text}</text>')
        for value, text in ticks(*self.y, most_y):
            y = self.at_y(value)
            drawn.append(f'<path class="axis" d="M{self.left:g} {y:.1f}H{right:g}"/>')
            drawn.append(f'<text x="{self.left - 4:g}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
        middle_x, middle_y = (self.left + right) / 2.0, (self.top + floor) / 2.0
        drawn.append(
            f'<text class="title" x="{middle_x:.1f}" y="{self.height - 5:g}" text-anchor="middle">'
            f"{escape(x_title)}</text>"
        )
        drawn.append(
            f'<text class="title" transform="translate(11 {middle_y:.1f}) rotate(-90)" text-anchor="middle">'
            f"{escape(y_title)}</text>"
        )
        return drawn


def figure(caption: str, height: float, drawn: Sequence[str]) -> str:
    """Return a drawing with its caption."""
    return (
        f'<figure><svg viewBox="0 0 {_WIDTH:g} {height:.0f}" role="img" aria-label="{escape(caption)}">'
        f"{''.join(drawn)}</svg><figcaption>{escape(caption)}</figcaption></figure>"
    )


def histogram(axis: str, unit: str, errors: Sequence[np.ndarray]) -> str:
    """Return the errors of one axis as bars, and those of a second replay as a line over them."""
    reach = max(float(np.percentile(np.abs(np.concatenate(errors)), 99)), 1e-3)
    edges = np.linspace(-reach, reach, _BINS + 1)
    counts = [np.histogram(np.clip(each, -reach, reach), edges)[0] for each in errors]
    scale = Scale((-reach, reach), (0.0, float(max(each.max() for each in counts))), 180.0)
    drawn = scale.axes(f"error of {axis}: prediction - recorded ({unit})", "images")
    width = scale.at_x(edges[1]) - scale.at_x(edges[0])
    drawn += [
        f'<rect class="fill-predicted" x="{scale.at_x(edge) + 0.5:.1f}" y="{scale.at_y(count):.1f}" '
        f'width="{width - 1:.1f}" height="{scale.at_y(0) - scale.at_y(count):.1f}"/>'
        for edge, count in zip(edges, counts[0])
        if count
    ]
    for more in counts[1:]:
        middles = (edges[:-1] + edges[1:]) / 2.0
        drawn.append(_line(scale, "against", list(zip(middles, more))))
    drawn.append(f'<path class="zero" d="M{scale.at_x(0):.1f} {scale.top:g}V{scale.at_y(0):.1f}"/>')
    caption = f"{axis}: number of images by error" + ("; the line is the second replay" if counts[1:] else "")
    return figure(caption, scale.height, drawn)


def memory(runs: Sequence[Sequence[MemorySample]]) -> list[str]:
    """Return the memory of the process, and of torch on the GPU where it used one, over the replay."""
    series = {"resident memory of the process": "rss_mib", "memory of torch on the GPU": "gpu_allocated_mib"}
    figures = []
    for title, field in series.items():
        most = max(getattr(sample, field) for run in runs for sample in run)
        if most <= 0.0 or max(map(len, runs)) < 2:
            continue
        end_s = max(sample.elapsed_s for run in runs for sample in run)
        scale = Scale((0.0, end_s), (0.0, most * 1.1), 170.0)
        drawn = scale.axes("time of the replay (s)", "memory (MiB)")
        for run, key in zip(runs, ("predicted", "against")):
            drawn.append(_line(scale, key, [(sample.elapsed_s, getattr(sample, field)) for sample in run]))
        figures.append(figure(title, scale.height, drawn))
    return figures


def over_time(
    times_s: Sequence[float],
    series: dict[str, Sequence[float | None]],
    ranges: tuple[tuple[float, float], tuple[float, float]],
    axis: str,
    unit: str,
) -> str:
    """Return values of one axis over time, on given ranges of both axes; None is a gap in the line."""
    scale = Scale(*ranges, 150.0)
    drawn = scale.axes("time since the first image (s)", f"{axis} ({unit})")
    for key, values in series.items():
        drawn.append(_line(scale, key, [(t, v) for t, v in zip(times_s, values) if v is not None]))
    return figure(f"{axis} over time", scale.height, drawn)


def path_extent(paths: Sequence[np.ndarray]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the ranges of x and y (m) that hold all paths, at least 1 m each, with a margin."""
    found = np.concatenate(paths) if paths else np.zeros((1, 2))
    low, high = found[:, :2].min(axis=0), found[:, :2].max(axis=0)
    middle, half = (low + high) / 2.0, np.maximum((high - low) * 0.55, 0.5)
    return tuple((float(m - h), float(m + h)) for m, h in zip(middle, half))


def from_above(
    paths: dict[str, np.ndarray], extent: tuple[tuple[float, float], tuple[float, float]], cursor: bool = False
) -> str:
    """Return paths seen from above, x up and y to the left, with the same scale on both axes and a grid in metres.

    Args:
        paths: key of the colour -> poses [n, 2 or more], metres.
        extent: ranges of x and y, by `path_extent`.
        cursor: add a dot for each path, which the page's script moves.
    """
    (x_low, x_high), (y_low, y_high) = extent
    left, bottom, right, top = 46.0, 36.0, 10.0, 10.0
    # Of a path much wider or longer than that, the narrow side gets more room, so that the figure stays readable.
    width = _WIDTH - left - right
    height = min(max(width * (x_high - x_low) / (y_high - y_low), 120.0), 420.0)
    metre = min(width / (y_high - y_low), height / (x_high - x_low))
    spare_x, spare_y = height / metre - (x_high - x_low), width / metre - (y_high - y_low)
    x_low, x_high = x_low - spare_x / 2.0, x_high + spare_x / 2.0
    y_low, y_high = y_low - spare_y / 2.0, y_high + spare_y / 2.0
    scale = Scale((y_high, y_low), (x_low, x_high), height + bottom + top, left, bottom, right, top)
    step = nice_step(max(x_high - x_low, y_high - y_low), 8)
    drawn = _metre_grid(scale, step)
    # Inside this group, coordinates are metres: x up, y to the left.
    origin = f"{scale.at_x(0.0):.2f} {scale.at_y(0.0):.2f}"
    drawn.append(f'<g class="metres" transform="matrix(0 {-metre:.4f} {-metre:.4f} 0 {origin})">')
    dot = 4.0 / metre
    for key, path in paths.items():
        points = " ".join(f"{x:.3f},{y:.3f}" for x, y in _thinned(path)[:, :2])
        drawn.append(f'<polyline class="line-{key}" points="{points}"/>')
    for key, path in paths.items():
        x, y = path[-1, :2]
        drawn.append(f'<circle class="end-{key}" cx="{x:.3f}" cy="{y:.3f}" r="{dot:.4f}"/>')
    drawn.append(f'<circle class="start" cx="0" cy="0" r="{dot:.4f}"/>')
    if cursor:
        drawn += [f'<circle class="at-{key}" data-path="{key}" cx="0" cy="0" r="{dot * 1.5:.4f}"/>' for key in paths]
    drawn.append("</g>")
    return figure(f"seen from above; a square of the grid is {step:g} m", scale.height, drawn)


def _metre_grid(scale: Scale, step: float) -> list[str]:
    floor, right = scale.height - scale.bottom, _WIDTH - scale.right
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    y_high, y_low = scale.x
    x_low, x_high = scale.y
    drawn = []
    last_text = -math.inf
    for position in range(math.floor(y_high / step), math.ceil(y_low / step) - 1, -1):
        at, text = scale.at_x(position * step), f"{position * step:.{decimals}f}"
        drawn.append(f'<path class="axis" d="M{at:.1f} {scale.top:g}V{floor:g}"/>')
        if at - last_text > 26.0:
            drawn.append(f'<text x="{at:.1f}" y="{floor + 14:g}" text-anchor="middle">{text}</text>')
            last_text = at
    for position in range(math.ceil(x_low / step), math.floor(x_high / step) + 1):
        at, text = scale.at_y(position * step), f"{position * step:.{decimals}f}"
        drawn.append(f'<path class="axis" d="M{scale.left:g} {at:.1f}H{right:g}"/>')
        drawn.append(f'<text x="{scale.left - 4:g}" y="{at + 4:.1f}" text-anchor="end">{text}</text>')
    middle = (scale.left + right) / 2.0
    drawn.append(
        f'<text class="title" x="{middle:.1f}" y="{scale.height - 5:g}" text-anchor="middle">← left, y (m)</text>'
    )
    drawn.append(
        f'<text class="title" transform="translate(11 {(scale.top + floor) / 2.0:.1f}) rotate(-90)" '
        f'text-anchor="middle">ahead, x (m) →</text>'
    )
    return drawn


def _line(scale: Scale, key: str, points: Sequence[tuple[float, float]]) -> str:
    text = " ".join(f"{scale.at_x(x):.1f},{scale.at_y(y):.1f}" for x, y in _thinned(np.array(points).reshape(-1, 2)))
    return f'<polyline class="line-{key}" points="{text}"/>'


def _thinned(points: np.ndarray) -> np.ndarray:
    if len(points) <= _LINE_POINTS:
        return points
    return points[np.linspace(0, len(points) - 1, _LINE_POINTS).round().astype(int)]
