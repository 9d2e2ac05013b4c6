#!/usr/bin/env bash
# Start the node in its container, after checking what it needs: docker/run.sh --checkpoint CK [options] [-- launch arguments]
# docker/run.sh --help lists the options. The command goes to standard output, the results of the checks to standard error.

set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
image=mobile_vla_inference:jetson
name=mobile_vla
checkpoint="" processors="" params_file="" camera="" dtype=auto gpu=auto memory_mib="" dry_run=false detach=false tool=false
launch_arguments=()

# In addition to the policy: the node, ROS's processes and the page tables.
readonly node_mib=512
readonly disk_mib=1024

usage() {
    cat <<'HELP'
docker/run.sh --checkpoint CK [options] [-- launch arguments]

  --checkpoint CK     checkpoint file or converted folder, mounted read-only
  --processors DIR    processor folder, if it is not next to the checkpoint; mounted read-only
  --params-file FILE  parameters of vla_node instead of config/mobile_vla.yaml; mounted read-only
  --camera DEVICE     video device to pass to the container, such as /dev/video0 (only for a camera driver in it)
  --dtype D           auto, float32, float16, bfloat16 (default auto: float16 on a GPU)
  --gpu KIND          auto, jetson (--runtime nvidia), nvidia (--gpus all), none (default auto)
  --memory MIB        memory limit of the container (default: what the policy needs to load, plus 512 MiB)
  --image NAME        image (default mobile_vla_inference:jetson)
  --name NAME         name of the container (default mobile_vla)
  --detach            run in the background; Docker restarts it after a fault and a reboot
  --tool              run `mobile_vla` with the arguments after -- instead of the node: --tool -- drill
  --dry-run           check files and memory, print the command and start nothing; needs no Docker
  --help              this text

Launch arguments are those of mobile_vla.launch.py: docker/run.sh --checkpoint CK -- image_topic:=/camera/image_raw
ROS_DOMAIN_ID, RMW_IMPLEMENTATION and ROS's other discovery variables are passed to the container.
HELP
}

fail() {
    echo "docker/run.sh: error: $*" >&2
    exit 2
}

value_of() {
    [[ $# -ge 2 && -n $2 ]] || fail "$1 has no value, expected one; see docker/run.sh --help"
    echo "$2"
}

parse() {
    while (($#)); do
        case $1 in
            --checkpoint) checkpoint=$(value_of "$@"); shift ;;
            --processors) processors=$(value_of "$@"); shift ;;
            --params-file) params_file=$(value_of "$@"); shift ;;
            --camera) camera=$(value_of "$@"); shift ;;
            --dtype) dtype=$(value_of "$@"); shift ;;
            --gpu) gpu=$(value_of "$@"); shift ;;
            --memory) memory_mib=$(value_of "$@"); shift ;;
            --image) image=$(value_of "$@"); shift ;;
            --name) name=$(value_of "$@"); shift ;;
            --detach) detach=true ;;
            --tool) tool=true ;;
            --dry-run) dry_run=true ;;
            --help | -h) usage && exit 0 ;;
            --)
                shift
                launch_arguments=("$@")
                return
                ;;
            *) fail "unknown option $1; see docker/run.sh --help" ;;
        esac
        shift
    done
}

check_options() {
    [[ -n $checkpoint ]] || fail "no checkpoint was given, expected --checkpoint CK; see docker/run.sh --help"
    [[ $dtype =~ ^(auto|float32|float16|bfloat16)$ ]] ||
        fail "--dtype is $dtype, expected auto, float32, float16 or bfloat16; correct it"
    [[ $gpu =~ ^(auto|jetson|nvidia|none)$ ]] || fail "--gpu is $gpu, expected auto, jetson, nvidia or none; correct it"
    [[ -z $memory_mib || $memory_mib =~ ^[1-9][0-9]*$ ]] ||
        fail "--memory is $memory_mib, expected a number of MiB; correct it"
}

check_path() { # option, path
    [[ -e $2 ]] || fail "$1 $2 does not exist, expected a readable file or folder; correct the path"
    [[ -f $2 || -d $2 ]] || fail "$1 $2 is a device, pipe or socket, expected a readable file or folder; correct the path"
    [[ -r $2 && (! -d $2 || -x $2) ]] ||
        fail "$1 $2 is not readable by $(id -un), expected read permission; run: sudo chmod -R a+rX $2"
}

