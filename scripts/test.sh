#!/usr/bin/env bash
# Run all tests in two processes, or some: scripts/test.sh [pytest arguments], such as `-m smoke` for the essential ones.
# No network, weights or GPU needed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

python -m pytest --numprocesses 2 --dist worksteal "$@"
