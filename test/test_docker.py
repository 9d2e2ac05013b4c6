"""docker/: each check of run.sh made to fail, its dry run against a reference, and every file through its linter."""

from __future__ import annotations

import csv
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from mobile_vla_inference.tools.bench.images_profile import IMAGES_PROFILE

REPOSITORY = Path(__file__).resolve().parent.parent
DOCKER = REPOSITORY / "docker"
BIN = Path(sys.executable).parent

#: A `docker` that answers as an engine would; the variable BROKEN names the question that it answers badly.
FAKE_DOCKER = """#!/bin/sh
case "$1 $2" in
    "info --format") [ "$BROKEN" = runtime ] && echo '{"runc":{}}' || echo '{"nvidia":{},"runc":{}}' ;;
    "info "*) [ "$BROKEN" != daemon ] ;;
    "image inspect") [ "$BROKEN" != image ] ;;
    "container inspect") [ "$BROKEN" = container ] ;;
    "run "*) echo "started: $*" ;;
esac
"""


def _script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def run_sh(tmp_path, tiny_checkpoint) -> Callable[..., subprocess.CompletedProcess]:
    """Return what runs docker/run.sh with commands of our own first on its PATH."""
    programs = tmp_path / "bin"
    programs.mkdir()
    _script(programs / "docker", FAKE_DOCKER)
    _script(programs / "free", "#!/bin/sh\necho 'head'; echo \"Mem: 15000 1 1 1 1 ${FREE_MIB:-14000}\"\n")
    _script(programs / "df", "#!/bin/sh\necho Avail; echo ${DISK_MIB:-50000}\n")
    _script(programs / "python3", f'#!/bin/sh\nexec {sys.executable} "$@"\n')

    def run(*arguments: str, checkpoint: Path | None = tiny_checkpoint, **environment: str):
        given = [] if checkpoint is None else ["--checkpoint", str(checkpoint)]
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("ROS_", "RMW_", "FASTRTPS_"))
        }
        return subprocess.run(
            [str(DOCKER / "run.sh"), *given, *arguments],
            env={**inherited, "PATH": f"{programs}:{os.environ['PATH']}", **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


def test_the_dry_run_is_the_reference(run_sh, tiny_checkpoint):
    done = run_sh(
        *("--dry-run", "--gpu", "jetson", "--memory", "4800", "--", "image_topic:=/camera/image_raw"),
        ROS_DOMAIN_ID="7",
        RMW_IMPLEMENTATION="rmw_fastrtps_cpp",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "docker run \\\n"
        "    --name mobile_vla \\\n"
        "    --network host \\\n"
        "    --ipc host \\\n"
        "    --runtime nvidia \\\n"
        "    --memory 4800m \\\n"
        "    --memory-swap 4800m \\\n"
        "    --oom-score-adj=-200 \\\n"
        "    --rm \\\n"
        "    --init \\\n"
        "    --env ROS_DOMAIN_ID=7 \\\n"
        "    --env RMW_IMPLEMENTATION=rmw_fastrtps_cpp \\\n"
        f"    --mount type=bind\\,source={tiny_checkpoint.parent}\\,target=/policies\\,readonly \\\n"
        "    mobile_vla_inference:jetson ros2 launch mobile_vla_inference mobile_vla.launch.py "
        f"checkpoint:=/policies/{tiny_checkpoint.name} image_topic:=/camera/image_raw\n"
    )
    assert "memory: " in done.stderr


def test_with_everything_in_place_it_runs_what_it_printed(run_sh):
    done = run_sh("--gpu", "nvidia", "--detach")
    assert done.returncode == 0, done.stderr
    command, _, started = done.stdout.partition("started: ")
    printed = shlex.split(command.replace("\\\n", " "))
    assert printed[:2] == ["docker", "run"]
    assert started.split() == printed[1:]
    assert "--gpus all" in started
    assert "--restart unless-stopped" in started


@pytest.mark.parametrize("name", ["run:3", "a,b", 'the "best" one', "-checkpoint", "로봇 1", "a:/policies:rw,b"])
def test_any_name_of_a_folder_can_be_mounted(run_sh, tiny_checkpoint, tmp_path, name):
    folder = tmp_path / name
    folder.mkdir(parents=True)
    checkpoint = Path(shutil.copy(tiny_checkpoint, folder / f"{name[:6].replace('/', '_')}.pth"))
    done = run_sh("--dry-run", "--gpu", "none", "--memory", "4800", "--processors", str(folder), checkpoint=checkpoint)
    assert done.returncode == 0, done.stderr
    command = shlex.split(done.stdout.replace("\\\n", " "))
    mounts = [next(csv.reader([word])) for before, word in pairwise(command) if before == "--mount"]
    assert mounts == [
        ["type=bind", f"source={folder}", "target=/policies", "readonly"],
        ["type=bind", f"source={folder}", "target=/processors", "readonly"],
    ]
    assert f"checkpoint:=/policies/{checkpoint.name}" in command
    assert "--volume" not in command


def test_a_pipe_is_no_checkpoint(run_sh, tmp_path):
    os.mkfifo(tmp_path / "policy.pth")
    done = run_sh("--dry-run", checkpoint=tmp_path / "policy.pth")
    assert done.returncode == 2
    assert "policy.pth is a device, pipe or socket" in done.stderr


def test_a_tool_runs_instead_of_the_node(run_sh):
    done = run_sh("--dry-run", "--gpu", "none", "--tool", "--", "drill", "--rounds", "3")
    assert done.returncode == 0, done.stderr
    command = done.stdout.replace("\\\n", " ").split()
    assert command[-7:] == ["ros2", "run", "mobile_vla_inference", "mobile_vla", "drill", "--rounds", "3"]
    assert "--interactive" in done.stdout


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        ("daemon", "the Docker daemon does not answer"),
        ("runtime", "Docker has no NVIDIA runtime"),
        ("image", "image mobile_vla_inference:jetson does not exist"),
        ("container", "a container named mobile_vla already exists"),
    ],
)
def test_each_fault_of_docker_has_its_sentence_and_fix(run_sh, broken, sentence):
    done = run_sh("--gpu", "jetson", BROKEN=broken)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "run:" in done.stderr
    assert "started" not in done.stdout