check_paths() {
    check_path --checkpoint "$checkpoint"
    if [[ -n $processors ]]; then
        check_path --processors "$processors"
        [[ -d $processors ]] || fail "--processors $processors is not a folder, expected the folder with both processors; correct it"
    fi
    [[ -z $params_file ]] || check_path --params-file "$params_file"
    if [[ -n $camera && ! -c $camera ]]; then
        fail "--camera $camera is not a device, expected one of: $(find /dev -maxdepth 1 -name 'video*' -printf '%p ' 2>/dev/null);" \
            "connect the camera or correct the name"
    fi
}

is_jetson() {
    [[ -f /etc/nv_tegra_release ]]
}

resolve_gpu() {
    [[ $gpu == auto ]] || return 0
    if is_jetson; then
        gpu=jetson
    elif command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
        gpu=nvidia
    else
        gpu=none
    fi
}

check_docker() {
    command -v docker >/dev/null ||
        fail "docker is not installed, expected Docker Engine; install it: https://docs.docker.com/engine/install/ubuntu"
    docker info >/dev/null 2>&1 ||
        fail "the Docker daemon does not answer $(id -un), expected it to run and to allow you; run:" \
            "sudo systemctl start docker && sudo usermod -aG docker $(id -un), then log in again"
    if [[ $gpu != none ]] && ! docker info --format '{{json .Runtimes}}' | grep -q '"nvidia"'; then
        fail "Docker has no NVIDIA runtime, expected one for --gpu $gpu; install nvidia-container-toolkit and run:" \
            "sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker"
    fi
    docker image inspect "$image" >/dev/null 2>&1 ||
        fail "image $image does not exist, expected one that was built before; run:" \
            "docker build --file docker/Dockerfile.jetson --tag $image $repository"
    if docker container inspect "$name" >/dev/null 2>&1; then
        fail "a container named $name already exists, expected none; run: docker rm --force $name"
    fi
}

check_disk() {
    local free_mib
    free_mib=$(df --output=avail --block-size=1M "${TMPDIR:-/tmp}" | tail -n 1 | tr -d ' ')
    ((free_mib >= disk_mib)) ||
        fail "${free_mib} MiB of disk are free in ${TMPDIR:-/tmp}, expected at least $disk_mib for logs and bags; remove" \
            "unused images with: docker image prune"
}

