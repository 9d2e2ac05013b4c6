"""The report of a replay: what the page holds, always; how it behaves, where a Chromium is found."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace as changed
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from bag_files import PERIOD_NS, START_NS, stamps, write_drive
from test_replay import CountingPolicy, run

from mobile_vla_inference.replay.report import (
    PICTURES_MOST,
    events,
    page_data,
    picture_indices,
    report_html,
    write_report,
)
from mobile_vla_inference.replay.result import ReplayResult
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
    assert f"its limits change</span><b>{share}</b>" in text
    assert f"changed {gate['changed']} of {gate['moving']} frames" in text
    assert f"<td>speed of linear.x</td><td class=number>{gate['by']['speed of linear.x']}</td>" in text
    data = json.loads(Page(text).scripts["data"])
    told = [data["limits"][code] for code in data["limit"]]
    assert told == [", ".join(names or ()) for names in gate["frames"]]


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
        {"id": "frame", "alt": "the frame at the cursor"}
    ]


def test_two_replays_stand_side_by_side(result, tmp_path):
    short = run(tmp_path / "drive", CountingPolicy(), max_frames=15)
    other = changed(short, policy=changed(short.policy, checkpoint="the other"))
    data = page_data(result, other)
    assert [series["key"] for series in data["series"]] == ["recorded", "predicted", "gated", "against"]
    assert data["series"][3]["values"][0][14:] == [round(other.frames[14].command[0], 4)] + 5 * [None]
    text = report_html(result, other)
    assert "the other" in text
    assert "how far the two are apart" in text


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
    assert (3, "the state was cleared: start") in found
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
    assert page.locator("#arrows line").count() > 0


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
    assert "no picture" in page.inner_text(".picture")
    page.close()
    assert complaints == []
