"""Where the LibriSpeech recipe's yaml file differs from SpeechBrain's.

Authors
 * The sb_memeff authors 2026
"""

from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[3]
RECIPE = ROOT / "recipes/LibriSpeech/ASR/transducer_memeff"
# Keys and defaults of SpeechBrain 1.1's conformer_transducer.yaml, a line each.
UPSTREAM = ROOT / "tests/data/upstream/conformer_transducer_keys.txt"


def keys_and_defaults(text):
    """Maps "key.key" to tag and value, in the order of the file."""
    found = {}

    def scalar(node):
        tag = node.tag if node.tag.startswith("!") else ""
        if isinstance(node, yaml.SequenceNode):
            value = f"[{', '.join(map(scalar, node.value))}]"
        else:
            value = node.value
        return f"{tag} {value}".strip()

    def visit(path, node):
        if not isinstance(node, yaml.MappingNode):
            found[path] = scalar(node)
            return
        if path and node.tag.startswith("!"):
            found[path] = node.tag
        for key, value in node.value:
            visit(f"{path}.{key.value}".strip("."), value)

    visit("", yaml.compose(text, yaml.SafeLoader))
    return found


def differences():
    """Lines of a diff of the two lists, in our order, then what is gone."""
    path = RECIPE / "hparams/conformer_transducer.yaml"
    ours = keys_and_defaults(path.read_text())
    lines = UPSTREAM.read_text().splitlines()
    theirs = dict(line.split(": ", 1) for line in lines)
    found = []
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        if ours.get(key) != theirs.get(key):
            for sign, values in (("-", theirs), ("+", ours)):
                if key in values:
                    found.append(f"{sign}{key}: {values[key]}")
    return found


def test_readme_lists_every_difference():
    readme = (RECIPE / "README.md").read_text()
    block = readme.split("```diff\n")[1].split("\n```")[0]
    assert block.splitlines() == differences()


def test_modules_are_in_the_same_order():
    """Optimizer checkpoints number the parameters in this order."""
    path = RECIPE / "hparams/conformer_transducer.yaml"
    ours = [
        key for key in keys_and_defaults(path.read_text()) if "modules." in key
    ]
    theirs = [
        line.split(": ")[0]
        for line in UPSTREAM.read_text().splitlines()
        if line.startswith("modules.")
    ]
    first = theirs.index("modules.Tjoint")
    theirs[first : first + 2] = ["modules.transducer_loss"]
    assert ours == theirs
