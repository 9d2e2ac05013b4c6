"""Arithmetic of `mobile_vla bench node`: gaps, the stages of a reaction, and whether a figure is flat. No ROS."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mobile_vla_inference.units import percentiles

#: From an image's publication to the arrival of the command that it caused, without the policy step, in order.
STAGES = ("transport", "wait", "conversion", "hand_over", "gate", "delivery")

#: Parts of a series that are compared to judge whether it is flat.
_PARTS = 5
#: A command that has not arrived by then is lost: the subscription keeps the newest only.
_LOST_AFTER_S = 1.0


def summarize(values: Iterable[float]) -> dict[str, float] | None:
    """Return p50, p95, p99 and max; None where there is no value."""
    samples = np.fromiter(values, dtype=float)
    if samples.size == 0:
        return None
    return {**percentiles(samples), "max": float(samples.max())}


def gaps_ms(times_s: Sequence[float], since_s: float, until_s: float) -> list[float]:
    """Return the gaps in milliseconds between events within a window, whose ends count as events.

    So a stream that starts late, stops early or is silent shows as a gap, too.
    """
    inside = [time_s for time_s in times_s if since_s < time_s < until_s]
    return [1e3 * float(gap) for gap in np.diff([since_s, *inside, until_s])]


def reactions_ms(
    images: Iterable[Mapping[str, float]],
    commands: Iterable[Mapping[str, float]],
    arrivals: Sequence[Mapping[str, float]],
    since_s: float,
) -> list[dict[str, float]]:
    """Return the stages of each reaction in milliseconds, and their `total`: from image to command, without the step.

    Args:
        images: `stamp_s` and `published_s` of each image, by the camera.
        commands: what the node published, with the times of the step if one caused it.
        arrivals: `arrived_s` and `linear_x_mps` of each command that arrived, in order.
        since_s: only images that were published from then on.
    """
    published_s = {image["stamp_s"]: image["published_s"] for image in images}
    arrival_times = [arrival["arrived_s"] for arrival in arrivals]
    reactions = []
    for command in commands:
        image_s = published_s.get(command.get("stamp_s"))
        if image_s is None or image_s < since_s:
            continue
        first = bisect_left(arrival_times, command["published_s"])
        last = bisect_left(arrival_times, command["published_s"] + _LOST_AFTER_S)
        same = (arrival for arrival in arrivals[first:last] if arrival["linear_x_mps"] == command["linear_x_mps"])
        arrived_s = next((arrival["arrived_s"] for arrival in same), None)
        if arrived_s is None:
            continue  # on its way when the benchmark ended, or replaced by a newer one; the gaps show late ones
        stages_s = {
            "transport": command["received_s"] - image_s,
            "wait": command["started_s"] - command["received_s"],
            "conversion": command["loaded_s"] - command["started_s"],
            "hand_over": command["finished_s"] - command["loaded_s"] - command["step_s"],
            "gate": command["published_s"] - command["finished_s"],
            "delivery": arrived_s - command["published_s"],
        }
        reactions.append({name: 1e3 * seconds for name, seconds in stages_s.items()})
        reactions[-1]["total"] = sum(reactions[-1].values())
    return reactions


def account(facts: Mapping[str, str]) -> dict[str, Any]:
    """Return what the node did with the frames, by its diagnostics; `missing` counts those not accounted for."""
    dropped = {key.removeprefix("dropped_"): int(facts[key]) for key in sorted(facts) if key.startswith("dropped_")}
    received, stepped = int(facts.get("frames_received", 0)), int(facts.get("steps", 0))
    missing = received - stepped - sum(dropped.values())
    return {"received": received, "stepped": stepped, "dropped": dropped, "missing": missing}


def drift(times_s: Sequence[float], values: Sequence[float], warm_up_s: float) -> dict[str, float] | None:
    """Return how far a series is from flat after a warm-up; None if fewer than ten samples are left.

    Returns:
        `range`: largest difference of the medians of its fifths; `slope_per_hour` of the fitted line, and `growth` of
        that line over the time; `last`: the median of the last fifth.
    """
    kept = [(time_s - times_s[0], value) for time_s, value in zip(times_s, values) if time_s - times_s[0] >= warm_up_s]
    if len(kept) < 2 * _PARTS:
        return None
    seconds, series = np.array(kept).T
    medians = [float(np.median(part)) for part in np.array_split(series, _PARTS)]
    slope_per_s = float(np.polyfit(seconds - seconds[0], series, 1)[0])
    return {
        "range": max(medians) - min(medians),
        "slope_per_hour": slope_per_s * 3600.0,
        "growth": slope_per_s * float(seconds[-1] - seconds[0]),
        "last": medians[-1],
    }


def deviation(series: Mapping[str, float]) -> float:
    """Return how far a series (see `drift`) is from flat, up or down."""
    return max(series["range"], abs(series["growth"]))


def is_flat(series: Mapping[str, float] | None, tolerance: float) -> bool:
    """Whether a series (see `drift`) stays within a tolerance; a series that is too short is not flat."""
    return series is not None and deviation(series) <= tolerance
