import pytest

from modeling_baichuan_audio.evaluation.figures import Figure, at_least, at_most, shown, table


def test_numbers():
    assert [shown(7.25, "%"), shown(-0.04, "points"), shown(5.04, "points")] == ["7.2 %", "-0.0 points", "+5.0 points"]
    assert [shown(3.456, "MOS"), shown(1.234, "s"), shown(0.4567, ""), shown(None, "s")] == ["3.46", "1.23 s", "0.457", "none"]


def test_aims():
    assert at_most(8.0, "%", 8.0) == ("≤ 8 %", True) and at_most(8.0, "%", 8.01)[1] is False
    assert at_most(5, "points", 5.1) == ("≤ +5 points", False)
    assert at_least(3, "MOS", 3.0) == ("≥ 3.0", True) and at_least(3, "MOS", 2.999)[1] is False
    assert at_least(90, "%", None) == ("≥ 90 %", False)


def test_the_table():
    figures = [
        Figure("speak", "WER", 16.0, "%", 120, *at_most(15, "%", 16.0), {"source": 1.25, "human": 4.0}, {"noise": 100.0}),
        Figure("speak", "DistillMOS", 3.2, "MOS", 120, *at_least(3, "MOS", 3.2), {"source": 4.4}),
        Figure("codec", "mel MAE", 0.5, "", 3),
    ]
    assert table(figures).splitlines() == [
        "| task | measure | figure | n | aim |  | ceiling | floor |",
        "|---|---|---|---|---|---|---|---|",
        "| speak | WER | 16.0 % | 120 | ≤ 15 % | **missed** | source 1.2 %, human 4.0 % | noise 100.0 % |",
        "|  | DistillMOS | 3.20 | 120 | ≥ 3.0 | met | source 4.40 |  |",
        "| codec | mel MAE | 0.500 | 3 |  |  |  |  |",
    ]


def test_entries_make_the_same_figure():
    figure = Figure("speak", "WER", 16.0, "%", 120, *at_most(15, "%", 16.0), {"source": 1.25})
    assert Figure(**figure.entry()) == figure
    with pytest.raises(TypeError):
        Figure(**figure.entry() | {"taste": 1})
