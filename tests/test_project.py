"""The project as a whole: version, what an import costs, the direction of imports, the sets of clients it is tested with."""

import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import check_imports
import compat
import pytest
import versions
from packaging.requirements import Requirement

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


# ----------------------------------------------------------------------------------------------------- scripts/compat.py

SETS = ("oldest", "previous", "newest")


@pytest.fixture
def sets(tmp_path):
    """A folder in which `constraints.txt` and the set `old` pin something, in place of the project's."""
    (tmp_path / "constraints").mkdir()
    (tmp_path / "constraints.txt").write_text(
        '# all\ntorch==2.13.0\nhuggingface_hub==2.4.0; python_version >= "3.11"\ntqdm==4.7  # bars\n'
    )
    (tmp_path / "constraints" / "old.txt").write_text(
        "Hugging-Face.Hub==0.1\nhuggingface-hub==0.34.0\n\ntorch==2.6.0\n"
    )
    return tmp_path


def pinned(name):
    """Package -> the versions that a set of the project pins, of whichever Python."""
    found = {}
    for pin in compat.pins_of(name):
        found.setdefault(pin.package, set()).add(pin.version)
    return found


def test_a_set_takes_the_place_of_the_pins_of_the_same_packages(sets):
    assert [(pin.package, pin.version, pin.condition) for pin in compat.pins_of("old", sets)] == [
        ("tqdm", "4.7", ""),
        ("hugging-face-hub", "0.1", ""),
        ("huggingface-hub", "0.34.0", ""),
        ("torch", "2.6.0", ""),
    ]
    assert [pin.line for pin in compat.pins_of("newest", sets)] == [
        "torch==2.13.0",
        'huggingface_hub==2.4.0; python_version >= "3.11"',
        "tqdm==4.7  # bars",
    ]


@pytest.mark.parametrize("line", ["torch>=2.6", "torch", "-e .", "torch==2.6.0 numpy==1.26.4"])
def test_a_set_pins_and_does_nothing_else(sets, line):
    (sets / "constraints" / "old.txt").write_text(f"numpy==2.1.0\n{line}\n")
    with pytest.raises(ValueError, match=rf"old.txt:2: expected 'package==version.*', got {re.escape(repr(line))}"):
        compat.pins_of("old", sets)


def test_the_sets_of_the_project():
    assert {path.stem for path in (ROOT / "constraints").iterdir()} == set(SETS) - {"newest"}
    oldest, previous, newest = map(pinned, SETS)
    assert oldest.keys() >= newest.keys() == previous.keys()
    assert {name: found for name, found in previous.items() if found != newest[name]} == {"transformers": {"5.23.0"}}
    series = {name: {found.rpartition(".")[0] for found in oldest[name]} for name in compat.SHOWN[:3]}
    assert series == {"torch": {"2.6"}, "transformers": {"4.57"}, "diffusers": {"0.35"}}


def test_no_less_is_asked_for_than_is_tested():
    """The oldest set has the least version of each package of which the library asks for one."""
    required = [Requirement(line) for line in importlib.metadata.requires("peft") if "extra ==" not in line]
    least = {compat.plain(one.name): str(one.specifier).removeprefix(">=") for one in required if one.specifier}
    assert least.keys() == {
        *("torch", "transformers", "accelerate", "numpy", "safetensors", "huggingface-hub", "packaging")
    }
    oldest = pinned("oldest")
    for name, version in least.items():
        assert any(f"{found}.".startswith(f"{version}.") for found in oldest[name]), (name, version, oldest[name])


@pytest.mark.parametrize(
    "versions, found",
    [
        ({"torch": "2.6.0", "Huggingface_Hub": "0.34.0"}, []),
        ({"torch": "2.6.0+cpu"}, []),
        ({}, []),
        ({"torch": "2.13.0+cpu"}, ["torch is 2.13.0+cpu, the set pins 2.6.0"]),
        ({"huggingface_hub": "0.34.1"}, ["huggingface-hub is 0.34.1, the set pins 0.34.0"]),
    ],
)
def test_an_environment_is_what_its_set_pins(versions, found):
    pins = [("torch", "2.6.0", ""), ("huggingface-hub", "0.34.0", "")]
    assert list(compat.differences(versions, pins)) == found


