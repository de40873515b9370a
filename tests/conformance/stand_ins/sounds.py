"""Stands in for a download helper: recordings that the tests would fetch from the Hub are synthesised, so that they run offline."""

import math
import os
import struct
import tempfile
import wave
import zlib


_FOLDER = os.path.join(tempfile.gettempdir(), "baichuan_audio_conformance_sounds")
_RATE = 16000


def _tone(name: str) -> str:
    """A second of a sine whose pitch depends on the name."""
    os.makedirs(_FOLDER, exist_ok=True)
    path = os.path.join(_FOLDER, os.path.splitext(name)[0] + ".wav")
    if not os.path.exists(path):
        pitch = 110 + zlib.crc32(name.encode()) % 400
        samples = (int(8000 * math.sin(2 * math.pi * pitch * index / _RATE)) for index in range(_RATE))
        partial = f"{path}.{os.getpid()}"
        with wave.open(partial, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(_RATE)
            file.writeframes(b"".join(struct.pack("<h", sample) for sample in samples))
        os.replace(partial, path)
    return path


def url_to_local_path(url: str, return_url_if_not_found: bool = True) -> str:
    name = url.rsplit("/", 1)[-1]
    if name.rsplit(".", 1)[-1] in ("wav", "mp3", "flac"):
        return _tone(name)
    return url if return_url_if_not_found else name
