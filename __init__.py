"""The InternLM-XComposer2 family of vision-language models on transformers 5."""
