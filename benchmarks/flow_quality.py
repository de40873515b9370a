"""How far is the mel of fewer Euler steps, or of another time grid, from that of ten cosine steps?

    python benchmarks/flow_quality.py --checkpoint FOLDER --audio one.wav two.wav

Each file is encoded to codes and decoded again; the noise is the same for every setting. A `.npy` file holds codes already, integers
(num_codebooks, frames). Printed are the mean absolute difference in log-mel from ten cosine steps, from fifty (closer to the flow's
true end, and ten steps are not right by definition there) and the passes that a setting costs (a step under guidance is one pass with
the condition and one without). Without a checkpoint everything is tiny and random, and the figures mean nothing.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch


sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.reporting import RANDOM_NOTICE, read_codes, versions, write_figures  # noqa: E402
from modeling_baichuan_audio import (  # noqa: E402
    BaichuanAudioFlowMatchingDecoder,
    BaichuanAudioTokenizerModel,
)
from modeling_baichuan_audio.conversion import tiny_model  # noqa: E402


SCHEDULES = ("cosine", "linear", "sway:-0.5", "sway:0.5")  # "sway" itself, with -1, is the cosine
STEPS = (4, 5, 6, 7, 8, 9, 10)


def codes_of(path: str, tokenizer: BaichuanAudioTokenizerModel) -> torch.Tensor:
    """(num_codebooks, frames) of a file of sound (its first chunk) or of codes."""
    return torch.from_numpy(np.load(path).astype(np.int64)) if path.endswith(".npy") else read_codes(path, tokenizer)


@torch.no_grad()
def measure(flow, states: list[torch.Tensor], steps=STEPS, schedules=SCHEDULES, guidance: float | None = None) -> list[dict]:
    """
    One row for each setting.

    Args:
        states: mel decoder states `(frames, input_size)` of each clip.
    """
    halves = 2 if (flow.config.guidance if guidance is None else guidance) else 1

    def solve(count: int, schedule: str) -> torch.Tensor:
        clips = [
            flow(clip[None], seed=index, num_steps=count, time_schedule=schedule, guidance=guidance).mel[0]
            for index, clip in enumerate(states)
        ]
        return torch.cat(clips)

    ten, fifty = solve(10, "cosine"), solve(50, "cosine")
    rows = []
    for schedule in schedules:
        for count in steps:
            mel = solve(count, schedule)
            distances = {f"from_{name}": float((mel - other).abs().mean()) for name, other in (("ten", ten), ("fifty", fifty))}
            rows.append({"schedule": schedule, "steps": count, "passes": count * halves, **distances})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint", help="a folder with the flow-matching decoder and, unless --tokenizer names another, the tokenizer"
    )
    parser.add_argument("--tokenizer", help="a folder to take the tokenizer from")
    parser.add_argument("--audio", nargs="+", default=[], help="files of sound, or of codes (.npy)")
    parser.add_argument("--guidance", type=float, help="the config's by default")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    if bool(arguments.checkpoint) != bool(arguments.audio):
        parser.error("--checkpoint and --audio need each other")
    if arguments.checkpoint:
        model = arguments.checkpoint
        flow = BaichuanAudioFlowMatchingDecoder.from_pretrained(model, dtype=torch.float32).eval()
        tokenizer = BaichuanAudioTokenizerModel.from_pretrained(arguments.tokenizer or model, dtype=torch.float32).eval()
        with torch.no_grad():
            codes = [codes_of(path, tokenizer) for path in arguments.audio]
    else:
        model = RANDOM_NOTICE
        whole = tiny_model()
        flow, tokenizer = whole.flow_matching, whole.audio_tokenizer
        generator = torch.Generator().manual_seed(0)
        codes = [torch.stack([torch.randint(size, (50,), generator=generator) for size in tokenizer.config.codebook_sizes])]
    with torch.no_grad():
        states = [tokenizer.decode(clip[None]).hidden_states[0] for clip in codes]
    print(f"model     {model}")
    print(f"versions  {versions()}")
    print(f"clips     {len(states)}, {sum(len(clip) for clip in states)} mel frames\n")
    print(f"{'schedule':10s} {'steps':>5s} {'passes':>6s} {'from 10':>9s} {'from 50':>9s}")
    rows = measure(flow, states, guidance=arguments.guidance)
    for row in rows:
        print(f"{row['schedule']:10s} {row['steps']:5d} {row['passes']:6d} {row['from_ten']:9.4f} {row['from_fifty']:9.4f}")
    write_figures(arguments.json, {"model": str(model), "rows": rows})


if __name__ == "__main__":
    main()
