"""What the language-model examples share: text, training state, checkpoints, decoding, measurements, figures."""
