#!/usr/bin/env bash
# Install ROS 2 Humble and the system packages that the node needs, on Ubuntu 22.04; keeps an installed ROS 2.
set -euo pipefail

packages=(
    python3-colcon-common-extensions python3-opencv python3-pip python3-psutil python3-rich python3-tqdm
    ros-humble-cv-bridge ros-humble-nav-msgs ros-humble-ros-base
    ros-humble-twist-mux
)
# NVIDIA's images contain their own OpenCV with CUDA, which conflicts with Ubuntu's; both work.
if python3 -c 'import cv2' 2>/dev/null; then
    packages=("${packages[@]/python3-opencv/}")
fi

apt-get update
apt-get install --yes --no-install-recommends ca-certificates curl gnupg
if [[ ! -f /opt/ros/humble/setup.bash ]]; then
    curl --fail --silent --show-error --location https://raw.githubusercontent.com/ros/rosdistro/master/ros.key \
        --output /usr/share/keyrings/ros-archive-keyring.gpg
    echo "deb [arch=$(dpkg --print-architecture) signed-by=/usr/share/keyrings/ros-archive-keyring.gpg]" \
        "http://packages.ros.org/ros2/ubuntu jammy main" >/etc/apt/sources.list.d/ros2.list
    apt-get update
fi
# shellcheck disable=SC2068  # an element removed above is empty and must disappear
apt-get install --yes --no-install-recommends ${packages[@]}
rm -rf /var/lib/apt/lists/*
