"""A small corpus for speech recognition in the layout of LibriSpeech.

    OUT/<split>/<speaker>/<chapter>/<speaker>-<chapter>-<number>.flac    16 kHz
    OUT/<split>/<speaker>/<chapter>/<speaker>-<chapter>.trans.txt

The splits are train, dev and test. The speakers of dev are those of train;
those of test occur nowhere else. A chapter is a session.

Authors
 * The sb_memeff authors 2026
"""

from pathlib import Path

from corpus import Corpus


def list_transcripts(speakers):
    """A transcript for each chapter."""
    transcripts = {}
    for speaker in speakers:
        for session in speaker.sessions:
            chapter = next(iter(session)).rpartition("-")[0]
            transcripts[f"{chapter}.trans.txt"] = "".join(
                f"{Path(path).stem} {' '.join(text).upper()}\n"
                for path, text in session.items()
            )
    return transcripts


DIGITS = Corpus(
    name="digits",
    audio="{split}/{speaker}/{session}/{speaker}-{session}-{utterance:04d}.flac",
    lists=list_transcripts,
    # Fewer, and strings would run out; more, and training would take longer.
    digits=(3, 6),
    train_speakers=30,
    train_sessions=(("train", 10),) * 3 + (("dev", 2),),
    test_speakers=16,
    test_sessions=(("test", 4),) * 2,
    seed=2211,
)
