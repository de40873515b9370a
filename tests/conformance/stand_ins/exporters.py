"""Stands in for transformers' exporter tests, which its source distribution lacks: ours are in tests/modeling/test_interfaces.py."""


class ExportTesterMixin:
    pass


class ExportGenerateTesterMixin(ExportTesterMixin):
    pass
