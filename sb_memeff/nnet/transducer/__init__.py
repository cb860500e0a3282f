"""The neural transducer without its logits."""
