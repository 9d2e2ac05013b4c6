"""The drill's faults of the camera: silence, wrong stamps, images that can't be used, and a second camera."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

from mobile_vla_inference.control.gate import Reason
from mobile_vla_inference.tools.drill.judge import Onset
from mobile_vla_inference.tools.drill.rig import IMAGE_TIMEOUT_S, RESUME_WITHIN_S, Fault, Recovery, Rig


def _spoil_images(change: Callable[[Any], None], rig: Rig) -> Onset:
    return Onset(rig.graph.camera.spoil(change))


def _spoil_pixels(change: Callable[[Any], None], rig: Rig) -> Onset:
    """Spoil the pixels, which is noticed when the frame is converted for a step."""
    return Onset(rig.graph.camera.spoil(change), rig.panel.step_period_s)


def _repeat_stamps(rig: Rig) -> Onset:
    camera = rig.graph.camera
    camera.stop()
    stamp, since_s = camera.last_good_stamp, camera.last_good_s
    spoilt_s = camera.spoil(lambda message: setattr(message.header, "stamp", stamp))
    return Onset(since_s, IMAGE_TIMEOUT_S, spoilt_s)


def _shift_stamp(offset_s: float, message: Any) -> None:
    stamp = message.header.stamp
    total_ns = stamp.sec * 10**9 + stamp.nanosec + round(offset_s * 1e9)
    stamp.sec, stamp.nanosec = divmod(total_ns, 10**9)


def _set_fields(fields: dict[str, Any], message: Any) -> None:
    for name, value in fields.items():
        setattr(message, name, value)


def _halve_data(message: Any) -> None:
    message.data = message.data[: len(message.data) // 2]


_JPEG_SIZE = b"\xff\xc0\x00\x11\x08"
_JPEG_TABLE = b"\xff\xc4"


def _claim_huge_jpeg(message: Any) -> None:
    """Write 8000 x 6000 as the size in the frame header."""
    position = message.data.tobytes().index(_JPEG_SIZE) + len(_JPEG_SIZE)
    for offset, value in enumerate((6000).to_bytes(2, "big") + (8000).to_bytes(2, "big")):
        message.data[position + offset] = value


def _break_jpeg_tables(message: Any) -> None:
    """Make every Huffman table invalid; header and end stay valid."""
    data = message.data.tobytes()
    position = data.find(_JPEG_TABLE)
    while position >= 0:
        for offset in range(16):
            message.data[position + 5 + offset] = 0xFF
        position = data.find(_JPEG_TABLE, position + 2)


def _lose_jpeg_bytes(message: Any) -> None:
    """Remove the middle third; header and end stay valid, and most decoders fill up with grey."""
    data = message.data.tobytes()
    message.data = data[: len(data) // 3] + data[2 * len(data) // 3 :]


def _image_fault(name: str, injection: str, change: Callable[[Any], None], **others: Any) -> Fault:
    inject = partial(others.pop("spoil", _spoil_images), change)
    return Fault(name, injection, inject, Rig.good_images, (Reason.IMAGE_REFUSED,), **others)


def _add_camera(rig: Rig) -> Onset:
    return Onset(rig.graph.add_second_camera())


FAULTS = (
    Fault("images_stop", "the camera stops for a second", Rig.stop_images, Rig.good_images, (Reason.IMAGE_STALE,)),
    Fault(
        "images_stop_long",
        "the camera stops for longer than resume_within_s",
        Rig.stop_images,
        Rig.good_images,
        (Reason.IMAGE_STALE,),
        Recovery.AFTER_ENABLE,
        hold_s=RESUME_WITHIN_S,
    ),
    _image_fault("stamps_old", "images stamped 10 s ago", partial(_shift_stamp, -10.0)),
    _image_fault("stamps_future", "images stamped 10 s in the future", partial(_shift_stamp, 10.0)),
    Fault(
        "stamps_repeated", "images that all have the same stamp", _repeat_stamps, Rig.good_images, (Reason.IMAGE_STALE,)
    ),
    Fault(
        "time_backwards",
        "stamps jump back by 0.25 s, as in a bag that loops",
        partial(_spoil_images, partial(_shift_stamp, -0.25)),
        Rig.good_images,
        (Reason.NO_STEP,),
        momentary=True,
        step_s=0.0,
    ),
    _image_fault("encoding_wrong", "rgb8 pixels with the encoding rgba8", partial(_set_fields, {"encoding": "rgba8"})),
    _image_fault(
        "encoding_unknown",
        "an encoding that does not exist",
        partial(_set_fields, {"encoding": "rgb7"}),
        # cv_bridge, if installed, notices it when the frame is converted.
        spoil=_spoil_images if find_spec("cv_bridge") is None else _spoil_pixels,
    ),
    _image_fault("step_small", "an image step that is shorter than a row", partial(_set_fields, {"step": 100})),
    _image_fault("data_short", "an image with half of its pixels", _halve_data),
    _image_fault("size_0x0", "an image of 0 x 0 pixels", partial(_set_fields, {"width": 0, "height": 0})),
    _image_fault(
        "size_8000x6000",
        "an image header of 8000 x 6000 pixels",
        partial(_set_fields, {"width": 8000, "height": 6000, "step": 24000}),
    ),
    Fault(
        "two_cameras",
        "a second publisher on the image topic",
        _add_camera,
        lambda rig: rig.graph.remove_second_camera(),
        (Reason.IMAGE_AMBIGUOUS,),
    ),
)

COMPRESSED_FAULTS = (
    _image_fault("jpeg_cut_off", "the first half of a JPEG", _halve_data, transport="compressed"),
    _image_fault("jpeg_8000x6000", "a JPEG header of 8000 x 6000 pixels", _claim_huge_jpeg, transport="compressed"),
    _image_fault(
        "jpeg_corrupt",
        "a JPEG with invalid tables, detected when it is decoded",
        _break_jpeg_tables,
        transport="compressed",
        spoil=_spoil_pixels,
    ),
    _image_fault(
        "jpeg_lost_bytes",
        "a JPEG without its middle third",
        _lose_jpeg_bytes,
        transport="compressed",
        spoil=_spoil_pixels,
    ),
    _image_fault(
        "format_depth",
        "a compressed image with the format of a depth image",
        partial(_set_fields, {"format": "16UC1; compressedDepth png"}),
        transport="compressed",
    ),
)
