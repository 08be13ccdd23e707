"The project itself: metadata agrees, proj/ is what the notebooks say, notebooks keep their rules."
import ast
import json
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import tomllib
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import proj

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.relative_to(ROOT).parts))
NUMBERED = [p for p in NOTEBOOKS if p.name[0].isdigit()]
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def code_cells(path): return ["".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]


def exported(path): return [c for c in code_cells(path) if re.search(r"^\s*#\s*\|\s*exports?\b", c, re.M)]


def module(path):
    "The module that a notebook is exported to, or None."
    names = [m.group(1) for c in code_cells(path) for m in re.finditer(r"^\s*#\s*\|\s*default_exp\s+(\S+)", c, re.M)]
    assert len(names) <= 1, f"{path.name} has {len(names)} default_exp"
    return f"proj.{names[0]}" if names else None


def tree(cell):
    "The cell's syntax, without lines for the notebook (%magic, !shell)."
    return ast.parse("\n".join("pass" if line.lstrip().startswith(("%", "!")) else line for line in cell.splitlines()))


MODULES = {module(p): p for p in NUMBERED}


# ---- metadata

def settings():
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    return ini["DEFAULT"]


def test_names_and_versions_agree():
    ini, toml = settings(), tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert proj.__version__ == ini["version"]
    assert toml["tool"]["nbdev"]["lib_name"] == toml["tool"]["nbdev"]["lib_path"] == ini["lib_name"] == "proj"
    assert "project" not in toml, "settings.ini is the home of the metadata"


def test_every_requirement_is_pinned_to_a_version_that_satisfies_it():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    assert "+" not in "".join(pins.values()), "a local build cannot be had elsewhere"
    ini = settings()
    for text in " ".join(ini[key] for key in ("requirements", "dev_requirements", "offline_requirements", "qlora_requirements", "swipe_requirements")).split():
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text


def test_ci_starts_with_the_oldest_python_allowed():
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yaml").read_text())["jobs"]["test"]
    assert workflow["strategy"]["matrix"]["python"][0] == settings()["min_python"]
    assert workflow["steps"][-1]["run"] == ".ci/run"


# ---- proj/ is what the notebooks say

@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "The sources in another folder, without proj/."
    folder = tmp_path_factory.mktemp("copy")
    for name in ("pyproject.toml", "settings.ini"): shutil.copy(ROOT / name, folder)
    for path in NOTEBOOKS:
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    (folder / "proj").mkdir()
    shutil.copy(ROOT / "proj" / "__init__.py", folder / "proj")
    return folder


def nbdev(command, folder):
    done = subprocess.run([str(Path(sys.executable).with_name(command))], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def python_files(folder): return {str(p.relative_to(folder)): p.read_text(encoding="utf-8") for p in sorted((folder / "proj").rglob("*.py"))}


def test_modules_are_exported_from_the_notebooks(copy):
    "Exporting anew gives exactly the files that are there: none differs, none is missing, none is left over."
    nbdev("nbdev-export", copy)
    fresh, here = python_files(copy), python_files(ROOT)
    assert sorted(fresh) == sorted(here)
    assert [name for name in here if here[name] != fresh[name]] == [], "run nbdev-export"


def test_notebooks_are_clean(copy):
    "nbdev-clean has nothing to do."
    nbdev("nbdev-clean", copy)
    assert [p.name for p in NOTEBOOKS if p.read_bytes() != (copy / p.relative_to(ROOT)).read_bytes()] == [], "run nbdev-clean"


def test_one_notebook_one_module():
    assert None not in MODULES and len(MODULES) == len(NUMBERED)
    files = {".".join(p.relative_to(ROOT).with_suffix("").parts) for p in (ROOT / "proj").rglob("*.py") if p.stem not in ("__init__", "_modidx")}
    assert files == set(MODULES)
    for name, path in MODULES.items(): assert f"proj.{path.stem.split('_', 1)[1]}" == name, path.name


def test_parameters_tag_survives_cleaning(copy):
    "Without it `papermill -p` would stop working, with exit code 0."
    tagged = {"cells": [{"cell_type": "code", "execution_count": 3, "id": "a", "metadata": {"tags": ["parameters"], "collapsed": True}, "outputs": [],
                         "source": ["loss: str = \"mnr\""]}],
              "metadata": {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}, "nbformat": 4, "nbformat_minor": 5}
    path = copy / "nbs" / "tagged.ipynb"
    path.write_text(json.dumps(tagged))
    nbdev("nbdev-clean", copy)
    cell = json.loads(path.read_text())["cells"][0]
    path.unlink()
    assert cell["metadata"] == {"tags": ["parameters"]} and cell["execution_count"] is None


# ---- rules of the notebooks

@each_notebook
def test_exports_have_a_module_and_entry_points_export_nothing(path):
    if path in NUMBERED: assert module(path) and exported(path)
    else: assert module(path) is None and exported(path) == []


@each_notebook
def test_exported_cells_fit_a_screen_and_import_absolutely(path):
    for cell in exported(path):
        assert len(cell.splitlines()) <= 60, cell.splitlines()[1]
        assert not [node for node in ast.walk(tree(cell)) if isinstance(node, ast.ImportFrom) and node.level], "write from proj.x import y"


def imported(cell):
    "Modules of ours that a cell imports, inside functions too."
    for node in ast.walk(tree(cell)):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names if a.name.split(".")[0] == "proj")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "proj":
            if node.module in MODULES: yield node.module
            else: yield from (name if name in MODULES else node.module for name in (f"{node.module}.{a.name}" for a in node.names))


def number(path): return int(re.match(r"\d+", path.name).group())


@pytest.mark.parametrize("path", NUMBERED, ids=lambda p: p.stem)
def test_imports_only_from_lower_numbers(path):
    for name in {n for cell in code_cells(path) for n in imported(cell)} - {"proj"}:
        assert name in MODULES, f"{path.name} imports {name}, which no notebook exports"
        assert number(MODULES[name]) < number(path), f"{path.name} imports {name} from {MODULES[name].name}"


def test_every_public_name_exists():
    for name in proj.__all__: assert getattr(proj, name).__name__ == name


def test_import_is_light(record_property):
    "Nothing heavy comes with `import proj`. The time it takes is reported, not judged: it depends on the machine."
    script = "import sys, time; start = time.perf_counter(); import proj; print(time.perf_counter() - start, *sys.modules)"
    seconds, *modules = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"torch", "transformers", "sentence_transformers", "IPython", "datasets", "pyarrow", "matplotlib", "scipy", "pandas", "faiss"}
    assert not heavy & set(modules)
    record_property("seconds of import proj", float(seconds))