def test_a_missing_docker_is_named(run_sh, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("bash", "dirname", "id", "realpath", "env"):
        (bare / name).symlink_to(shutil.which(name))
    done = run_sh("--gpu", "none", PATH=str(bare))
    assert done.returncode == 2
    assert "docker is not installed" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "sentence"),
    [
        (["--dtype", "int3"], {}, "--dtype is int3"),
        (["--gpu", "tpu"], {}, "--gpu is tpu"),
        (["--memory", "lots"], {}, "--memory is lots"),
        (["--sideways"], {}, "unknown option --sideways"),
        (["--image"], {}, "--image has no value"),
        (["--processors", "/nowhere"], {}, "--processors /nowhere does not exist"),
        (["--params-file", "/nowhere.yaml"], {}, "--params-file /nowhere.yaml does not exist"),
        (["--camera", "/dev/null.0"], {}, "--camera /dev/null.0 is not a device"),
        ([], {"FREE_MIB": "300"}, "300 MiB of memory are available"),
        ([], {"DISK_MIB": "20"}, "20 MiB of disk are free"),
    ],
)
def test_each_other_fault_has_its_sentence(run_sh, arguments, environment, sentence):
    done = run_sh("--dry-run", *arguments, **environment)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert done.stdout == ""


def test_a_missing_and_a_broken_checkpoint_are_named(run_sh, tmp_path):
    assert "no checkpoint was given" in run_sh("--dry-run", checkpoint=None).stderr
    assert "does not exist" in run_sh("--dry-run", checkpoint=tmp_path / "missing.pth").stderr
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"no checkpoint")
    done = run_sh("--dry-run", checkpoint=broken)
    assert done.returncode == 2
    assert "broken.pth" in done.stderr
    assert "the checkpoint can't be used" in done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_an_unreadable_checkpoint_is_named(run_sh, tmp_path):
    locked = tmp_path / "locked.pth"
    locked.write_bytes(b"x")
    locked.chmod(0)
    assert "is not readable" in run_sh("--dry-run", checkpoint=locked).stderr


def test_the_memory_limit_is_what_the_policy_needs(run_sh):
    done = run_sh("--dry-run", "--gpu", "none")
    (needed,) = [line.split()[1] for line in done.stderr.splitlines() if line.startswith("memory: ")]
    assert f"--memory {needed}m" in done.stdout
    assert int(needed) > 512


