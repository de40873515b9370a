"""What the miniature is taught: numbers in words, answers that are true, texts and operands that stay held out."""

import re
from collections import Counter

import pytest

from modeling_baichuan_audio.processors.processing_baichuan_audio import split_speech_text
from modeling_baichuan_audio.training.miniature import facts
from modeling_baichuan_audio.training.miniature.balanced import balanced, vocabulary, words
from modeling_baichuan_audio.training.miniature.frames import frames
from modeling_baichuan_audio.training.miniature.phrases import phrases
from modeling_baichuan_audio.training.miniature.plan import OWN_VOICE, TEST_VOICES, TRAIN_VOICES, Plan, make_plan, uncovered
from modeling_baichuan_audio.training.miniature.prompts import WORDS as COMMON_WORDS
from modeling_baichuan_audio.training.miniature.prompts import prompts
from modeling_baichuan_audio.training.miniature.sentences import (
    GRAMMARS,
    Line,
    longer_sums,
    number,
    questions,
    sentences,
    wide_arithmetic,
    wide_comparisons,
)


COUNTS = {"test": 12, "valid": 6, "own": 60, "varied": 20, "voices": 15, "prompts": 12, "prompt_voices": 5, "covered": 0}
COUNTS |= {"again": 0, "sums": 0, "more": 0, "phrases": 0, "balanced": 0, "frames": 0, "takes": 0}
SMALL = Plan(**COUNTS)
WORDS = {number(value): value for value in range(10_000)}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (20, "twenty"),
        (42, "forty two"),
        (100, "one hundred"),
        (365, "three hundred sixty five"),
        (1001, "one thousand one"),
        (9999, "nine thousand nine hundred ninety nine"),
    ],
)
def test_number(value, words):
    assert number(value) == words


def test_numbers_are_distinct_and_bounded():
    assert len(WORDS) == 10_000
    for value in (-1, 10_000):
        with pytest.raises(ValueError, match=f"got {value}"):
            number(value)


def operands(text: str):
    found = re.match(r"(?:What is|How much is) (.+) (plus|minus|times) (.+)\?", text)
    return WORDS[found[1]], found[2], WORDS[found[3]]


def test_sums_are_right():
    sums = [line for line in [*questions(), *wide_arithmetic()] if line.category == "arithmetic"]
    assert len(sums) > 30_000
    for line in sums:
        one, operation, two = operands(line.text)
        result = {"plus": one + two, "minus": one - two, "times": one * two}[operation]
        assert line.answer.lower() == f"{number(one)} {operation} {number(two)} is {number(result)}."


def test_held_out_operands_are_nowhere_in_training():
    """Sums and differences count as one, in either order; of a product the other order may be taught."""

    def facts(text):
        one, operation, two = operands(text)
        if operation == "times":
            return {("times", one, two)}
        low, high = sorted((one, two) if operation == "plus" else (two, one - two))
        return {("plus", low, high)}

    lines = [line for line in questions() if line.category == "arithmetic"]
    held_out = set().union(*(facts(line.text) for line in lines if line.held_out))
    taught = set().union(*(facts(line.text) for line in [*lines, *wide_arithmetic()] if not line.held_out))
    assert len(held_out) > 10 and not held_out & taught
    products = [fact for fact in held_out if fact[0] == "times"]
    assert products and all(("times", two, one) in taught for _, one, two in products)
    # Both ways of asking go together.
    assert len({line.text for line in lines if line.held_out}) == 2 * len({line.answer for line in lines if line.held_out})


def test_longer_sums_are_right_and_take_no_step_that_is_held_out():
    held_out = {frozenset(operands(line.text)[::2]) for line in questions() if line.held_out and " plus " in line.text}
    lines = longer_sums(2000)
    assert lines == longer_sums(3000)[:2000] != longer_sums(2000, seed=1)
    for line in lines:
        words = re.fullmatch(r"What is (.+) plus (.+) (plus|minus) (.+)\?", line.text).groups()
        one, two, three = (WORDS[word] for word in (words[0], words[1], words[3]))
        result = one + two + (three if words[2] == "plus" else -three)
        assert line.answer.lower().endswith(f" is {number(result)}.")
        pairs = [(one, two), (one + two, three), (two, three)] if words[2] == "plus" else [(one, two), (three, result)]
        assert not held_out & {frozenset(pair) for pair in pairs}
    assert len({line.text for line in lines}) > 1500


