#!/usr/bin/env bash
# Both networks of scripts/reproduce.py on a GPU: bash scripts/train_on_gpu.sh celeba-32 | celeba-64 | cifar10
# Then: make reproduce-celeba or reproduce-cifar10, which finds them in build/ and goes on. Needs SYMBREAK_DATA.
set -eu
case $1 in
  celeba-32) data=celeba10k recipe=faces-32 options="--size 32 --crop 70" ;;
  celeba-64) data=celeba10k recipe=faces-64 options="--size 64 --crop 70" ;;
  cifar10) data=cifar10 recipe=cifar10 options="" ;;
  *) echo "expected celeba-32, celeba-64 or cifar10" >&2; exit 2 ;;
esac
cd "$(dirname "$0")/.."
for kind in plain residual; do
  flag=$([ $kind = plain ] || echo --residual)
  # shellcheck disable=SC2086
  python -m symbreak train --data "$SYMBREAK_DATA/$data-train.parquet" --labels none $options --device cuda \
    --recipe recipes/$recipe.json $flag --out "build/$1/$kind"
done
