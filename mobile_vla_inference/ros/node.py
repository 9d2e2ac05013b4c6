"""vla_node: camera images and an instruction in, velocity commands out.

Wiring only. Callbacks store; the policy runs in the worker process (control/worker.py); what reaches the base is
decided by the gate (control/gate.py) alone, and published from exactly one place, `_publish_decision`.

Nothing that may block stands between a stop and its zero. The executor's thread and the pulse's only decide and publish
velocities; logs and reports go through a reporter (control/reporter.py), questions to the graph through a thread of
their own, and the process's output through a pump (control/output_pump.py). The main thread watches the others.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from geometry_msgs.msg import Twist, TwistStamped
from rcl_interfaces.msg import SetParametersResult
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup, ReentrantCallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.duration import Duration
from rclpy.executors import ExternalShutdownException
from rclpy.lifecycle import LifecycleNodeMixin, LifecycleState, TransitionCallbackReturn
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Bool, String
from std_srvs.srv import SetBool, Trigger

from mobile_vla_inference.action import STANDSTILL, ActionMapping, VelocityCommand
from mobile_vla_inference.control.clock import steady_s
from mobile_vla_inference.control.gate import ADVICE, STALL_S, CommandGate, Decision, Reason
from mobile_vla_inference.control.leave import LeaveRequest
from mobile_vla_inference.control.mailbox import Frame, WorkerCounters
from mobile_vla_inference.control.memory import MemoryProbe
from mobile_vla_inference.control.output_pump import OutputPump
from mobile_vla_inference.control.overlay import draw_command
from mobile_vla_inference.control.pulse import Pulse
from mobile_vla_inference.control.reporter import Reporter
from mobile_vla_inference.control.worker import PolicyWorker
from mobile_vla_inference.control.worker_events import (
    FrameRefused,
    InstructionRefused,
    StepFailed,
    StepResult,
    WorkerChanged,
    WorkerEvent,
    WorkerFault,
    WorkerState,
)
from mobile_vla_inference.control.worker_options import WORKER_MODULE, WorkerOptions
from mobile_vla_inference.errors import FrameError, InstructionError, MobileVlaError
from mobile_vla_inference.frames import reduce_frame
from mobile_vla_inference.instructions import check_instruction
from mobile_vla_inference.ros import conversions
from mobile_vla_inference.ros.clock import missing_clock
from mobile_vla_inference.ros.diagnostics import ERROR, OK, WARN, diagnostic_status
from mobile_vla_inference.ros.executor import NodeExecutor, RequestError
from mobile_vla_inference.ros.graph import GraphWatch
from mobile_vla_inference.ros.inputs import EveryPublisher
from mobile_vla_inference.ros.overrides import refuse_unknown_parameters
from mobile_vla_inference.ros.parameters import ParameterError, declare_parameters
from mobile_vla_inference.ros.startup import start_ros
from mobile_vla_inference.units import percentiles

NODE_NAME = "vla_node"

_DIAGNOSTICS_PERIOD_S = 1.0
#: Deep enough that a listener who is busy for a while misses no step.
_STEP_QOS = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)
#: What the diagnostics tell of the loaded policy, by its own names (VlaPolicy.describe).
_POLICY_FACTS = ("checkpoint", "variant", "parameters", "dtype", "quantization", "device", "engine", "engine_fallback")
#: Steps that the latency percentiles look back on.
_LATENCY_WINDOW = 200
#: The last zero is repeated this long before the node goes, so that it arrives whatever the transport does.
_FAREWELL_S = 0.1
#: The gate is asked this often at least, whatever the publish rate.
_SAFETY_PERIOD_S = 0.05
#: While standstill is held it is published this often at least.
_ZERO_PERIOD_S = 0.1
#: How often the executor shows that it runs callbacks, and the main thread looks at the others.
_WATCH_PERIOD_S = 0.1
#: Callbacks that come so late have waited for each other, and are handled within so long after.
_EXECUTOR_LATE_S, _CATCH_UP_S = 0.3, 1.0
#: A thread that the main thread has not seen at work for so long will not come back: the node leaves.
_THREAD_LIMIT_S = 2.0
#: How long a leaving node waits for the motion lock, which a thread that hangs may hold.
_LOCK_LIMIT_S = 0.05
#: How long a leaving node may take in all once its last zero is out.
_LEAVE_LIMIT_S = 15.0
#: How long a leaving process waits for whoever reads its output.
_OUTPUT_LIMIT_S = 0.5


@dataclass(frozen=True)
class _ImageFormat:
    """How one image_transport arrives: topic, message type, and what checks and converts a message."""

    topic: str
    type: type
    type_name: str
    check: Callable[[Any], None]
    convert: Callable[[Any], np.ndarray]


_RAW = _ImageFormat("image_raw", Image, "sensor_msgs/msg/Image", conversions.check_image, conversions.image_to_rgb)
_COMPRESSED = _ImageFormat(
    "image_raw/compressed",
    CompressedImage,
    "sensor_msgs/msg/CompressedImage",
    conversions.check_compressed,
    conversions.compressed_to_rgb,
)


class VlaNode(LifecycleNodeMixin, Node):
    """The robot's node. Lifecycle: configure loads the policy, activate allows motion, deactivate stops first."""

    def __init__(self, worker_module: str = WORKER_MODULE) -> None:
        """Declare the interface; raise MobileVlaError for a bad or unknown parameter.

        Args:
            worker_module: what runs as the policy worker; `mobile_vla drill` gives one that fails on demand.
        """
        self._threads: list[Pulse] = []  # rclpy destroys what failed to be made, too
        self.leave = LeaveRequest()
        self.failure: BaseException | None = None
        self.output = OutputPump()
        self._reporter = Reporter()
        self._said_s: dict[str, float] = {}
        Node.__init__(self, NODE_NAME)
        self._worker_module = worker_module
        # Transitions block their thread while the worker loads: NodeExecutor runs this group apart.
        self.transitions = ReentrantCallbackGroup()
        LifecycleNodeMixin.__init__(self, callback_group=self.transitions)
        self._config = declare_parameters(self)
        refuse_unknown_parameters(self)
        self.add_on_set_parameters_callback(self._on_set_parameters)
        self._gate = CommandGate(self._config.gate_limits())
        # Guards the gate and the publisher together: no command can overtake a later standstill.
        self._motion_lock = threading.Lock()
        self._worker: PolicyWorker | None = None
        self._mapping: ActionMapping | None = None
        self._instruction = ""
        self._instruction_error = ""
        self._image_error = ""
        self._last_stamp_s = -math.inf
        self._image_received_s = -math.inf
        self._image_refused_s = -math.inf
        self._images_received = 0
        self._images_reported = 0
        self._newest_image: tuple[Callable, Any] | None = None
        self._decision = Decision(None, Reason.INACTIVE)
        self._commands_published = 0
        self._beats = 0
        self._executor_seen_s = steady_s()
        self._caught_up_from_s = self._stopped_s = -math.inf
        self._step_s: deque[float] = deque(maxlen=_LATENCY_WINDOW)
        self._reaction_s: deque[float] = deque(maxlen=_LATENCY_WINDOW)
        self._memory_probe = MemoryProbe()
        self._debug_image_waits = False
        self._create_interface()
        # No callback of the executor: however many images and calls wait, a command is due.
        self._pulse = Pulse(self._beat, _beat_period_s(self._config.publish_rate_hz), self.fail)
        self._graph_pulse = Pulse(self._look_at_graph, GraphWatch.PERIOD_S, self.fail, name="graph")
        self._threads = [self._pulse, self._graph_pulse]

    def _create_interface(self) -> None:
        """Create topics, services and timers, all in one mutually exclusive group; timers run on the steady clock."""
        parameters = self._config
        group = MutuallyExclusiveCallbackGroup()
        reliable = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
        latched = QoSProfile(
            depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL
        )
        image_qos = QoSProfile(depth=1, reliability=ReliabilityPolicy[parameters.image_reliability.upper()])
        steady = Clock(clock_type=ClockType.STEADY_TIME)

        self._command_publisher = self.create_publisher(
            TwistStamped if parameters.stamped else Twist, "cmd_vel", reliable
        )
        self._diagnostics_publisher = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._status_publisher = self.create_publisher(DiagnosticStatus, "~/status", latched)
        self._step_publisher = self.create_publisher(DiagnosticStatus, "~/step", _STEP_QOS)

        self._debug_publisher = self.create_publisher(Image, "~/debug_image", image_qos)
        self._format = _COMPRESSED if parameters.image_transport == "compressed" else _RAW
        self._image_subscription = self.create_subscription(
            self._format.type, self._format.topic, self._on_image, image_qos, callback_group=group
        )
        self._instructions = EveryPublisher(self, String, "instruction", self._on_instruction, group)
        self._stops = EveryPublisher(self, Bool, "stop", self._on_stop, group, self._on_replayed_stop)
        self.create_service(Trigger, "~/reset", self._on_reset, callback_group=group)
        self.create_service(SetBool, "~/enable", self._on_enable, callback_group=group)

        self._worker_news = self.create_guard_condition(self._on_worker_news, callback_group=group)
        diagnose = partial(self._reporter.post, self._publish_diagnostics)
        self.create_timer(_DIAGNOSTICS_PERIOD_S, diagnose, callback_group=group, clock=steady)
        self.create_timer(_WATCH_PERIOD_S, self._show_executor, callback_group=group, clock=steady)
        self._graph = GraphWatch(
            self,
            image=(self._image_subscription.topic_name, self._format.type_name, parameters.image_reliability),
            inputs=(self._stops, self._instructions),
            cmd_vel=(self._command_publisher.topic_name, "TwistStamped" if parameters.stamped else "Twist"),
            changed=self._publish_decision,
        )

    @property
    def autostart(self) -> bool:
        """Whether to configure and activate without being asked."""
        return self._config.autostart

    # ---- lifecycle -----------------------------------------------------------------------------------------------

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load and warm up the policy in the worker process; FAILURE with the loader's sentence where it can't."""
        parameters = self._config
        if not parameters.checkpoint:
            self._say("error", "parameter checkpoint is empty, expected a file or folder; set checkpoint:=PATH")
            return TransitionCallbackReturn.FAILURE
        options = WorkerOptions(
            policy={
                "path": parameters.checkpoint,
                "processors": parameters.processors or None,
                "device": parameters.device,
                "dtype": parameters.dtype,
                "engine": parameters.engine,
                "force": parameters.force_load,
            },
            load_timeout_s=parameters.load_timeout_s,
            step_timeout_s=parameters.step_timeout_s,
            state_gap_s=parameters.state_gap_s,
            max_restarts=parameters.max_restarts,
            module=self._worker_module,
        )
        with self._motion_lock:
            self._gate.worker_changed = False
        worker = self._worker = PolicyWorker(options, self._worker_news.trigger, self.fail)
        worker.set_instruction(self._instruction)
        worker.start()
        worker.wait_until_loaded()
        if worker.state is not WorkerState.READY:
            return self._fail_configure(worker.last_error or "the worker was stopped")
        facts = worker.facts
        try:
            with self._motion_lock:  # parameters may be set meanwhile
                self._mapping = self._config.action_mapping(facts)
        except ParameterError as error:
            return self._fail_configure(str(error))
        with self._motion_lock:
            self._gate.settings_confirmed = not facts.assumed_settings
            self._gate.worker_ready = worker.state is WorkerState.READY  # it may have died meanwhile
        for warning in filter(None, (*facts.warnings, facts.engine_fallback)):
            self._say("warning", warning)
        self._say(
            "info",
            f"policy ready: {facts.variant}, {facts.parameters:,} parameters, {facts.dtype} on {facts.device}",
        )
        return TransitionCallbackReturn.SUCCESS

    def _fail_configure(self, sentence: str) -> TransitionCallbackReturn:
        self._say("error", f"configure failed: {sentence}")
        self._release_worker()
        return TransitionCallbackReturn.FAILURE

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Allow motion; FAILURE while a setting is only assumed, because a guess must not reach a wheel."""
        assumed = self._worker.facts.assumed_settings
        if assumed:
            self._say(
                "error",
                f"activation refused: settings {', '.join(assumed)} are assumed, expected confirmed ones; "
                f"{ADVICE[Reason.SETTINGS_ASSUMED]}",
            )
            return TransitionCallbackReturn.FAILURE
        if self.leave.is_set():
            self._say("error", "activation refused: the node is leaving, expected one that runs; start it again")
            return TransitionCallbackReturn.FAILURE
        with self._motion_lock:
            self._gate.forget_action()
            self._gate.active = True
        self._worker.allow_steps(True)
        return TransitionCallbackReturn.SUCCESS

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Publish standstill, then forbid motion."""
        self._stop_motion()
        return TransitionCallbackReturn.SUCCESS

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """End the worker process."""
        self._release_worker()
        return TransitionCallbackReturn.SUCCESS

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Publish standstill and end the worker process."""
        self.close()
        return TransitionCallbackReturn.SUCCESS

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Publish standstill and end the worker process; the node can be configured again."""
        self.close()
        return TransitionCallbackReturn.SUCCESS

    def destroy_node(self) -> None:
        """End the node's threads, then the node."""
        for thread in self._threads:
            thread.close()
        self._reporter.close(_FAREWELL_S)
        super().destroy_node()

    def close(self) -> None:
        """Stop the robot, then end the worker process; safe to call more than once."""
        self._stop_motion()
        self._release_worker()

    def farewell(self) -> None:
        """Forbid motion and publish standstill until it has surely arrived: the first thing that a leaving node does.

        Not even a thread that hangs with the motion lock prevents it.
        """
        deadline_s = time.monotonic() + _FAREWELL_S
        while True:
            with self._motion_lock_in_time(), contextlib.suppress(Exception):  # what fails now may work the next time
                self._gate.halt()
                self._publish_command(STANDSTILL)
            if time.monotonic() >= deadline_s:
                break
            time.sleep(_FAREWELL_S / 5)
        with contextlib.suppress(Exception):
            self._command_publisher.wait_for_all_acked(Duration(seconds=_FAREWELL_S))

    @contextlib.contextmanager
    def _motion_lock_in_time(self) -> Iterator[None]:
        acquired = self._motion_lock.acquire(timeout=_LOCK_LIMIT_S)
        try:
            yield
        finally:
            if acquired:
                self._motion_lock.release()

    def _stop_motion(self) -> None:
        with self._motion_lock:
            was_active = self._gate.active
            self._gate.halt()
            if was_active:
                self._publish_command(STANDSTILL)
        if self._worker is not None:
            self._worker.allow_steps(False)

    # ---- the node's own threads ------------------------------------------------------------------------------------

    def fail(self, error: BaseException) -> None:
        """Have the node leave, with a standstill, because a part of it has failed; any thread may call this."""
        if not self.context.ok():
            return  # it is the end of the context that ends the threads
        if self.failure is None:
            self.failure = error
            sentence = f"a part of the node failed, it leaves: {type(error).__name__}: {error}"
            details = "".join(traceback.format_exception(type(error), error, error.__traceback__))
            self._reporter.post(lambda: print(f"{details}{NODE_NAME}: error: {sentence}", file=sys.stderr))
        self.leave.set()

    def watch(self) -> None:
        """Look after the other threads until the node has to leave; runs in the main thread."""
        looked_s = steady_s()
        while not self.leave.wait(_WATCH_PERIOD_S):
            now_s, before_s = steady_s(), looked_s
            looked_s = now_s
            if now_s - before_s > STALL_S:  # the whole process stood still: they have not had their chance
                time.sleep(_WATCH_PERIOD_S)
                continue
            for name, seen_s in (
                ("pulse", self._pulse.last_beat_s),
                ("graph", self._graph_pulse.last_beat_s),
                ("executor", self._executor_seen_s),
            ):
                if now_s - seen_s > _THREAD_LIMIT_S:
                    self.fail(RuntimeError(f"thread {name} has done nothing for {now_s - seen_s:.1f} s"))

    def _look_at_graph(self) -> None:
        """Look who is on the topics; the middleware may fail now and then while nodes come and go, but not for long."""
        try:
            self._graph.look()
        except Exception as error:
            if steady_s() - self._graph.looked_s > _THREAD_LIMIT_S:
                raise
            self._say_once(1.0, "graph", "warning", f"the graph can't be read now: {type(error).__name__}: {error}")

    def _show_executor(self) -> None:
        """Show that the executor runs callbacks; and stop the robot should the pulse, which looks at that, be late."""
        self._note_executor()
        if self._executor_seen_s - self._pulse.last_beat_s > STALL_S:
            self._publish_decision()

    def _note_executor(self) -> None:
        """Note that the executor runs a callback now, and whether it comes to it late."""
        now_s, before_s = steady_s(), self._executor_seen_s
        self._executor_seen_s = now_s
        if now_s - before_s > _EXECUTOR_LATE_S:
            self._caught_up_from_s = now_s

    def _beat(self) -> None:
        """Ask the gate, and publish what it says as often as is due."""
        self._beats += 1
        now_s = steady_s()
        with self._motion_lock:
            # Whoever can't hear a stop must not drive.
            self._gate.executor_stalled = now_s - self._executor_seen_s > STALL_S
            self._gate.clock_missing = bool(missing_clock(self.get_clock()))
        self._publish_decision(repeated=True)

    def report_error(self, text: str) -> None:
        """Log an error, in its turn; any thread may call this."""
        self._say("error", text)

    def _say(self, severity: str, text: str) -> None:
        """Log a sentence, in its turn."""
        self._reporter.post(lambda: _LOG[severity](self.get_logger(), text))

    def _say_once(self, every_s: float, kind: str, severity: str, text: str) -> None:
        """Log a sentence unless one of its kind was logged in the last `every_s` seconds."""
        now_s = steady_s()
        if now_s - self._said_s.get(kind, -math.inf) >= every_s:
            self._said_s[kind] = now_s
            self._say(severity, text)

    def _release_worker(self) -> None:
        with self._motion_lock:
            self._gate.worker_ready = False
            self._mapping = None
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()

    # ---- what comes in: store only ---------------------------------------------------------------------------------

    def _on_image(self, message: Any) -> None:
        now_s = steady_s()
        self._image_received_s = now_s
        self._images_received += 1
        stamp_s = message.header.stamp.sec + message.header.stamp.nanosec * 1e-9
        age_s = self.get_clock().now().nanoseconds * 1e-9 - stamp_s
        refusal = self._image_refusal(message, stamp_s, age_s)
        backwards, self._last_stamp_s = stamp_s < self._last_stamp_s, stamp_s
        if refusal is not None:
            self._refuse_image(*refusal)
            return
        captured_s = now_s - max(0.0, age_s)
        with self._motion_lock:
            self._gate.image_accepted(captured_s)
            if backwards:
                self._gate.forget_action()
        if backwards:  # a bag that loops: what the policy remembers, or computes just now, has not happened yet
            if self._worker is not None:
                self._worker.reset("time_backwards")
            self._publish_decision()
        self._newest_image = (self._format.convert, message)
        if self._worker is not None:
            self._worker.submit(Frame(stamp_s, now_s, captured_s, partial(_load_frame, self._format.convert, message)))

    def _refuse_image(self, cause: str, sentence: str) -> None:
        """Count an image that can't be used, and stand still unless it only repeats the one before."""
        self._image_error = sentence
        if self._worker is not None:
            self._worker.count_refused(cause)
        if cause != "repeated_stamp":
            with self._motion_lock:
                self._image_refused_s = steady_s()
                self._gate.image_refused()
            self._publish_decision()

    def _image_refusal(self, message: Any, stamp_s: float, age_s: float) -> tuple[str, str] | None:
        """Return the cause and a sentence where an image can't be used, else None."""
        try:
            self._format.check(message)
        except FrameError as error:
            return "unreadable", str(error)
        return self._stamp_refusal(stamp_s, age_s)

    def _stamp_refusal(self, stamp_s: float, age_s: float) -> tuple[str, str] | None:
        """Return the cause and a sentence where a stamp can't be trusted, else None."""
        limits = self._config
        if sentence := missing_clock(self.get_clock()):
            return "no_clock", sentence
        if stamp_s == 0.0:
            return (
                "no_stamp",
                "image has no stamp, expected the capture time in header.stamp; set it in the camera driver",
            )
        if stamp_s == self._last_stamp_s:
            return (
                "repeated_stamp",
                "image repeats the stamp of the one before, expected a newer one; check the camera",
            )
        if age_s > limits.image_timeout_s:
            return (
                "stale_stamp",
                f"image is {age_s:.3f} s old by its stamp, expected at most {limits.image_timeout_s:g} s; "
                "check the clocks, use_sim_time and the load",
            )
        if age_s < -limits.future_stamp_tolerance_s:
            return (
                "future_stamp",
                f"image is stamped {-age_s:.3f} s ahead, expected at most {limits.future_stamp_tolerance_s:g} s; "
                "check the clocks",
            )
        return None

    def _on_instruction(self, message: String) -> None:
        try:
            text, self._instruction_error = check_instruction(message.data), ""
        except InstructionError as error:
            text, self._instruction_error = "", str(error)
            self._say_once(0.2, "refusal", "warning", f"instruction refused: {error}")
        if text == self._instruction:
            return
        self._instruction = text
        with self._motion_lock:
            self._gate.instruction_changed(bool(text), steady_s())
        if self._worker is not None:
            self._worker.set_instruction(text)
        if self._decision.reason is Reason.MOVING:
            self._publish_decision()
        self._say_once(0.2, "instruction", "info", f"instruction: {text!r}")

    def _on_stop(self, message: Bool) -> None:
        self._note_executor()
        if message.data:
            self._stopped_s = steady_s()
        with self._motion_lock:
            self._gate.request_stop(message.data)
        self._publish_decision()

    def _on_replayed_stop(self, message: Bool) -> bool:
        """Heed a stop that was said before the node came; a release from then says nothing of now."""
        if message.data:
            self._on_stop(message)
        return message.data

    def _on_reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        with self._motion_lock:
            self._gate.forget_action()
        if self._worker is not None:
            self._worker.reset()
        self._publish_decision()
        response.success = self._worker is not None
        response.message = (
            "hidden state cleared" if response.success else "no policy is loaded; configure the node first"
        )
        return response

    def _on_enable(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        self._note_executor()
        # What arrived on the stop topic before this request was handled counts: a release before it, a stop after it.
        stopped = request.data and (
            any(message.data for message in self._stops.take_pending())
            # Of what waited while nothing was handled, nobody knows the order.
            or (self._stopped_s >= self._caught_up_from_s and steady_s() - self._caught_up_from_s < _CATCH_UP_S)
        )
        if not stopped:
            with self._motion_lock:
                self._gate.enable(request.data)
            if self._worker is not None:
                self._worker.reset("enable")
        decision = self._publish_decision()
        response.success = not stopped
        response.message = (
            "refused: a stop arrived while this request waited; call again when it is safe"
            if stopped
            else f"{decision.reason.value}: {ADVICE[decision.reason]}"
        )
        return response

    def _on_set_parameters(self, changes: list[Parameter]) -> SetParametersResult:
        own = {change.name: change.value for change in changes if hasattr(self._config, change.name)}
        try:
            config = self._config.changed(own)
            with self._motion_lock:
                if self._worker is not None and self._worker.facts is not None:
                    self._mapping = config.action_mapping(self._worker.facts)
                self._config = config
        except ParameterError as error:
            return SetParametersResult(successful=False, reason=str(error))
        if self._worker is not None:
            self._worker.step_timeout_s = config.step_timeout_s
        with self._motion_lock:
            self._gate.limits = config.gate_limits()
        self._pulse.period_s = _beat_period_s(config.publish_rate_hz)
        return SetParametersResult(successful=True)

    # ---- what the worker says ------------------------------------------------------------------------------------

    def _on_worker_news(self) -> None:
        worker = self._worker
        if worker is None:
            return
        with self._motion_lock:
            ready = worker.state is WorkerState.READY and self._mapping is not None
            was_ready, self._gate.worker_ready = self._gate.worker_ready, ready
        events = worker.take_events()
        for event in events:
            self._take_event(event)
        if events or (was_ready and not ready):
            self._publish_decision()
        if events:
            self._post_debug_image()
            self._publish_steps(events)

    def _take_event(self, event: WorkerEvent) -> None:
        with self._motion_lock:
            if isinstance(event, StepResult):
                if event.received_s <= self._image_refused_s or self._mapping is None:
                    return  # a good frame from before the bad one says nothing about what the camera sees now
                self._gate.action_ready(self._mapping.velocity(event.values), event.captured_s)
                self._step_s.append(event.step_s)
                self._reaction_s.append(steady_s() - event.received_s)
                self._image_error = ""
                return
            if isinstance(event, FrameRefused):
                self._image_refused_s = steady_s()
                self._gate.image_refused()
                self._image_error = event.message
            elif isinstance(event, InstructionRefused):
                self._gate.has_instruction = False
                self._instruction_error = event.message
            elif isinstance(event, StepFailed):
                self._gate.latch(Reason.ACTION_NOT_FINITE)
            elif isinstance(event, WorkerFault):
                self._gate.latch(Reason.WORKER_FAULT)
            elif isinstance(event, WorkerChanged):
                self._gate.worker_changed = True
                self._gate.forget_action()
        self._say_once(1.0, type(event).__name__, "error", event.message)

    # ---- what goes out -------------------------------------------------------------------------------------------

    def _publish_decision(self, repeated: bool = False) -> Decision:
        """Ask the gate and publish what it says: the only path to the base besides a final standstill.

        Args:
            repeated: nothing has happened, it is only time: unless the decision changes what the base does, it is
                published as often as `publish_rate_hz` says, standstill at 10 Hz or more.
        """
        graph = self._graph.seen
        with self._motion_lock:
            other_images = self._gate.image_sources(graph.image_publishers)
            if other_images:
                self._image_refused_s = steady_s()  # no step on an image from before counts any more
            self._gate.stop_unheard = bool(graph.stop_unheard)
            self._gate.cmd_vel_shared = self._config.exclusive_cmd_vel and graph.cmd_vel_publishers > 1
            decision = self._gate.decide(steady_s())
            changed, self._decision = decision.reason is not self._decision.reason, decision
            if decision.command is not None and (changed or not repeated or self._is_due(decision)):
                self._publish_command(decision.command)
            if changed:  # under the lock: the last reason that is told is the one in force
                self._reporter.post(partial(self._report_reason, decision.reason, self._gate_status()))
        worker = self._worker
        if other_images and worker is not None:
            worker.reset("image_sources")
        return decision

    def _is_due(self, decision: Decision) -> bool:
        """Whether a command is repeated at this beat; by the beats alone, so that no step puts a repetition off."""
        beat_period_s = _beat_period_s(self._config.publish_rate_hz)
        period_s = 1.0 / self._config.publish_rate_hz
        if decision.reason is not Reason.MOVING:
            period_s = min(period_s, _ZERO_PERIOD_S)
        return self._beats % max(1, math.floor(period_s / beat_period_s + 1e-6)) == 0

    def _publish_command(self, command: VelocityCommand) -> None:
        """Publish one velocity; the caller holds the motion lock."""
        twist = Twist()
        twist.linear.x, twist.linear.y, twist.angular.z = command.values
        if self._config.stamped:
            message = TwistStamped(twist=twist)
            message.header.stamp = self.get_clock().now().to_msg()
            message.header.frame_id = self._config.base_frame_id
        else:
            message = twist
        self._command_publisher.publish(message)
        self._commands_published += 1

    def _report_reason(self, reason: Reason, status: DiagnosticStatus) -> None:
        """Say on change, and only then, why the robot moves or stands; runs in the reporter."""
        self._status_publisher.publish(status)
        severity = "info" if reason is Reason.MOVING else "warning"
        _LOG[severity](self.get_logger(), f"{reason.value}: {ADVICE[reason]}")

    def _post_debug_image(self) -> None:
        """Have the decision drawn on the newest image; costs nothing while nobody subscribes."""
        if self._newest_image is None or self._debug_image_waits:
            return
        if self._debug_publisher.get_subscription_count() > 0:
            self._debug_image_waits = True
            self._reporter.post(partial(self._publish_debug_image, *self._newest_image, self._decision))

    def _publish_debug_image(self, convert: Callable, message: Any, decision: Decision) -> None:
        self._debug_image_waits = False
        try:
            frame = convert(message)
        except FrameError:
            return  # the diagnostics say why
        command = decision.command or STANDSTILL
        lines = (
            f"{decision.reason.value}  x {command.linear_x_mps:+.2f} m/s  y {command.linear_y_mps:+.2f} m/s  "
            f"turn {command.angular_z_radps:+.2f} rad/s",
            self._instruction or "(no instruction)",
        )
        picture = draw_command(frame, command, self._gate.limits.max_velocity, lines)
        header = message.header
        self._debug_publisher.publish(conversions.rgb_to_image(picture, Image, header.stamp, header.frame_id))

    def _publish_steps(self, events: list[WorkerEvent]) -> None:
        """Tell every step that counted, exactly: what `mobile_vla replay` needs to take the same ones."""
        decision = self._decision
        for event in events:
            if isinstance(event, StepResult):
                values = {
                    "stamp_s": repr(event.stamp_s),
                    "first_of_state": event.first_of_state,
                    "instruction": self._instruction,
                    "action": json.dumps(event.values),
                    "step_s": repr(event.step_s),
                    "command": json.dumps(decision.command.values if decision.command is not None else None),
                }
                status = self._status("step", OK, decision.reason.value, values)
                self._reporter.post(partial(self._step_publisher.publish, status))

    def _gate_status(self) -> DiagnosticStatus:
        decision = self._decision
        command = decision.command or STANDSTILL
        level = OK if decision.reason in (Reason.MOVING, Reason.INACTIVE, Reason.NO_INSTRUCTION) else WARN
        if self._gate.latched is not None or self._gate.worker_changed:
            level = ERROR
        graph = self._graph.seen
        if graph.warnings and level == OK:
            level = WARN
        values = {
            "reason": decision.reason.value,
            "latched": self._gate.latched is not None,
            "enabled": self._gate.enabled,
            "linear_x_mps": command.linear_x_mps,
            "linear_y_mps": command.linear_y_mps,
            "angular_z_radps": command.angular_z_radps,
            "commands_published": self._commands_published,
            "instruction": self._instruction,
            "instruction_error": self._instruction_error,
            "stop_publishers": graph.stop_publishers,
            "warnings": "; ".join(graph.warnings),
            "reports_dropped": self._reporter.dropped,
            "log_lines_dropped": self.output.dropped_lines,
        }
        message = "; ".join((f"{decision.reason.value}: {ADVICE[decision.reason]}", *graph.warnings))
        return self._status("gate", level, message, values)

    def _status(self, subject: str, level: bytes, message: str, values: dict) -> DiagnosticStatus:
        return diagnostic_status(self.get_fully_qualified_name().lstrip("/"), subject, level, message, values)

    def _publish_diagnostics(self) -> None:
        worker = self._worker
        counters = worker.counters() if worker is not None else WorkerCounters()
        array = DiagnosticArray(
            status=[
                self._gate_status(),
                self._policy_status(worker, counters),
                self._image_status(counters),
                self._memory_status(worker),
            ]
        )
        array.header.stamp = self.get_clock().now().to_msg()
        self._diagnostics_publisher.publish(array)

    def _policy_status(self, worker: PolicyWorker | None, counters: WorkerCounters) -> DiagnosticStatus:
        state = worker.state if worker is not None else WorkerState.STOPPED
        level = {WorkerState.READY: OK, WorkerState.FAILED: ERROR}.get(state, WARN)
        message = (worker.progress or worker.last_error if worker is not None else "") or state.value
        facts = worker.facts if worker is not None else None
        values = {
            "state": state.value,
            "last_error": worker.last_error if worker is not None else "",
            "restarts": counters.restarts,
            "steps": counters.stepped,
            "discarded_results": counters.discarded_results,
            **{f"step_ms_{name}": value for name, value in _percentiles_ms(self._step_s).items()},
            **{f"reaction_ms_{name}": value for name, value in _percentiles_ms(self._reaction_s).items()},
            **{f"state_resets_{cause}": count for cause, count in sorted(counters.state_resets.items())},
            **({} if facts is None else {name: getattr(facts, name) for name in _POLICY_FACTS}),
            "warnings": "; ".join(() if facts is None else facts.warnings),
        }
        return self._status("policy", level, message, values)

    def _image_status(self, counters: WorkerCounters) -> DiagnosticStatus:
        age_s = steady_s() - self._image_received_s
        rate_hz = (self._images_received - self._images_reported) / _DIAGNOSTICS_PERIOD_S
        self._images_reported = self._images_received
        graph = self._graph.seen
        mismatch = graph.image_mismatch
        arriving = age_s < self._config.image_timeout_s
        problem = mismatch or self._image_error or ("" if arriving else ADVICE[Reason.NO_IMAGE])
        values = {
            "topic": self._image_subscription.topic_name,
            "publishers": graph.image_publishers,
            "rate_hz": rate_hz,
            "since_last_image_s": age_s,
            "frames_received": counters.received,
            "frames_dropped": sum(counters.dropped.values()),
            **{f"dropped_{cause}": count for cause, count in sorted(counters.dropped.items())},
            "mismatch": mismatch,
        }
        return self._status("image", WARN if problem else OK, problem or "images arrive", values)

    def _memory_status(self, worker: PolicyWorker | None) -> DiagnosticStatus:
        gpu = worker.memory if worker is not None else {}
        reading = self._memory_probe.read(worker.pid if worker is not None else None, **gpu)
        available_mib = reading.system_available_mib
        level = OK if available_mib >= self._config.memory_warn_mib else WARN
        if available_mib < self._config.memory_error_mib:
            level = ERROR
        return self._status("memory", level, f"{available_mib:.0f} MiB available", vars(reading))


#: One line for each severity: rclpy ties a severity to the line that logs.
_LOG: dict[str, Callable[[Any, str], object]] = {
    "info": lambda logger, text: logger.info(text),
    "warning": lambda logger, text: logger.warning(text),
    "error": lambda logger, text: logger.error(text),
}


def _beat_period_s(publish_rate_hz: float) -> float:
    """Return how often the gate is asked: the publish period, divided until it is short enough for safety."""
    period_s = 1.0 / publish_rate_hz
    return period_s / math.ceil(period_s / _SAFETY_PERIOD_S)


def _load_frame(convert: Callable, message: Any, size_px: int, keep_aspect: bool) -> np.ndarray:
    """Convert an image message and reduce it to the policy's size, when its step is due."""
    return reduce_frame(convert(message), size_px, keep_aspect)


def _percentiles_ms(samples_s: deque[float]) -> dict[str, float]:
    samples = np.array(list(samples_s)) * 1000.0  # a copy: steps are added meanwhile
    if not samples.size:
        return {"p50": 0.0, "p95": 0.0}
    return percentiles(samples, (50, 95))


def _autostart(node: VlaNode, failed: threading.Event) -> None:
    """Configure and activate; raise `failed` where that is refused, so that `ros2 run` ends with the sentence."""
    try:
        succeeded = all(
            transition() == TransitionCallbackReturn.SUCCESS
            for transition in (node.trigger_configure, node.trigger_activate)
        )
    except RuntimeError as error:  # somebody else has asked for a transition meanwhile
        node.report_error(f"autostart failed: {error}")
        succeeded = False
    if not succeeded:
        if not node.leave.is_set():
            failed.set()
        node.leave.set()


def main(
    args: list[str] | None = None,
    worker_module: str = WORKER_MODULE,
    node_type: Callable[[str], VlaNode] = VlaNode,
) -> int:
    """Run the node until SIGINT or SIGTERM; exit status 0, 2 where it could not start, 1 where a part of it failed.

    Args:
        args: like sys.argv, the default.
        worker_module: what runs as the policy worker.
        node_type: makes the node from the worker module; `mobile_vla bench` gives one that keeps times.
    """
    output = OutputPump()
    output.start()
    try:
        return _run(args, output, partial(node_type, worker_module))
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        output.close(_OUTPUT_LIMIT_S)


def _run(args: list[str] | None, output: OutputPump, make_node: Callable[[], VlaNode]) -> int:
    interrupted = LeaveRequest()
    # rclpy's handlers would invalidate the context before a last standstill could be published.
    _on_signals(interrupted)
    try:
        start_ros(NODE_NAME, "Camera images and an instruction in, velocity commands out.", args, output)
        node = make_node()
    except MobileVlaError as error:
        print(f"{NODE_NAME}: error: {error}", file=sys.stderr)
        rclpy.try_shutdown()
        return 2
    node.output = output
    _on_signals(node.leave)
    if interrupted.is_set():
        node.leave.set()
    executor = NodeExecutor(node.transitions)
    executor.add_node(node)
    failed = threading.Event()
    spinner = threading.Thread(target=_spin, args=(executor, node), name="executor", daemon=True)
    spinner.start()
    if node.autostart:
        threading.Thread(target=_autostart, args=(node, failed), name="autostart", daemon=True).start()
    node.watch()
    node.farewell()
    status = 1 if node.failure is not None else 2 if failed.is_set() else 0
    _leave_in_time(status, output)
    node.close()
    executor.shutdown(timeout_sec=1.0)
    spinner.join()
    node.destroy_node()
    rclpy.try_shutdown()
    return status


def _on_signals(request: LeaveRequest) -> None:
    """Leave on Ctrl-C, on SIGTERM, and where the terminal goes, unless `nohup` keeps the node from that."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: request.set())


def _leave_in_time(status: int, output: OutputPump) -> None:
    """See to it that the process ends although a thread of it, or its worker, hangs; its last zero is out."""

    def leave() -> None:
        output.close(_OUTPUT_LIMIT_S)
        os._exit(status or 1)

    timer = threading.Timer(_LEAVE_LIMIT_S, leave)
    timer.daemon = True
    timer.start()


def _spin(executor: NodeExecutor, node: VlaNode) -> None:
    """Run the callbacks until the executor is shut down; whatever else ends that, the node leaves with a zero."""
    while True:
        try:
            executor.spin()
            node.leave.set()
            return
        except ExternalShutdownException:  # the context was shut down from outside
            node.leave.set()
            return
        except RequestError as error:
            node.report_error(str(error))
        except BaseException as error:
            node.fail(error)
            return


if __name__ == "__main__":
    raise SystemExit(main())
