"""A small corpus of many speakers in the layout of VoxCeleb.

    OUT/wav/<speaker>/<session>/<utterance>.wav    16 kHz, 16 bit
    OUT/veri_test.txt       "1 a.wav b.wav" same speaker, "0 a.wav b.wav" not

The speakers of veri_test.txt occur in no training file.

Authors
 * The sb_memeff authors 2026
"""

import itertools

from corpus import Corpus, audio_files


def list_trials(speakers):
    """The list of trials: every pair of test utterances of two sessions.

    Pairs within a session are left out, since a shared channel gives them
    away, and so they are in VoxCeleb.
    """
    paths = [
        path.removeprefix("wav/")
        for path in audio_files(speakers)
        if "/test" in path
    ]
    trials = []
    for a, b in itertools.combinations(paths, 2):
        (one, first, _), (other, second, _) = a.split("/"), b.split("/")
        if (one, first) != (other, second):
            trials.append(f"{int(one == other)} {a} {b}\n")
    return {"veri_test.txt": "".join(trials)}


SPEAKERS = Corpus(
    name="voices",
    audio="wav/id{speaker:05d}/{split}{session:02d}/{utterance:05d}.wav",
    lists=list_trials,
    # At least two seconds, a training segment, in nearly every utterance.
    digits=(7, 9),
    train_speakers=60,
    train_sessions=(("train", 3),) * 3,
    test_speakers=16,
    test_sessions=(("test", 2),) * 4,
    seed=2412,
)
