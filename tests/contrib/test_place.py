"""Placing the files into a small stand-in of SpeechBrain's repository.

Authors
 * The sb_memeff authors 2026
"""

import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import speechbrain
from speechbrain.utils.run_opts import RunOptions

from contrib import place

DATA = place.ROOT / "tests" / "data" / "upstream"
# SpeechBrain's settings: strictest where ours are not.
RUFF = """
target-version = "py38"
line-length = 80
[lint]
select = ["E", "W", "F", "I", "B", "C4", "UP"]
ignore = ["B006", "B008", "C408", "E203", "E501"]
[lint.isort]
combine-as-imports = true
force-wrap-aliases = true
known-first-party = ["speechbrain"]
split-on-trailing-comma = false
[lint.per-file-ignores]
"__init__.py" = ["F401"]
"""
# Imports the placed modules as parts of the installed package, and uses one.
IMPORT_ALL = """
import importlib, sys
from pathlib import Path
import speechbrain, torch

root = Path(sys.argv[1])
installed = Path(speechbrain.__file__).parents[1]
paths = [p.relative_to(root) for p in sorted(root.glob("speechbrain/**/*"))]
for path in [Path("speechbrain"), *paths]:
    if (root / path).is_dir() and (installed / path).is_dir():
        name = ".".join(path.parts)
        importlib.import_module(name).__path__.append(str(root / path))
for path in paths:
    if path.suffix == ".py" and path.name not in ("__init__.py", "core.py"):
        importlib.import_module(".".join(path.with_suffix("").parts))
assert not any(name.startswith("sb_memeff") for name in sys.modules)
from speechbrain.lobes.models.RevResNet import RevResNet

net = RevResNet.from_preset("RevNet34", base_channels=2, input_size=16)
net(torch.rand(2, 20, 16)).sum().backward()
"""


def before_the_patch():
    """The lines of SpeechBrain's files that the patch shows, by path."""
    texts = {}
    for line in place.PATCH.read_text().splitlines(keepends=True):
        if line.startswith("--- a/"):
            lines = texts.setdefault(line[6:].strip(), [])
        elif line[0] in " -":
            lines.append(line[1:])
    return {path: "".join(lines) for path, lines in texts.items()}


def write(checkout):
    """Writes the stand-in."""
    tables = (place.ROOT / "tests" / "recipes").glob("*.csv")
    header = next(tables).read_text().splitlines(keepends=True)[0]
    for path, text in {
        **before_the_patch(),
        "ruff.toml": RUFF,
        "speechbrain/core.py": "",
        "speechbrain/nnet/__init__.py": '"""Of SpeechBrain."""\n',
        "tests/recipes/LibriSpeech.csv": header,
        "tests/recipes/VoxCeleb.csv": header + "theirs" + "," * 10 + "\n",
    }.items():
        (checkout / path).parent.mkdir(parents=True, exist_ok=True)
        (checkout / path).write_text(text)
    subprocess.run(["git", "init", "--quiet"], cwd=checkout, check=True)
    return checkout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The stand-in, with our files."""
    checkout = write(tmp_path_factory.mktemp("speechbrain"))
    place.main([str(checkout)])
    return checkout


def test_no_file_has_the_path_of_one_of_speechbrains():
    root = Path(speechbrain.__file__).parents[1]
    theirs = {p.relative_to(DATA).parent for p in DATA.glob("recipes/**/*.*")}
    for target in place.files().values():
        assert not (root / target).exists() or target.endswith("__init__.py")
        assert not theirs.intersection(Path(target).parents)


def test_packages_that_speechbrain_has_keep_their_docstring(checkout):
    text = (checkout / "speechbrain" / "nnet" / "__init__.py").read_text()
    assert text == '"""Of SpeechBrain."""\n'
    # Nothing but a docstring is lost.
    root = Path(speechbrain.__file__).parents[1]
    for source, target in place.files().items():
        if (root / target).exists():
            assert (place.ROOT / source).read_text().count("\n") == 1


def test_a_file_of_that_name_is_not_replaced(tmp_path):
    theirs = write(tmp_path) / "speechbrain" / "ops" / "grid.py"
    theirs.parent.mkdir()
    theirs.write_text("theirs")
    with pytest.raises(SystemExit, match="has a speechbrain/ops/grid.py"):
        place.main([str(tmp_path)])
    assert theirs.read_text() == "theirs"
    assert not (tmp_path / "recipes").exists()


@pytest.mark.parametrize(
    "path, text, reason",
    [
        ("requirements.txt", "others\n", "patch does not apply"),
        ("tests/recipes/VoxCeleb.csv", None, "is missing or has other columns"),
        ("tests/recipes/VoxCeleb.csv", "a,b\n", "is missing or has other"),
        (".git", None, "is not the root of a git repository"),
    ],
)
def test_nothing_is_written_if_a_part_would_fail(tmp_path, path, text, reason):
    changed = write(tmp_path) / path
    if changed.is_dir():
        shutil.rmtree(changed)
    else:
        changed.unlink()
    if text is not None:
        changed.write_text(text)
    before = sorted(p for p in tmp_path.rglob("*") if ".git" not in p.parts)
    with pytest.raises(SystemExit, match=f"(?s)Nothing was written.*{reason}"):
        place.main([str(tmp_path)])
    assert before == sorted(
        p for p in tmp_path.rglob("*") if ".git" not in p.parts
    )


def test_a_table_without_a_last_newline(tmp_path):
    table = write(tmp_path) / "tests" / "recipes" / "VoxCeleb.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join(lines))
    text = place.tables(tmp_path)[table]
    assert text.splitlines()[: len(lines)] == lines and text.endswith("\n")


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="is not a checkout of SpeechBrain"):
        place.main([str(tmp_path)])
    with pytest.raises(SystemExit, match="Usage"):
        place.main([])


def test_names_are_speechbrains(checkout):
    found = set()
    for path in checkout.rglob("*"):
        if path.suffix in place.SUFFIXES:
            found |= set(re.findall(r".*\bsb_memeff\b.*", path.read_text()))
    assert {line.strip(" #*") for line in found} == {
        "The sb_memeff authors 2026",
        "Authors: The sb_memeff authors 2026",
    }


def test_placed_files_import_nothing_that_stays(checkout):
    stays = {"speechbrain.analysis", "speechbrain.cli", "speechbrain.export"}
    for folder in ("benchmarks", "demo", "recipes"):
        stays |= {p.stem for p in (place.ROOT / folder).rglob("*.py")}
    for folder in ("speechbrain", "tests"):
        for path in (checkout / folder).rglob("*.py"):
            imported = re.findall(
                r"^(?:from|import) (speechbrain\.\w+|\w+)",
                path.read_text(),
                re.MULTILINE,
            )
            assert not stays.intersection(imported), path


def test_speechbrains_ruff_finds_nothing(checkout):
    folders = ["speechbrain", "recipes", "tests"]
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *folders],
            cwd=checkout,
            capture_output=True,
            text=True,
        )
        assert not done.returncode, done.stdout


def test_classes_and_functions_have_docstrings(checkout):
    """Those that SpeechBrain's check finds: of one line, functions unhinted."""
    without = re.compile(
        r"^ *(?:def [a-zA-Z].*\(.*\)|class .*):\n(?!(?: *(?:#.*)?\n)* *r?\")",
        re.MULTILINE,
    )
    for path in (checkout / "speechbrain").rglob("*.py"):
        assert not without.findall(path.read_text()), path


