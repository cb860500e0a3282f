"""Memory-efficient training of speech models with SpeechBrain.

The tree mirrors SpeechBrain's own, so that a file can move upstream by path:
`nnet` holds what knows no speech, `lobes` the speaker and speech models built
of it, `optim` the 8-bit optimizers, `core` the Brain for long runs with its
`dataio`, `utils` the memory analysis, checkpoints and 8-bit tensors.
"""

__version__ = "0.1.0"
