"""A small corpus of many speakers in the layout of VoxCeleb.

The speakers are voice variants of eSpeak NG: one variant and one accent make
one speaker. A session of a speaker has its own pitch, rate, room, equalizer
and noise, as a VoxCeleb video has, so that neither the spectrum of the channel
nor the pitch alone tells who speaks. No text occurs twice.

    OUT/wav/<speaker>/<session>/<utterance>.wav    16 kHz, 16 bit
    OUT/veri_test.txt       "1 a.wav b.wav" same speaker, "0 a.wav b.wav" not

The speakers of veri_test.txt occur in no training file.

Authors
 * The sb_memeff authors 2026
"""

import dataclasses
import itertools

from corpus import Corpus, audio_files
from voices import SAMPLE_RATE, TEST_VARIANTS, TRAIN_VARIANTS

DETERMINERS = "the a this that every one another our their some".split()
ADJECTIVES = (
    "quiet yellow enormous clever frozen patient hollow northern careful rusty "
    "gentle crooked famous empty purple thirsty modern wooden sudden bitter"
).split()
NOUNS = (
    "lighthouse parrot engineer cathedral violin harbour teacher mountain "
    "bicycle orchard letter captain kitchen thunderstorm museum puzzle "
    "shepherd telescope basket village river doctor chimney journey"
).split()
VERBS = (
    "watched followed measured painted ignored repaired described borrowed "
    "surprised visited counted imagined guarded mentioned chose understood"
).split()
PLACES = (
    "behind the station;near the old bridge;under a grey sky;in the valley;"
    "across the square;beside the fire;on the third floor;far from home;"
    "outside the theatre;among tall trees"
).split(";")
TIMES = (
    "before breakfast;on Thursday;all through July;at half past nine;"
    "without a word;for five years;twice a week;just in time;every winter;"
    "long after midnight"
).split(";")


@dataclasses.dataclass(frozen=True)
class Speakers(Corpus):
    """Settings of the corpus.

    A speaker has so many sessions of so many utterances each.
    """

    FORMAT = 1
    SPEAKER = "id{:05d}"
    AUDIO = "wav/{speaker}/s{session:02d}/{utterance:05d}.wav"
    FIRST_SESSION = 0
    WORDS_PER_MINUTE = (150, 190)

    train_speakers: int = 60
    train_sessions: int = 3
    train_utterances: int = 3
    test_speakers: int = 16
    test_sessions: int = 4
    test_utterances: int = 2
    seed: int = 2412

    def groups(self):
        """Training speakers and test speakers."""
        train = [("train", self.train_utterances)] * self.train_sessions
        test = [("test", self.test_utterances)] * self.test_sessions
        return [
            (TRAIN_VARIANTS, 10001, self.train_speakers, train),
            (TEST_VARIANTS, 20001, self.test_speakers, test),
        ]

    def draw_text(self, rng):
        """Draws two sentences; the second is for those who speak fast."""
        return draw_sentence(rng), draw_sentence(rng)

    def speak(self, rng, say, pitch, text):
        """Speaks for three to four seconds."""
        pitch += rng.normal(0, 2)
        length = int(SAMPLE_RATE * rng.uniform(3.1, 4.0))
        samples = say(text[0], pitch)
        if len(samples) < length:
            samples = say(" ".join(text), pitch)
        return samples[:length]

    def lists(self, speakers):
        """The trials of the test speakers."""
        trials = list_trials(speakers[self.train_speakers :])
        return {"veri_test.txt": "\n".join(trials) + "\n"}

    def counts(self, speakers):
        """Utterances and trials."""
        trials = list_trials(speakers[self.train_speakers :])
        return {
            "utterances": len(audio_files(speakers)),
            "trials": len(trials),
            "target_trials": sum(line[0] == "1" for line in trials),
        }

    def describe_counts(self, manifest):
        """Utterances and trials."""
        return (
            f"{manifest['utterances']} utterances, "
            f"{manifest['trials']} trials ({manifest['target_trials']} target)"
        )


def draw_sentence(rng):
    """Draws a sentence of ten to fourteen words."""

    def pick(words):
        return words[rng.integers(len(words))]

    def thing():
        return f"{pick(DETERMINERS)} {pick(ADJECTIVES)} {pick(NOUNS)}"

    main = f"{thing()} {pick(VERBS)} {thing()}"
    order = rng.integers(3)
    if order == 0:
        sentence = f"{main} {pick(PLACES)} {pick(TIMES)}."
    elif order == 1:
        sentence = f"{pick(TIMES)}, {main} {pick(PLACES)}."
    else:
        sentence = f"{pick(PLACES)} {main}, {pick(TIMES)}."
    return sentence[0].upper() + sentence[1:]


def list_trials(speakers):
    """Lines of veri_test.txt: every pair of utterances of two sessions.

    Pairs within a session are left out, since a shared channel gives them
    away, and so they are in VoxCeleb.
    """
    paths = [path.removeprefix("wav/") for path in audio_files(speakers)]
    trials = []
    for a, b in itertools.combinations(paths, 2):
        (one, first, _), (other, second, _) = a.split("/"), b.split("/")
        if (one, first) != (other, second):
            trials.append(f"{int(one == other)} {a} {b}")
    return trials
