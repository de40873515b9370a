"""How far is the mel decoder's "low_latency" policy from the exact one, by length of the pieces?

    python benchmarks/mel_decoder_latency.py --checkpoint FOLDER --audio one.wav two.wav

Each file (its first chunk) is encoded to codes and decoded at once and in pieces. Printed are, over all clips, the distance of the
hidden states relative to their size (mean and worst clip), and the mean absolute difference of the log-mel that flow matching makes of
them with the same noise. As a measure of what such a difference means, the last rows give the same for the exact states with other
noise, and with one codebook less. A clip is normed by its own statistics so far and, while they are few, by others:

- typical: of random codes, each as frequent as in training (the default of the package);
- previous: of the clip before in the list;
- none: by its own alone.

Without a checkpoint everything is tiny and random, and the figures mean nothing.
"""

import argparse
import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.reporting import RANDOM_NOTICE, read_codes, versions, write_figures  # noqa: E402
from modeling_baichuan_audio import (  # noqa: E402
    BaichuanAudioFlowMatchingDecoder,
    BaichuanAudioTokenizerModel,
    streaming_mel_decoder,
)
from modeling_baichuan_audio.conversion import tiny_model  # noqa: E402


PRIORS = ("typical", "previous", "none")


def stream(tokenizer, codes: torch.Tensor, piece: int, prior, positions: int):
    """Hidden states of a clip in pieces of `piece` code frames, and the clip's statistics; the prior counts as `positions`."""
    usual, streaming_mel_decoder.PRIOR_POSITIONS = streaming_mel_decoder.PRIOR_POSITIONS, positions
    try:
        state, states = tokenizer.start_stream(prior=prior), []
        for start in range(0, codes.shape[2], piece):
            part = codes[..., start : start + piece]
            states.append(tokenizer.stream_decode(part, state, final=start + piece >= codes.shape[2])[0])
    finally:
        streaming_mel_decoder.PRIOR_POSITIONS = usual
    return torch.cat(states, dim=1), state.statistics


@torch.no_grad()
def measure(
    tokenizer, flow, clips: list[torch.Tensor], pieces=(1, 4, 12, 25, 50), priors=PRIORS, steps: int | None = None
) -> dict:
    """
    Distances from the exact policy.

    Args:
        clips: codes `(1, num_codebooks, frames)`.
        pieces: code frames of each push.
        priors: of `PRIORS`.
        steps (*optional*): of flow matching; None takes the config's, 0 leaves the mel out.
    """

    def mel(states, seed):
        return flow(states, seed=seed, num_steps=steps).mel if steps != 0 else None

    exact = [tokenizer.decode(codes) for codes in clips]
    exact = [decoded.hidden_states for decoded in exact]
    exact_mels = [mel(states, index) for index, states in enumerate(exact)]

    def distances(states: list[torch.Tensor], seeds=None) -> dict[str, float]:
        apart = [float((ours - theirs).norm() / theirs.norm()) for ours, theirs in zip(states, exact)]
        row = {"states": sum(apart) / len(apart), "states_worst": max(apart)}
        if steps != 0:
            mels = [mel(ours, seed) for seed, ours in enumerate(states)] if seeds is None else list(map(mel, states, seeds))
            differences = [float((ours - theirs).abs().mean()) for ours, theirs in zip(mels, exact_mels)]
            row |= {"mel": sum(differences) / len(differences), "mel_worst": max(differences)}
        return row

    own = [stream(tokenizer, codes, codes.shape[2], None, 0)[1] for codes in clips]
    typical = streaming_mel_decoder.typical_statistics(tokenizer, tokenizer.config.num_codebooks)
    rows = []
    for prior in priors:
        positions = 0 if prior == "none" else streaming_mel_decoder.PRIOR_POSITIONS
        for piece in pieces:
            given = [own[index - 1] if prior == "previous" else typical for index in range(len(clips))]
            states = [stream(tokenizer, codes, piece, known, positions)[0] for codes, known in zip(clips, given)]
            rows.append({"prior": prior, "piece": piece, **distances(states)})
    fewer = tokenizer.config.num_codebooks - 1
    references = {"other noise": distances(exact, [len(clips) + index for index in range(len(clips))])}
    references[f"{fewer} codebooks"] = distances([tokenizer.decode(codes, fewer).hidden_states for codes in clips])
    return {"clips": len(clips), "seconds": sum(codes.shape[2] for codes in clips) / 12.5, "rows": rows, "references": references}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", help="a folder with the tokenizer and, unless --flow names another, flow matching")
    parser.add_argument("--flow", help="a folder to take the flow-matching decoder from")
    parser.add_argument("--audio", nargs="+", default=[], help="files of speech")
    parser.add_argument(
        "--pieces", type=int, nargs="+", default=[1, 4, 12, 25, 50], help="code frames of each push (12.5 a second)"
    )
    parser.add_argument("--priors", choices=PRIORS, nargs="+", default=PRIORS)
    parser.add_argument("--steps", type=int, help="of flow matching; the config's by default, 0 leaves the mel out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    if bool(arguments.checkpoint) != bool(arguments.audio):
        parser.error("--checkpoint and --audio need each other")
    torch.set_num_threads(arguments.threads)
    if arguments.checkpoint:
        model = arguments.checkpoint
        tokenizer = BaichuanAudioTokenizerModel.from_pretrained(model, dtype=torch.float32).eval()
        flow = BaichuanAudioFlowMatchingDecoder.from_pretrained(arguments.flow or model, dtype=torch.float32).eval()
        with torch.no_grad():
            clips = [read_codes(path, tokenizer)[None] for path in arguments.audio]
    else:
        model = RANDOM_NOTICE
        whole = tiny_model()
        tokenizer, flow = whole.audio_tokenizer, whole.flow_matching
        sizes, generator = tokenizer.config.codebook_sizes, torch.Generator().manual_seed(0)
        clips = [torch.stack([torch.randint(size, (1, 60), generator=generator) for size in sizes], dim=1) for _ in range(3)]
    print(f"model     {model}")
    print(f"versions  {versions()}")
    result = measure(tokenizer, flow, clips, arguments.pieces, arguments.priors, arguments.steps)
    print(f"clips     {result['clips']}, {result['seconds']:.0f} s\n")
    print(f"{'prior':12s} {'piece':>5s} {'ms':>6s} {'states':>8s} {'worst':>8s} {'log-mel':>8s} {'worst':>8s}")

    def figures(row):
        return "".join(f" {row[name]:8.4f}" for name in ("states", "states_worst", "mel", "mel_worst") if name in row)

    for row in result["rows"]:
        print(f"{row['prior']:12s} {row['piece']:5d} {80 * row['piece']:6d}{figures(row)}")
    for name, row in result["references"].items():
        print(f"{name:25s}{figures(row)}")
    write_figures(arguments.json, {"model": str(model), "versions": versions(), **result})


if __name__ == "__main__":
    main()
