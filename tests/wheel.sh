#!/usr/bin/env bash
# Builds the sdist and the wheel of the last commit, checks them, and uses the wheel in an empty environment away from
# the clone: tests/wheel.sh DIST. The environment takes 6 GB in a temporary folder, which is removed at the end.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p "$1"
dist=$(realpath "$1")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir "$folder/source"
git archive HEAD | tar -x -C "$folder/source"
"${PYTHON:-python3}" -m venv "$folder/tools"
"$folder/tools/bin/python" -m pip install -q build twine
"$folder/tools/bin/python" -m build --outdir "$dist" "$folder/source"
"$folder/tools/bin/twine" check --strict "$dist"/*

"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/python" -m pip install -q --no-cache-dir "$dist"/*.whl
"$folder/env/bin/python" -m pip check
echo "the environment has $(du -sm "$folder/env" | cut -f1) MB"
cd "$folder"
env/bin/python source/docs/shapes.py own
rm -r source
env/bin/vitdistill demo
env/bin/vitdistill distill own --teacher out/demo/work/teacher-vit*/model --student resnet18 --image-size 32 --epochs 1
env/bin/vitdistill predict out/mine/models/taught own/ring > seen.csv
test "$(wc -l < seen.csv)" = 61
