import pytest
import torch

from modeling_baichuan_audio import TranscriptLengthCriteria


AUDIO, OTHER = 9, 1


def test_a_row_ends_a_margin_after_a_token_for_each_frame():
    inputs = {"input_ids": torch.tensor([[OTHER, AUDIO, AUDIO, AUDIO], [OTHER, OTHER, OTHER, AUDIO]])}
    criterion = TranscriptLengthCriteria(inputs, AUDIO, margin=2)
    ended = [criterion(torch.full((2, 4 + new), AUDIO), None).tolist() for new in range(7)]
    # What is written counts, whatever it is; three frames and two tokens, one frame and two tokens.
    assert [row[0] for row in ended] == [new >= 5 for new in range(7)]
    assert [row[1] for row in ended] == [new >= 3 for new in range(7)]
    beams = criterion(torch.full((6, 4 + 3), AUDIO), None)
    assert beams.tolist() == [False] * 3 + [True] * 3


@pytest.mark.parametrize("beams", [1, 2])
def test_transcripts_of_a_batch_end_where_each_would_alone(shared_tiny_model, processor, beams):
    model = shared_tiny_model
    seconds = (2.0, 0.6)
    waveforms = [
        torch.randn(round(16_000 * length), generator=torch.Generator().manual_seed(0)).numpy() * 0.1 for length in seconds
    ]

    def write(audio):
        inputs = processor.apply_transcription_request(audio)
        sequences = model.generate(
            **inputs,
            do_sample=False,
            num_beams=beams,
            max_new_tokens=200,
            # Untrained, it might end by chance: not before the limit.
            suppress_tokens=[model.generation_config.eos_token_id] if model.generation_config.eos_token_id is not None else None,
            stopping_criteria=[TranscriptLengthCriteria(inputs, processor.audio_token_id, margin=3)],
        )
        frames = (inputs["input_ids"] == processor.audio_token_id).sum(1).tolist()
        return sequences[:, inputs["input_ids"].shape[1] :], frames

    together, frames = write(waveforms)
    assert frames[0] > 2 * frames[1] and together.shape[1] == frames[0] + 3
    for row, waveform in enumerate(waveforms):
        alone, _ = write(waveform)
        assert alone.shape[1] == frames[row] + 3
        assert torch.equal(together[row, : alone.shape[1]], alone[0])
