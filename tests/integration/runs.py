"""Running a recipe as a user runs it, and as SpeechBrain's own tests do.

Authors
 * The sb_memeff authors 2026
"""

import csv
import os
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import speechbrain as sb
import yaml

from tests.processes import start_script

ROOT = Path(__file__).resolve().parents[2]
FLAGS = "test_debug_flags"
# benchmarks/gpu.py runs the same recipes on a GPU.
DEVICE = os.environ.get("SB_MEMEFF_TEST_DEVICE") or "cpu"


class Recipe:
    """A folder of recipes/ and its table in tests/recipes.

    Arguments
    ---------
    folder : str
        Relative to recipes/.
    table : str
        Name of the csv file.
    """

    def __init__(self, folder, table):
        self.folder = ROOT / "recipes" / folder
        self.table = ROOT / "tests" / "recipes" / table

    def rows(self):
        """The lines of the table, as dicts."""
        with open(self.table, newline="") as f:
            return list(csv.DictReader(f))

    def argv(self, script, hparams, *flags):
        """A script's path and its arguments."""
        return [
            str(self.folder / script),
            str(self.folder / "hparams" / hparams),
            *map(str, flags),
        ]

    def run(self, place, script, hparams, *flags, fails=False):
        """Runs a script in a working folder; gives what it printed."""
        return output_of(place, self.argv(script, hparams, *flags), fails)

    def run_table(self, place, data, on_samples):
        """Runs every line of the table on a corpus, some on samples too.

        Arguments
        ---------
        place : Path
            Working folder.
        data : callable
            Maps the name of a yaml file to the flags (a dict) for the corpus.
            They take the place of those for SpeechBrain's tests/samples.
        on_samples : list of str
            Names of yaml files whose line also runs as it is, on samples like
            SpeechBrain's.

        Returns
        -------
        dict
            Maps the name of each yaml file to the line, the output folder and
            the printed text, and "samples/<name>" to those on the samples.
        """
        write_samples(place)
        lines, jobs = {}, []
        for row in self.rows():
            script, hparams = (
                Path(row[c]).name for c in ("Script_file", "Hparam_file")
            )
            samples = dict(f.split("=", 1) for f in row[FLAGS].split())
            kept = {
                key: value
                for key, value in samples.items()
                if key != "--skip_prep" and "tests/samples/" not in value
            }
            runs = {hparams: {**kept, **data(hparams)}}
            if hparams in on_samples:
                runs[f"samples/{hparams}"] = samples
            for name, flags in runs.items():
                folder = place / "results" / name
                argv = self.argv(
                    script,
                    hparams,
                    *(f"{key}={value}" for key, value in flags.items()),
                    f"--device={DEVICE}",
                    f"--output_folder={folder}",
                )
                lines[name] = row, folder
                jobs.append(argv)
        # The first that fails ends it.
        with ThreadPoolExecutor(1 if DEVICE == "cpu" else 6) as pool:
            outputs = list(pool.map(lambda argv: output_of(place, argv), jobs))
        return {
            name: (*line, text)
            for (name, line), text in zip(lines.items(), outputs, strict=True)
        }

    def check_table(self):
        """Every yaml file is listed, every listed file is there."""
        listed = {row["Hparam_file"] for row in self.rows()}
        there = {
            str(path.relative_to(ROOT))
            for path in self.folder.glob("hparams/*.yaml")
        }
        assert listed == there
        for row in self.rows():
            for column in ("Script_file", "Data_prep_file", "Readme_file"):
                assert (ROOT / row[column]).is_file()

    def check_keys(self, spelled_out):
        """SpeechBrain's rule: a key of a yaml file is used by it or the script.

        Arguments
        ---------
        spelled_out : dict
            Code of the scripts that makes keys, and these keys.
        """
        options = sb.utils.run_opts.RunOptions.__dataclass_fields__
        for row in self.rows():
            script = (ROOT / row["Script_file"]).read_text()
            for code, keys in spelled_out.items():
                script = script.replace(code, " ".join(f'"{k}"' for k in keys))
            text = (ROOT / row["Hparam_file"]).read_text()
            for key in re.findall(r"^(\w+):(?!.*!apply)", text, re.MULTILINE):
                assert (
                    key in options
                    or f"<{key}>" in text
                    or f'"{key}"' in script
                    or f"hparams.{key}" in script
                    or f"modules.{key}" in script
                ), f"{row['Hparam_file']}: {key}"


def start(place, argv):
    """Starts a script in a working folder.

    Returns
    -------
    multiprocessing.Process
        The process.
    Path
        The file with what it prints.
    """
    handle, output = tempfile.mkstemp(dir=place, suffix=".txt")
    os.close(handle)
    environment = {
        "OMP_NUM_THREADS": "1",
        # cuBLAS is deterministic with a workspace of this form.
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    return start_script(argv, place, output, environment), Path(output)


def output_of(place, argv, fails=False):
    """Runs a script in a working folder; gives what it printed."""
    process, output = start(place, argv)
    process.join(300)
    process.kill()
    text = output.read_text()
    assert (process.exitcode != 0) == fails, text[-3000:]
    return text


def deterministic(place, hparams):
    """A copy of a yaml file with the line that makes a run deterministic.

    Two runs on a GPU differ in their last bits without it.
    """
    hparams = Path(hparams)
    path = place / f"deterministic_{hparams.name}"
    path.write_text(
        hparams.read_text()
        + "\n__deterministic: !apply:torch.use_deterministic_algorithms\n"
        "    mode: True\n    warn_only: True\n"
    )
    return path


def write_samples(place):
    """Two utterances and their lists, like those in SpeechBrain's tests/samples.

    The sentences have as many different characters as the two there.
    """
    annotation = place / "tests" / "samples" / "annotation"
    audio = place / "tests" / "samples" / "ASR"
    annotation.mkdir(parents=True)
    audio.mkdir()
    noise = np.random.default_rng(0)
    rows = []
    for name, text in (
        ("spk1_snt1", "the child almost hurt the small dog"),
        ("spk1_snt2", "drop the tue when you add the figures"),
    ):
        wav = f"tests/samples/ASR/{name}.wav"
        soundfile.write(place / wav, 0.1 * noise.standard_normal(45920), 16000)
        rows.append([name, "2.87", "0", "16000", wav, "spk1", text])
    with open(annotation / "ASR_train.csv", "w", newline="") as f:
        writer = csv.writer(f)
        columns = ["ID", "duration", "start", "stop", "wav", "spk_id", "wrd"]
        writer.writerows([columns, *rows])
    (annotation / "verification.txt").write_text(
        "1 spk1_snt1 spk1_snt1.wav\n0 spk1_snt1 spk1_snt2.wav\n"
    )


def check_files(row, folder):
    """The files of the table's test_debug_checks are there."""
    checks = re.fullmatch(r"file_exists=\[(.*)\]", row["test_debug_checks"])
    for name in checks[1].split(","):
        assert (folder / name).is_file(), name


def steps_of(train_log):
    """Optimizer steps at the end of each epoch, of a log's text."""
    return [int(n) for n in re.findall(r"steps: (\d+)", train_log)]


def last_checkpoint(folder):
    """Folder of the newest checkpoint of an output folder."""
    paths = folder.glob("save/CKPT*/CKPT.yaml")
    return max(
        paths, key=lambda p: yaml.safe_load(p.read_text())["unixtime"]
    ).parent
