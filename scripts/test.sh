#!/usr/bin/env bash
# Run all tests in two processes, or some: scripts/test.sh [pytest arguments], such as `-m smoke` for the essential ones.
# No network, weights or GPU needed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

# Some containers switch it on: every process would then compile the package and the tests again, 8 seconds each.
unset PYTHONDONTWRITEBYTECODE

python -m pytest --numprocesses 2 --dist worksteal "$@"
