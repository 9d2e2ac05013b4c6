"""VlaNode: camera images and an instruction in, velocity commands out.

Wiring only. Callbacks check and store; the policy runs in the worker process (control/worker.py); the gate
(control/gate.py) alone decides what reaches the base, and MotionControl (ros/motion.py) alone publishes it.

Nothing that can block stands between a stop and its zero. The executor's thread and the pulse only decide and publish
velocities; logs and reports go through a reporter (control/reporter.py), questions to the graph through a thread of
their own, and the process's output through a pump (control/output_pump.py). The main thread watches the others.
"""

from __future__ import annotations

from rclpy.callback_groups import MutuallyExclusiveCallbackGroup, ReentrantCallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.lifecycle import LifecycleNodeMixin, LifecycleState, TransitionCallbackReturn
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy

from mobile_vla_inference.control.clock import steady_s
from mobile_vla_inference.control.gate import Reason
from mobile_vla_inference.control.output_pump import OutputPump
from mobile_vla_inference.control.reporter import Reporter
from mobile_vla_inference.control.reset_cause import ResetCause
from mobile_vla_inference.control.worker_options import WORKER_MODULE
from mobile_vla_inference.ros.clock import missing_clock
from mobile_vla_inference.ros.diagnostics import DIAGNOSTICS_PERIOD_S, NodeDiagnostics, StepTimes
from mobile_vla_inference.ros.graph import GraphFacts, GraphWatch
from mobile_vla_inference.ros.image_intake import ImageIntake
from mobile_vla_inference.ros.live_parameters import LiveParameters
from mobile_vla_inference.ros.motion import FINAL_ZERO_S, MotionControl, beat_period_s
from mobile_vla_inference.ros.node_log import NodeLog
from mobile_vla_inference.ros.operator_inputs import OperatorInputs
from mobile_vla_inference.ros.overrides import refuse_unknown_parameters
from mobile_vla_inference.ros.parameter_declarations import declare_parameters
from mobile_vla_inference.ros.parameters import NodeParameters
from mobile_vla_inference.ros.policy_link import PolicyLink
from mobile_vla_inference.ros.reports import Reports
from mobile_vla_inference.ros.thread_watch import THREAD_LIMIT_S, WATCH_PERIOD_S, ThreadWatch
from mobile_vla_inference.ros.transitions import Transitions
from mobile_vla_inference.ros.worker_events import WorkerEvents

NODE_NAME = "vla_node"


