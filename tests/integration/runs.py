"""Running a recipe as a user runs it, and as SpeechBrain's own tests do.

Authors
 * The sb_memeff authors 2026
"""

import csv
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import speechbrain as sb
import yaml

ROOT = Path(__file__).resolve().parents[2]
FLAGS = "test_debug_flags"
# benchmarks/gpu.py runs the same recipes on a GPU.
DEVICE = os.environ.get("SB_MEMEFF_TEST_DEVICE") or "cpu"

# Each script runs as __main__ in a process of its own, but what all of them
# import is imported once: it takes longer than to train so little. The first
# that fails ends it. (bitsandbytes initialises CUDA when it is imported, and
# CUDA does not survive a fork: on a GPU each script imports for itself.)
ONE_AFTER_THE_OTHER = """
import json, os, runpy, sys
import speechbrain, torchaudio, sb_memeff.brain, sb_memeff.export.speaker_folder
for argv, output in json.load(sys.stdin):
    child = os.fork()
    if not child:
        file = os.open(output, os.O_WRONLY | os.O_CREAT)
        for number in (1, 2):
            os.dup2(file, number)
        sys.argv, sys.path[0] = argv, os.path.dirname(argv[0])
        runpy.run_path(argv[0], run_name="__main__")
        break
    if os.waitpid(child, 0)[1]:
        sys.exit(1)
"""


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

    def command(self, script, hparams, *flags):
        """A command line, as a list."""
        return [
            sys.executable,
            str(self.folder / script),
            str(self.folder / "hparams" / hparams),
            *map(str, flags),
        ]

    def run(self, place, script, hparams, *flags, fails=False):
        """Runs a script in a working folder; gives what it printed."""
        _, *argv = self.command(script, hparams, *flags)
        return self.output_of(place, *argv, fails=fails)

    def output_of(self, place, *argv, fails=False):
        """Runs Python in a working folder; gives what it printed."""
        done = subprocess.run(
            [sys.executable, *argv],
            cwd=place,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert (done.returncode != 0) == fails, done.stdout[-3000:]
        return done.stdout

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
                _, *argv = self.command(
                    script,
                    hparams,
                    *(f"{key}={value}" for key, value in flags.items()),
                    f"--device={DEVICE}",
                    f"--output_folder={folder}",
                )
                lines[name] = row, folder
                printed = place / f"{name.replace('/', '_')}.txt"
                jobs.append((argv, str(printed)))
        if DEVICE != "cpu":
            with ThreadPoolExecutor(6) as pool:
                outputs = list(
                    pool.map(lambda job: self.output_of(place, *job[0]), jobs)
                )
        else:
            done = subprocess.run(
                [sys.executable, "-c", ONE_AFTER_THE_OTHER],
                cwd=place,
                env=environment(),
                input=json.dumps(jobs),
                text=True,
                timeout=300 * len(jobs),
            )
            outputs = [
                Path(output).read_text()
                for _, output in jobs
                if Path(output).exists()
            ]
            assert not done.returncode, outputs[-1:] and outputs[-1][-3000:]
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


def environment():
    """Variables for a process of a recipe."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        # cuBLAS is deterministic with a workspace of this form.
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }


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
