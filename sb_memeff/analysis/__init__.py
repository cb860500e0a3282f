"""From a SpeechBrain yaml file to what its training step needs."""
