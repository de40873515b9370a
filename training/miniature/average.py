"""A vocoder between two: `python -m modeling_baichuan_audio.training.miniature.average BEFORE AFTER FOLDER --share 0.6`.

What was trained last often gains at a cost, and the weights on the way there can have the gain without it (arXiv 2109.01903): here a
vocoder is more natural after training with an energy distance, and better understood before.
"""

import argparse
from pathlib import Path

import torch

from ...modeling_vocoder import BaichuanAudioVocoder


def between(before: BaichuanAudioVocoder, after: BaichuanAudioVocoder, share: float) -> BaichuanAudioVocoder:
    """
    Moves `after` to `before + share * (after - before)`, weights and the source's `noise_std` alike.

    Args:
        before, after: in float32, of the same sizes; `after` is changed and returned.
        share: between 0 (`before`) and 1 (`after`).

    Raises:
        ValueError: a share outside, or sizes that differ.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"`share` must be between 0 and 1, got {share}.")
    ours, theirs = after.state_dict(), before.state_dict()
    shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise ValueError("The two vocoders differ in size.")
    with torch.no_grad():
        for name, tensor in ours.items():
            tensor.copy_(torch.lerp(theirs[name], tensor, share))
    # Both may read one config object (`source` keeps it too), so nothing is assigned but this value.
    first, last = before.config.noise_std, after.config.noise_std
    after.config.noise_std = first + share * (last - first)
    return after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("before", "after", "folder"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--share", type=float, default=0.6, help="0 gives BEFORE, 1 AFTER")
    options = parser.parse_args()
    try:
        parts = [BaichuanAudioVocoder.from_pretrained(source, dtype=torch.float32) for source in (options.before, options.after)]
        between(*parts, options.share).save_pretrained(options.folder)
    except (ValueError, OSError) as error:
        raise SystemExit(f"Error: {error}") from error
    print(options.folder)


if __name__ == "__main__":
    main()
