"""The simulated robot: its kinematics, its cameras, and the node over real DDS."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mobile_vla_inference.action import VelocityCommand
from mobile_vla_inference.errors import FrameError
from mobile_vla_inference.frames import list_frames, read_image
from mobile_vla_inference.ros.conversions import compressed_to_rgb, image_to_rgb
from mobile_vla_inference.sim.camera import WORLD_M, FolderCamera, SimulatedCamera
from mobile_vla_inference.sim.live_world import LiveWorld
from mobile_vla_inference.sim.robot import DifferentialDrive, Pose
from mobile_vla_inference.sim.world import PHYSICS_STEP_S, Motion

REPOSITORY = Path(__file__).resolve().parent.parent
DEADLINE_S = 30.0

speeds = st.floats(-1.0, 1.0)
times_s = st.lists(st.floats(0.0, 3.0), min_size=1, max_size=20)


# Kinematics


def drive_for(linear_x_mps, angular_z_radps, steps_s):
    """Drive with one command from the origin, in steps of these lengths."""
    drive = DifferentialDrive(command_timeout_s=math.inf)
    drive.command(linear_x_mps, angular_z_radps, 0.0)
    for now_s in np.cumsum(steps_s):
        drive.step(float(now_s))
    return drive.pose


def test_a_straight_line_and_a_turn_on_the_spot():
    assert drive_for(0.5, 0.0, [2.0]) == Pose(1.0, 0.0, 0.0)
    assert drive_for(0.0, 0.5, [2.0]) == Pose(0.0, 0.0, 1.0)


def test_positive_angular_velocity_turns_left():
    pose = drive_for(1.0, math.pi / 2.0, [1.0])  # a quarter of a circle of radius 2 / pi
    assert (pose.x_m, pose.y_m, pose.yaw_rad) == pytest.approx((2.0 / math.pi, 2.0 / math.pi, math.pi / 2.0))


@given(linear=speeds, angular=speeds, parts=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=20))
def test_a_full_circle_returns_to_the_start_in_any_steps(linear, angular, parts):
    assume(abs(angular) > 0.01)
    pose = drive_for(linear, angular, np.array(parts) / sum(parts) * math.tau / abs(angular))
    assert (pose.x_m, pose.y_m, math.sin(pose.yaw_rad)) == pytest.approx((0.0, 0.0, 0.0), abs=1e-6)
    assert math.cos(pose.yaw_rad) == pytest.approx(1.0)


@given(linear=speeds, angular=speeds, steps_s=times_s)
def test_the_pose_does_not_depend_on_the_steps(linear, angular, steps_s):
    many, one = drive_for(linear, angular, steps_s), drive_for(linear, angular, [sum(steps_s)])
    assert (many.x_m, many.y_m) == pytest.approx((one.x_m, one.y_m), abs=1e-6)
    assert math.cos(many.yaw_rad - one.yaw_rad) == pytest.approx(1.0)
    assert -math.pi <= many.yaw_rad <= math.pi


@given(steps_s=times_s)
def test_a_command_moves_the_robot_until_its_timeout_and_no_longer(steps_s):
    drive = DifferentialDrive(command_timeout_s=0.5)
    drive.command(1.0, 0.0, 0.0)
    for now_s in np.cumsum(steps_s):
        assert drive.step(float(now_s)).x_m == pytest.approx(min(now_s, 0.5))
    assert drive.linear_x_mps == (1.0 if sum(steps_s) < 0.5 else 0.0)


def test_each_command_starts_the_timeout_again():
    drive = DifferentialDrive(command_timeout_s=0.5)
    for now_s in (0.0, 0.4, 0.8):
        drive.command(1.0, 0.0, now_s)
    assert drive.step(2.0).x_m == pytest.approx(1.3)
    drive.command(-1.0, 0.0, 3.0)
    assert drive.step(3.25).x_m == pytest.approx(1.05)


def test_without_a_command_nothing_moves():
    drive = DifferentialDrive()
    drive.step(5.0)
    assert drive.step(1000.0) == Pose()


def test_a_clock_that_stands_or_goes_back_moves_nothing():
    drive = DifferentialDrive(command_timeout_s=math.inf)
    drive.command(1.0, 0.0, 10.0)
    drive.step(11.0)
    assert drive.step(10.5).x_m == pytest.approx(1.0)
    assert drive.step(11.0).x_m == pytest.approx(1.0)
    assert drive.step(11.5).x_m == pytest.approx(1.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_a_command_that_is_not_finite_is_refused_and_changes_nothing(bad, place):
    drive = DifferentialDrive(command_timeout_s=0.5)
    drive.command(1.0, 0.0, 0.0)
    values = [0.0, 0.0]
    values[place] = bad
    with pytest.raises(ValueError, match="expected finite numbers"):
        drive.command(*values, 0.4)
    assert drive.step(2.0) == Pose(0.5, 0.0, 0.0)


def test_commands_are_clamped_to_the_maximum_speeds():
    drive = DifferentialDrive(max_linear_mps=1.5, max_angular_radps=2.5)
    drive.command(-1e9, 1e9, 0.0)
    assert (drive.linear_x_mps, drive.angular_z_radps) == (-1.5, 2.5)


# Cameras


def mean_change(first, second):
    return float(np.abs(first.astype(int) - second).mean())


@pytest.mark.parametrize(("width", "height"), [(320, 240), (640, 480), (161, 97), (16, 16)])
def test_the_simulated_camera_gives_frames_of_the_size_asked_for(width, height):
    frame = SimulatedCamera(width, height).frame(Pose())
    assert (frame.shape, frame.dtype) == ((height, width, 3), np.uint8)


def test_the_picture_depends_on_pose_and_seed_only():
    poses = [Pose(), Pose(0.1, 0.0, 0.0), Pose(0.0, 0.1, 0.0), Pose(0.0, 0.0, 0.05)]
    camera = SimulatedCamera(seed=3)
    frames = [camera.frame(pose) for pose in poses]
    for pose, frame in zip(poses, frames, strict=True):
        np.testing.assert_array_equal(SimulatedCamera(seed=3).frame(pose), frame)
    for moved in frames[1:]:
        assert mean_change(frames[0], moved) > 1.0
    assert mean_change(SimulatedCamera(seed=4).frame(Pose()), frames[0]) > 1.0


def test_turning_left_moves_the_picture_to_the_right():
    camera = SimulatedCamera(width=320)
    bearing_rad = math.atan(40 / (160 / math.tan(math.radians(40))))  # of a column 40 pixels beside the middle
    before, after = camera.frame(Pose()), camera.frame(Pose(yaw_rad=bearing_rad))
    hills = slice(0, 100)
    shifts = [mean_change(after[hills, 150 + s : 170 + s], before[hills, 150:170]) for s in range(-80, 81)]
    assert abs(int(np.argmin(shifts)) - 80 - 40) <= 3


@given(x=st.floats(-1e3, 1e3), y=st.floats(-1e3, 1e3), yaw=st.floats(-math.pi, math.pi), periods=st.integers(-100, 100))
@settings(max_examples=60, deadline=None)
def test_the_world_repeats_so_that_no_drive_leaves_it(x, y, yaw, periods):
    camera = SimulatedCamera(80, 60)
    here, there = camera.frame(Pose(x, y, yaw)), camera.frame(Pose(x + periods * WORLD_M, y, yaw))
    assert mean_change(here, there) < 0.5
    assert here[40:].std() > 0.0


def test_the_lane_lies_where_the_pinhole_model_puts_it():
    camera = SimulatedCamera(320, 240)
    focal_px, ahead_m = 160.0 / math.tan(math.radians(40.0)), 2.0
    left_m = 0.8 * math.sin(math.tau * ahead_m / WORLD_M)  # the lane winds to the left at first
    row = camera.frame(Pose())[100 + round(focal_px * 0.35 / ahead_m)].astype(int)
    yellow = np.nonzero(row[:, 0] - row[:, 2] > 60)[0]
    assert yellow.mean() == pytest.approx(159.5 - focal_px * left_m / ahead_m, abs=3.0)


def shows(box, pixel):
    """Whether a pixel has the hue of a box, whatever the light and the haze."""
    shade, color = pixel - pixel.min(), np.array(box.rgb) - min(box.rgb)
    return shade.max() > 20 and np.allclose(shade / shade.max(), color / color.max(), atol=0.15)


def test_a_box_ahead_grows_in_the_middle_of_the_picture():
    camera = SimulatedCamera(160, 120)
    for box in camera.boxes:
        widths = []
        for distance_m in (4.0, 2.0, 1.0):
            row = camera.frame(Pose(box.x_m, box.y_m - distance_m, math.pi / 2.0))[50].astype(int)
            columns = np.nonzero([shows(box, pixel) for pixel in row])[0]
            assert columns.mean() == pytest.approx(79.5, abs=1.5)
            widths.append(columns.size)
        assert 4 < widths[0] < widths[1] / 1.5 < widths[2] / 3.0


def test_only_the_walls_that_face_the_camera_are_seen():
    camera = SimulatedCamera(160, 120)
    for box in camera.boxes:
        east = camera.frame(Pose(box.x_m + 1.0, box.y_m, math.pi))[50, 80].astype(int)
        west = camera.frame(Pose(box.x_m - 1.0, box.y_m, 0.0))[50, 80].astype(int)
        assert shows(box, east)
        assert shows(box, west)
        assert east.sum() > west.sum() + 30  # the light comes from the east


def test_a_wall_beside_the_camera_is_cut_at_its_plane():
    camera = SimulatedCamera(160, 120)
    for box in camera.boxes:
        beside_m = box.y_m - box.half_side_m - 0.1
        assert shows(box, camera.frame(Pose(box.x_m, beside_m, 0.0))[50, 0].astype(int))
        assert shows(box, camera.frame(Pose(box.x_m, beside_m, math.pi))[50, -1].astype(int))
        assert not shows(box, camera.frame(Pose(box.x_m, beside_m, -math.pi / 2.0))[50, 80].astype(int))


@pytest.fixture
def frames_dir(tmp_path):
    """A folder of three lossless images of different colours and sizes; the names are not in the order of writing."""
    for name, rgb, size in (("b.png", (0, 200, 0), 40), ("a.png", (200, 0, 0), 32), ("c.png", (0, 0, 200), 48)):
        cv2.imwrite(str(tmp_path / name), np.full((24, size, 3), rgb[::-1], dtype=np.uint8))
    return tmp_path


def test_the_folder_camera_shows_the_images_in_name_order_over_and_over(frames_dir):
    camera = FolderCamera(frames_dir)
    seen = [camera.frame(Pose()) for _ in range(7)]
    expected = [read_image(frames_dir / f"{name}.png") for name in "abcabca"]
    for image, original in zip(seen, expected, strict=True):
        np.testing.assert_array_equal(image, original)


def test_the_folder_camera_refuses_what_it_cannot_show(tmp_path):
    with pytest.raises(FrameError, match="is not a folder"):
        FolderCamera(tmp_path / "missing")
    with pytest.raises(FrameError, match="contains no image files"):
        FolderCamera(tmp_path)
    (tmp_path / "a.jpg").write_bytes(b"not an image")
    with pytest.raises(FrameError, match=r"a\.jpg contains 12 bytes"):
        FolderCamera(tmp_path)


# The world of a scenario, live


@pytest.fixture
def live():
    pytest.importorskip("panda3d")
    return LiveWorld("1box_hori_left", 3, command_timeout_s=0.5)


def test_a_command_counts_until_its_timeout(live):
    live.step(0.0)
    live.command(VelocityCommand(0.3), 1.0)
    assert live.motion == Motion()
    live.step(1.0 + 0.15 + 0.3)  # the longest delay, and what the acceleration takes
    assert live.motion.linear_x_mps == pytest.approx(0.3)
    live.step(1.5 + 0.15 + 0.3 + PHYSICS_STEP_S)
    assert live.motion == Motion()
    assert live.episode["outcome"] is None


def test_what_became_of_an_episode_is_settled_once_and_a_reset_begins_the_next(live):
    first = live.frame(live.step(0.0))
    for now_s in np.arange(0.0, 12.0, 0.3):
        live.command(VelocityCommand(0.5), float(now_s))
    assert live.episode["outcome"] == "collision"
    settled = dict(live.episode)
    assert settled["time_s"] < live.world.time_s
    live.step(100.0)
    assert live.episode == settled
    with pytest.raises(ValueError, match="3box"):
        live.reset("3box_hori_left", 3)
    assert live.episode == settled
    live.reset("1box_hori_left", 3)
    assert (live.episode["number"], live.episode["outcome"]) == (2, None)
    np.testing.assert_array_equal(live.frame(live.step(100.0)), first)


# The node, over real DDS


class Listener:
    """A node of the test that commands the robot and keeps what its camera sends."""

    def __init__(self, node, executor):
        self.node = node
        self._executor = executor
        self.images = []

    def subscribe(self, message_type, topic, keep):
        """Have each message of a best-effort topic kept."""
        from rclpy.qos import qos_profile_sensor_data

        self.node.create_subscription(message_type, topic, keep, qos_profile_sensor_data)

    def wait(self, condition, process, what):
        """Spin until the condition holds; fail where the robot ends first or the deadline passes."""
        deadline_s = time.monotonic() + DEADLINE_S
        while not condition():
            assert process.poll() is None, f"sim_robot ended: {process.communicate()[1]}"
            assert time.monotonic() < deadline_s, f"no {what} within {DEADLINE_S} s"
            self._executor.spin_once(timeout_sec=0.1)

    def next_images(self, count, process):
        """Return the next `count` images that arrive."""
        self.images.clear()
        self.wait(lambda: len(self.images) >= count, process, f"{count} images")
        return self.images[:count]


@pytest.fixture
def listener():
    rclpy = pytest.importorskip("rclpy")
    from rclpy.executors import SingleThreadedExecutor

    context = rclpy.Context()
    rclpy.init(context=context)
    node = rclpy.create_node("listener", context=context)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    yield Listener(node, executor)
    executor.shutdown()
    node.destroy_node()
    rclpy.shutdown(context=context)


def start_robot(**parameters):
    """Start sim_robot with these parameters."""
    pytest.importorskip("rclpy")
    arguments = [word for name, value in parameters.items() for word in ("-p", f"{name}:={value}")]
    command = [sys.executable, "-m", "mobile_vla_inference.ros.sim_robot", "--ros-args", *arguments]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@contextlib.contextmanager
def running_robot(**parameters):
    """Run sim_robot; at the end, it has to leave at SIGINT as every node should."""
    process = start_robot(**parameters)
    try:
        yield process
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=DEADLINE_S)
        assert (process.returncode, "Traceback" in errors) == (0, False), errors
    finally:
        process.kill()
        process.communicate()


def test_the_picture_follows_cmd_vel_and_stands_still_without(listener):
    from geometry_msgs.msg import Twist
    from sensor_msgs.msg import Image

    listener.subscribe(Image, "image_raw", listener.images.append)
    publisher = listener.node.create_publisher(Twist, "cmd_vel", 1)

    def still():
        """Whether the last ten pictures are one."""
        return len(listener.images) >= 10 and len({bytes(image.data) for image in listener.images[-10:]}) == 1

    with running_robot(rate_hz=50.0, width=160, height=120, cmd_vel_timeout_s=0.1) as process:
        start, *more = listener.next_images(10, process)
        assert all(image.data == start.data for image in more)

        command = Twist()
        command.linear.x = math.nan
        listener.wait(lambda: publisher.get_subscription_count() == 1, process, "subscription to cmd_vel")
        publisher.publish(command)
        assert all(image.data == start.data for image in listener.next_images(10, process))

        command.linear.x, command.angular.z = 0.5, 0.5
        timer = listener.node.create_timer(0.02, lambda: publisher.publish(command))
        listener.wait(lambda: listener.images[-1].data != start.data, process, "motion")
        moving = listener.next_images(10, process)
        assert len({bytes(image.data) for image in moving}) > 5

        listener.node.destroy_timer(timer)
        listener.images.clear()
        listener.wait(still, process, "stop after the last command")
        assert listener.images[-1].data != start.data


def test_stamped_commands_and_both_kinds_of_image(listener):
    from geometry_msgs.msg import TwistStamped
    from rclpy.qos import ReliabilityPolicy
    from rclpy.time import Time
    from sensor_msgs.msg import CompressedImage, Image

    compressed = []
    listener.subscribe(Image, "image_raw", listener.images.append)
    listener.subscribe(CompressedImage, "image_raw/compressed", compressed.append)
    publisher = listener.node.create_publisher(TwistStamped, "cmd_vel", 1)
    command = TwistStamped()
    command.twist.linear.x = 1.0
    with running_robot(rate_hz=50.0, encoding="bgr8", compressed=True, stamped=True, seed=5, frame_id="eye") as process:
        image = listener.next_images(1, process)[0]
        np.testing.assert_array_equal(image_to_rgb(image), SimulatedCamera(320, 240, seed=5).frame(Pose()))
        assert (image.encoding, image.header.frame_id) == ("bgr8", "eye")
        now = listener.node.get_clock().now()
        assert 0 <= (now - Time.from_msg(image.header.stamp)).nanoseconds < DEADLINE_S * 1e9
        info = listener.node.get_publishers_info_by_topic("image_raw")
        assert [each.qos_profile.reliability for each in info] == [ReliabilityPolicy.BEST_EFFORT]

        listener.node.create_timer(0.02, lambda: publisher.publish(command))
        listener.wait(lambda: listener.images[-1].data != image.data, process, "motion")
        listener.wait(lambda: compressed, process, "compressed image")
        assert compressed_to_rgb(compressed[-1]).shape == (240, 320, 3)


def test_frames_dir_publishes_the_pixels_of_the_folder_over_and_over(listener, frames_dir):
    from sensor_msgs.msg import Image

    listener.subscribe(Image, "image_raw", listener.images.append)
    originals = [read_image(path) for path in list_frames(frames_dir)]
    with running_robot(rate_hz=20.0, frames_dir=frames_dir) as process:
        images = [image_to_rgb(message) for message in listener.next_images(9, process)]
    order = [next(i for i, original in enumerate(originals) if np.array_equal(original, rgb)) for rgb in images]
    assert set(order) == {0, 1, 2}


def test_real_frames_arrive_as_they_are(listener, track_drive_dir):
    from sensor_msgs.msg import Image

    listener.subscribe(Image, "image_raw", listener.images.append)
    folder = track_drive_dir / "images"
    with running_robot(frames_dir=folder) as process:
        first = image_to_rgb(listener.next_images(1, process)[0])
    assert any(np.array_equal(first, read_image(path)) for path in list_frames(folder))


def test_the_world_of_a_scenario_is_reset_to_another(listener):
    pytest.importorskip("panda3d")
    from rcl_interfaces.srv import SetParameters
    from rclpy.parameter import Parameter
    from rclpy.qos import DurabilityPolicy, QoSProfile
    from sensor_msgs.msg import CameraInfo, Image
    from std_msgs.msg import String
    from std_srvs.srv import Trigger

    infos, episodes = [], []
    listener.subscribe(Image, "image_raw", listener.images.append)
    listener.subscribe(CameraInfo, "camera_info", infos.append)
    latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    listener.node.create_subscription(
        String, "sim_robot/episode", lambda message: episodes.append(json.loads(message.data)), latched
    )
    change = listener.node.create_client(SetParameters, "sim_robot/set_parameters")
    reset = listener.node.create_client(Trigger, "sim_robot/reset")

    def call(client, request, process):
        listener.wait(client.service_is_ready, process, client.srv_name)
        answer = client.call_async(request)
        listener.wait(answer.done, process, f"answer of {client.srv_name}")
        return answer.result()

    def changed(process, **values):
        parameters = [Parameter(name, value=value).to_parameter_msg() for name, value in values.items()]
        results = call(change, SetParameters.Request(parameters=parameters), process).results
        return [result.successful for result in results]

    with running_robot(rate_hz=20.0, scenario="1box_hori_left", seed=3) as process:
        before = image_to_rgb(listener.next_images(1, process)[0])
        listener.wait(lambda: infos and episodes, process, "camera_info and episode")
        assert (infos[0].width, infos[0].height) == before.shape[1::-1] == (224, 224)
        assert infos[0].k[0] == pytest.approx(112.0 * math.sqrt(3.0))
        assert (episodes[0]["seed"], episodes[0]["number"], episodes[0]["outcome"]) == (3, 1, None)
        assert changed(process, scenario="3box") == [False]
        assert changed(process, scenario="2box_vert_right", seed=4) == [True, True]
        assert call(reset, Trigger.Request(), process).success
        listener.wait(lambda: episodes[-1]["number"] == 2, process, "the next episode")
        assert (episodes[-1]["scenario"], episodes[-1]["seed"]) == ("2box_vert_right", 4)
        assert "right" in episodes[-1]["instruction"].lower() or "오른쪽" in episodes[-1]["instruction"]
        after = image_to_rgb(listener.next_images(2, process)[1])
        assert (before != after).mean() > 0.5


def test_the_clock_that_it_publishes_is_that_of_its_stamps(listener):
    from rclpy.qos import qos_profile_sensor_data
    from rosgraph_msgs.msg import Clock
    from sensor_msgs.msg import Image

    def seconds(time) -> float:
        return time.sec + time.nanosec * 1e-9

    clocks = []
    listener.subscribe(Image, "image_raw", listener.images.append)
    listener.node.create_subscription(
        Clock, "/clock", lambda message: clocks.append(message.clock), qos_profile_sensor_data
    )
    with running_robot(rate_hz=20.0, publish_clock=True) as process:
        image = listener.next_images(1, process)[0]
        stamp_s = image.header.stamp.sec + image.header.stamp.nanosec * 1e-9
        # Which of the two arrives first is open: a clock that is no older has to come.
        listener.wait(lambda: clocks and seconds(clocks[-1]) >= stamp_s, process, "a later /clock")
    times_s = [seconds(time) for time in clocks]
    assert times_s == sorted(times_s)
    assert 0.0 <= stamp_s <= times_s[-1] < 60.0  # since the start, not since 1970


def test_sigterm_ends_it_without_a_traceback(listener):
    from sensor_msgs.msg import Image

    listener.subscribe(Image, "image_raw", listener.images.append)
    process = start_robot(rate_hz=0.1)  # the request must not wait for the next image
    publishers = lambda: listener.node.get_publishers_info_by_topic("image_raw")  # noqa: E731
    listener.wait(publishers, process, "publisher of images")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=8.0)
    assert (process.returncode, "Traceback" in errors) == (0, False), errors


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"ratehz": 5.0}, "sim_robot has no parameter 'ratehz', expected rate_hz; correct"),
        (
            {"rate_hz": 20},
            "parameter rate_hz is 20, expected a double from 0.1 to 240, write 20.0; correct it",
        ),
        ({"rate_hz": "[]"}, "parameter rate_hz is [], expected a double from 0.1 to 240; correct it"),
        ({"width": 5}, "parameter width is 5, expected a number from 16 to 4608; correct it"),
        ({"encoding": "mono8"}, "parameter encoding is 'mono8', expected one of rgb8, bgr8; correct it"),
        ({"scenario": "3box"}, "parameter scenario is '3box', expected one of 1box_vert_left, "),
        ({"scenario": "1box_vert_left", "frames_dir": "/missing"}, "parameters scenario and frames_dir are given"),
        ({"frames_dir": "/missing"}, "/missing is not a folder, expected one with image files; check the path"),
        ({"rate_hz": ""}, "argument -p rate_hz:= can't be used, expected -p NAME:=VALUE"),
    ],
)
def test_what_cannot_be_used_is_reported_in_one_sentence(parameters, sentence):
    process = start_robot(**parameters)
    output, errors = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, output) == (2, "")
    assert len(errors.splitlines()) == 1
    assert errors.startswith(f"sim_robot: {sentence}")


def test_an_image_that_turns_out_unreadable_ends_it_with_one_sentence(frames_dir):
    (frames_dir / "d.png").write_bytes(b"not an image")
    process = start_robot(rate_hz=50.0, frames_dir=frames_dir)
    _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 2, errors
    assert "Traceback" not in errors
    assert "d.png contains 12 bytes that no image decoder accepts" in errors.splitlines()[-1]
