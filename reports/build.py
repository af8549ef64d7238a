"""Executes the analysis notebooks on reports/runs: `make figures`.

For one of them: `python reports/build.py a02_study`. Tables go to reports/tables, pictures to
reports/figures, outputs into the notebooks in nbs/analysis. What agrees by value with what is there
stays as it is, so that another processor changes nothing.
"""
import argparse
import json
from pathlib import Path

from vitdistill.cli import analysis_parameters, run_notebook
from vitdistill.base import write_atomic
from vitdistill.study.figures import same_text
from vitdistill.study.page import write_index

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "nbs/analysis").glob("*.ipynb"))


def kept_outputs(outputs, root=ROOT):
    """Returns the outputs of a cell as they are committed: printed text in one piece, tables, pictures.

    Warnings are left out. The path of `root` is taken out of texts.
    """
    def relative(lines):
        return "".join(lines).replace(f"{root}/", "").splitlines(keepends=True)

    kept = []
    for output in outputs:
        if output["output_type"] != "stream":
            data = {kind: relative(value) if kind.startswith("text/") else value
                    for kind, value in output["data"].items()}
            kept.append(dict(output_type="display_data", data=data, metadata=output["metadata"]))
        elif output["name"] == "stdout":
            before = kept.pop()["text"] if kept and kept[-1]["output_type"] == "stream" else []
            kept.append(dict(output, text=relative([*before, *output["text"]])))
    return kept


def same_outputs(old, new):
    """Returns whether two lists of `kept_outputs` agree: texts by value, pictures by their SVGs."""
    def shown(outputs):
        found = {}  # (number of the output, kind) -> text
        for n, output in enumerate(outputs):
            data = output.get("data") or {"text": output["text"]}
            about = output.get("metadata", {}).get("image/png")
            if about:
                data = data | {"image/png": f"#{about['svg']}"}
            found |= {(n, kind): "".join(text) for kind, text in data.items()}
        return found

    before, after = shown(old), shown(new)
    return before.keys() == after.keys() and all(same_text(before[key], after[key]) for key in before)


def write_outputs(source, executed, root=ROOT):
    """Writes the outputs of an executed copy into a notebook, but for cells whose outputs agree."""
    notebook, done = (json.loads(file.read_text(encoding="utf-8")) for file in (source, executed))
    made = {cell["id"]: kept_outputs(cell.get("outputs", []), root) for cell in done["cells"]}
    changed = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"
               and not same_outputs(cell["outputs"], made[cell["id"]])]
    for cell in changed:
        cell["outputs"] = made[cell["id"]]
    if changed:  # as nbdev_clean writes it
        write_atomic(source, json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = [notebook.stem for notebook in NOTEBOOKS]
    parser.add_argument("names", nargs="*", choices=[*names, []], metavar="NAME",
                        help="notebook (default: all)")
    for name in parser.parse_args().names or names:
        given = analysis_parameters(name, "reports/runs", "reports")
        executed = run_notebook(name, ROOT / f"out/figures/{name}.ipynb", given)
        write_outputs(ROOT / f"nbs/analysis/{name}.ipynb", executed)
        print("executed notebook:", executed, flush=True)
    print("page:", write_index(ROOT / "reports", "Figures, tables and benches"))


if __name__ == "__main__":
    main()
