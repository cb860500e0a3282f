#!/usr/bin/env python3
"""Time and memory of preparing VoxCeleb, on a synthetic tree of headers.

    python benchmarks/prepare_voxceleb.py [FILES ...]

The files are hard links to wav files of 1 to 20 s in sparse files: their headers
are read, not their samples (amp_th is 0). 1.2 million is VoxCeleb1 and 2.

Authors
 * The sb_memeff authors 2026
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import wave
from pathlib import Path

from result_file import write_results

RECIPE = (
    Path(__file__).resolve().parents[1] / "recipes/VoxCeleb/SpeakerRec_memeff"
)
SPEAKERS = 7205
# Prepares in a process of its own, whose peak is the preparation's.
PREPARE = """
import json, resource, sys, time
sys.path.insert(0, sys.argv[1])
from voxceleb_prepare import prepare_voxceleb
def usage():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime, used.ru_maxrss // 1024
before, start = usage(), time.perf_counter()
prepare_voxceleb(sys.argv[2], sys.argv[3], amp_th=0)
after = usage()
print(json.dumps({
    "seconds": round(time.perf_counter() - start, 1),
    "processor_seconds": round(after[0] - before[0], 1),
    "mb_before": before[1],
    "peak_mb": after[1],
}))
"""


def make_tree(folder, files):
    """Writes the tree."""
    originals = []
    for seconds in range(1, 21):
        path = folder / f"{seconds}.wav"
        with wave.open(str(path), "wb") as f:
            f.setnchannels(1)
            f.setsampwidth(2)
            f.setframerate(16000)
            f.setnframes(16000 * seconds)
            f.writeframes(b"")
        # wave corrects the header when it closes the file.
        size = 32000 * seconds
        with open(path, "r+b") as f:
            for position, value in ((4, 36 + size), (40, size)):
                f.seek(position)
                f.write(value.to_bytes(4, "little"))
            f.truncate(44 + size)
        originals.append(path)
    for number in range(files):
        speaker = number % SPEAKERS
        session = folder / f"wav/id{speaker:05d}/s{number // SPEAKERS // 20}"
        session.mkdir(parents=True, exist_ok=True)
        # A file may have only so many links.
        original = originals[number % 20]
        target = session / f"{number:07d}.wav"
        try:
            os.link(original, target)
        except OSError:
            copy = folder / f"copy{number}.wav"
            subprocess.run(
                ["cp", "--sparse=always", original, copy], check=True
            )
            originals[number % 20] = copy
            os.link(copy, target)


def main(arguments):
    """Measures, prints and writes the result file."""
    rows = []
    for files in map(int, arguments or ["100000", "1200000"]):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            make_tree(Path(folder), files)
            print(f"tree in {time.perf_counter() - start:.0f} s", flush=True)
            done = subprocess.run(
                [
                    sys.executable,
                    "-c",
                    PREPARE,
                    RECIPE,
                    folder,
                    f"{folder}/save",
                ],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            with open(f"{folder}/save/train.csv", encoding="utf-8") as f:
                segments = sum(1 for _ in f) - 1
        row = {"files": files, "segments": segments, **json.loads(done.stdout)}
        print(row, flush=True)
        rows.append(row)
    write_results(__file__, rows)


if __name__ == "__main__":
    main(sys.argv[1:])
