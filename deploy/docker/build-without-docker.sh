#!/usr/bin/env bash
# Build the image's cpu target and try it where no Docker engine runs: buildah with chroot isolation over a base that
# debootstrap makes, run by runc. As root on Debian 12, with buildah, runc, debootstrap, and Python 3.11 with pip.
#
#   deploy/docker/build-without-docker.sh WORK_DIRECTORY [DEBIAN_MIRROR]
#
# Packages come from wherever pip is configured to take them. WORK_DIRECTORY keeps wheels and base for the next time.
set -euo pipefail
work=$(realpath -m "$1"); mirror=${2:-http://deb.debian.org/debian}
cd "$(dirname "$0")/../.."
mkdir -p "$work/wheels"
buildah="buildah --root $work/storage --runroot $work/run --storage-driver vfs"

echo "-- wheels"
python3 -m pip download --quiet --dest "$work/wheels" --constraint constraints.txt 'setuptools>=77' torch==2.13.0 \
    $(python3 -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]
print(*(d.partition(";")[0].strip().replace(" ", "") for d in p["dependencies"] + p["optional-dependencies"]["otlp"]))')

echo "-- base"
[ -e "$work/base.tar" ] || {
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$work/base" "$mirror" >"$work/base.log"
    tar --create --file "$work/base.tar" --directory "$work/base" .
    rm -rf "$work/base"
}
$buildah inspect --type image penumbra-base >/dev/null 2>&1 || {
    container=$($buildah from scratch)
    $buildah add --quiet "$container" "$work/base.tar" / >/dev/null
    $buildah commit --quiet --rm "$container" penumbra-base >/dev/null
}

echo "-- image"
$buildah bud --isolation chroot --network host --format docker --target cpu --file deploy/docker/Dockerfile \
    --volume "$work/wheels:/wheels:ro" --build-arg BASE=localhost/penumbra-base \
    --build-arg PIP_FROM="--no-index --find-links /wheels" --build-arg VERSION="$(python3 -c 'import serving; print(serving.VERSION)')" \
    --build-arg REVISION="$(git rev-parse HEAD)" --tag penumbra:cpu . >"$work/build.log" 2>&1 || { tail -30 "$work/build.log"; exit 1; }

container=$($buildah from --pull-never penumbra:cpu)
trap '$buildah rm "$container" >/dev/null' EXIT
root=$($buildah mount "$container")
$buildah inspect --type image penumbra:cpu >"$work/image.json"
python3 deploy/docker/try_image.py "$root" "$work/image.json" "$work/bundle"
