#!/usr/bin/env bash
# An environment with ai2-olmo-core, for benchmarks/olmo_buckets.py.
# It lends torch and numpy from the environment of PYTHON, and leaves out what OLMo's numpy
# datasets do not import. VENV says where it goes.
#   PYTHON=.venv/bin/python benchmarks/peers/install_olmo.sh
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=$(realpath -s "${PYTHON:-../../.venv/bin/python}")
VENV=$(realpath -sm "${VENV:-.venv-olmo}")

"$PYTHON" -m venv "$VENV"
BASE=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
HERE=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "import site; site.addsitedir('$BASE')" > "$HERE/base.pth"
"$VENV/bin/pip" install --quiet --disable-pip-version-check --requirement requirements-olmo.txt
"$VENV/bin/pip" install --quiet --disable-pip-version-check --no-deps ai2-olmo-core==3.0.0
"$VENV/bin/python" -c 'from olmo_core.data.numpy_dataset import NumpyVSLDataset'