def test_comparisons_are_right():
    """Of held-out pairs neither order is in training."""
    lines, pairs = [line for line in questions() if line.category == "comparison"], {True: set(), False: set()}
    wide = wide_comparisons()
    assert len(lines) > 50 and len(wide) > 8000
    for line in lines + wide:
        one, two = re.match(r"Which is bigger, (.+) or (.+)\?", line.text).groups()
        assert line.answer.lower() == f"{number(max(WORDS[one], WORDS[two]))} is bigger."
        pairs[line.held_out].add(frozenset((one, two)))
    assert pairs[True] and not pairs[True] & pairs[False]


def test_questions_are_distinct_and_answered():
    lines = questions()
    assert len({line.text for line in lines}) == len(lines) > 1000
    assert all(line.answer.endswith((".", "?")) for line in lines)


def test_sentences_are_distinct_seeded_and_grow():
    many = sentences(3000, seed=1)
    assert len({line.text for line in many}) == 3000
    assert sentences(500, seed=1) == many[:500] != sentences(500, seed=2)
    assert {line.category for line in many} == set(GRAMMARS)
    assert all(re.fullmatch(r"[A-Z][A-Za-z',. ?]+[.?]", line.text) for line in many), "only letters: numbers are words"
    with pytest.raises(ValueError, match="got 20001"):
        sentences(20_001)


def test_prompts_are_distinct_seeded_and_bring_new_words():
    many = prompts(3000, seed=1)
    assert len({line.text for line in many}) == 3000 and {line.category for line in many} == {"prompt"}
    assert prompts(500, seed=1) == many[:500] != prompts(500, seed=2)
    assert all(re.fullmatch(r"[A-Z][A-Za-z',. ?]+[.?]", line.text) for line in many)

    def words(lines):
        return {word for line in lines for word in re.findall(r"[a-z']+", line.text.lower())}

    known = words(sentences(5000))
    assert len(words(many) | known) > 2 * len(known)
    assert len(set(COMMON_WORDS)) == len(COMMON_WORDS)


def test_plan_holds_out_voices_sentences_and_operands():
    clips = make_plan(SMALL)
    train = [clip for clip in clips if clip.split == "train"]
    heard = {clip.text for clip in train}
    for split, count in (("test_sentence", 12), ("test_voice", 18), ("test_operands", 6)):
        members = [clip for clip in clips if clip.split == split]
        assert len(members) == count
        if split != "test_sentence":
            assert {clip.voice for clip in members} <= set(TEST_VOICES) and len(TEST_VOICES) >= 3
        assert not heard & {clip.text for clip in members if clip.kind == "sentence" or split == "test_operands"}
    assert not set(TEST_VOICES) & {clip.voice for clip in train}
    assert not set(TEST_VOICES) & set(TRAIN_VOICES)
    said = [clip for clip in clips if clip.kind == "prompt"]
    assert {clip.split for clip in said} == {"train"} and len({clip.text for clip in said}) == len(said) == 17
    assert [sum(clip.voice == OWN_VOICE for clip in said), sum(clip.engine == "kokoro" for clip in said)] == [4, 5]
    # A prompt may be a sentence of the other grammar, too.
    everything = make_plan(Plan())
    tested = {clip.text for clip in everything if clip.split != "train" and clip.kind == "sentence"}
    assert len(tested) == 300 and not tested & {clip.text for clip in everything if clip.split == "train"}
    spoken_answers = {clip.text for clip in train if clip.kind == "answer"}
    assert all(clip.answer in spoken_answers for clip in train if clip.kind == "question")
    assert len({clip.id for clip in clips}) == len(clips)


def test_plan_is_a_function_of_counts_and_seed():
    assert make_plan(SMALL) == make_plan(SMALL)
    assert make_plan(SMALL) != make_plan(Plan(**COUNTS, seed=1))
    larger = {clip.id for clip in make_plan(Plan(**COUNTS | {"voices": 30}))}
    assert {clip.id for clip in make_plan(SMALL)} <= larger
    for bad, message in ((Plan(voices=20_000), "20000 sentences"), (Plan(test=-1), "cannot be negative")):
        with pytest.raises(ValueError, match=message):
            make_plan(bad)