# Print the value of --mount, as CSV: unlike --volume, it accepts a colon in a path, and creates no missing folder.
mount_of() { # source, target, further fields
    local field line=type=bind
    for field in "source=$1" "target=$2" "${@:3}"; do
        if [[ $field == *[\",$'\n']* ]]; then
            field="\"${field//\"/\"\"}\""
        fi
        line+=,$field
    done
    echo "$line"
}

# Run `mobile_vla inspect` with the first Python that can: an environment's, the system's, the image's.
inspect() { # FILE of the JSON
    local python
    for python in "$repository/.venv/bin/python" python3; do
        if PYTHONPATH=$repository "$python" -c 'import mobile_vla_inference.tools.inspect' >/dev/null 2>&1; then
            PYTHONPATH=$repository "$python" -m mobile_vla_inference inspect "$checkpoint" --json "$1" >/dev/null
            return
        fi
    done
    [[ $dry_run == false ]] || return 3
    docker run --rm --mount "$(mount_of "$(realpath -- "$checkpoint")" "/policies/$(basename -- "$checkpoint")" readonly)" \
        --mount "$(mount_of "$(dirname "$1")" /report)" --user "$(id -u):$(id -g)" "$image" ros2 run mobile_vla_inference mobile_vla \
        inspect "/policies/$(basename "$checkpoint")" --json "/report/$(basename "$1")" >/dev/null
}

# Print the memory that loading needs in MiB, for the data type that will be used.
needed_mib() {
    local report status=0 kind=fp32
    report=$(mktemp -d)
    inspect "$report/inspect.json" || status=$?
    if ((status == 0)); then
        if [[ $dtype == float16 || $dtype == bfloat16 || ($dtype == auto && $gpu != none) ]]; then
            kind=fp16
        fi
        tr -d '\n' <"$report/inspect.json" |
            sed -E "s/.*\"$kind\": *\{[^}]*\"load_mib\": *([0-9]+).*/\1/"
    fi
    rm -r "$report"
    return "$status"
}

check_memory() {
    local needed="" status=0 available_mib swap_mib
    needed=$(needed_mib) || status=$?
    if ((status == 3)); then
        echo "not checked: memory (no Python here can run mobile_vla inspect, and the dry run starts no container)" >&2
        memory_mib=${memory_mib:-8192}
        return
    fi
    ((status == 0)) || fail "the checkpoint can't be used (the reason is above); give another one"
    read -r available_mib swap_mib < <(
        free --mebi | awk '/^Mem:/ { available = $7 } /^Swap:/ { swap = $4 } END { print available, swap + 0 }'
    )
    needed=$((needed + node_mib))
    ((available_mib >= needed)) ||
        fail "the policy and the node need $needed MiB and $available_mib MiB of memory are available ($swap_mib MiB of swap are" \
            "too slow to drive on); close the desktop (sudo systemctl isolate multi-user), take --dtype float16, or convert to int8"
    echo "memory: $needed MiB needed, $available_mib MiB available, $swap_mib MiB of swap free" >&2
    memory_mib=${memory_mib:-$needed}
}

# Build the command. The checkpoint's whole folder is mounted: it contains the settings and processors, too.
compose_command() {
    local folder inside
    command=(docker run --name "$name" --network host --ipc host)
    case $gpu in
        jetson) command+=(--runtime nvidia) ;;
        nvidia) command+=(--gpus all) ;;
    esac
    # No swap: a policy that is swapped out can't keep its period. The kernel kills the worker first (it raises its own score).
    command+=(--memory "${memory_mib}m" --memory-swap "${memory_mib}m" --oom-score-adj=-200)
    if [[ $tool == true ]]; then
        command+=(--rm --interactive --tty)
    elif [[ $detach == true ]]; then
        command+=(--detach --init --restart unless-stopped)
    else
        command+=(--rm --init)
    fi
    for variable in ROS_DOMAIN_ID RMW_IMPLEMENTATION ROS_LOCALHOST_ONLY ROS_AUTOMATIC_DISCOVERY_RANGE ROS_STATIC_PEERS; do
        [[ -z ${!variable:-} ]] || command+=(--env "$variable=${!variable}")
    done
    checkpoint=$(realpath -- "$checkpoint")
    if [[ -d $checkpoint ]]; then
        folder=$checkpoint inside=/policies
    else
        folder=$(dirname -- "$checkpoint") inside=/policies/$(basename -- "$checkpoint")
    fi
    command+=(--mount "$(mount_of "$folder" /policies readonly)")
    [[ -z $processors ]] || command+=(--mount "$(mount_of "$(realpath -- "$processors")" /processors readonly)")
    [[ -z $params_file ]] || command+=(--mount "$(mount_of "$(realpath -- "$params_file")" /params.yaml readonly)")
    [[ -z $camera ]] || command+=(--device "$camera")
    command+=("$image")
    if [[ $tool == true ]]; then
        command+=(ros2 run mobile_vla_inference mobile_vla "${launch_arguments[@]}")
        return
    fi
    command+=(ros2 launch mobile_vla_inference mobile_vla.launch.py "checkpoint:=$inside")
    [[ -z $processors ]] || command+=(processors:=/processors)
    [[ -z $params_file ]] || command+=(params_file:=/params.yaml)
    [[ $dtype == auto ]] || command+=("dtype:=$dtype")
    command+=("${launch_arguments[@]}")
}

print_command() {
    local argument line=""
    for argument in "${command[@]}"; do
        argument=$(printf '%q' "$argument")
        if [[ $argument == --* || $argument == "$image" ]]; then
            echo "$line \\"
            line="    $argument"
        else
            line=${line:+$line }$argument
        fi
    done
    echo "$line"
}

parse "$@"
check_options
check_paths
resolve_gpu
if [[ $dry_run == false ]]; then
    check_docker
fi
check_disk
check_memory
compose_command
print_command
if [[ $dry_run == false ]]; then
    exec "${command[@]}"
fi
