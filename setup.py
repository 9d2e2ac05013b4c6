"""Install the package: the nodes and the command line as executables, launch files and parameters as shared data."""

from pathlib import Path

from setuptools import find_packages, setup

NAME = "mobile_vla_inference"
SHARE = f"share/{NAME}"


def files_in(folder: str, pattern: str) -> list:
    """List the files of a folder of the repository; setuptools wants relative paths."""
    return sorted(str(path) for path in Path(folder).glob(pattern))


setup(
    name=NAME,
    version="0.1.0",
    packages=find_packages(include=[NAME, f"{NAME}.*"]),
    package_data={NAME: ["data/small_policy/*", "data/small_policy/processors/*/*", "replay/report_page/*"]},
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (SHARE, ["package.xml"]),
        (f"{SHARE}/config", files_in("config", "*.*")),
        (f"{SHARE}/launch", files_in("launch", "*.launch.py")),
    ],
    # Versions are pinned in requirements/; torch and transformers are left to the robot's own builds.
    install_requires=["setuptools"],
    zip_safe=False,
    author="mobile_vla_inference maintainers",
    maintainer="mobile_vla_inference maintainers",
    maintainer_email="maintainers@mobile-vla.invalid",
    description="A hybrid vision-language-action policy (Kosmos-2, CLIP, LSTM) as a ROS 2 node",
    license="Apache-2.0",
    python_requires=">=3.10",
    entry_points={
        "console_scripts": [
            "mobile_vla = mobile_vla_inference.tools.cli:main",
            "sim_robot = mobile_vla_inference.ros.sim_robot:main",
            "vla_node = mobile_vla_inference.ros.node:main",
        ],
    },
)
