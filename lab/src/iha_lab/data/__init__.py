"""Examples to train on, corpora, and the retrieval task."""
