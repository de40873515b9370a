"""The command `baichuan-audio`: a thin layer over the public API."""

import importlib

from .cli_common import app


# Importing them registers their commands, in the order of the help.
for _name in ("cli_speech", "cli_models", "cli_eval", "cli_bench"):
    importlib.import_module(f".{_name}", __package__)

__all__ = ["app"]

if __name__ == "__main__":
    app()