def test_an_environment_is_asked_for_what_holds_there():
    def pin(package, version, condition=""):
        return compat.Pin(package, version, condition, "")

    held = [pin("pytest", "0.0"), pin("numpy", "0.0", 'python_version < "3"'), pin("peft", "0.22.0")]
    versions, wrong = compat.examine(Path(sys.executable), held)
    assert versions["peft"] == "0.22.0"
    assert versions["python"] == platform.python_version()
    assert wrong == [f"pytest is {pytest.__version__}, the set pins 0.0"]


TESTS = """
import pytest

def test_good(): pass
def test_bad(): assert 1 == 2, "wrong"
@pytest.mark.parametrize("value", ["a b"])
def test_error(value, missing): pass
@pytest.mark.skip(reason="not here")
def test_skipped(): pass
@pytest.mark.xfail
def test_expected(): assert False
class TestClass:
    def test_bad(self): assert False, "wrong again"
"""


def test_a_report_is_read(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(TESTS)
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=it.xml", "tests/test_it.py"]
    subprocess.run(run, cwd=tmp_path, capture_output=True)
    counts, lines = compat.read_report(tmp_path / "it.xml")
    assert counts == {"passed": 1, "failed": 2, "errors": 1, "skipped": 2}
    assert lines == [
        "tests/test_it.py::TestClass::test_bad: AssertionError: wrong again",
        "tests/test_it.py::test_bad: AssertionError: wrong",
        'tests/test_it.py::test_error[a b]: failed on setup with "file ' + lines[2].partition('"file ')[2],
    ]


def fake_pytest(monkeypatch, tmp_path, code=0, outcome=""):
    """In place of pytest: leave a report with one test and end with an exit code."""

    def run(command, **options):
        if "-c" in command:
            return real(command, **options)
        calls.append(command)
        report = next(Path(word.partition("=")[2]) for word in command if word.startswith("--junitxml="))
        if code != 5:
            report.write_text(f'<t><testcase classname="tests.test_it" name="test_it">{outcome}</testcase></t>')
        return subprocess.CompletedProcess(command, code)

    calls, real = [], subprocess.run
    monkeypatch.setattr(compat, "RESULTS", tmp_path / "compat")
    monkeypatch.setattr(compat, "pins_of", lambda name: [])
    monkeypatch.setattr(compat.subprocess, "run", run)
    return calls


@pytest.mark.parametrize(
    "code, outcome, counts, problem",
    [
        (0, "", "1 | 0 | 0 | 0", None),
        (1, '<failure message="torn&#10;apart"/>', "0 | 1 | 0 | 0", "old: tests/test_it.py::test_it: torn"),
        (5, "", "0 | 0 | 0 | 0", "old: no test was selected"),
        (3, "", "1 | 0 | 0 | 0", "old: pytest ended with 3; its output above says why"),
    ],
)
def test_the_table_and_the_exit_code(monkeypatch, tmp_path, capsys, code, outcome, counts, problem):
    fake_pytest(monkeypatch, tmp_path, code, outcome)
    assert compat.main([f"old={sys.prefix}", "--", "-x"]) == (problem is not None)
    head, rule, row, *after = capsys.readouterr().out.partition("| set")[2].splitlines()
    squeezed = re.sub(" +", " ", row)
    assert squeezed.startswith(f"| old | {platform.python_version()} | {importlib.metadata.version('torch')} | ")
    assert f" | {counts} | 0 |" in squeezed
    assert len(rule) == len(row) == len("| set" + head)
    assert after == ([] if problem is None else [problem])
    saved = json.loads((tmp_path / "compat" / "results.json").read_text())
    assert [(one["name"], one["versions"]["peft"]) for one in saved] == [("old", "0.22.0")]
    assert (tmp_path / "compat" / "table.md").read_text().splitlines()[2] == row


def test_an_environment_of_other_versions_runs_nothing(monkeypatch, tmp_path, capsys):
    calls = fake_pytest(monkeypatch, tmp_path)
    monkeypatch.setattr(compat, "pins_of", lambda name: [compat.Pin("pytest", "0.0", "", "")])
    assert compat.main([f"old={sys.prefix}", f"gone={tmp_path / 'gone'}"]) == 1
    assert calls == []
    *_, old, gone = capsys.readouterr().out.splitlines()
    assert old == f"old: pytest is {pytest.__version__}, the set pins 0.0"
    assert gone.startswith(f"gone: {tmp_path / 'gone' / 'bin' / 'python'} cannot be asked for its packages: ")


def test_the_marked_files_run_unless_some_are_named(monkeypatch, tmp_path):
    calls = fake_pytest(monkeypatch, tmp_path)
    compat.main([f"old={sys.prefix}", f"new={sys.prefix}"])
    compat.main([f"old={sys.prefix}", "--", "tests/test_utils.py::test_it", "-k", "a or b"])
    first, second, named = ([word for word in call if "/test_" in word and "=" not in word] for call in calls)
    assert first == second
    files = {Path(file).name for file in first}
    assert files >= {"test_diffusers_models.py", "test_transformers_models.py", "test_lifecycle.py"}
    assert "test_naming.py" not in files
    assert named == ["tests/test_utils.py::test_it"]
    assert calls[2][-3:] == ["tests/test_utils.py::test_it", "-k", "a or b"]


@pytest.mark.parametrize("argv", [[], ["old"], ["old="], ["=x"], ["--constraints"]])
def test_calls_that_say_nothing_are_refused(argv, capsys):
    assert compat.main(argv) == 2
    assert "NAME=FOLDER" in capsys.readouterr().err


def test_the_tests_of_clients_are_marked():
    """What builds a model of a client's, or trains or quantises one, runs with every set."""
    client = re.compile(
        r"^\s*(from|import) (diffusers|accelerate|trl|transformers(?!\.pytorch_utils))\b", re.MULTILINE
    )
    sources = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py")}
    unmarked = {name for name, source in sources.items() if client.search(source) and compat.MARK not in source}
    assert unmarked == set()


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")
def test_make_runs_the_sets_that_are_named(monkeypatch):
    for inherited in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES"):  # these tests run under a make themselves
        monkeypatch.delenv(inherited, raising=False)

    def make(sets):
        call = ["make", "-n", "test-compat", f"SETS={sets}", "VENV=.v", "ARGS=-k 'a or b'"]
        return subprocess.run(call, cwd=ROOT, capture_output=True, text=True)

    lines = make("newest oldest").stdout.replace("\\\n", "").splitlines()
    assert ".v-oldest/bin/pip install --quiet -c build/compat/oldest.txt setuptools" in lines
    assert ".v/bin/pip install --quiet -c constraints.txt setuptools" in lines
    assert re.search(r" \.v/bin/python scripts/compat\.py +newest=\.v oldest=\.v-oldest -- -k 'a or b'$", lines[-1])
    wrong = make("oldest latest")
    assert wrong.returncode != 0 and "SETS are among oldest previous newest, got oldest latest" in wrong.stderr


@pytest.mark.parametrize(
    "package, oldest, reason",
    [
        ("pytest", "1.0", None),
        ("pytest", "999.1", f"pytest {pytest.__version__} has no such thing; 999.1 or newer is needed"),
        ("no_such_package", "1.0", "no_such_package is not installed"),
    ],
)
def test_a_test_says_what_it_needs(package, oldest, reason):
    assert versions.lacking(package, oldest, "has no such thing") == reason
    mark = versions.needs(package, oldest, "has no such thing").mark
    assert (mark.name, mark.args, mark.kwargs) == ("skipif", (reason is not None,), {"reason": reason or ""})
    if reason is None:
        versions.skip_file(package, oldest, "has no such thing")
    else:
        with pytest.raises(pytest.skip.Exception, match=reason):
            versions.skip_file(package, oldest, "has no such thing")
