"""Packaging: settings.ini has the declarations; what it names as shipped is copied into a wheel."""
import json
import re
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
settings = ConfigParser(delimiters=["="])
settings.read(ROOT / "settings.ini", encoding="utf-8")
cfg = settings["DEFAULT"]
suffix = "_requirements"  # of an extra
first, last = (int(cfg[key].split(".")[1]) for key in ("min_python", "max_python"))
BLOB = f"{cfg['git_url']}/blob/v{cfg['version']}"  # the tag, so that PyPI's page does not drift
CLASSIFIERS = [
    "Development Status :: 4 - Beta",
    "Framework :: Jupyter",
    "Intended Audience :: Developers",
    "Intended Audience :: Science/Research",
    "Operating System :: MacOS",
    "Operating System :: POSIX :: Linux",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
    "Topic :: Scientific/Engineering :: Image Recognition",
    *(f"Programming Language :: Python :: 3.{minor}" for minor in range(first, last + 1)),
]


def with_whole_links(text):
    """Returns a page whose links and pictures lead to the repository online, for it is read on PyPI too."""
    text = re.sub(r"(!\[[^\]]*\])\((?!https?:|#)([^)]+)\)", rf"\1({BLOB}/\2?raw=true)", text)
    return re.sub(r"\]\((?!https?:|#)([^)]+)\)", rf"]({BLOB}/\1)", text)


def without_outputs(notebook):
    """Returns the text of a notebook without its outputs, which a user's own runs replace."""
    content = json.loads(notebook.read_text(encoding="utf-8"))
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = []
    return json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


class Build(build_py):
    """The modules, and in share/ the notebooks, presets, studies and numbers that a clone holds once."""

    def run(self):
        super().run()
        if self.editable_mode:  # a clone has them already
            return
        share = Path(self.build_lib) / cfg["lib_name"] / "share"
        shutil.rmtree(share, ignore_errors=True)  # of an earlier build
        for name in cfg["shipped"].split():
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, share / name, ignore=shutil.ignore_patterns(".*", "__pycache__"))
            else:
                (share / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, share / name)
        for notebook in share.rglob("*.ipynb"):
            notebook.write_text(without_outputs(notebook), encoding="utf-8")


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=with_whole_links((ROOT / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    project_urls={
        "Source": cfg["git_url"],
        "Changelog": f"{BLOB}/CHANGELOG.md",
        "Issues": f"{cfg['git_url']}/issues",
        "The study": f"{BLOB}/reports/study.md",
    },
    keywords=cfg["keywords"].split(),
    license="Apache-2.0",
    packages=find_packages(include=["vitdistill", "vitdistill.*"]),
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={key.removesuffix(suffix): cfg[key].split() for key in cfg if key.endswith(suffix)},
    entry_points={"console_scripts": ["vitdistill=vitdistill.cli:main"]},
    classifiers=CLASSIFIERS,
    cmdclass={"build_py": Build},
    zip_safe=False,
)
