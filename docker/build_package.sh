#!/usr/bin/env bash
# Build the package with colcon: build_package.sh WORKSPACE, whose src/ contains the repository.
# ROS_SETUP names a ROS 2 set-up file to source first; colcon is found on the PATH.
set -eo pipefail # ROS's set-up files use unset variables

workspace=${1:?"build_package.sh: error: no workspace was given; usage: build_package.sh WORKSPACE"}
if [[ ! -f $workspace/src/mobile_vla_inference/package.xml ]]; then
    echo "build_package.sh: error: $workspace/src/mobile_vla_inference contains no package.xml, expected the repository;" \
        "copy it there" >&2
    exit 1
fi
if [[ -n ${ROS_SETUP:-} ]]; then
    # shellcheck source=/dev/null
    source "$ROS_SETUP"
fi
cd "$workspace"
colcon build --packages-select mobile_vla_inference