def test_voices_say_every_kind_of_sentence():
    """Small kinds of sentences are used up before the training voices have their turn: those are said again."""
    told = [Line(f"Let us go {number} together.", "daily") for number in range(6)] + [Line("We will see.", "daily")] * 9
    told += [Line(f"Turn left {number}.", "daily") for number in range(4)]  # too few to be a kind
    lines = uncovered(told, [Line("We will go.", "daily"), Line("We will stay.", "daily")], 8)
    assert [line.text for line in lines] == [f"Let us go {number % 6} together." for number in range(8)]
    assert uncovered(told[-4:], [], 8) == []
    clips, before = make_plan(Plan()), {clip.id for clip in make_plan(Plan(covered=0))}
    added = [clip for clip in clips if clip.id not in before]
    assert len(added) == 600 and len(clips) == len(before) + 600 and {clip.id for clip in clips} >= before
    assert {clip.voice for clip in added} == set(TRAIN_VOICES) and {clip.split for clip in added} == {"train"}
    assert not {clip.text for clip in added} & {clip.text for clip in clips if clip.split != "train"}
    begun = Counter(" ".join(clip.text.split()[:2]) for clip in clips if clip.engine == "kokoro" and clip.split == "train")
    assert begun["Let us"] == 15 and begun["My name"] >= 16


def test_the_own_voice_says_what_others_say():
    """Lines of the other voices and written sums, each once, beside all that a plan without them has."""
    before = {clip.id: clip for clip in make_plan(SMALL)}
    clips = make_plan(Plan(**COUNTS | {"again": 2000, "sums": 9}))
    added = [clip for clip in clips if clip.id not in before]
    assert {clip.id for clip in clips} >= set(before) and len({clip.id for clip in clips}) == len(clips)
    assert {(clip.voice, clip.split) for clip in added} == {(OWN_VOICE, "train")}
    kinds = Counter(clip.kind for clip in added if clip.kind != "piece")
    assert (kinds["answer"], kinds["prompt"]) == (9, 13) and kinds["question"] > 1000
    assert kinds["sentence"] == 33  # of 35: two are answers too, and those it says already
    texts, own = [clip.text for clip in added if clip.kind != "piece"], [c for c in before.values() if c.voice == OWN_VOICE]
    assert len(set(texts)) == len(texts) and not set(texts) & {clip.text for clip in own if clip.split == "train"}
    held_out = {line.answer for line in questions() if line.held_out and line.category == "arithmetic"}
    tested = {clip.text for clip in clips if clip.split == "test_operands" or (clip.split != "train" and clip.kind == "sentence")}
    assert not {clip.text for clip in added} & (held_out | tested)
    smaller = {clip.id for clip in make_plan(Plan(**COUNTS | {"again": 300, "sums": 4}))}
    assert smaller < {clip.id for clip in clips}


def test_the_own_voice_says_what_nobody_says():
    """Sentences left over, phrases, rare words, other words: no text twice, none that is tested, all else of the plan the same."""
    before = {clip.id: clip for clip in make_plan(SMALL)}
    clips = make_plan(Plan(**COUNTS | {"more": 300, "phrases": 200, "balanced": 100, "frames": 50}))
    added = [clip for clip in clips if clip.id not in before]
    assert {clip.id for clip in clips} >= set(before) and len({clip.id for clip in clips}) == len(clips)
    assert {(clip.voice, clip.split) for clip in added} == {(OWN_VOICE, "train")}
    texts = [clip.text for clip in added if clip.kind == "sentence"]
    kinds = Counter(clip.category for clip in added if clip.kind == "sentence")
    assert (kinds["phrase"], kinds["balanced"]) == (200, 100) and 30 < kinds["frame"] <= 50  # but those that are said already
    assert len(set(texts)) == len(texts) == 600 + kinds["frame"]
    others = {clip.text for clip in added if clip.kind == "sentence" and clip.category != "frame"}
    assert not others & {clip.text for clip in before.values()}
    assert not set(texts) & {clip.text for clip in clips if clip.split != "train" and clip.kind == "sentence"}
    pieces = Counter(clip.id.rpartition("-")[0] for clip in added if clip.kind == "piece")
    wholes = {clip.id: len(split_speech_text(clip.text)) for clip in added if clip.kind == "sentence"}
    assert pieces == {name: count for name, count in wholes.items() if count > 1}


