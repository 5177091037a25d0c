#!/bin/sh
# Makes a virtual environment with the pinned packages, and sees to it that MuJoCo can render:
#   ./setup.sh VENV REQUIREMENTS [PYTHON]
# Without PYTHON it takes that of VENV, or python3. A VENV made of another Python, or half made, is made anew.
# Where packages of the system are missing it installs them, as root or by sudo and apt, or prints the command.
set -eu
venv=$1 requirements=$2 python=${3:-}

install() {
    if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
        echo "installing $*"
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" >/dev/null
    elif command -v apt-get >/dev/null && command -v sudo >/dev/null && { [ -t 0 ] || sudo -n true 2>/dev/null; }; then
        echo "installing $* with sudo"
        sudo apt-get update -qq && sudo apt-get install -y -qq "$@" >/dev/null
    else
        echo "please type: sudo apt-get install $*" >&2
        return 1
    fi
}

# PyTorch and MuJoCo have wheels for 64 bits only, and gRPC, for TensorBoard, has none for free-threaded builds.
works() {
    "$1" -c 'import sys, sysconfig
sys.exit(not (3, 11) <= sys.version_info < (3, 15) or sys.implementation.name != "cpython" or sys.maxsize < 2**32
         or bool(sysconfig.get_config_var("Py_GIL_DISABLED")))' 2>/dev/null
}

made_of() {
    "$1" -c "import sys${2:+, $2}; print(sys.version, sys.base_prefix)" 2>/dev/null
}

renders() {
    "$venv/bin/python" -c "import dmc2gym; dmc2gym.make('cartpole', 'swingup', from_pixels=True).reset()" 2>/dev/null
}

if [ -z "$python" ]; then
    python=$venv/bin/python
    works "$python" || python=python3
fi
works "$python" ||
    { echo "$python will not do; Python 3.11 to 3.14 (CPython, 64 bits) is needed: make PYTHON=python3.13 ..." >&2; exit 1; }
if [ "$(made_of "$venv/bin/python" pip)" != "$(made_of "$python")" ]; then
    "$python" -c 'import ensurepip' 2>/dev/null ||
        install "$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
    if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv")" ]; then
        echo "$venv is no virtual environment: move it away, or name another folder" >&2
        exit 1
    fi
    "$python" -m venv --clear "$venv"
fi
echo "installing $requirements into $venv: some minutes, and several GB where PyTorch comes with CUDA"
"$venv/bin/python" -m pip install --quiet -r "$requirements"
"$venv/bin/python" -m pip install --quiet --no-deps -r requirements-suite.txt
renders || install libegl1 libgl1-mesa-dri libopengl0 || echo "until then nothing can render; states can be learned from" >&2
