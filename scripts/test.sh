#!/usr/bin/env bash
# Installs the package with its test tools into .venv and runs every test. Arguments go to pytest:
#   bash scripts/test.sh -m "not slow"     the fast suite
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/install.sh test

# real images, where the checkout has them beside it; tests that need them skip with a reason otherwise
if [ ! -e tests/sample_data ] && [ -d ../shared/data ]; then
  ln -s "$(cd ../shared/data && pwd)" tests/sample_data
fi
# one test process per core, each with one thread; tests of one file stay together because they share datasets
export OMP_NUM_THREADS=1
exec python -m pytest -n "${DGPLUGINS_TEST_WORKERS:-2}" --dist loadfile "$@"
