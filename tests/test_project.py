"""The project as a whole: version, what an import costs, the direction of imports."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import check_imports
import pytest

import peft

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("transformers", "accelerate", "diffusers", "bitsandbytes", "torchao")


@pytest.fixture
def tree(tmp_path):
    """Writes modules of a package `peft` under a folder that is given back."""

    def write(**sources):
        for name, source in {"__init__": "", **sources}.items():
            path = tmp_path / "peft" / (name.replace("__in__", "/") + ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        return tmp_path

    return write


def test_version():
    assert peft.__version__ == "0.22.0"
    assert importlib.metadata.version("peft") == "0.22.0"


def test_the_package_is_typed():
    assert Path(peft.__file__).with_name("py.typed").is_file()


def test_import_peft_imports_no_client_library():
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import peft"], capture_output=True, text=True, check=True
    )
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in run.stderr.splitlines()}
    assert "peft" in imported
    assert imported.isdisjoint(HEAVY)


def test_all_names_that_the_package_announces_exist():
    assert [name for name in peft.__all__ if not hasattr(peft, name)] == []
    assert sorted(set(peft.__all__) - set(dir(peft))) == []
    with pytest.raises(AttributeError):
        peft.NoSuchThing  # noqa: B018


def test_imports_go_downwards():
    assert check_imports.problems(ROOT / "src") == []


@pytest.mark.parametrize(
    "source, complaint",
    [
        ("from peft.utils import low", None),
        ("from ..utils.low import x", None),
        ("from ..auto import x", "must not import peft.auto"),
        ("import peft.auto", "must not import peft.auto"),
        ("from .. import auto", "must not import peft.auto"),
        ("def f():\n    from ..auto import x", "must not import peft.auto"),
        ("def f():\n    from ..auto import x  # lazy: on demand", None),
        ("def f():\n    from ..auto import x  # lazy:", "must not import peft.auto"),
        ("from ..auto import x  # lazy: on demand", "within functions only"),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..auto import x", None),
        ("# layer: top\nfrom ..auto import x", None),
        ("# layer: attic", "no layer 'attic'"),
        ("from ..gone import x", "does not exist"),
    ],
)
def test_an_import_upwards_is_found(tree, source, complaint):
    root = tree(
        engine__in____init__="", engine__in__it=source, utils__in____init__="", utils__in__low="x = 1", auto="x = 1"
    )
    found = check_imports.problems(root)
    if complaint is None:
        assert found == []
    else:
        assert len(found) == 1
        assert re.search(complaint, found[0])
