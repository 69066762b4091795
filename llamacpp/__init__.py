"""Checkpoints as GGUF, run by llama.cpp. Never ships with a checkpoint, so it need not be flat."""
