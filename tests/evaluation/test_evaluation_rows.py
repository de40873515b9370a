from modeling_baichuan_audio.evaluation.rows import BEFORE, SINGLE_STAGE, TWO_STAGES, written_rows


def test_questions_in_writing():
    """120 known and 60 held-out questions: the whole is weighted, and compared where there is something to compare with."""
    shares = {BEFORE: (100.0, 70.0), TWO_STAGES: (95.0, 70.0), SINGLE_STAGE: (98.0, 61.0), "this checkpoint": (90.0, 60.0)}
    figures = {figure.measure: figure for figure in written_rows(shares, (120, 60))}
    assert len(figures) == 12
    assert figures[f"accuracy: {BEFORE}"].value == 90 and figures[f"accuracy: {BEFORE}"].ceiling == {}
    two, single = figures[f"accuracy: {TWO_STAGES}"], figures[f"accuracy: {SINGLE_STAGE}"]
    assert (two.value, two.n, two.met, two.ceiling) == (260 / 3, 180, True, {BEFORE: 90.0})
    assert single.value == 257 / 3 and single.met is None and single.aim == ""
    known = figures[f"accuracy, known facts: {TWO_STAGES}"]
    assert (known.value, known.n, known.met, known.ceiling) == (95.0, 120, None, {BEFORE: 100.0})
    assert (
        figures["accuracy, held-out operands: this checkpoint"].value == 60 and figures["accuracy: this checkpoint"].value == 80
    )


def test_a_tie_is_no_smaller_loss():
    figures = written_rows({TWO_STAGES: (50.0, 50.0), SINGLE_STAGE: (50.0, 50.0)}, (10, 10))
    assert [figure.met for figure in figures] == [False, None, None, None, None, None]
    assert all(figure.met is None for figure in written_rows({"this checkpoint": (50.0, 50.0)}, (10, 10)))
