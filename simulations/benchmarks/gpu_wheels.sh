#!/usr/bin/env bash
# Fill wheels/ with what a machine that reaches no package index lacks for gpu.sh: see docs/gpu.md.
#
#   PYTHON_VERSION=3.12   the Python there (its PyTorch stays what it is)
#   PIP="python -m pip"   the pip here
#
# All are unpacked and packed tighter, as one archive: as they come, they are larger than what such a
# machine may be sent. Of Ray the parts are left out that no simulation uses.
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
fetched=$(mktemp -d)
unpacked=$(mktemp -d)
trap 'rm -rf "$fetched" "$unpacked"' EXIT
# shellcheck disable=SC2086
$pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
  --python-version "$version" --implementation cp --abi "cp$short" --abi abi3 --abi none \
  $platforms --dest "$fetched" -c constraints.txt -r simulations/benchmarks/gpu_wheels.txt
for wheel in "$fetched"/*.whl; do
  python3 -m zipfile -e "$wheel" "$unpacked"
done
(cd "$unpacked/ray" && rm -rf jars rllib serve llm dashboard/client)
chmod +x "$unpacked"/ray/core/src/ray/gcs/gcs_server "$unpacked"/ray/core/src/ray/raylet/raylet
rm -rf wheels && mkdir wheels
tar -C "$unpacked" --sort=name --exclude=__pycache__ -cf - . | xz -9 >wheels/site.tar.xz
du -sh wheels
