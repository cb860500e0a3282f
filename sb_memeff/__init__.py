"""Memory-efficient training of speech models with SpeechBrain.

The folders that SpeechBrain has too are named alike, so that a file can move
upstream by its path: `nnet` (building blocks and losses), `lobes` (networks),
`decoders`, `dataio`, `utils` (checkpoints) and `core` (the Brain for long
trainings). `optim` has the 8-bit optimizers, `ops` the numerics with their Triton
kernels, `memory` and `analysis` the memory analysis, and `export` the export of
trained networks.
"""

__version__ = "0.1.0"
