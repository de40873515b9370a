"""Stands in for transformers' generation tests, which its source distribution lacks: ours are tests/modeling/test_generation*.py.

The class has no tests. It is there because the model tests want to see that a model which generates has generation tests.
"""


class GenerationTesterMixin:
    pass
