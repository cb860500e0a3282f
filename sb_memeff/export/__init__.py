"""Exports of trained networks: SpeechBrain folders, ONNX, TorchScript."""
