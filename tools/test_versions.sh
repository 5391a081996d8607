#!/usr/bin/env bash
# The whole test suite with every version of torch that is supported, each in a fresh virtual environment of 5 GB, one
# after the other; a line with the result of each at the end. Arguments choose among: oldest resolved newest.
set -uo pipefail
cd "$(dirname "$0")/.."

declare -A VERSIONS=(
  [oldest]="torch==2.11.* torchvision==0.26.*"  # as setup.py names them
  [resolved]=""                                 # what pip takes
  [newest]="torch==2.15.* torchvision"
)
results=()
for name in "${@:-oldest resolved newest}"; do
  for version in $name; do
    if [[ ! -v VERSIONS[$version] ]]; then
      echo "error: $version is none of: oldest resolved newest" >&2
      exit 2
    fi
    venv=$(mktemp -d)
    # shellcheck disable=SC2086 # several requirements
    python3 -m venv "$venv" && "$venv/bin/pip" install -q -e '.[dev]' ${VERSIONS[$version]} && "$venv/bin/pytest"
    status=$?
    torch=$("$venv/bin/python" -c "import torch, torchvision; print(torch.__version__, torchvision.__version__)")
    results+=("$version (torch and torchvision $torch): $([[ $status == 0 ]] && echo passed || echo "failed, exit code $status")")
    rm -rf "$venv"
  done
done
printf '%s\n' "${results[@]}"
[[ ${results[*]} != *failed* ]]
