#!/usr/bin/env bash
# All that is to be known of fedpriv on a GPU, in at most eight minutes: see docs/gpu.md.
#
#   DEVICE=cuda|cpu    where to train (default cuda); cpu runs everything small
#   OUT=FOLDER         where results go (default runs/gpu); each stage writes before the next begins
#   SECONDS_IN_ALL=N   the deadline (default 470, on a CPU 170)
#   STAGES="..."       which stages, of: tests speed large study (default all)
#   PYTHON=PATH        a Python that has PyTorch (default: the first of .venv's and python3 that has)
#
# What that Python lacks is taken from wheels/, where that folder is there, else from PyPI.
set -u
cd "$(dirname "$0")/../.." || exit 2
DEVICE=${DEVICE:-cuda}
OUT=${OUT:-runs/gpu}
case $DEVICE in
  cuda) default=470 ;;
  cpu) default=170 ;;
  *) echo "DEVICE: write cuda or cpu, got $DEVICE" >&2; exit 2 ;;
esac
ends=$((SECONDS + ${SECONDS_IN_ALL:-$default}))
mkdir -p "$OUT" || exit 2

has() { "$1" -c "import importlib.util as u, sys; sys.exit(any(u.find_spec(m) is None for m in sys.argv[1:]))" "${@:2}" 2>/dev/null; }

found=
for python in "${PYTHON:-}" .venv/bin/python python3; do
  if [ -n "$python" ] && has "$python" torch; then found=$python; break; fi
done
if [ -z "$found" ]; then
  echo "no Python here has PyTorch: run make install, or set PYTHON" >&2
  exit 2
fi

if has "$found" flwr ray dp_accounting pytorch_optimizer pydantic jiwer opacus pytest_timeout; then
  :
elif compgen -G "wheels/*" >/dev/null; then
  site=$PWD/runs/gpu-site
  rm -rf "$site" && mkdir -p "$site"
  if compgen -G "wheels/*.whl" >/dev/null; then
    "$found" -m pip install --quiet --no-index --no-deps --no-compile --disable-pip-version-check \
      --no-cache-dir --target "$site" wheels/*.whl || echo "wheels/: not all were installed" >&2
  fi
  for archive in wheels/*.tar.xz; do
    [ -e "$archive" ] && tar -xJf "$archive" -C "$site"
  done
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
else
  # PyTorch and what belongs to it stay as they are.
  if "$found" -m venv --system-site-packages runs/gpu-venv; then
    grep -viE '^(torch|torchaudio|triton|numpy|nvidia.*|cuda.*)==' constraints.txt \
      >runs/gpu-venv/constraints.txt
    timeout 150 runs/gpu-venv/bin/pip install --quiet --disable-pip-version-check --timeout 10 \
      --retries 1 -c runs/gpu-venv/constraints.txt -e '.[opacus,synthetic-speech]' pytest \
      pytest-timeout pytest-xdist hypothesis && found=$PWD/runs/gpu-venv/bin/python
  fi
fi

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
export RAY_TMPDIR=${RAY_TMPDIR:-/tmp} FLWR_TELEMETRY_ENABLED=0 RAY_USAGE_STATS_ENABLED=0
# shellcheck disable=SC2086
exec "$found" simulations/benchmarks/gpu.py --device "$DEVICE" --out "$OUT" \
  --seconds $((ends - SECONDS)) --stages ${STAGES:-tests speed large study}
