"""The drill's catalogue: every fault with how it is injected, lifted, answered and recovered from.

Here is what the worker, the camera and the operator do wrong; drill_node_faults.py has what happens to the node itself.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

from mobile_vla_inference.control.gate import Reason
from mobile_vla_inference.tools.drill import node_faults as drill_node_faults
from mobile_vla_inference.tools.drill.judge import Onset
from mobile_vla_inference.tools.drill.rig import (
    EVENT_LIMIT_S,
    IMAGE_TIMEOUT_S,
    INSTRUCTION,
    RESUME_WITHIN_S,
    STEP_TIMEOUT_S,
    DrillError,
    Fault,
    Recovery,
    Rig,
    leave,
)
from mobile_vla_inference.tools.drill.worker import STEP_FAULTS

#: Numbers of lifecycle_msgs/msg/Transition.
_DEACTIVATE = 4


# ---- the worker ------------------------------------------------------------------------------------------------------


def _hang_worker(rig: Rig) -> Onset:
    sent_s = rig.signal_worker(signal.SIGSTOP)
    return Onset(rig.panel.finished_s, STEP_TIMEOUT_S, sent_s)


def _fail_step(kind: str, rig: Rig) -> Onset:
    asked_s = time.monotonic()
    rig.panel.fault = list(STEP_FAULTS).index(kind)
    if not rig.graph.wait_for(lambda: rig.panel.fired_s >= asked_s, EVENT_LIMIT_S):
        raise DrillError(f"no step was made within {EVENT_LIMIT_S:g} s that could fail with {kind}")
    return Onset(rig.panel.fired_s)


def _worker_fault(name: str, injection: str, inject: Callable[[Rig], Onset], **others: Any) -> Fault:
    reasons = others.pop("reasons", (Reason.WORKER_FAULT, Reason.WORKER_NOT_READY))
    return Fault(name, injection, inject, Rig.await_another_worker, reasons, Recovery.AFTER_ENABLE, **others)


def _step_fault(kind: str, injection: str, **others: Any) -> Fault:
    return _worker_fault(f"step_{kind}", injection, partial(_fail_step, kind), **others)


def _bad_action(kind: str, injection: str) -> Fault:
    return Fault(
        f"action_{kind}",
        injection,
        partial(_fail_step, kind),
        leave,
        (Reason.ACTION_NOT_FINITE,),
        Recovery.AFTER_ENABLE,
    )


# ---- the images ------------------------------------------------------------------------------------------------------


def _spoil_images(change: Callable[[Any], None], rig: Rig) -> Onset:
    return Onset(rig.graph.camera.spoil(change))


def _spoil_pixels(change: Callable[[Any], None], rig: Rig) -> Onset:
    """Spoil what is only seen when a step is due and its frame is converted."""
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
    """Write 8000 x 6000 where the frame header tells the size."""
    position = message.data.tobytes().index(_JPEG_SIZE) + len(_JPEG_SIZE)
    for offset, value in enumerate((6000).to_bytes(2, "big") + (8000).to_bytes(2, "big")):
        message.data[position + offset] = value


def _break_jpeg_tables(message: Any) -> None:
    """Make every Huffman table impossible; header and end stay whole."""
    data = message.data.tobytes()
    position = data.find(_JPEG_TABLE)
    while position >= 0:
        for offset in range(16):
            message.data[position + 5 + offset] = 0xFF
        position = data.find(_JPEG_TABLE, position + 2)


def _lose_jpeg_bytes(message: Any) -> None:
    """Take a third out of the middle; header and end stay whole, and most decoders go on in grey."""
    data = message.data.tobytes()
    message.data = data[: len(data) // 3] + data[2 * len(data) // 3 :]


def _image_fault(name: str, injection: str, change: Callable[[Any], None], **others: Any) -> Fault:
    inject = partial(others.pop("spoil", _spoil_images), change)
    return Fault(name, injection, inject, Rig.good_images, (Reason.IMAGE_REFUSED,), **others)


def _add_camera(rig: Rig) -> Onset:
    return Onset(rig.graph.add_second_camera())


# ---- the instruction -------------------------------------------------------------------------------------------------


def _instruct(rig: Rig) -> None:
    rig.graph.instruct(INSTRUCTION)


def _send_instruction(text: str, rig: Rig) -> Onset:
    return Onset(rig.graph.instruct(text))


def _no_instruction(rig: Rig) -> Onset:
    graph = rig.graph
    if not graph.wait_for(lambda: graph.reason == Reason.NO_INSTRUCTION.value, EVENT_LIMIT_S):
        raise DrillError(f"the node waits for something else than an instruction: {graph.reason}")
    return Onset(time.monotonic())


def _end_flood(rig: Rig) -> None:
    rig.graph.end_flood()
    rig.graph.instruct(INSTRUCTION)


def _instruction_fault(name: str, injection: str, inject: Callable[[Rig], Onset], **others: Any) -> Fault:
    return Fault(name, injection, inject, _instruct, (Reason.NO_INSTRUCTION,), **others)


# ---- the operator ----------------------------------------------------------------------------------------------------


def _release_stop(rig: Rig) -> None:
    rig.graph.stop(False)


def _deactivate_in_step(rig: Rig) -> Onset:
    rig.await_step(max(time.monotonic(), rig.panel.finished_s))
    return Onset(rig.graph.change_state(_DEACTIVATE))


def _refuse_nan(rig: Rig) -> Onset:
    """Set parameters to NaN, which has to be refused; then see that the image timeout is in force as before."""
    for name in ("image_timeout_s", "step_timeout_s", "max_linear_x_mps", "max_angular_z_radps", "publish_rate_hz"):
        answer = rig.graph.set_parameter(name, math.nan)
        if answer.successful or name not in answer.reason:
            raise DrillError(f"parameter {name} was set to NaN: {answer.reason or 'accepted'}, expected a refusal")
    return rig.stop_images()


#: The order is the order of a round: what can only be seen in a fresh node is first, what ends it is last.
CATALOGUE = (
    Fault(
        "instruction_absent",
        "images, but nobody has told an instruction",
        _no_instruction,
        _instruct,
        (Reason.NO_INSTRUCTION,),
        hold_s=1.0,
        from_rest=True,
    ),
    _instruction_fault("instruction_empty", "an instruction of spaces", partial(_send_instruction, "  ")),
    _instruction_fault("instruction_1mb", "an instruction of 1 MB", partial(_send_instruction, "go " * 350_000)),
    _instruction_fault(
        "instruction_not_utf8",
        "bytes that are not UTF-8, on the wire",
        lambda rig: Onset(rig.graph.instruct_raw(b"go \xff\xfe\xc3(")),
    ),
    _instruction_fault(
        "instruction_control",
        "an instruction of control characters",
        partial(_send_instruction, "\x01\x07\t\r\n\x1b\x7f\u200b"),
    ),
    Fault(
        "instruction_flood",
        "1000 different instructions a second, for a second",
        lambda rig: Onset(rig.graph.flood(1000.0, lambda count: rig.graph.instruct(f"go to place {count}"))),
        _end_flood,
        (Reason.NO_STEP,),
        step_s=0.0,
        hold_s=1.0,
    ),
    Fault(
        "images_stop", "the camera falls silent for a second", Rig.stop_images, Rig.good_images, (Reason.IMAGE_STALE,)
    ),
    Fault(
        "images_stop_long",
        "the camera falls silent for longer than resume_within_s",
        Rig.stop_images,
        Rig.good_images,
        (Reason.IMAGE_STALE,),
        Recovery.AFTER_ENABLE,
        hold_s=RESUME_WITHIN_S,
    ),
    _image_fault("stamps_old", "images stamped 10 s ago", partial(_shift_stamp, -10.0)),
    _image_fault("stamps_future", "images stamped 10 s ahead", partial(_shift_stamp, 10.0)),
    Fault("stamps_repeated", "images with one stamp", _repeat_stamps, Rig.good_images, (Reason.IMAGE_STALE,)),
    Fault(
        "time_backwards",
        "stamps jump back by 0.25 s, as in a bag that loops",
        partial(_spoil_images, partial(_shift_stamp, -0.25)),
        Rig.good_images,
        (Reason.NO_STEP,),
        momentary=True,
        step_s=0.0,
    ),
    _image_fault("encoding_wrong", "rgb8 pixels that claim to be rgba8", partial(_set_fields, {"encoding": "rgba8"})),
    _image_fault(
        "encoding_unknown",
        "an encoding that does not exist",
        partial(_set_fields, {"encoding": "rgb7"}),
        # cv_bridge, where there is one, is asked when the frame is converted.
        spoil=_spoil_images if find_spec("cv_bridge") is None else _spoil_pixels,
    ),
    _image_fault("step_small", "a step shorter than a row", partial(_set_fields, {"step": 100})),
    _image_fault("data_short", "half of the pixels", _halve_data),
    _image_fault("size_0x0", "an image of 0 x 0 pixels", partial(_set_fields, {"width": 0, "height": 0})),
    _image_fault(
        "size_8000x6000",
        "a header of 8000 x 6000 pixels",
        partial(_set_fields, {"width": 8000, "height": 6000, "step": 24000}),
    ),
    Fault(
        "two_cameras",
        "a second publisher on the image topic",
        _add_camera,
        lambda rig: rig.graph.remove_second_camera(),
        (Reason.IMAGE_AMBIGUOUS,),
    ),
    Fault(
        "disable",
        "~/enable false",
        lambda rig: Onset(rig.graph.enable(False)),
        leave,
        (Reason.DISABLED,),
        Recovery.AFTER_ENABLE,
    ),
    Fault(
        "stop_topic",
        "true on the stop topic",
        lambda rig: Onset(rig.graph.stop(True)),
        _release_stop,
        (Reason.STOP_REQUESTED,),
        Recovery.AFTER_ENABLE,
    ),
    Fault(
        "reset",
        "~/reset at full speed",
        lambda rig: Onset(rig.graph.reset()),
        leave,
        (Reason.NO_STEP,),
        momentary=True,
        step_s=0.0,
    ),
    Fault(
        "deactivate",
        "lifecycle deactivate in the middle of a step",
        _deactivate_in_step,
        leave,
        (Reason.INACTIVE,),
        Recovery.AFTER_ACTIVATE,
    ),
    Fault(
        "parameter_nan",
        "five parameters set to NaN, each refused by name; then the camera falls silent",
        _refuse_nan,
        Rig.good_images,
        (Reason.IMAGE_STALE,),
    ),
    _bad_action("nan", "the policy's action is NaN"),
    _bad_action("infinity", "the policy's action is infinite"),
    _worker_fault("worker_killed", "SIGKILL to the worker", Rig.kill_worker),
    _step_fault("exception", "RuntimeError in a policy step"),
    *drill_node_faults.ON_A_RUNNING_NODE,
    Fault(
        "node_sigterm",
        "SIGTERM to the node",
        drill_node_faults.terminate,
        leave,
        (Reason.INACTIVE,),
        Recovery.NEVER,
        hold_s=0.0,
    ),
    *drill_node_faults.THAT_END_IT,
    _image_fault("jpeg_cut_off", "half of a JPEG", _halve_data, transport="compressed"),
    _image_fault("jpeg_8000x6000", "a JPEG header of 8000 x 6000 pixels", _claim_huge_jpeg, transport="compressed"),
    _image_fault(
        "jpeg_corrupt",
        "a JPEG with broken tables: seen when it is decoded",
        _break_jpeg_tables,
        transport="compressed",
        spoil=_spoil_pixels,
    ),
    _image_fault(
        "jpeg_lost_bytes",
        "a JPEG that lost its middle third",
        _lose_jpeg_bytes,
        transport="compressed",
        spoil=_spoil_pixels,
    ),
    _image_fault(
        "format_depth",
        "a picture that says it is a depth image",
        partial(_set_fields, {"format": "16UC1; compressedDepth png"}),
        transport="compressed",
    ),
    _worker_fault(
        "worker_hung",
        "SIGSTOP to the worker",
        _hang_worker,
        reasons=(Reason.STEP_STALE, Reason.WORKER_FAULT),
        transport="compressed",
    ),
    _step_fault("gpu_memory_error", "torch.OutOfMemoryError in a policy step", transport="compressed"),
    _step_fault("memory_error", "MemoryError in a policy step", transport="compressed"),
)
