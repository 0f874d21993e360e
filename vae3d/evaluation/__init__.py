"""Score reconstructions against originals: pairs, scores, summaries, reports."""
