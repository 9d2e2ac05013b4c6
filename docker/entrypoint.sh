#!/usr/bin/env bash
# Run a command with ROS 2 and the package sourced.
set -e
# shellcheck source=/dev/null
source "${ROS_SETUP:?}"
# shellcheck source=/dev/null
source /workspace/install/setup.bash
exec "$@"
