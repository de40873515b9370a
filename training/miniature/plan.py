"""Which clip is spoken by whom, and which split it belongs to: all of it a function of a few counts and a seed."""

import hashlib
import random
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, replace
from typing import Any

from ...processors.processing_baichuan_audio import split_speech_text
from .balanced import balanced
from .frames import frames
from .phrases import phrases
from .prompts import prompts
from .sentences import MOST_SENTENCES, SUMS, Line, questions, sentences, wide_arithmetic


TRAIN_VOICES = (
    "af_alloy af_aoede af_bella af_heart af_jessica af_kore af_nicole af_river af_sarah af_sky am_adam am_echo am_eric "
    "am_fenrir am_liam am_michael am_onyx am_santa bf_alice bf_emma bf_isabella bm_daniel bm_fable bm_george"
).split()
# Never heard in training: two accents, two sexes.
TEST_VOICES = ("af_nova", "am_puck", "bf_lily", "bm_lewis")
# The voice that the model speaks with. Played at another pitch it stands for other speakers, in training only.
OWN_VOICE = "heart"
PITCHES = (0.84, 0.9, 0.95, 1.06, 1.12, 1.2)


@dataclass(frozen=True)
class Clip:
    """
    One clip to be spoken.

    Args:
        id: what it is, its number, and a digest of what is spoken how: a file of another plan is never taken for it.
        text, answer, category: of the [`Line`].
        kind: "sentence", "prompt" (of a telephone system), "question", "answer" or "piece" (of a training sentence or prompt in the
            model's own voice, spoken piece by piece).
        engine, voice, speed, pitch, seed: how it is spoken.
        split: "train", "valid", "test_sentence" (known voices, new texts), "test_voice" (new voices; sentences are new too) or
            "test_operands" (new voices and operand pairs).
    """

    id: str
    text: str
    kind: str
    category: str
    engine: str
    voice: str
    speed: float
    pitch: float
    seed: int
    split: str
    answer: str = ""

    @property
    def path(self) -> str:
        return f"{self.split}/{self.id}.wav"

    def job(self) -> dict[str, Any]:
        """What `speak.py` is told."""
        return {name: getattr(self, name) for name in ("path", "text", "engine", "voice", "speed", "pitch", "seed")}

    def entry(self) -> dict[str, Any]:
        return asdict(self) | {"path": self.path}


@dataclass(frozen=True)
class Plan:
    """
    How many clips of what.

    Args:
        test: clips of each held-out set.
        own: training sentences in the model's own voice. varied: sentences, and as many questions, by that voice at other pitches.
        voices: training sentences, and as many questions, by Kokoro's training voices.
        prompts: prompts of telephone systems, every third in the model's own voice, the others at other pitches.
        prompt_voices: more prompts, by Kokoro's training voices.
        covered: sentences of the own voice that begin with words which none of Kokoro's training sentences begins with, by its voices.
        again: of what other voices say in training, and of questions, at most so many lines in the model's own voice too.
        sums: answers to written sums, in the model's own voice.
        more: of the sentences that nobody says so far, at most so many in the model's own voice.
        phrases: phrases in ever new order and spelled words, in the model's own voice.
        balanced: lines of the words that all of the above say least, in the model's own voice.
        frames: sentences of daily life and of menus with other words in them, in the model's own voice.
        takes: more recordings of every answer to a small fact, in the model's own voice at other speeds.
    """

    test: int = 120
    valid: int = 60
    own: int = 5000
    varied: int = 3000
    voices: int = 2400
    prompts: int = 6000
    prompt_voices: int = 400
    covered: int = 600
    again: int = 12_000
    sums: int = 2500
    more: int = 9000
    phrases: int = 6000
    balanced: int = 10_000
    frames: int = 5000
    takes: int = 8
    seed: int = 0


