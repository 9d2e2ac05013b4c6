#!/usr/bin/env bash
# Run a command with ROS 2 and the package sourced.
set -e
source /opt/ros/jazzy/setup.bash
source /workspace/install/setup.bash
exec "$@"
