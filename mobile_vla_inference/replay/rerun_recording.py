"""A replay as a Rerun recording (.rrd): frames, commands, steps, the gate's reasons and instructions on one timeline.

For people who look at drives in the Rerun viewer, instead of the HTML report or in addition to it. rerun-sdk is an
extra (requirements/rerun.txt): everything else runs without it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from mobile_vla_inference.action import AXES, AXIS_UNITS
from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.replay.result import ReplayFrame, ReplayResult, Velocity

_TIMELINE = "stamp"
_PICTURE_WIDTH_PX = 640


class RerunMissingError(MobileVlaError):
    """rerun-sdk is not installed."""


def require_rerun() -> None:
    """Raise RerunMissingError if rerun-sdk is not installed."""
    try:
        import rerun  # noqa: F401
    except ImportError as error:
        raise RerunMissingError(
            "rerun-sdk is not installed, expected it for --rerun; run: pip install -r requirements/rerun.txt"
        ) from error


def write_recording(result: ReplayResult, path: Path, against: ReplayResult | None = None) -> None:
    """Write a replay, and a second one over the same bag if it is given; show progress.

    Entities are `camera`, `linear.x/recorded` and the like per axis, `step_ms`, `gate`, `instruction` and `events`; the
    timeline `stamp` is the capture time of each image.

    Raises:
        RerunMissingError: rerun-sdk is not installed.
    """
    require_rerun()
    import rerun
    from tqdm import tqdm

    recording = rerun.RecordingStream("mobile_vla_replay")
    # The file grows while it is written: it gets its final name once it is whole.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        unfinished = Path(folder) / path.name
        recording.save(unfinished, default_blueprint=_blueprint(result))
        recording.log("made_by", rerun.TextDocument(result.command_line), static=True)
        for frame in tqdm(result.frames, "commands", unit="frame", delay=1, disable=None):
            _log_frame(recording, frame)
        for frame in () if against is None else against.frames:
            recording.set_time(_TIMELINE, timestamp=frame.stamp_s)
            _log_velocity(recording, "against", frame.command)
        pictures = tqdm(
            result.frames_jpeg(_PICTURE_WIDTH_PX, range(len(result.frames))),
            "pictures",
            len(result.frames),
            unit="frame",
            delay=1,
            disable=None,
        )
        for index, jpeg in pictures:
            recording.set_time(_TIMELINE, timestamp=result.frames[index].stamp_s)
            recording.log("camera", rerun.EncodedImage(contents=jpeg, media_type="image/jpeg"))
        recording.disconnect()
        unfinished.replace(path)


def _blueprint(result: ReplayResult) -> Any:
    """Return the first layout of the viewer: the camera at the left, a plot for each axis at the right."""
    from rerun import blueprint

    plots = [
        blueprint.TimeSeriesView(origin=axis, name=f"{axis} ({unit})")
        for axis, unit in zip(AXES, AXIS_UNITS)
        if axis in result.policy.action_axes
    ]
    return blueprint.Blueprint(
        blueprint.Horizontal(
            blueprint.Vertical(
                blueprint.Spatial2DView(origin="camera", name="camera"),
                blueprint.TextLogView(name="gate, instruction, events"),
                row_shares=[3, 1],
            ),
            blueprint.Vertical(*plots, blueprint.TimeSeriesView(origin="step_ms", name="policy step (ms)")),
        )
    )


def _log_frame(recording: Any, frame: ReplayFrame) -> None:
    import rerun

    recording.set_time(_TIMELINE, timestamp=frame.stamp_s)
    _log_velocity(recording, "recorded", frame.recorded)
    _log_velocity(recording, "predicted", frame.command)
    _log_velocity(recording, "gated", frame.gated)
    if frame.latency_s is not None:
        recording.log("step_ms", rerun.Scalars(1e3 * frame.latency_s))
    recording.log("gate", rerun.TextLog(frame.reason))
    recording.log("instruction", rerun.TextLog(frame.instruction))
    for event in filter(None, (frame.drop, frame.reset and f"LSTM state reset: {frame.reset}")):
        recording.log("events", rerun.TextLog(event, level="WARN"))


def _log_velocity(recording: Any, name: str, velocity: Velocity | None) -> None:
    import rerun

    if velocity is not None:
        for axis, value in zip(AXES, velocity):
            recording.log(f"{axis}/{name}", rerun.Scalars(value))