class VlaNode(LifecycleNodeMixin, Node):
    """The robot's node. Lifecycle: configure loads the policy, activate allows motion, deactivate stops first.

    Attributes:
        transitions: the callback group of the lifecycle services, which block while the worker loads.
        threads: the node's own threads; they request the node's end.
        motion: the only path to the base.
        log: the node's log.
    """

    def __init__(
        self,
        output: OutputPump,
        worker_module: str = WORKER_MODULE,
        motion_type: type[MotionControl] = MotionControl,
    ) -> None:
        """Declare the interface; raise MobileVlaError for a bad or unknown parameter.

        Args:
            output: what the process prints goes through it.
            worker_module: the module that runs as the policy worker; `mobile_vla drill` uses one that fails on demand.
            motion_type: the path to the base; `mobile_vla bench` uses one that keeps times.
        """
        # Before anything that can fail: rclpy calls destroy_node also when the constructor failed.
        self._reporter = Reporter()
        self.threads = ThreadWatch(NODE_NAME, self._reporter, lambda: self.context.ok())
        Node.__init__(self, NODE_NAME)
        self.transitions = ReentrantCallbackGroup()
        LifecycleNodeMixin.__init__(self, callback_group=self.transitions)
        self.log = NodeLog(self.get_logger(), self._reporter)
        self._live = LiveParameters(declare_parameters(self, NodeParameters))
        refuse_unknown_parameters(self)
        self._output = output
        self._create_parts(worker_module, motion_type)
        self.add_on_set_parameters_callback(lambda changes: self._live.change(changes, self._apply))
        # Not callbacks of the executor: a command is due however many images and service calls wait.
        self._pulse = self.threads.start_pulse("pulse", self._beat, beat_period_s(self._live.values.publish_rate_hz))
        self.threads.start_pulse("graph", self._look_at_graph, GraphWatch.PERIOD_S)

    def _create_parts(self, worker_module: str, motion_type: type[MotionControl]) -> None:
        """Create topics, services and timers, all in one mutually exclusive group; timers run on the steady clock."""
        parameters = self._live.values
        group = MutuallyExclusiveCallbackGroup()
        image_qos = QoSProfile(depth=1, reliability=ReliabilityPolicy[parameters.image_reliability.upper()])
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        news = self.create_guard_condition(lambda: self._events.take(), callback_group=group)
        self._policy = PolicyLink(news.trigger, self.threads.fail)
        self.motion = motion_type(self, parameters, self._report_reason)
        self._inputs = OperatorInputs(self, group, self.motion, self._policy, self.threads, self.log)
        self._images = ImageIntake(self, group, image_qos, self._live, self.motion, self._policy)
        self._graph = GraphWatch(
            self,
            image=(self._images.topic_name, self._images.format.type_name, parameters.image_reliability),
            inputs=self._inputs.topics,
            cmd_vel=(self.motion.topic_name, "TwistStamped" if parameters.stamped else "Twist"),
            changed=self._on_graph,
        )
        times = StepTimes()
        diagnostics = NodeDiagnostics(
            self.get_fully_qualified_name().lstrip("/"),
            parameters=self._live,
            motion=self.motion,
            policy=self._policy,
            images=self._images,
            inputs=self._inputs,
            times=times,
            graph=lambda: self._graph.seen,
            dropped=self._count_dropped,
        )
        self._reports = Reports(
            self, image_qos, self._reporter, diagnostics, self.motion, self._policy, self._images, self.log
        )
        self._events = WorkerEvents(
            self._policy, self.motion, self._images, self._inputs, times, self._reports, self.log
        )
        self._lifecycle = Transitions(
            self._live, self.motion, self._policy, self.threads.exit_request, self.log, worker_module
        )
        self.create_timer(DIAGNOSTICS_PERIOD_S, self._reports.post_diagnostics, callback_group=group, clock=steady)
        self.create_timer(WATCH_PERIOD_S, self._show_executor, callback_group=group, clock=steady)

    @property
    def autostart(self) -> bool:
        """Whether to configure and activate without being asked."""
        return self._live.values.autostart

    # ---- lifecycle -----------------------------------------------------------------------------------------------

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load and warm up the policy in the worker process; FAILURE, with a sentence in the log, if it can't."""
        return _result(self._lifecycle.configure())

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Allow motion; FAILURE while a setting is only assumed: a guess must not move the robot."""
        return _result(self._lifecycle.activate())

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Publish standstill, then forbid motion."""
        self._lifecycle.stop()
        return TransitionCallbackReturn.SUCCESS

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """End the worker process."""
        self._lifecycle.release()
        return TransitionCallbackReturn.SUCCESS

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Publish standstill and end the worker process."""
        self.close()
        return TransitionCallbackReturn.SUCCESS

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Publish standstill and end the worker process; the node can be configured again."""
        self.close()
        return TransitionCallbackReturn.SUCCESS

    def close(self) -> None:
        """Stop the robot, then end the worker process; safe to call more than once."""
        self._lifecycle.close()

    def destroy_node(self) -> None:
        """End the node's threads, then the node."""
        self.threads.close()
        self._reporter.close(FINAL_ZERO_S)
        super().destroy_node()

    # ---- what the threads do -------------------------------------------------------------------------------------

    def _beat(self) -> None:
        """Ask the gate, and publish what it decides when that is due; runs in the pulse."""
        self.motion.beat(
            executor_stalled=self.threads.executor_stalls(), clock_missing=bool(missing_clock(self.get_clock()))
        )

    def _show_executor(self) -> None:
        """Show that the executor runs callbacks, and stop the robot if the pulse, which checks that, is late."""
        self.threads.note_executor()
        if self.threads.pulse_is_late("pulse"):
            self.motion.publish_decision()

    def _look_at_graph(self) -> None:
        """Ask who is on the topics; the middleware can fail for a moment while nodes come and go."""
        try:
            self._graph.look()
        except Exception as error:
            if steady_s() - self._graph.looked_s > THREAD_LIMIT_S:
                raise
            self.log.say_once(1.0, "graph", "warning", f"the graph can't be read now: {type(error).__name__}: {error}")

    def _on_graph(self, facts: GraphFacts) -> None:
        if self.motion.graph_changed(facts):
            self._policy.reset(ResetCause.IMAGE_SOURCES)

    # ---- what the parts ask for ------------------------------------------------------------------------------------

    def _apply(self, values: NodeParameters) -> None:
        """Put changed parameters into the parts that keep a copy."""
        self.motion.change_parameters(values, self._policy.facts)
        self._policy.set_step_timeout(values.step_timeout_s)
        self._pulse.period_s = beat_period_s(values.publish_rate_hz)

    def _report_reason(self, reason: Reason) -> None:
        self._reports.post_reason(reason)

    def _count_dropped(self) -> dict[str, int]:
        return {"reports_dropped": self._reporter.dropped, "log_lines_dropped": self._output.dropped_lines}


def _result(succeeded: bool) -> TransitionCallbackReturn:
    return TransitionCallbackReturn.SUCCESS if succeeded else TransitionCallbackReturn.FAILURE
