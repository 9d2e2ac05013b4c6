"""The simulated world: layouts and instructions from seeds, motion and its limits, the expert, images, outcomes."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobile_vla_inference.action import STANDSTILL, VelocityCommand
from mobile_vla_inference.sim.auxiliary_targets import AUXILIARY_TARGETS, auxiliary_targets
from mobile_vla_inference.sim.closed_loop import (
    EpisodeResult,
    EpisodeTask,
    drive_episode,
    summarize,
    summarize_by_scenario,
    wilson_interval,
)
from mobile_vla_inference.sim.expert import Expert, convex_hull, path_length_m
from mobile_vla_inference.sim.layout import draw_layout
from mobile_vla_inference.sim.phrases import instruction, training_sentences, with_unknown_word
from mobile_vla_inference.sim.robot import Pose
from mobile_vla_inference.sim.scenarios import SCENARIOS, other_side
from mobile_vla_inference.sim.world import (
    BASES,
    MAX_ANGULAR_RADPS,
    MAX_LINEAR_MPS,
    REACH_M,
    ROBOT_RADIUS_M,
    World,
)

STEP_S = 0.3
SEEDS = st.integers(0, 2**31 - 1)


def run_expert(world: World) -> World:
    expert = Expert(world)
    while world.outcome is None:
        world.command(expert.command())
        world.step(STEP_S)
    return world


# --- layouts and instructions ---


@given(st.sampled_from(SCENARIOS), SEEDS)
@settings(max_examples=60, deadline=None)
def test_a_layout_follows_from_its_seed_and_hides_the_cup(scenario, seed):
    layout = draw_layout(scenario, seed)
    assert layout == draw_layout(scenario, seed)
    assert len(layout.boxes) == int(scenario[0])
    x_from, x_to, y_from, y_to = layout.room
    assert x_from < layout.start.x_m < layout.cup[0] < x_to
    assert y_from < layout.cup[1] < y_to
    assert World(layout).outcome is None
    assert (layout.doorway is not None) == ("_cone_" in scenario)
    values = dict(zip(AUXILIARY_TARGETS, auxiliary_targets(World(replace(layout, start=Pose())))))
    assert values["boxes_seen"] == 1.0
    # The boxes hide the cup from the start, or from the doorway where there is one.
    door = layout.doorway
    viewpoint = Pose() if door is None else Pose(door.x_m - 0.1, door.y_m)
    values = dict(zip(AUXILIARY_TARGETS, auxiliary_targets(World(replace(layout, start=viewpoint)))))
    assert values["boxes_seen"] == 1.0
    assert values["cup_seen"] == -1.0 or len(layout.boxes) == 2  # visible only between two boxes
    assert layout.side == scenario.rpartition("_")[2]


@given(st.sampled_from([name for name in SCENARIOS if "_cone_" in name]), SEEDS)
@settings(max_examples=30, deadline=None)
def test_the_cone_is_seen_before_the_doorway_and_never_behind_it(scenario, seed):
    world = World(draw_layout(scenario, seed))
    expert, door = Expert(world), world.layout.doorway
    seen, last_m = 0, -math.inf
    while world.outcome is None:
        values = dict(zip(AUXILIARY_TARGETS, auxiliary_targets(world)))
        if values["cone_seen"] > 0:
            seen, last_m = seen + 1, world.pose.x_m
            assert abs(values["cone_bearing"]) < 1.0
        world.command(expert.command())
        world.step(STEP_S)
    assert world.outcome == "success"
    assert seen >= 3
    assert last_m < door.x_m - 0.5
    aside_m = door.cone[1] - door.y_m
    assert (aside_m > 0.0) == (door.cone_side == "left")


def test_the_robot_passes_the_doorway_and_collides_with_its_walls_and_cone():
    layout = draw_layout("1box_vert_cone_left", 4)
    door = layout.doorway
    for y_m, outcome in ((door.y_m, None), (door.cone[1], "collision"), (door.y_m - door.half_width_m, "collision")):
        world = World(replace(layout, start=Pose(door.x_m - 0.6, y_m, 0.0)))
        world.command(VelocityCommand(0.5))
        while world.outcome is None and world.pose.x_m < door.x_m + 0.3:
            world.step(0.1)
        assert world.outcome == outcome


@given(st.sampled_from(SCENARIOS), SEEDS)
@settings(max_examples=30, deadline=None)
def test_the_side_to_pass_on_changes_nothing_in_the_world(scenario, seed):
    other = other_side(scenario)
    assert other != scenario
    assert other_side(other) == scenario
    assert replace(draw_layout(other, seed), scenario=scenario) == draw_layout(scenario, seed)


def test_an_unknown_scenario_is_refused():
    with pytest.raises(ValueError, match="3box"):
        draw_layout("3box_vert_left", 0)


@given(st.sampled_from(SCENARIOS), SEEDS, st.sampled_from(["training", "unseen", "canonical"]))
@settings(max_examples=80, deadline=None)
def test_an_instruction_names_its_side_and_no_other(scenario, seed, phrasing):
    text = instruction(scenario, seed, phrasing)
    assert text == instruction(scenario, seed, phrasing)
    assert "{" not in text
    if "_cone_" in scenario:  # the instruction contains the cone and not the side
        assert "cone" in text or "콘" in text
        assert not any(word in text.lower() for word in ("left", "right", "왼쪽", "오른쪽"))
        assert text != instruction(other_side(scenario), seed, phrasing)
        return
    words = {"left": ("left", "왼쪽"), "right": ("right", "오른쪽")}
    side = scenario.rpartition("_")[2]
    other = "right" if side == "left" else "left"
    assert any(word in text.lower() for word in words[side])
    assert not any(word in text.lower() for word in words[other])


def test_unseen_phrases_are_not_among_those_of_training():
    trained = {text.lower().rstrip(".!") for text in training_sentences()}
    unseen = {instruction(name, seed, "unseen").lower() for name in SCENARIOS for seed in range(60)}
    assert len(unseen) > 40
    assert not unseen & trained


def test_the_sentence_of_the_original_data():
    assert instruction("1box_vert_left", 0, "canonical", "ko") == "박스를 왼쪽으로 돌아서 컵까지 가세요"
    assert instruction("1box_vert_right", 0, "canonical", "en") == "Go around the box on the right to the cup"
    by_cone = {instruction(f"1box_vert_cone_{side}", 0, "canonical", "en") for side in ("left", "right")}
    assert by_cone == {
        "Go around the box on the side of the cone to the cup",
        "Go around the box on the side without the cone to the cup",
    }


@given(st.sampled_from(SCENARIOS), SEEDS)
@settings(max_examples=30, deadline=None)
def test_an_unknown_word_is_added_and_nothing_else_changes(scenario, seed):
    text = instruction(scenario, seed)
    words = with_unknown_word(text, np.random.default_rng(seed)).split(" ")
    assert any(" ".join(words[:index] + words[index + 1 :]) == text for index in range(len(words)))


# --- motion ---


def test_the_base_follows_a_command_after_its_delay_and_no_faster_than_it_can():
    layout = replace(draw_layout("1box_vert_left", 0), delay_s=0.1)
    world = World(layout)
    world.command(VelocityCommand(9.0, 9.0, -9.0))
    world.step(0.075)
    assert world.pose == layout.start
    speeds = []
    for _ in range(20):
        world.step(0.05)
        speeds.append((world.motion.linear_x_mps, world.motion.angular_z_radps))
    assert 0.0 < speeds[1][0] < MAX_LINEAR_MPS
    assert speeds[-1] == (MAX_LINEAR_MPS, -MAX_ANGULAR_RADPS)
    assert world.motion.linear_y_mps == 0.0


def test_an_omnidirectional_base_moves_sideways():
    world = World(replace(draw_layout("1box_vert_left", 0), start=Pose(), delay_s=0.0), "omnidirectional")
    world.command(VelocityCommand(0.0, 0.3, 0.0))
    world.step(1.0)
    assert world.pose.y_m > 0.1
    assert world.pose.x_m == pytest.approx(0.0)


def test_an_unknown_base_and_a_command_of_nan_are_refused():
    layout = draw_layout("1box_vert_left", 0)
    with pytest.raises(ValueError, match="legged"):
        World(layout, "legged")
    with pytest.raises(ValueError, match="nan"):
        World(layout).command(VelocityCommand(math.nan))


# --- outcomes ---


def test_driving_straight_on_ends_at_the_box():
    world = World(replace(draw_layout("1box_hori_left", 3), start=Pose()))
    while world.outcome is None:
        world.command(VelocityCommand(0.5))
        world.step(STEP_S)
    assert world.outcome == "collision"
    before = world.pose
    world.step(1.0)
    assert world.pose == before


def test_standing_still_is_a_timeout():
    world = World(draw_layout("1box_hori_left", 3))
    while world.outcome is None:
        world.command(STANDSTILL)
        world.step(STEP_S)
    assert world.outcome == "timeout"
    assert world.path_m == 0.0


def test_reaching_the_cup_on_the_wrong_side_is_no_success():
    layout = draw_layout("2box_hori_left", 5)
    guide = World(replace(layout, scenario=other_side(layout.scenario)))
    judged = World(layout)
    expert = Expert(guide)
    while judged.outcome is None:
        command = expert.command()
        for world in (guide, judged):
            world.command(command)
            world.step(STEP_S)
    assert judged.outcome == "wrong side"


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_expert_succeeds(scenario, base):
    for seed in range(3):
        world = run_expert(World(draw_layout(scenario, seed), base))
        assert world.outcome == "success"
        assert world.cup_distance_m <= REACH_M
        assert world.passed_side == world.layout.side


@given(st.sampled_from(SCENARIOS), SEEDS, st.floats(0.0, 3.0), st.floats(-1.0, 1.0), st.floats(-3.0, 3.0))
@settings(max_examples=80, deadline=None)
def test_the_expert_has_a_command_for_every_pose(scenario, seed, x_m, y_m, yaw_rad):
    world = World(replace(draw_layout(scenario, seed), start=Pose(x_m, y_m, yaw_rad)))
    expert = Expert(world)
    path = expert.path()
    assert path[0] == (x_m, y_m)
    assert path[-1] == world.layout.cup
    assert path_length_m(path) >= world.cup_distance_m - 1e-9
    assert expert.command().is_finite


@given(st.sets(st.tuples(st.integers(-20, 20), st.integers(-20, 20)), min_size=3, max_size=30))
def test_a_convex_hull_holds_all_its_points(points):
    hull = convex_hull(list(points))
    assert set(hull) <= points
    for a, b in zip(hull, [*hull[1:], hull[0]]):
        for point in points:
            assert (b[0] - a[0]) * (point[1] - a[1]) - (b[1] - a[1]) * (point[0] - a[0]) >= 0


# --- figures ---


def test_the_interval_of_a_share():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    low, high = wilson_interval(180, 200)
    assert (round(low, 3), round(high, 3)) == (0.851, 0.934)
    assert wilson_interval(200, 200)[1] == pytest.approx(1.0)


def test_figures_of_some_episodes():
    def result(scenario, outcome):
        return EpisodeResult(scenario, 1, "go", outcome, 10, 3.0, 2.2, 2.0)

    results = [result("1box_vert_left", "success"), result("1box_vert_left", "collision")]
    results += [result("2box_hori_right", "wrong side"), result("2box_hori_right", "timeout")]
    figures = summarize(results)
    assert (figures["episodes"], figures["success_rate"], figures["path_ratio"]) == (4, 0.25, pytest.approx(1.1))
    assert figures["collision_rate"] == figures["wrong_side_rate"] == figures["timeout_rate"] == 0.25
    by_scenario = summarize_by_scenario(results)
    assert list(by_scenario) == ["1box_vert_left", "2box_hori_right"]
    assert by_scenario["2box_hori_right"]["success_rate"] == 0.0
    assert by_scenario["2box_hori_right"]["path_ratio"] is None


# --- images ---


@pytest.fixture(scope="module")
def renderer():
    pytest.importorskip("panda3d")
    from mobile_vla_inference.sim.renderer import Renderer

    renderer = Renderer()
    yield renderer
    renderer.close()


def plain(layout):
    """The layout without noise, blur and tint, and a box of one colour."""
    light = replace(layout.light, noise_std=0.0, blur_px=0, gain=(1.0, 1.0, 1.0), contrast=0.0)
    boxes = tuple(replace(box, rgb=(1.0, 0.0, 0.0)) for box in layout.boxes)
    return replace(layout, light=light, boxes=boxes, cup_rgb=(0.0, 0.0, 1.0))


def test_an_image_shows_the_box_at_its_place(renderer):
    layout = plain(draw_layout("1box_hori_left", 1))
    box = layout.boxes[0]
    scene = renderer.scene(layout)

    def columns(yaw_rad):
        red = (scene.frame(Pose(0.0, 0.0, yaw_rad)) == (255, 0, 0)).all(axis=-1)
        return np.flatnonzero(red.any(axis=0)), np.flatnonzero(red.any(axis=1))

    facing = math.atan2(box.y_m, box.x_m)
    across, down = columns(facing)
    assert abs(across.mean() - renderer.size_px / 2) < 12
    assert down.min() < renderer.size_px / 2 < down.max()  # taller than the camera
    turned_left, _ = columns(facing + 0.2)
    assert turned_left.mean() > across.mean() + 20  # the box moves to the right
    assert not columns(facing + math.pi)[0].size
    scene.close()


def test_the_cup_is_hidden_at_the_start_and_seen_from_behind_the_boxes(renderer):
    layout = plain(draw_layout("1box_hori_left", 2))
    scene = renderer.scene(layout)

    def blue(pose):
        return (scene.frame(pose) == (0, 0, 255)).all(axis=-1).sum()

    assert blue(layout.start) == 0
    assert blue(Pose(layout.cup[0] - 0.6, layout.cup[1], 0.0)) > 100
    scene.close()


def test_images_of_two_worlds_do_not_mix_and_noise_follows_the_seed(renderer):
    layouts = [draw_layout("2box_vert_left", seed) for seed in (1, 2)]
    scenes = [renderer.scene(layout) for layout in layouts]
    first = [scene.frame(Pose()) for scene in scenes]
    assert first[0].shape == (renderer.size_px, renderer.size_px, 3)
    assert first[0].dtype == np.uint8
    assert (first[0] != first[1]).mean() > 0.5
    again = [renderer.scene(layout).frame(Pose()) for layout in layouts]
    assert all((a == b).all() for a, b in zip(first, again))


class Blind:
    """Drives straight on, and keeps the frames and instructions that it got."""

    def __init__(self):
        self.frames = []
        self.instructions = []

    def begin(self, instruction):
        self.instructions.append(instruction)

    def drive(self, frame):
        self.frames.append(frame.copy())
        return VelocityCommand(MAX_LINEAR_MPS)


@pytest.mark.parametrize("camera", ["on", "frozen", "black"])
def test_the_driver_of_an_episode_gets_the_cameras_images(renderer, camera):
    driver = Blind()
    shown = []
    result = drive_episode(
        EpisodeTask("1box_hori_left", 3, "go left"),
        driver,
        renderer,
        period_s=STEP_S,
        camera=camera,
        watcher=lambda world, frame, command: shown.append(world.pose),
    )
    assert driver.instructions == ["go left"]
    assert result.outcome == "collision"
    assert result.steps == len(driver.frames) == len(shown)
    assert result.path_m > ROBOT_RADIUS_M
    changes = [(a != b).mean() for a, b in zip(driver.frames, driver.frames[1:])]
    assert (min(changes) > 0.0) == (camera == "on")
    assert any(frame.any() for frame in driver.frames) == (camera != "black")


def test_without_panda3d_one_sentence_names_the_requirements(monkeypatch):
    from mobile_vla_inference.sim.renderer import Renderer, SimulatorError

    monkeypatch.setitem(sys.modules, "panda3d", None)
    with pytest.raises(SimulatorError, match=r"requirements/world\.txt"):
        Renderer()