class _Speakers:
    """Draws voices, speeds and seeds; every clip has a stream of its own, so that a larger plan repeats a smaller one
    (of what the own voice says beyond its sentences, as far as `own` and `prompts` stay)."""

    def __init__(self, seed: int):
        self.seed = seed

    def clip(self, number: int, line: Line, kind: str, split: str, who: str) -> Clip:
        rng = random.Random(f"{self.seed} {split} {kind} {who} {number}")
        engine, voice, pitch, speed = "hibari", OWN_VOICE, 1.0, 1.0
        if who == "varied":
            pitch, speed = rng.choice(PITCHES), round(rng.uniform(0.9, 1.15), 2)
        elif who == "take":  # the own voice says a text always alike at the same speed
            speed = round(rng.uniform(0.88, 1.12), 2)
        elif who in ("train", "test"):
            engine = "kokoro"
            voices = TRAIN_VOICES if who == "train" else TEST_VOICES
            voice, speed = voices[number % len(voices)], round(rng.uniform(0.92, 1.12), 2)
        voice = voice if pitch == 1.0 else f"{voice}@{pitch}"
        spoken = (engine, voice, speed, pitch, rng.randrange(2**31))
        digest = hashlib.sha256(f"{line.text} {spoken}".encode()).hexdigest()[:8]
        return Clip(f"{kind}-{who}-{number:05d}-{digest}", line.text, kind, line.category, *spoken, split, line.answer)


def _pieces(clip: Clip) -> list[Clip]:
    """The pieces that a reply speaks the clip's text in, where there are several."""
    texts = split_speech_text(clip.text)
    if len(texts) < 2:
        return []
    return [replace(clip, id=f"{clip.id}-{number}", text=text.strip(), kind="piece") for number, text in enumerate(texts)]


def _opening(line: Line) -> str:
    return " ".join(line.text.split()[:2])


def uncovered(told: list[Line], voices: list[Line], count: int) -> list[Line]:
    """
    Of kinds of sentences that run out before the training voices have their turn: `count` of `told`, each first two words that begin
    at least five of them and at most one of `voices` as often as any other.
    """
    begun, kinds = Counter(map(_opening, voices)), defaultdict(list)
    for line in told:
        if begun[_opening(line)] < 2:
            kinds[_opening(line)].append(line)
    kinds = sorted((lines for lines in kinds.values() if len(lines) >= 5), key=lambda lines: -len(lines))
    rounds = count // len(kinds) + 1 if kinds else 0
    return [lines[number % len(lines)] for number in range(rounds) for lines in kinds][:count]


