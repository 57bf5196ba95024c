"""Answers one question with a base model and with its fine-tuned adapter; prints both as a JSON list.

Usage: ``python -m demo.answer MODEL.gguf models:/CHECKPOINT QUESTION``. Plain transformers and peft: what
was trained here is readable without this project.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

MAX_NEW_TOKENS = 60


def main() -> None:
    """Answer twice."""
    import mlflow.artifacts
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model_file, checkpoint, question = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    adapter = mlflow.artifacts.download_artifacts(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    base = AutoModelForCausalLM.from_pretrained(model_file.parent, gguf_file=model_file.name)
    before = answer(base, tokenizer, question)
    after = answer(PeftModel.from_pretrained(base, adapter), tokenizer, question)
    print(json.dumps([before, after]))


def answer(model: Any, tokenizer: Any, question: str) -> str:
    """Return the model's greedy answer."""
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


if __name__ == "__main__":
    main()
