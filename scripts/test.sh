#!/usr/bin/env bash
# All tests, on two processes: scripts/test.sh [pytest arguments]. No network, weights or GPU needed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

python -m pytest --numprocesses 2 --dist worksteal "$@"
