"""The report of a replay: what the page holds, always; how it behaves, where a Chromium is found."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace as changed
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from bag_files import PERIOD_NS, START_NS, stamps, write_drive
from test_replay import CountingPolicy, run

from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.replay.dead_reckoning import held, integrate
from mobile_vla_inference.replay.report.drives import drive_of, read_drive
from mobile_vla_inference.replay.report.labels import labels
from mobile_vla_inference.replay.report.limits import ANY_LIMIT, limit_shares
from mobile_vla_inference.replay.report.page import report_html, write_report
from mobile_vla_inference.replay.report.page_data import PICTURES_MOST, page_data, picture_indices
from mobile_vla_inference.replay.report.plots import path_extent, ticks
from mobile_vla_inference.replay.report.sections import events
from mobile_vla_inference.replay.result import ReplayResult
from mobile_vla_inference.replay.summary import result_json
from mobile_vla_inference.replay.training_record import TrainingRecord, read_training_record, seen_frames
from mobile_vla_inference.tools import cli

#: Closes a script, an attribute and a comment where it is not escaped.
NASTY = """</script><img src=x onerror="alert(1)"><!-- '&amp; 박스를 왼쪽으로"""


class Page(HTMLParser):
    """The elements of a page, and the texts of its scripts by their id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.scripts: dict[str | None, str] = {}
        self._script: str | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)
        if tag == "script":
            self._script = dict(attrs).get("id")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[self._script] = self.scripts.get(self._script, "") + data


@pytest.fixture
def result(tmp_path) -> ReplayResult:
    return run(
        write_drive(tmp_path / "drive", instructions={0: "follow the track", 8: "go back"}),
        command_line="mobile_vla replay drive --checkpoint counting",
    )


def test_the_page_holds_what_the_replay_found(result):
    page = Page(report_html(result))
    assert page.open == []
    data, pictures = (json.loads(page.scripts[name]) for name in ("data", "pictures"))
    assert data["times"] == pytest.approx([0.05 * index for index in range(20)])
    assert [axis["name"] for axis in data["axes"]] == ["linear.x", "angular.z"]
    by_key = {series["key"]: series["values"] for series in data["series"]}
    assert by_key["predicted"][0] == [round(frame.command[0], 4) for frame in result.frames]
    assert by_key["recorded"][1] == pytest.approx([-0.01 * index for index in range(20)])
    assert data["instructions"] == ["follow the track", "go back"]
    assert [index for index, mark in enumerate(data["marks"]) if mark] == [0, 8]
    assert pictures["frames"] == list(range(20))
    assert all(base64.b64decode(jpeg).startswith(b"\xff\xd8") for jpeg in pictures["jpeg"])
    text = report_html(result)
    assert "mobile_vla replay drive --checkpoint counting" in text
    assert result.versions["numpy"] in text


def test_the_page_tells_what_the_limits_of_the_gate_changed(result):
    gate = result.gate
    text = report_html(result)
    share = f"{gate['changed'] / gate['moving']:.1%}"
    assert gate["changed"] > 10
    assert f"changed by the gate&#x27;s limits</span><b>{share}</b>" in text
    assert f"changed {gate['changed']} of {gate['moving']} moving frames" in text
    limit = f"{gate['limits']['max_linear_x_mps']:g} m/s"
    assert f"<td>speed of linear.x</td><td>{limit}</td><td class=number>{gate['by']['speed of linear.x']}</td>" in text
    data = json.loads(Page(text).scripts["data"])
    shown = [data["limits"][code] for code in data["limit"]]
    assert shown == [", ".join(names or ()) for names in gate["frames"]]


def test_nothing_is_fetched(result):
    text = report_html(result)
    for tag, attributes in Page(text).elements:
        assert tag not in ("link", "iframe", "object", "base"), tag
        assert not {"src", "href", "srcset", "action"} & set(attributes), tag
    assert "default-src 'none'" in text
    assert "url(" not in text
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}  # a name, not an address


def test_words_from_outside_stay_words(result):
    policy = changed(result.policy, checkpoint=NASTY)
    frames = tuple(changed(frame, instruction=NASTY) for frame in result.frames)
    nasty = changed(
        result, policy=policy, frames=frames, notes=(NASTY,), command_line=NASTY, instructions=(NASTY,), bag=Path(NASTY)
    )
    page = Page(report_html(changed(nasty, bag=result.bag), nasty))
    assert page.open == []
    assert json.loads(page.scripts["data"])["instructions"] == [NASTY]
    assert [attributes for tag, attributes in page.elements if tag == "img"] == [
        {"id": "frame", "alt": "the image at the cursor"}
    ]


def test_two_replays_stand_side_by_side(result, tmp_path):
    short = run(tmp_path / "drive", CountingPolicy(), max_frames=15)
    other = changed(short, policy=changed(short.policy, checkpoint="the other"))
    data = page_data(result, other)
    assert [series["key"] for series in data["series"]] == ["recorded", "predicted", "gated", "against"]
    assert data["series"][3]["values"][0][14:] == [round(other.frames[14].command[0], 4)] + 5 * [None]
    text = report_html(result, other)
    assert "the other" in text
    assert "difference of the two predictions" in text


def test_a_drive_without_commands_says_so(tmp_path):
    silent = run(write_drive(tmp_path / "drive", commands=False))
    assert "recorded" not in [series["key"] for series in page_data(silent)["series"]]
    assert "no recorded command" in report_html(silent)


def test_stamps_out_of_order_give_the_place_to_image_numbers(tmp_path):
    times = stamps(20)
    times[10:] = [START_NS + index * PERIOD_NS for index in range(10)]
    data = page_data(run(write_drive(tmp_path / "drive", times)))
    assert (data["time_unit"], data["times"]) == ("image", list(range(20)))


def test_a_command_that_is_not_finite_is_left_out_of_the_plots(result):
    frames = (changed(result.frames[0], recorded=(float("nan"), 0.0, float("inf"))), *result.frames[1:])
    recorded = page_data(changed(result, frames=frames))["series"][0]["values"]
    assert (recorded[0][0], recorded[1][0]) == (None, None)
    report_html(changed(result, frames=frames))  # JSON knows no NaN


def test_events_tell_what_changed(tmp_path):
    path = write_drive(tmp_path / "drive", instructions={3: "follow the track", 9: "go back"})
    found = events(run(path, CountingPolicy(fail_at=(2,))).frames)
    assert (0, "dropped from here: no_instruction") in found
    assert (3, "instruction: follow the track") in found
    assert (3, "the LSTM state was reset: start") in found
    assert (5, "dropped from here: step_failed") in found
    assert (9, "instruction: go back") in found


@pytest.mark.parametrize(("count", "most"), [(0, 5), (1, 5), (5, 5), (6, 5), (10_000, PICTURES_MOST)])
def test_pictures_are_thinned_out_evenly(count, most):
    indices = picture_indices(count, most)
    assert len(indices) == min(count, most)
    assert indices == sorted(set(indices))
    if count:
        assert (indices[0], indices[-1]) == (0, count - 1)


def test_the_subcommand_writes_it(tmp_path, tiny_checkpoint, capsys):
    path = write_drive(tmp_path / "drive")
    report = tmp_path / "drive.html"
    assert cli.main(["replay", str(path), "--checkpoint", str(tiny_checkpoint), "--report", str(report)]) == 0
    assert "tiny.pth" in report.read_text()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["drive", "drive.html"]


# ---- limits, paths, training and other drives ------------------------------------------------------------------------


def test_each_limit_has_its_share_of_the_moving_images_and_of_their_time():
    limited = [None, ("speed of linear.x",), (), ("speed of linear.x", "acceleration")]
    shares = {share.name: share for share in limit_shares([0.0, 1.0, 1.5, 2.0], limited)}
    assert (shares["speed of linear.x"].frames, shares["speed of linear.x"].frame_share) == (2, pytest.approx(2 / 3))
    assert (shares["acceleration"].time_s, shares["acceleration"].time_share) == (0.5, pytest.approx(1 / 3))
    assert shares["speed of angular.z"].frames == 0
    assert shares[ANY_LIMIT].frames == 2


def test_a_gap_in_the_images_counts_as_no_time_of_a_limit():
    limited = [("acceleration",), ("acceleration",)]
    assert limit_shares([0.0, 100.0], limited)[-1].time_s == 0.0
    assert limit_shares([], [])[-1].frame_share == 0.0


@pytest.mark.parametrize(
    ("velocity", "end"),
    [
        ((0.5, 0.0, 0.0), (1.0, 0.0, 0.0)),
        ((0.0, 0.5, 0.0), (0.0, 1.0, 0.0)),  # an omnidirectional base, to the left
        ((0.0, 0.0, 1.0), (0.0, 0.0, 2.0)),
        ((1.0, 0.0, math.pi / 4), (4 / math.pi, 4 / math.pi, math.pi / 2)),  # a quarter of a circle to the left
    ],
)
def test_commands_are_integrated_by_rep_103(velocity, end):
    poses = integrate([0.0, 0.5, 1.0, 2.0], [velocity] * 4)
    assert poses[0].tolist() == [0.0, 0.0, 0.0]
    assert poses[-1] == pytest.approx(np.array(end), abs=1e-9)


def test_silence_gaps_and_time_that_runs_backwards_move_nothing():
    ahead = (1.0, 0.0, 0.0)
    assert integrate([0.0, 1.0, 2.0], [ahead, None, ahead])[-1, 0] == pytest.approx(1.0)
    assert integrate([0.0, 10.0, 9.0, 9.5], [ahead] * 4)[-1, 0] == pytest.approx(0.5)
    assert integrate([0.0, 1.0], [(math.nan, 0.0, 0.0)] * 2)[-1, 0] == 0.0
    assert integrate([], []).shape == (0, 3)
    assert held([0.0, 1.0, 2.5], [ahead, None, None]) == [ahead, ahead, None]


def test_the_page_holds_the_path_of_each_command(result):
    data = page_data(result)
    expected = integrate([0.05 * index for index in range(20)], [frame.recorded for frame in result.frames])
    assert np.array(data["paths"]["recorded"]) == pytest.approx(expected[:, :2], abs=1e-3)
    text = report_html(result)
    assert {attributes["data-path"] for _, attributes in Page(text).elements if "data-path" in attributes} == {
        "recorded",
        "predicted",
        "gated",
    }
    assert "Dead reckoning" in text


def test_a_path_has_the_same_scale_on_both_axes(result):
    (group,) = re.findall(r'class="metres" transform="matrix\((.*?)\)"', report_html(result))
    a, b, c, d, _, _ = map(float, group.split())
    assert (a, d) == (0.0, 0.0)  # x is up, y is to the left
    assert b == c < 0.0


def test_a_path_that_stands_still_still_has_room():
    assert path_extent([np.zeros((3, 3))]) == ((-0.5, 0.5), (-0.5, 0.5))


@pytest.mark.parametrize(
    ("span", "texts"),
    [((-0.73, 0.73), ["-0.5", "0.0", "0.5"]), ((0.0, 41.0), ["0", "20", "40"]), ((0.0, 0.0), ["0"])],
)
def test_ticks_stand_at_round_values(span, texts):
    assert [text for _, text in ticks(*span, 4)] == texts


def test_images_that_training_saw_are_marked(tmp_path):
    seen = seen_frames(TrainingRecord("drive", (0, 12), (12, 20)), tmp_path / "drive", 20)
    assert seen.seen == (*[True] * 12, *[False] * 8)
    assert "steps 0 to 11" in seen.sentence


@pytest.mark.parametrize(
    "record", [None, TrainingRecord("world"), TrainingRecord("another", (0, 12)), TrainingRecord("drive")]
)
def test_what_is_not_recorded_about_training_is_said_so(record, tmp_path):
    seen = seen_frames(record, tmp_path / "drive.mcap", 20)
    assert seen.seen is None
    assert seen.sentence.startswith("Not recorded")


def test_the_record_of_a_training_is_read_from_a_checkpoint(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "policy.pth"
    torch.save({"model_state_dict": {"w": torch.zeros(1)}, "args": {"episodes": "a/drive.h5", "steps": (0, 5)}}, path)
    assert read_training_record(path) == TrainingRecord("drive", (0, 5))
    folder = tmp_path / "converted"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"training": {"args": {"episodes": "world"}}}))
    assert read_training_record(folder) == TrainingRecord("world")
    assert read_training_record(tmp_path / "missing.pth") is None
    (folder / "config.json").write_text("[]")
    assert read_training_record(folder) is None


def test_a_page_shows_what_training_saw_or_that_it_is_not_recorded(result):
    assert page_data(result)["seen"] is None
    assert "<b>not recorded</b>" in report_html(result)
    assert page_data(result, seen=[True] * 5 + [False] * 15)["seen"] == [1] * 5 + [0] * 15


def test_drives_are_shown_next_to_each_other_on_the_same_scales(result, tmp_path):
    slow = changed(result, frames=tuple(changed(f, recorded=(0.01, 0.0, 0.0)) for f in result.frames[:10]))
    slow = changed(slow, bag=tmp_path / "slow", gate={**slow.gate, "frames": slow.gate["frames"][:10]})
    file = tmp_path / "slow.json"
    file.write_text(result_json(slow))
    drive = read_drive(file)
    assert drive == drive_of(slow)
    text = report_html(result, more=[drive])
    cards = re.findall(r'<article class="drive">.*?</article>', text, re.DOTALL)
    assert [re.search("<h3>(.*?)</h3>", card)[1] for card in cards] == ["drive, counting", "slow, counting"]
    scales = [re.findall(r'matrix\([^)]*\)|<text x="[^"]*" y="[^"]*"[^>]*>[^<]*</text>', card) for card in cards]
    assert scales[0] == scales[1]
    assert "<article" not in report_html(result)


@pytest.mark.parametrize("content", ["[]", "{}", '{"stamps_s": [], "bag": 1}', "no JSON"])
def test_a_file_that_is_no_replay_is_refused(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(MobileVlaError, match=r"x\.json .*, expected .*; "):
        read_drive(tmp_path / "x.json")


def test_other_drives_need_a_report(tmp_path, tiny_checkpoint, capsys):
    path = write_drive(tmp_path / "drive")
    arguments = ["replay", str(path), "--checkpoint", str(tiny_checkpoint), "--with-drive", "x.json"]
    assert cli.main(arguments) == 2
    assert "--with-drive is given without --report" in capsys.readouterr().err


def test_replays_have_short_names_that_differ(result):
    def named(checkpoint: str, engine: str = "eager") -> ReplayResult:
        return changed(result, policy=changed(result.policy, checkpoint=checkpoint, dtype="float32", engine=engine))

    assert labels([named("a/x.pth"), named("b/y.pth")]) == ["x.pth", "y.pth"]
    assert labels([named("a/x.pth"), named("b/x.pth")]) == ["a/x.pth", "b/x.pth"]
    assert labels([named("x.pth"), named("x.pth", "flat")]) == ["x.pth (float32, eager)", "x.pth (float32, flat)"]


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium is installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium, result, tmp_path) -> Iterator[SimpleNamespace]:
    """The report, open in a page that must complain of nothing and ask for nothing."""
    report = tmp_path / "drive.html"
    other = changed(result, policy=changed(result.policy, checkpoint=NASTY), notes=(NASTY,))
    write_report(result, report, other)
    page = chromium.new_page()
    complaints: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report.as_uri())
    yield SimpleNamespace(page=page, expect=pytest.importorskip("playwright.sync_api").expect)
    page.close()
    assert complaints == []
    assert [url for url in asked if not url.startswith("data:")] == [report.as_uri()]


def state(page) -> tuple[str, str, str, str]:
    """Return what follows the cursor: position, shown frame, its picture and where the line of the first plot is."""
    return page.evaluate(
        "() => [document.getElementById('scrubber').value, document.getElementById('frame').dataset.frame,"
        " document.getElementById('frame').src, document.querySelector('.cursor').style.left]"
    )


def test_the_scrubber_moves_frame_cursor_and_figures(opened):
    page = opened.page
    before = state(page)
    assert before[:2] == ["0", "0"]
    page.fill("#scrubber", "12")
    after = state(page)
    assert after[:2] == ["12", "12"]
    assert all(old != new for old, new in zip(before, after))
    assert "12 of 19" in page.inner_text("#facts")
    assert "go back" in page.inner_text("#facts")
    assert "-0.120" in page.inner_text("#values")
    assert page.evaluate("() => document.getElementById('frame').decode().then(() => [frame.naturalWidth])") == [64]
    assert page.locator("#arcs path.arc").count() == 3


def test_keys_move_the_cursor(opened):
    page = opened.page
    for key, position in (
        ("ArrowRight", "1"),
        ("Shift+ArrowRight", "11"),
        ("ArrowLeft", "10"),
        ("End", "19"),
        ("ArrowRight", "19"),
        ("Home", "0"),
    ):
        page.keyboard.press(key)
        assert state(page)[0] == position
    page.keyboard.press("Space")
    opened.expect(page.locator("#facts")).not_to_contain_text("image0 of 19")  # it plays


def test_a_click_into_a_plot_and_into_an_event_moves_the_cursor(opened):
    page = opened.page
    plot = page.locator(".plot canvas").first
    plot.click(position={"x": plot.bounding_box()["width"] - 9, "y": 20})
    assert state(page)[0] == "19"
    page.get_by_role("button", name="image 8").first.click()
    assert state(page)[0] == "8"


def test_plots_are_drawn_in_both_themes_and_zoomed(opened):
    page = opened.page

    def drawn() -> list[str]:
        return page.evaluate("() => [...document.querySelectorAll('canvas')].map((canvas) => canvas.toDataURL())")

    light = drawn()
    assert len(set(light)) == len(light) == 4
    page.click("#theme")
    dark = drawn()
    assert all(old != new for old, new in zip(light, dark))
    page.keyboard.press("+")
    assert all(old != new for old, new in zip(dark[:2], drawn()))
    page.keyboard.press("0")
    assert drawn() == dark


def test_it_fits_a_phone(opened):
    opened.page.set_viewport_size({"width": 360, "height": 740})
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 360


def test_an_empty_report_opens(chromium, result, tmp_path):
    nothing = {"moving": 0, "changed": 0, "by": {}, "limits": {}, "frames": []}
    nothing = changed(result, frames=(), comparison=None, instructions=(), reasons={}, resets={}, gate=nothing)
    write_report(nothing, tmp_path / "empty.html")
    page = chromium.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto((tmp_path / "empty.html").as_uri())
    assert "could not be read" in page.inner_text(".picture")
    page.close()
    assert complaints == []