def test_hints_are_not_evaluated(checkout):
    for path in (checkout / "speechbrain").rglob("*.py"):
        text = path.read_text()
        if re.search(r"^(def|class) ", text, re.MULTILINE):
            assert "\nfrom __future__ import annotations\n" in text, path


def test_modules_can_be_imported(checkout):
    subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, str(checkout)],
        check=True,
        timeout=300,
    )


def recipe_lines(name, checkout):
    """Our lines of a table of recipes."""
    with open(checkout / "tests" / "recipes" / f"{name}.csv") as f:
        return [row for row in csv.DictReader(f) if row["Task"] != "theirs"]


@pytest.mark.parametrize("name", ["LibriSpeech", "VoxCeleb"])
def test_scripts_read_all_keys(name, checkout):
    """As SpeechBrain's check of yaml files finds them: in the script's text."""
    options = RunOptions().as_dict()
    for row in recipe_lines(name, checkout):
        script = (checkout / row["Script_file"]).read_text()
        text = (checkout / row["Hparam_file"]).read_text()
        # Parts of a name may be computed.
        computed = [
            re.sub(r"{.*?}", ".+", x)
            for x in re.findall(r'\[f"(.+?)"\]', script)
        ]
        for key in re.findall(r"^(\w+):(?! *!apply)", text, re.MULTILINE):
            forms = rf'\["{key}"\]', rf'\.get\("{key}"', rf"\w\.{key}\b"
            assert (
                key in options
                or f"<{key}>" in text
                or any(re.search(form, script) for form in forms)
                or any(re.fullmatch(name, key) for name in computed)
            ), (row["Hparam_file"], key)


@pytest.mark.parametrize("name", ["LibriSpeech", "VoxCeleb"])
def test_lines_of_recipes(name, checkout):
    rows = recipe_lines(name, checkout)
    listed = {row["Hparam_file"] for row in rows}
    placed = checkout.glob(f"recipes/{name}/**/*.yaml")
    assert listed == {str(p.relative_to(checkout)) for p in placed}
    for row in rows:
        for field in ("Script_file", "Data_prep_file", "Readme_file"):
            assert (checkout / row[field]).is_file()


def test_patch_requires_what_we_require(checkout):
    ours = (place.ROOT / "pyproject.toml").read_text()
    for name in ("torch", "torchaudio", "bitsandbytes"):
        (least,) = re.findall(rf'"{name}>=([\d.]+)[",]', ours)
        for path in ("pyproject.toml", "requirements.txt"):
            text = (checkout / path).read_text()
            assert re.findall(rf"\b{name}>=([\d.]+)", text) == [least]
