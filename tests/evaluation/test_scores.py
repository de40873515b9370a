import math

import numpy as np
import pytest
import torch

from modeling_baichuan_audio.evaluation.scores import (
    TextNormalizer,
    accuracy,
    codebook_usage,
    edit_distance,
    mel_error,
    similarity,
    weighted_mean,
    word_error_rate,
)


normalize = TextNormalizer({"colour": "color"})


@pytest.mark.parametrize(
    ("said", "written"),
    [
        ("Two plus three is five.", "2 + 3 = 5"),
        ("Two plus three is five.", "2+3=5."),
        ("Nine minus four is five.", "9 - 4 = 5"),
        ("Nine minus four is five.", "9 − 4 is 5."),
        ("Six times seven is forty two.", "6 x 7 is 42."),
        ("Six times seven is forty two.", "6×7=42"),
        ("It is three o'clock.", "It is 3 o'clock."),
        ("It is three o'clock.", "It's 3:00."),
        ("It is seven forty five.", "It is 7:45."),
        ("This basket costs six hundred twenty eight dollars.", "This basket costs $628."),
        ("The number is eight seven zero.", "The number is 870."),
        ("Table is spelled T, A, B, L, E.", "Table is spelled T-A-B-L-E."),
        ("The colour is red.", "the color is red"),
        ("Doctor Smith", "Dr. Smith"),
        ("My number is five five one two.", "My number is 5512."),
        ("My number is five five one two.", "My number is 55-12."),
        ("My number is zero two nine zero.", "My number is 0290."),
        ("The number is six seven one seven.", "The number is 6-7-1-7."),
        ("He counted two thousand five hundred seven steps.", "He counted 2,507 steps."),
        ("He came on May second.", "He came on May 2."),
        ("I woke up at three twenty eight.", "I woke up at 3.28."),
        ("Three thousand two.", "3002"),
        ("You are caller number one.", "You are caller number 1."),
        ("Thank you.", "Thank you..."),
        ("You can not hear.", "You cannot hear."),
        ("My name is Tom, T, O, M.", "My name is Tom, TOM."),
        ("It begins on March twenty ninth.", "It begins on March 29th."),
        ("The twenty-first of May.", "The 21st of May."),
        ("Breakfast is served until five to eight.", "Breakfast is served until 5-8."),
        ("Nineteen minus four is fifteen.", "19-4 is 15."),
        ("Four times seven is twenty eight.", "4x7 is 28."),
    ],
)
def test_what_was_understood_counts_not_how_it_is_written(said, written):
    assert word_error_rate([(said, written)], normalize) == 0


@pytest.mark.parametrize(
    ("said", "written"),
    [
        ("Two plus three is five.", "2 + 3 = 6"),
        ("Two plus three is five.", "2 - 3 = 5"),
        ("Two plus three is five.", "2-3 is 5"),
        ("Nineteen minus four is fifteen.", "19-4 is 16."),
        ("It is three o'clock.", "It is 3:30."),
        ("The number is eight seven zero.", "The number is 807."),
        ("The number is zero two nine.", "The number is 29."),
        ("The second room is red.", "The 2 room is red."),
        ("He came on May second.", "He came on May 3rd."),
        ("It begins on March twenty ninth.", "It begins on March 28th."),
        ("Breakfast is served until five to eight.", "Breakfast is served until 5-9."),
        ("My name is Tom, T, O, M.", "My name is Tom, Tom."),
        ("Table is spelled T, A, B, L, E.", "Table is spelled T-A-B-E-L."),
    ],
)
def test_what_was_misunderstood_is_an_error(said, written):
    assert word_error_rate([(said, written)], normalize) > 0
    assert accuracy([(said, written)], normalize) == 0


def test_edit_distance():
    assert edit_distance("the cat sat down".split(), "the cat down".split()) == 1
    assert edit_distance("a b c".split(), "x b c d".split()) == 2
    assert edit_distance([], "a b".split()) == 2


def test_word_error_rate_is_over_all_words():
    pairs = [("one cat sat here", "one cat sat there"), ("go", "go go away")]
    assert word_error_rate(pairs, str) == 3 / 5
    assert word_error_rate([("go", "you do not know what to say")], str) == 7
    with pytest.raises(ValueError, match="needs references"):
        word_error_rate([("...", "a")], normalize)


def test_accuracy_leaves_spaces_and_numerals_aside():
    pairs = [("Twelve comes after eleven.", "12 comes after 11"), ("Cat is spelled C, A, T.", "Cat is spelled CAT.")]
    assert accuracy(pairs, normalize) == 1
    assert accuracy([*pairs, ("A cat says meow.", "A cat says moo."), ("Tuesday.", "")], normalize) == 0.5
    with pytest.raises(ValueError, match="needs answers"):
        accuracy([], normalize)


def test_mel_error_is_over_the_frames_both_have():
    one, other = torch.zeros(3, 2), torch.tensor([[1.0, -1.0], [0.5, 0.5], [0.0, 3.0], [9.0, 9.0]])
    assert mel_error(one, other) == (1.0, 3)
    assert mel_error(other, one) == (1.0, 3)
    for bad in (torch.zeros(0, 2), torch.zeros(3, 4)):
        with pytest.raises(ValueError, match="nothing to compare"):
            mel_error(one, bad)


def test_weighted_mean():
    assert weighted_mean([(1.0, 1), (4.0, 2)]) == 3
    with pytest.raises(ValueError, match="needs values"):
        weighted_mean([])


def test_codebook_usage():
    codes = np.array([[0, 1, 2, 3, 0, 1, 2, 3], [5, 5, 5, 5, 5, 5, 5, 5], [0, 0, 0, 0, 0, 0, 1, 1]])
    one, two, three = codebook_usage(codes, [8, 8, 2])
    assert one == {"used": 0.5, "perplexity": pytest.approx(4.0)}
    assert two == {"used": 0.125, "perplexity": pytest.approx(1.0)}
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert three == {"used": 1.0, "perplexity": pytest.approx(math.exp(entropy))}


def test_similarity():
    assert similarity([3.0, 4.0], [6.0, 8.0]) == pytest.approx(1.0)
    assert similarity([1.0, 0.0], [0.6, 0.8]) == pytest.approx(0.6)
    assert similarity(None, [1.0, 0.0]) == 0.0
