#!/bin/sh
# Makes a virtual environment with the pinned packages, and sees to it that MuJoCo can render:
#   ./setup.sh PYTHON VENV REQUIREMENTS
# Where packages of the system are missing it installs them, as root or by sudo and apt, or prints the command.
set -eu
python=$1 venv=$2 requirements=$3

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

renders() {
    "$venv/bin/python" -c "import dmc2gym; dmc2gym.make('cartpole', 'swingup', from_pixels=True).reset()" 2>/dev/null
}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 ..." >&2; exit 1; }
"$python" -c 'import ensurepip' 2>/dev/null ||
    install "$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
"$python" -m venv "$venv"
echo "installing $requirements into $venv: some minutes, and several GB where PyTorch comes with CUDA"
"$venv/bin/python" -m pip install --quiet -r "$requirements"
renders || install libegl1 libgl1-mesa-dri libopengl0 || echo "until then nothing can render; states can be learned from" >&2
