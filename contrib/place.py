"""Places the files that are meant for SpeechBrain into a checkout of it.

    python contrib/place.py /path/to/speechbrain

Files keep their paths: sb_memeff/nnet becomes speechbrain/nnet. Imports and names
become SpeechBrain's, lines of tests/recipes are appended to its tables, and
contrib/upstream.patch is applied. No other file of the checkout changes, and
nothing changes if a part would fail. Ruff then sorts the imports, with the settings
of the checkout. To put everything aside: ``git stash --include-untracked`` in the
checkout.

Authors
 * The sb_memeff authors 2026
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATCH = ROOT / "contrib" / "upstream.patch"
# The command sb-memeff and what only it needs stay in the plugin. So do tests of
# scripts in recipes: SpeechBrain runs the lines of tests/recipes instead.
STAYS = (
    "sb_memeff/__init__.py",
    "sb_memeff/analysis/",
    "sb_memeff/cli.py",
    "sb_memeff/export/",
    "tests/unittests/analysis/",
    "tests/unittests/export/",
    "tests/unittests/recipes/",
    "tests/unittests/test_cli",
)
SUFFIXES = (".py", ".yaml", ".md")
OTHERS = ("tests/conftest.py", "tests/data/transducer_cases.json")


def files() -> dict[str, str]:
    """The files that move, and their paths in SpeechBrain.

    Returns
    -------
    dict
        Maps paths relative to this repository to paths relative to the checkout.
    """
    paths = [
        path.relative_to(ROOT).as_posix()
        for folder in ("sb_memeff", "recipes", "tests/unittests")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in SUFFIXES and "results" not in path.parts
    ]
    return {
        path: re.sub("^sb_memeff/", "speechbrain/", path)
        for path in (*OTHERS, *paths)
        if not path.startswith(STAYS)
    }


def rewritten(text: str) -> str:
    """The text of a file with SpeechBrain's name for our package.

    Arguments
    ---------
    text : str
        The text here.

    Returns
    -------
    str
        The text there. Authors keep their name.

    Example
    -------
    >>> rewritten("from sb_memeff.optim import SGD8bit")
    'from speechbrain.optim import SGD8bit'
    """
    return re.sub(r"\bsb_memeff\b(?! authors)", "speechbrain", text)


def placed(checkout: Path) -> dict[Path, str]:
    """The files that move.

    Arguments
    ---------
    checkout : Path
        Root of SpeechBrain's repository.

    Returns
    -------
    dict
        Maps paths to texts.

    Raises
    ------
    FileExistsError
        If SpeechBrain has one of them.
    """
    texts = {}
    for source, target in files().items():
        path = checkout / target
        if not path.exists():
            text = (ROOT / source).read_text(encoding="utf-8")
            texts[path] = rewritten(text)
        # Packages that SpeechBrain has too keep their docstring.
        elif path.name != "__init__.py":
            raise FileExistsError(
                f"SpeechBrain has a {target} already. If it is from an earlier "
                f"run: git stash --include-untracked."
            )
    # Files of one name in several folders are modules of packages to pytest.
    tests = checkout / "tests" / "unittests"
    for folder in {path.parent for path in texts if tests in path.parents}:
        if folder != tests:
            texts[folder / "__init__.py"] = ""
    return texts


def tables(checkout: Path) -> dict[Path, str]:
    """SpeechBrain's tables of recipes, with our lines at the end.

    Arguments
    ---------
    checkout : Path
        Root of SpeechBrain's repository.

    Returns
    -------
    dict
        Maps paths to texts.

    Raises
    ------
    ValueError
        If a table is missing or has other columns.
    """
    texts = {}
    for table in sorted((ROOT / "tests" / "recipes").glob("*.csv")):
        header, *rows = table.read_text(encoding="utf-8").splitlines(True)
        path = checkout / "tests" / "recipes" / table.name
        lines = (
            path.read_text(encoding="utf-8").splitlines()
            if path.is_file()
            else []
        )
        if lines[:1] != [header.rstrip()]:
            raise ValueError(f"{path} is missing or has other columns.")
        texts[path] = "\n".join([*lines, *map(str.rstrip, rows)]) + "\n"
    return texts


def check_tools(checkout: Path) -> None:
    """Checks that git and ruff will do their part.

    Arguments
    ---------
    checkout : Path
        Root of SpeechBrain's repository.

    Raises
    ------
    ValueError
        If not; the message has git's or ruff's reason.
    """
    for command in (
        ["git", "apply", "--check", str(PATCH)],
        [sys.executable, "-m", "ruff", "--version"],
    ):
        found = subprocess.run(
            command, cwd=checkout, capture_output=True, text=True, check=False
        )
        if found.returncode:
            raise ValueError(f"{' '.join(command)}: {found.stderr.strip()}")
    # git apply passes over files outside of a repository's subfolder.
    if not (checkout / ".git").exists():
        raise ValueError(f"{checkout} is not the root of a git repository.")


def tidy(checkout: Path, paths: list[Path]) -> None:
    """Sorts the imports, as SpeechBrain's own are among them now.

    The modules get ``from __future__ import annotations`` too: SpeechBrain's
    oldest Python cannot evaluate hints such as ``int | None``. Hints then need no
    quotes.

    Arguments
    ---------
    checkout : Path
        Root of SpeechBrain's repository, whose settings count.
    paths : list of Path
        Python files in it.
    """
    hints = "from __future__ import annotations"
    required = f'lint.isort.required-imports = ["{hints}"]'
    modules = [
        path for path in paths if checkout / "speechbrain" in path.parents
    ]
    ruff = [sys.executable, "-m", "ruff"]
    fix = [*ruff, "check", "--quiet", "--fix", "--select"]
    for command in (
        [*fix, "I,UP037", "--config", required, *modules],
        [*fix, "I", *paths],
        [*ruff, "format", "--quiet", *paths],
    ):
        subprocess.run(command, cwd=checkout, check=True)


def main(arguments: list[str]) -> None:
    """Places everything.

    Arguments
    ---------
    arguments : list of str
        The path of the checkout.
    """
    if len(arguments) != 1:
        sys.exit("Usage: python contrib/place.py /path/to/speechbrain")
    checkout = Path(arguments[0]).resolve()
    if not (checkout / "speechbrain" / "core.py").is_file():
        sys.exit(f"{checkout} is not a checkout of SpeechBrain.")
    try:
        texts = placed(checkout)
        paths = [path for path in texts if path.suffix == ".py"]
        texts.update(tables(checkout))
        check_tools(checkout)
    except (FileExistsError, ValueError) as error:
        sys.exit(f"Nothing was written. {error}")
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    subprocess.run(["git", "apply", PATCH], cwd=checkout, check=True)
    tidy(checkout, paths)
    print(f"{len(paths)} Python files placed in {checkout}")


if __name__ == "__main__":
    main(sys.argv[1:])