def make_plan(plan: Plan) -> list[Clip]:
    """
    Every clip, the cheap ones first, then the tests, then the training voices: a corpus that is cut short is still whole.

    Raises:
        ValueError: counts that are negative or too large.
    """
    if min(count for name, count in asdict(plan).items() if name != "seed") < 0:
        raise ValueError(f"The counts of a plan cannot be negative, got {plan}.")
    speakers = _Speakers(plan.seed)
    asked = questions()
    held = 2 * plan.test + plan.valid
    total = held + plan.own + plan.varied + plan.voices
    if total + held > MOST_SENTENCES:
        raise ValueError(f"There are {MOST_SENTENCES} sentences, and this plan takes {total + held}: {plan}.")
    everything, told = sentences(MOST_SENTENCES, plan.seed), {text for line in asked for text in (line.text, line.answer)}
    # Held-out texts come first, so that they stay held out when the plan grows; what is also an answer is no new text, and one of
    # the last sentences takes its place.
    lines, spare = iter(everything[:total]), (line for line in reversed(everything) if line.text not in told)
    new_texts, new_voices, valid = (
        [line if line.text not in told else next(spare) for line in (next(lines) for _ in range(count))]
        for count in (plan.test, plan.test, plan.valid)
    )
    known, held_out = [line for line in asked if not line.held_out], [line for line in asked if line.held_out]

    def some(pool: list[Line], count: int, purpose: str) -> list[Line]:
        """`count` lines, each as often as any other; a larger count begins with a smaller one's."""
        rng, drawn = random.Random(f"{plan.seed} {purpose}"), []
        while len(drawn) < count:
            drawn += rng.sample(pool, len(pool))
        return drawn[:count]

    def clips(pool, kind: str, split: str, who: str, first: int = 0) -> list[Clip]:
        return [speakers.clip(number, line, kind, split, who) for number, line in enumerate(pool, first)]

    answers = {line.answer: Line(line.answer, line.category) for line in known}
    small = [line for line in known if line.category not in SUMS]
    sums = [line for line in known if line.category in SUMS]

    def mixed(count: int, who: str) -> list[Line]:
        """Questions to be heard, the small facts as often as the sums."""
        pairs = zip(some(small, count, f"{who} small"), some(sums, count, f"{who} sums"))
        return [line for pair in pairs for line in pair][:count]

    def further(own: list[Clip], pool: list[tuple[str, Line]]) -> list[Clip]:
        """What the own voice says beyond its clips `own`: lines of a pool of (kind, line), and answers to written sums."""
        said, rng = {clip.text for clip in own}, random.Random(f"{plan.seed} further")
        unsaid = list({line.text: (kind, line) for kind, line in pool if line.text not in said}.values())
        written = sorted({line.answer for line in wide_arithmetic()} - said)
        rng.shuffle(unsaid)
        rng.shuffle(written)
        results = [("answer", Line(text, "arithmetic")) for text in written[: plan.sums]]
        return [
            speakers.clip(len(own) + number, line, kind, "train", "own")
            for drawn in (unsaid[: plan.again], results)
            for number, (kind, line) in enumerate(drawn)
        ]

    own_sentences = [next(lines) for _ in range(plan.own)]
    varied_sentences = [next(lines) for _ in range(plan.varied)]
    voices_sentences = list(lines)
    tested = {line.text for line in (*new_texts, *new_voices, *valid)}
    said, others = prompts(plan.prompts + plan.prompt_voices, plan.seed), iter(prompts(len(tested), plan.seed + 1))
    said = [line if line.text not in tested else next(others) for line in said]
    others_prompts = [line for number, line in enumerate(said[: plan.prompts]) if number % 3]
    result = clips(answers.values(), "answer", "train", "own")
    result += clips(own_sentences, "sentence", "train", "own")
    result += clips(mixed(plan.own // 4, "own"), "question", "train", "own")
    result += clips(said[: plan.prompts : 3], "prompt", "train", "own")
    elsewhere = [("sentence", line) for line in varied_sentences + voices_sentences]
    elsewhere += [("prompt", line) for line in others_prompts + said[plan.prompts :]]
    result += further(result, elsewhere + [("question", line) for line in known])
    tested_or_said = tested | {clip.text for clip in result} | told
    unsaid = [line for line in everything[total:] if line.text not in tested_or_said][: plan.more]
    unsaid += [line for line in phrases(plan.phrases, plan.seed) if line.text not in tested_or_said]
    result += clips(unsaid, "sentence", "train", "own", first=len(result))
    even = balanced(plan.balanced, [clip.text for clip in result], tested, plan.seed)
    even += frames(plan.frames, tested, plan.seed)
    said_now = {line.text for line in unsaid}
    spoken = clips([line for line in even if line.text not in tested_or_said], "sentence", "train", "own", first=len(result))
    result += [clip for clip in spoken if clip.text not in said_now]
    facts_told = [line for line in answers.values() if line.category not in SUMS]
    result += clips(facts_told * plan.takes, "answer", "train", "take")
    result += [piece for clip in result if clip.kind in ("sentence", "prompt") for piece in _pieces(clip)]
    result += clips(valid, "sentence", "valid", "own")
    result += clips(new_texts, "sentence", "test_sentence", "own")
    result += clips(varied_sentences, "sentence", "train", "varied")
    result += clips(mixed(plan.varied, "varied"), "question", "train", "varied")
    result += clips(others_prompts, "prompt", "train", "varied")
    result += clips(new_voices, "sentence", "test_voice", "test")
    result += clips(some(small, plan.test // 2, "test small"), "question", "test_voice", "test")
    result += clips(some(held_out, plan.test // 2, "test held out"), "question", "test_operands", "test")
    result += clips(said[plan.prompts :], "prompt", "train", "train")
    missing = uncovered(own_sentences + varied_sentences, voices_sentences, plan.covered)
    result += clips(missing, "sentence", "train", "train", first=plan.voices)
    spoken_questions = clips(mixed(plan.voices, "train"), "question", "train", "train")
    pairs = zip(clips(voices_sentences, "sentence", "train", "train"), spoken_questions)
    result += [clip for pair in pairs for clip in pair]
    return result
