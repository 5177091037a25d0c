#!/bin/sh
# Makes a virtual environment with the pinned packages, and sees to it that MuJoCo can render:
#   ./setup.sh VENV REQUIREMENTS [PYTHON]
# Without PYTHON it takes that of VENV, or python3. A VENV that another Python made, or without pip, is made anew.
# Missing packages of the system are installed by apt, as root or by sudo; where that fails, the command is printed.
set -eu
venv=$1 requirements=$2 python=${3:-}

install() {
    sudo=$([ "$(id -u)" = 0 ] || echo sudo)
    echo "installing $*${sudo:+ with sudo}"
    { $sudo apt-get update -qq && $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" >/dev/null; } || {
        echo "please type: sudo apt-get install $*" >&2
        return 1
    }
}

works() {
    "$1" -c 'import sys
sys.exit(not (3, 11) <= sys.version_info < (3, 15) or sys.implementation.name != "cpython")' 2>/dev/null
}

# Which Python this is, or made this environment; nothing if the module $2 is missing.
identity() {
    "$1" -c "import sys, $2; print(sys.version, sys.base_prefix)" 2>/dev/null
}

if [ -z "$python" ]; then
    python=$venv/bin/python
    works "$python" || python=python3
fi
works "$python" || { echo "$python will not do; CPython 3.11 to 3.14 is needed: make PYTHON=python3.13 ..." >&2; exit 1; }
if [ "$(identity "$venv/bin/python" pip)" != "$(identity "$python" sys)" ]; then
    if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv")" ]; then
        echo "$venv is no virtual environment: move it away, or name another folder" >&2
        exit 1
    fi
    "$python" -c 'import ensurepip' 2>/dev/null ||
        install "$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
    "$python" -m venv --clear "$venv"
fi
echo "installing $requirements into $venv: some minutes, and several GB where PyTorch comes with CUDA"
"$venv/bin/python" -m pip install --quiet -r "$requirements"
"$venv/bin/python" -m pip install --quiet --no-deps -r requirements-suite.txt
"$venv/bin/python" -c "import dmc2gym; dmc2gym.make('cartpole', 'swingup', from_pixels=True).reset()" 2>/dev/null ||
    install libegl1 libgl1-mesa-dri libopengl0 ||
    echo "until then nothing can render; states can be learned from" >&2
