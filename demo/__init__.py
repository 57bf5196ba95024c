"""The demo behind ``make demo``: one LoRA job on the real servers, from submit to answer."""
