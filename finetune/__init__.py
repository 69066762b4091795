"""Fine-tuning of the InternLM-XComposer2 family, run from a clone: `python -m finetune.train`."""
