"""ROS 2's own linters, where a ROS 2 has them: `colcon test` runs what `package.xml` declares."""

from __future__ import annotations

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCES = [str(REPOSITORY / name) for name in ("mobile_vla_inference", "launch", "test", "setup.py")]


@pytest.mark.linter
@pytest.mark.flake8
def test_flake8() -> None:
    lint = pytest.importorskip("ament_flake8.main", reason="ament_flake8 comes with a full ROS 2 only")
    status, errors = lint.main_with_errors(argv=["--config", str(REPOSITORY / "test/flake8.ini"), *SOURCES])
    assert status == 0, "\n".join(errors)


@pytest.mark.linter
@pytest.mark.pep257
def test_pep257() -> None:
    lint = pytest.importorskip("ament_pep257.main", reason="ament_pep257 comes with a full ROS 2 only")
    status = lint.main(argv=["--convention", "google", "--add-ignore", "D105", "D107", "--", SOURCES[0]])
    assert status == 0


@pytest.mark.linter
@pytest.mark.xmllint
def test_xmllint() -> None:
    lint = pytest.importorskip("ament_xmllint.main", reason="ament_xmllint comes with a full ROS 2 only")
    assert lint.main(argv=[str(REPOSITORY / "package.xml")]) == 0
