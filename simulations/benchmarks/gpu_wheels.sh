#!/usr/bin/env bash
# Fill wheels/ with what a machine that reaches no package index lacks for gpu.sh: see docs/gpu.md.
#
#   PYTHON_VERSION=3.12   the Python there (its PyTorch stays what it is)
#   PIP="python -m pip"   the pip here
#
# Of Ray the parts are left out that no simulation uses, and the rest is packed tighter: its own
# wheel alone is larger than all that is left.
set -eu
cd "$(dirname "$0")/../.."
version=${PYTHON_VERSION:-3.12}
short=${version/./}
pip=${PIP:-.venv/bin/python -m pip}
platforms=
for name in 2_39 2_35 2_34 2_31 2_28 2_27 2_26 2_24 2_17 2_12 2_5; do
  platforms="$platforms --platform manylinux_${name}_x86_64"
done
for name in manylinux2014_x86_64 manylinux2010_x86_64 manylinux1_x86_64 any; do
  platforms="$platforms --platform $name"
done
rm -rf wheels && mkdir wheels
# shellcheck disable=SC2086
$pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
  --python-version "$version" --implementation cp --abi "cp$short" --abi abi3 --abi none \
  $platforms --dest wheels -c constraints.txt -r simulations/benchmarks/gpu_wheels.txt
unpacked=$(mktemp -d)
trap 'rm -rf "$unpacked"' EXIT
for wheel in wheels/ray-*.whl; do
  [ -e "$wheel" ] || continue
  python3 -m zipfile -e "$wheel" "$unpacked" && rm "$wheel"
  (cd "$unpacked" && rm -rf ray/jars ray/rllib ray/serve ray/llm ray/dashboard/client)
  chmod +x "$unpacked"/ray/core/src/ray/gcs/gcs_server "$unpacked"/ray/core/src/ray/raylet/raylet
  tar -C "$unpacked" -cf - . | xz -T0 -6 >wheels/ray.tar.xz
done
du -sh wheels
