"""Speaker verification: embeddings, scores, calibration and error rates."""
