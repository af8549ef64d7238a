#!/usr/bin/env bash
# Trains, compares and exports with the oldest or the newest libraries that settings.ini allows:
# tests/versions.sh oldest|newest. Its environment takes 6 GB in a temporary folder, which is removed at the end.
set -euo pipefail
cd "$(dirname "$0")/.."
case $1 in
    oldest) resolution=lowest-direct python=min_python ;;
    newest) resolution=highest python=max_python ;;
esac
python=$(sed -n "s/^$python = //p" settings.ini)
for folder in ~/.pyenv/versions/*/bin; do PATH+=:$folder; done # pyenv's shims start only what `pyenv global` names
PATH=$PWD/.venv/bin:$PATH
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export UV_CACHE_DIR=$folder/cache OMP_NUM_THREADS=1
uv venv -q --python "$python" "$folder/env"

with() { # with EXTRAS TEST...: the tests in an environment with these extras
    uv pip install -q --system-certs --upgrade --resolution "$resolution" --python "$folder/env" -e ".[$1]"
    uv pip install -q --system-certs --python "$folder/env" pytest
    uv pip freeze -q --python "$folder/env" | grep -v nvidia | paste -sd ' '
    "$folder/env/bin/python" -m pytest -q -p no:cacheprovider -m "" --durations 0 --durations-min 5 "${@:2}"
}
with notebooks,export,cluster \
    tests/test_notebooks.py::test_{deit_notebook,study_runs_by_papermill,paper_analysis_draws_the_runs} \
    tests/test_notebooks.py::test_a_study_is_trained_and_compared \
    "tests/test_notebooks.py::test_room_runs_from_top_to_bottom[data/03_augment]" \
    tests/test_own_images.py::test_{command_trains_and_compares,the_export_predicts_the_same}
# trackio may want older libraries than the others do
with notebooks,export,cluster,track \
    tests/test_outcome.py::test_trackers_hold_what_the_record_holds \
    tests/test_recipes.py::test_commands_train_and_export
