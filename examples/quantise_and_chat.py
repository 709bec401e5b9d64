"""Quantise a model, then talk to it: python examples/quantise_and_chat.py MODEL OUT [--bits 3] < questions.txt

MODEL is a directory or a hub name. OUT is made on the first run and reused afterwards.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import rosaq

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("out", type=Path)
parser.add_argument("--bits", type=int, default=3)
parser.add_argument("--group-size", type=int, default=64)
parser.add_argument("--num-sequences", type=int, default=64, help="calibration windows")
parser.add_argument("--max-new-tokens", type=int, default=200)
options = parser.parse_args()

if not options.out.exists():
    spec = rosaq.CalibrationSpec(num_sequences=options.num_sequences)
    result = rosaq.quantize(options.model, options.out, bits=options.bits, group_size=options.group_size, spec=spec)
    print(f"{options.out}: {result.bits_per_weight:.2f} bits per weight")

tokenizer = AutoTokenizer.from_pretrained(options.out)
model = AutoModelForCausalLM.from_pretrained(options.out, device_map="auto")
messages: list[dict[str, str]] = []
for line in sys.stdin:
    if tokenizer.chat_template:
        messages.append({"role": "user", "content": line.strip()})
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:  # a base model continues the text
        inputs = tokenizer(line.strip(), return_tensors="pt")
    inputs = inputs.to(model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with torch.inference_mode():
        ids = model.generate(
            **inputs, max_new_tokens=options.max_new_tokens, streamer=streamer, pad_token_id=tokenizer.eos_token_id
        )
    answer = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    messages.append({"role": "assistant", "content": answer})
