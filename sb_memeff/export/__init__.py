"""Trained networks for others to use: SpeechBrain folders, ONNX, TorchScript."""
