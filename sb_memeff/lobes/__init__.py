"""Speech models that stand in for the SpeechBrain lobes of like name."""
