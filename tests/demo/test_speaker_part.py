"""The demo's speaker network.

Authors
 * The sb_memeff authors 2026
"""

import pytest

pytest.importorskip("espeakng_loader", reason="pip install sb_memeff[demo]")
pytest.importorskip("scipy")

import speaker_part
from recipe_runner import DemoError


@pytest.fixture
def started(monkeypatch):
    """Scripts and overrides of the recipes that were to be run."""
    calls = []
    monkeypatch.setattr(
        speaker_part, "run_recipe", lambda *args: calls.append(args)
    )
    return calls


def test_trains_as_long_as_asked_on_as_many_speakers(started, tmp_path):
    speaker_part.train(tmp_path / "voices", tmp_path / "train", 8, 60)
    ((script, yaml, output, overrides, *_),) = started
    assert output == tmp_path / "train"
    assert script.is_file() and (script.parent / yaml).is_file()
    assert overrides["number_of_epochs"] == 8
    assert overrides["out_n_neurons"] == 60


@pytest.mark.parametrize("eer, passes", [(7.3, True), (33.6, False)])
def test_an_eer_that_did_not_fall_is_an_error(eer, passes):
    summary = {"untrained": {"eer": 33.6}, "trained": {"eer": eer}}
    if passes:
        speaker_part.check(summary)
    else:
        with pytest.raises(DemoError, match="33.6 % before, 33.6 % after"):
            speaker_part.check(summary)
