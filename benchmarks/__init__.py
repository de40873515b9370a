"""One script per question: what something costs, next to what it must cost. RESULTS.md holds figures, LOG.md what was tried."""
