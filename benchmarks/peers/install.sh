#!/usr/bin/env bash
# An environment with other context-parallel libraries, for benchmarks/ring_links.py --peers.
# It lends torch and ringctx from the environment of PYTHON, so both sides run the same torch.
#   PYTHON=.venv/bin/python benchmarks/peers/install.sh
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=$(realpath -s "${PYTHON:-../../.venv/bin/python}")

"$PYTHON" -m venv .venv
BASE=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
HERE=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# A plain path would leave out what is installed editable.
echo "import site; site.addsitedir('$BASE')" > "$HERE/base.pth"
.venv/bin/pip install --quiet --disable-pip-version-check wheel setuptools
# DeepSpeed's set-up imports torch, and needs none of its CUDA kernels.
DS_BUILD_OPS=0 .venv/bin/pip install --quiet --disable-pip-version-check \
  --no-build-isolation --requirement requirements.txt
# DeepSpeed compiles its CPU communication at the first start, about a minute; do it here, once,
# since ranks that are stopped meanwhile leave a lock behind.
rm -rf .venv/extensions
.venv/bin/python drivers.py
