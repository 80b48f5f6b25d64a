#!/usr/bin/env bash
# Installs the libraries that bench_ops.py measures beside ours, and prints their folder.   tools/bench_peers.sh
# (about a minute and 0.5 GB the first time, then under a second)
#
# Each is installed without its requirements into a folder of its own in the cache of setup_env.sh, with the few of them
# that its loss needs to be imported: torch, transformers and Megatron stay those of the environment. A library that does
# not install leaves NAME.failed with pip's reason, which becomes its row; it is tried again the next time.
#
# Knobs: MEGATRON_HYBRID_CACHE (as in setup_env.sh).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

peers="
trl==1.16.0 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 pandas==3.1.1 pyarrow==26.0.1
liger-kernel==0.8.5
nvidia-modelopt==0.47.0 nvidia-ml-py==13.615.71 omegaconf==2.4.0 pulp==3.3.2 scipy==1.18.1
ms-swift==4.6.0
verl==0.9.1
" # one library a line, itself first

cache="${MEGATRON_HYBRID_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/megatron_hybrid}"
python="$PWD/.venv/bin/python"
key="$({ "$python" -c 'import platform, sys; print(sys.version, platform.machine())'; cat tools/bench_peers.sh; } | sha256sum | cut -c 1-16)"
folder="$cache/peers-$key"

say() { printf 'peers: %s\n' "$*" >&2; }

install_peer() { # name, requirements: into $folder/name, which exists only once it is complete
    local name="$1" log="$folder/$1.log"
    shift
    [[ -d "$folder/$name" ]] && return
    say "installing $1"
    rm -rf "$folder/$name.building" "$folder/$name.failed"
    if "$python" -m pip install --no-input --progress-bar off --disable-pip-version-check --retries 1 --timeout 15 \
        --no-compile --no-deps --target "$folder/$name.building" "$@" >"$log" 2>&1; then
        mv "$folder/$name.building" "$folder/$name"
    else
        { grep '^ERROR' "$log" || tail -n 1 "$log"; } | tail -n 1 >"$folder/$name.failed"
        say "$1 does not install: $(cat "$folder/$name.failed")"
    fi
}

mkdir -p "$folder"
exec 9>"$folder/lock"
flock 9
while read -ra wanted; do
    if ((${#wanted[@]})); then install_peer "${wanted[0]%%==*}" "${wanted[@]}"; fi
done <<<"$peers"
# Of another Python, or other versions: the two used last are kept, as setup_env.sh does.
touch "$folder"
# shellcheck disable=SC2012  # by age; the names are our own keys
ls -dt "$cache"/peers-* | tail -n +3 | while IFS= read -r old; do say "removing the old $old"; rm -rf "$old"; done
printf '%s\n' "$folder"
