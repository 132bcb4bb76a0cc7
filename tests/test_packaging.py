"""The wheel holds what the folders hold, imports are light, and the files a person starts from are there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import hf_paged

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = PROJECT["tool"]["setuptools"]["package-dir"]


def test_the_packages_listed_are_those_that_are_there():
    found = set()
    for name, folder in FOLDERS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            inner = init.parent.relative_to(ROOT / folder).parts
            found.add(".".join((name, *inner)))
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(found)
    assert len(listed) == len(set(listed))


def test_every_folder_with_modules_is_a_package():
    for folder in FOLDERS.values():
        for module in (ROOT / folder).rglob("*.py"):
            assert (module.parent / "__init__.py").exists(), module


def test_no_top_level_package_shadows_another():
    # A top-level `kernels` would shadow the package of that name which transformers imports.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "integrations" / "__init__.py").exists()


def modules_after(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after a statement."""
    code = f"{statement}\nimport sys, json\nprint(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    return set(json.loads(done.stdout))


def test_importing_the_package_is_light():
    assert not modules_after("import hf_paged") & {"torch", "transformers", "triton", "numpy"}


def test_the_engine_room_knows_no_transformers():
    rooms = [path.stem for path in (ROOT / "hf_paged").glob("*.py") if path.stem not in ("__init__", "__main__")]
    statement = "\n".join(f"import hf_paged.{room}" for room in sorted(rooms))
    assert not modules_after(f"{statement}\nimport hf_paged.kernels") & {"transformers", "triton"}


def test_the_command_line_opens_quickly():
    assert "torch" not in modules_after("import hf_paged.integrations.cli")


def test_every_public_name_can_be_had():
    for name in hf_paged.__all__:
        assert getattr(hf_paged, name) is not None
    assert hf_paged.__version__ == PROJECT["project"]["version"]


def test_the_script_entry_exists():
    module, name = PROJECT["project"]["scripts"]["hf-paged"].split(":")
    assert callable(getattr(__import__(module, fromlist=[name]), name))


def test_the_files_a_person_starts_from():
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test", "lint", "wheel-check", "test-oldest", "clean"):
        assert f"\n{target}:" in makefile
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