def lint(*command: str) -> None:
    done = subprocess.run([str(word) for word in command], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.jetson"])
def test_hadolint_passes(name):
    lint(BIN / "hadolint", f"docker/{name}")


def test_shellcheck_passes():
    scripts = [*DOCKER.glob("*.sh"), *(REPOSITORY / "scripts").iterdir(), REPOSITORY / ".ci/run"]
    shell = [path for path in scripts if path.is_file() and "python" not in path.read_text().splitlines()[0]]
    assert len(shell) >= 8
    lint(BIN / "shellcheck", "-x", *sorted(shell))


def test_the_compose_file_fits_its_specification():
    lint(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", "docker/compose.yaml")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_accepts_the_unit(tmp_path):
    unit = tmp_path / "mobile-vla.service"
    # The check wants every program to exist, and Docker is not everywhere.
    unit.write_text((DOCKER / "mobile-vla.service").read_text().replace("/usr/bin/docker", shutil.which("true")))
    lint("systemd-analyze", "verify", unit)


def test_a_python_that_has_a_recent_torch_keeps_it(tmp_path):
    done = _install_policy(tmp_path, torch="2.7.0+nv25.5")
    assert done.returncode == 0, done.stderr
    assert "keeping torch 2.7.0" in done.stdout
    assert not any(line.startswith("torch") for line in _installed(tmp_path))
    assert any(line.startswith("transformers==") for line in _installed(tmp_path))


def test_an_old_torch_is_raised_from_the_index_that_is_named(tmp_path):
    done = _install_policy(tmp_path, torch="2.3.0", TORCH_INDEX_URL="https://torch.example/simple")
    assert done.returncode == 0, done.stderr
    assert "torch>=2.6" in _installed(tmp_path)
    assert "https://torch.example/simple" in _installed(tmp_path)


def test_an_old_torch_without_an_index_is_refused(tmp_path):
    done = _install_policy(tmp_path, torch="2.3.0")
    assert done.returncode == 1
    assert "torch is 2.3.0, expected 2.6 or later" in done.stderr


def test_without_torch_the_pinned_one_is_installed(tmp_path):
    done = _install_policy(tmp_path, torch="")
    assert done.returncode == 0, done.stderr
    assert any(line.startswith("torch==") for line in _installed(tmp_path))


def test_the_numpy_is_the_one_that_the_release_is_built_for(tmp_path):
    assert _install_policy(tmp_path, torch="").returncode == 0
    constraints = (tmp_path / "constraints.txt").read_text().splitlines()
    by_python = {python: _numpy(constraints, python) for python in ("3.10", "3.12", "3.13", "3.14")}
    assert by_python == {"3.10": "<2", "3.12": "<2", "3.13": ">=2", "3.14": ">=2"}
    (tmp_path / "constraints.txt").unlink()
    assert _install_policy(tmp_path, torch="", NUMPY="numpy==1.26.4").returncode == 0
    assert _numpy((tmp_path / "constraints.txt").read_text().splitlines(), "3.14") == "==1.26.4"


def _numpy(constraints: list[str], python: str) -> str:
    """Return the versions of numpy that constraints allow for a version of Python."""
    requirements = [Requirement(line) for line in constraints if line.startswith("numpy")]
    (found,) = [
        each for each in requirements if each.marker is None or each.marker.evaluate({"python_version": python})
    ]
    return str(found.specifier)


def _install_policy(tmp_path: Path, torch: str, **environment: str) -> subprocess.CompletedProcess:
    """Run install_policy.sh with a Python that has this torch and writes down what pip is asked for."""
    python = tmp_path / "python"
    _script(
        python,
        f"""#!/bin/sh
if [ "$1" = -c ]; then
    [ -n "{torch}" ] && echo "{torch.partition("+")[0]}"
    exit
fi
printf '%s\\n' "$@" >> {tmp_path}/pip.txt
while [ $# -gt 1 ]; do
    [ "$1" = --constraint ] && cat "$2" >> {tmp_path}/constraints.txt
    shift
done
exit 0
""",
    )
    return subprocess.run(
        [str(DOCKER / "install_policy.sh"), str(REPOSITORY / "requirements")],
        env={**os.environ, "PYTHON": str(python), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def _installed(tmp_path: Path) -> list[str]:
    return (tmp_path / "pip.txt").read_text().splitlines()


def test_robots_and_benchmarks_have_the_same_fast_dds_profile():
    assert (DOCKER / "fastdds_images.xml").read_text() == IMAGES_PROFILE


@pytest.mark.parametrize("damaged", [False, True])
def test_fast_dds_accepts_the_profile_and_would_say_if_not(tmp_path, damaged):
    text = (DOCKER / "fastdds_images.xml").read_text()
    profile = tmp_path / "profile.xml"
    profile.write_text(text.replace("segment_size", "segmentsize") if damaged else text)
    done = subprocess.run(
        [sys.executable, "-c", "import rclpy; rclpy.init(); rclpy.create_node('profile'); print('created')"],
        env={**os.environ, "FASTDDS_DEFAULT_PROFILES_FILE": str(profile)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "created" in done.stdout
    assert ("XMLPARSER" in done.stderr) is damaged


def test_building_without_the_repository_is_refused(tmp_path):
    done = subprocess.run([str(DOCKER / "build_package.sh"), str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "contains no package.xml" in done.stderr


@pytest.mark.skipif(shutil.which("colcon") is None, reason="colcon is not installed")
def test_the_package_builds_in_a_clean_workspace(tmp_path):
    (tmp_path / "src").mkdir()
    clone = ["git", "clone", "--quiet", str(REPOSITORY), str(tmp_path / "src/mobile_vla_inference")]
    subprocess.run(clone, check=True, timeout=60)
    done = subprocess.run(
        [str(DOCKER / "build_package.sh"), str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    share = tmp_path / "install/mobile_vla_inference/share/mobile_vla_inference"
    assert (share / "package.xml").exists()
    assert (share / "launch/mobile_vla.launch.py").exists()
