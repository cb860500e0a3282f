#!/usr/bin/env bash
# Packs the dependencies of benchmarks/gpu.py for a GPU machine without a network:
# pure wheels and small libraries for Linux x86-64 and Python 3.12, and bitsandbytes
# with only its CPU and CUDA 13.0 libraries. About 17 MB unpacked.
#
#   benchmarks/make_bundle.sh FOLDER
#
# On that machine, from the repository's root:
#
#   PYTHONPATH=FOLDER python benchmarks/gpu.py
#
# torch, torchaudio, Triton, pytest, pytest-xdist, numpy and scipy must be installed there.
set -euo pipefail
out=$(realpath -m "${1:?usage: make_bundle.sh FOLDER}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out"

platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014; do
  platforms+=(--platform "${tag}_x86_64")
done
python3 -m pip download --quiet --disable-pip-version-check --no-deps \
  --only-binary=:all: --python-version 3.12 --implementation cp \
  "${platforms[@]}" --dest "$work" \
  "speechbrain>=1.1" hyperpyyaml "ruamel.yaml<0.19" ruamel.yaml.clib \
  soundfile cffi pycparser "bitsandbytes>=0.50"
for wheel in "$work"/*.whl; do
  python3 -m zipfile -e "$wheel" "$out"
done
find "$out/bitsandbytes" -name 'libbitsandbytes_*.so' \
  ! -name '*cuda130*' ! -name '*cpu*' -delete
find "$out" -name tests -type d -prune -exec rm -rf {} +
du -sh "$out"
