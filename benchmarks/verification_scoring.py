#!/usr/bin/env python3
"""Time and memory of scoring the trials of VoxCeleb1-E, with random embeddings.

    python benchmarks/verification_scoring.py

600 000 trials between 150 000 utterances: cosine, AS-Norm with the 300 nearest
of 5 994 speakers, calibration and error rates.

Authors
 * The sb_memeff authors 2026
"""

import resource
import time

import torch
from result_file import write_results

from sb_memeff.verification.calibration import (
    Calibration,
    calibration_trials,
    quality_measures,
)
from sb_memeff.verification.errors import evaluate
from sb_memeff.verification.scoring import (
    CohortStatistics,
    cosine_scores,
    normalize_scores,
)

TRIALS = 600_000
UTTERANCES = 150_000
SPEAKERS = 5_994
DIMENSIONS = 256
COHORT_SIZE = 300


class Stages:
    """Seconds of each stage.

    Processor seconds are those of all threads: other processes do not count.
    """

    def __init__(self):
        self.rows = []
        self.start()

    def start(self):
        """Starts the clocks."""
        self.wall, self.processor = time.perf_counter(), time.process_time()

    def end(self, name):
        """Ends a stage and starts the next."""
        wall = time.perf_counter() - self.wall
        processor = time.process_time() - self.processor
        row = {
            "stage": name,
            "seconds": round(wall, 1),
            "processor_seconds": round(processor, 1),
        }
        self.rows.append(row)
        print(row)
        self.start()


def peak_mb():
    """Peak memory of the process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main():
    """Scores, prints and writes the result file."""
    torch.manual_seed(0)
    speakers = torch.arange(UTTERANCES) % 1251
    centres = torch.randn(1251, DIMENSIONS)
    embeddings = centres[speakers] + 2 * torch.randn(UTTERANCES, DIMENSIONS)
    cohort = torch.randn(SPEAKERS, DIMENSIONS)
    seconds = 4 + 10 * torch.rand(UTTERANCES)
    labels, enrol, test = calibration_trials(speakers, TRIALS, seed=0)
    before = peak_mb()
    stages = Stages()
    scores = cosine_scores(embeddings, enrol, test)
    stages.end("cosine")
    statistics = CohortStatistics.of(embeddings, cohort, COHORT_SIZE)
    stages.end("cohort statistics")
    scores = normalize_scores(scores, enrol, test, statistics)
    stages.end("AS-Norm")
    measures = quality_measures(
        scores, enrol, test, seconds, embeddings.norm(dim=1), statistics.mean
    )
    calibrated = Calibration(measures[::30], labels[::30])(measures)
    stages.end("calibration")
    figures = evaluate(calibrated, labels)
    stages.end("error rates")
    found = {
        "trials": TRIALS,
        "utterances": UTTERANCES,
        "speakers_of_the_cohort": SPEAKERS,
        "stages": stages.rows,
        "seconds": round(sum(row["seconds"] for row in stages.rows), 1),
        "processor_seconds": round(
            sum(row["processor_seconds"] for row in stages.rows), 1
        ),
        "embeddings_mb": embeddings.numel() * 4 // 2**20,
        "peak_mb_before": before,
        "peak_mb": peak_mb(),
        "figures": figures,
    }
    print(found)
    write_results(__file__, found)


if __name__ == "__main__":
    main()
