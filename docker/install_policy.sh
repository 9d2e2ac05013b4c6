#!/usr/bin/env bash
# Install what the policy's process and the tools need on top of ROS 2: install_policy.sh REQUIREMENTS_DIR [options of pip]
#
# An image with torch (a Jetson's, built for its GPU) keeps it if it is 2.6 or later; an older one is upgraded, from
# the index TORCH_INDEX_URL, because only a vendor's index has builds for a Jetson's GPU. PYTHON is the
# interpreter (default python3), NUMPY its constraint (default: what a ROS distribution's messages and cv_bridge are
# built for, by ros-sourced.txt).
set -euo pipefail

readonly oldest_torch=2.6
requirements=${1:?"install_policy.sh: error: no requirements folder was given; usage: install_policy.sh REQUIREMENTS_DIR"}
shift
python=${PYTHON:-python3}
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT

fail() {
    echo "install_policy.sh: error: $*" >&2
    exit 1
}

[[ -f $requirements/runtime.txt ]] || fail "$requirements holds no runtime.txt, expected the repository's requirements/; give it"

# Print the version of the torch that is installed, nothing if there is none.
installed_torch() {
    "$python" -c 'import torch; print(torch.__version__.partition("+")[0])' 2>/dev/null || true
}

is_recent() {
    [[ -n $1 && $(printf '%s\n' "$oldest_torch" "$1" | sort --version-sort | head -n 1) == "$oldest_torch" ]]
}

{
    cat "$requirements/lock.txt"
    echo "${NUMPY:-$(grep '^numpy' "$requirements/ros-sourced.txt")}"
} >"$constraints"
packages=(safetensors simplejpeg tokenizers transformers)
options=(--no-cache-dir --constraint "$constraints" "$@")

torch=$(installed_torch)
if is_recent "$torch"; then
    echo "keeping torch $torch"
    # Pinned to the installed version, or pip would replace a vendor's build with its own.
    echo "torch==$torch" >"$constraints.torch"
    sed '/^torch==/d' "$constraints" >>"$constraints.torch"
    mv "$constraints.torch" "$constraints"
elif [[ -n ${TORCH_INDEX_URL:-} ]]; then
    echo "torch ${torch:-is missing}: installing one of at least $oldest_torch from TORCH_INDEX_URL"
    sed -i '/^torch==/d' "$constraints"
    "$python" -m pip install "${options[@]}" --upgrade --index-url "$TORCH_INDEX_URL" "torch>=$oldest_torch"
elif [[ -n $torch ]]; then
    fail "torch is $torch, expected $oldest_torch or later; set TORCH_INDEX_URL to an index with builds for this machine"
else
    packages+=(torch)
fi

for package in "${packages[@]}"; do
    grep -E "^$package==" "$requirements/runtime.txt" || fail "$requirements/runtime.txt has no pin of $package"
done | xargs "$python" -m pip install "${options[@]}" --requirement "$requirements/workbench.txt"
