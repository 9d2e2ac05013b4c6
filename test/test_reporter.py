"""Reporter: reports in order, never blocks, is bounded, and continues after a report that fails."""

from __future__ import annotations

import threading
import time

from mobile_vla_inference.control.reporter import CAPACITY, Reporter

PATIENCE_S = 10.0


def test_reports_are_made_in_order_and_a_failing_one_ends_nothing(capsys):
    made: list[int] = []
    reports = Reporter()
    for number in range(100):
        reports.post(lambda number=number: made.append(number))
        if number == 50:
            reports.post(lambda: 1 // 0)
    reports.close(PATIENCE_S)
    assert made == list(range(100))
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_report_that_hangs_blocks_no_post_and_dropped_reports_are_counted():
    entered, release = threading.Event(), threading.Event()
    reports = Reporter()

    def hang() -> None:
        entered.set()
        release.wait(PATIENCE_S)

    reports.post(hang)
    assert entered.wait(PATIENCE_S)
    for _ in range(CAPACITY + 7):
        reports.post(lambda: None)
    assert reports.dropped == 7
    began_s = time.monotonic()
    reports.close(0.05)
    assert time.monotonic() - began_s < PATIENCE_S / 2, "closing does not wait for a report that hangs"
    release.set()
