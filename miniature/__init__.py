"""The miniature checkpoint: every part of Baichuan-Audio, small, trained for a small English domain (training/miniature/)."""

from pathlib import Path


FOLDER = Path(__file__).parent
