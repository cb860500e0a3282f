"""The demo's transducer.

Authors
 * The sb_memeff authors 2026
"""

import pytest

pytest.importorskip("espeakng_loader", reason="pip install sb_memeff[demo]")
pytest.importorskip("scipy")

import transducer_part
from hyperpyyaml import load_hyperpyyaml
from recipe_runner import DemoError
from speechbrain.utils.metric_stats import ErrorRateStats


def test_reads_the_file_that_the_recipe_writes(tmp_path):
    stats = ErrorRateStats()
    stats.append(
        ["a", "b"],
        [["ONE", "NINE"], ["TWO", "TEN"]],
        [["ONE", "FIVE"], ["TWO", "TEN"]],
    )
    path = tmp_path / "wer_test.txt"
    with open(path, "w") as file:
        stats.write_stats(file)
    wer = transducer_part.read_wer(path)
    assert wer == {"wer": 25.0, "errors": 1, "words": 4}


@pytest.mark.parametrize("wer, passes", [(19.9, True), (20.0, False)])
def test_a_high_wer_is_an_error(wer, passes):
    summary = {"test": {"wer": wer}}
    if passes:
        transducer_part.check(summary)
    else:
        with pytest.raises(DemoError, match="WER of 20.0 % is not below 20 %"):
            transducer_part.check(summary)


def test_the_overrides_are_keys_of_the_yaml():
    # An unknown key is an error of the recipe's, minutes into the demo.
    with open(transducer_part.RECIPE / transducer_part.TRAIN_YAML) as file:
        hparams = load_hyperpyyaml(
            file,
            {
                **transducer_part.OVERRIDES,
                "data_folder": "x",
                "number_of_epochs": 8,
            },
            overrides_must_match=True,
        )
    assert hparams["noam_annealing"].n_warmup_steps == 150