def test_answers_to_small_facts_have_other_takes():
    before = {clip.id for clip in make_plan(SMALL)}
    few, many = (make_plan(Plan(**COUNTS | {"takes": takes})) for takes in (2, 3))
    added = [clip for clip in many if clip.id not in before]
    assert {clip.id for clip in many} > {clip.id for clip in few} > before
    assert {(clip.voice, clip.split, clip.kind) for clip in added} == {(OWN_VOICE, "train", "answer")}
    told = {line.answer for line in questions() if line.category not in ("arithmetic", "comparison")}
    assert Counter(clip.text for clip in added) == dict.fromkeys(told, 3)
    speeds = [clip.speed for clip in added]
    assert 0.88 <= min(speeds) < 0.9 and 1.1 < max(speeds) <= 1.12 and len(set(speeds)) == 25


def test_phrases_bring_the_words_of_answers_and_letters():
    many = phrases(3000, seed=1)
    texts = [line.text for line in many]
    assert len(set(texts)) == 3000 and phrases(500, seed=1) == many[:500] != phrases(500, seed=2)
    assert all(re.fullmatch(r"[A-Z][A-Za-z',. ]*\.", text) for text in texts)
    said = Counter(" ".join(texts).replace(",", "").replace(".", "").split())
    answers = [*facts.CAPITALS.values(), *facts.SOUNDS.values(), *facts.LETTERS]
    assert min(said[word] for answer in answers for word in answer.split()) >= 1
    words = [found[1].lower() for text in texts if (found := re.match(r"(?:My name is )?(\w\w+)(?: is spelled|,) [A-Z],", text))]
    assert 400 < len(words) < 600 and not set(words) & {word.lower() for word in (*facts.SPELLED, *facts.PEOPLE)}


def test_balanced_lines_say_what_is_said_least():
    said = [line.text for line in sentences(4000)]
    tested = {"Let us cook dinner together.", "This call may be recorded."}
    many = balanced(1000, said, tested)
    texts = [line.text for line in many]
    assert len(set(texts)) == 1000 and balanced(200, said, tested) == many[:200] != balanced(200, said, tested, seed=1)
    assert not any(part in text for text in texts for part in ("us cook dinner together", "call may be", "may be recorded"))
    before = Counter(word for text in said for word in set(words(text)))
    after = before + Counter(word for text in texts for word in set(words(text)))
    known = vocabulary()
    assert len(known) > 600 and {"Canberra", "connect", "o'clock"} <= set(known)
    rare = [word for word in known if before[word] < 5]
    assert len(rare) > 150 and min(after[word] for word in rare) >= 3
    assert sum(after[word] for word in rare) > 2000 > 10 * sum(before[word] for word in rare)
    assert [words("My name is Anna, A."), words("Anna's hat. Please!"), words("")] == [
        ["my", "name", "is", "Anna", "A"],
        ["Anna's", "hat", "please"],
        [],
    ]


def test_frames_stand_around_many_words():
    tested = {"Turn left after the park and go straight on.", "This call may be recorded."}
    many = frames(3000, tested)
    texts = [line.text for line in many]
    assert len(set(texts)) == 3000 and frames(300, tested) == many[:300] != frames(300, tested, seed=1)
    assert not tested & set(texts) and "Your message has been saved." in texts
    for frame in (r"Turn left after (.+) and go straight on\.", r"Let us (.+) together\.", r"We usually (.+) in the evening\."):
        around = [found[1] for text in texts if (found := re.fullmatch(frame, text))]
        known = [words for words in around if words in (*facts.PLACES, *facts.ACTIVITIES)]
        assert len(around) == len(set(around)) > 50 and 8 < len(known) < len(around) / 2


def test_pieces_are_those_of_a_reply():
    clips = make_plan(SMALL)
    by_id = {clip.id: clip for clip in clips}
    pieces = [clip for clip in clips if clip.kind == "piece"]
    assert pieces
    for piece in pieces:
        whole, index = by_id[piece.id.rpartition("-")[0]], int(piece.id.rpartition("-")[2])
        assert piece.voice == whole.voice == OWN_VOICE
        assert piece.text == split_speech_text(whole.text)[index].strip()
