"""What a model outside transformers has to tell transformers' tests about itself. transformers itself is left as it is."""

import os
import unittest
from collections import OrderedDict

from .not_applicable import NOT_APPLICABLE


def declare_roles(base_models: dict[str, str], causal_lms: dict[str, str]) -> None:
    """Adds our class names, by model type, to the tests' copies of the name tables by which they tell base models from heads.

    `AutoModel.register` does not fill those tables, and without the names many tests would skip or run without labels.
    """
    import tests.test_modeling_common as common

    for table, names in (("MODEL_MAPPING_NAMES", base_models), ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", causal_lms)):
        setattr(common, table, OrderedDict(getattr(common, table)) | names)


def _skipped(name: str, reason: str):
    def test(self, *args, **kwargs):
        raise unittest.SkipTest(reason)

    test.__name__ = test.__qualname__ = name
    return test


def with_declared_skips(test_class: type) -> type:
    """Class decorator: replaces the tests that `NOT_APPLICABLE` lists for this class by skips with their reasons.

    With `CONFORMANCE_TRY_SKIPS` in the environment nothing is replaced: what passes then had no need of its entry.

    Raises:
        AttributeError: an entry names a test that does not exist, so that the table cannot go stale.
    """
    for name, reason in NOT_APPLICABLE.get(test_class.__name__, {}).items():
        # `parameterized` turns `test_x` into `test_x_0_case` and leaves nothing callable under the plain name.
        known = [test for test in dir(test_class) if test.startswith(name) and callable(getattr(test_class, test))]
        tests = [name] if name in known else [test for test in known if test.startswith(f"{name}_")]
        if not tests:
            raise AttributeError(f"{test_class.__name__} has no test {name}.")
        for test in tests if not os.environ.get("CONFORMANCE_TRY_SKIPS") else ():
            setattr(test_class, test, _skipped(test, reason))
    return test_class
