"""The miniature checkpoint: its corpus, its text LLM and how they become rows to train on."""
