"""Quantise a model, then talk to it: python examples/quantise_and_chat.py MODEL OUT --calibration TEXT < questions.txt

MODEL is a directory or a hub name. OUT is made on the first run and reused afterwards. TEXT is plain or JSON lines, and
should be of the kind that the model will be used for; without it prose that Python carries is taken, enough to try.
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
parser.add_argument("--calibration", type=Path, default=None)
parser.add_argument("--target-bits", type=float, default=3.45, help="bits per weight on average")
parser.add_argument("--num-sequences", type=int, default=None, help="calibration windows (128)")
parser.add_argument("--max-new-tokens", type=int, default=200)
options = parser.parse_args()

if not options.out.exists():
    spec = rosaq.CalibrationSpec(num_sequences=options.num_sequences)
    result = rosaq.quantize(
        options.model, options.out, target_bits=options.target_bits, calibration=options.calibration, spec=spec
    )
    print(f"{options.out}: {result.bits_per_weight:.2f} bits per weight")

tokenizer = AutoTokenizer.from_pretrained(options.out)
model = AutoModelForCausalLM.from_pretrained(options.out, dtype="auto")
if torch.cuda.is_available():
    model = model.to("cuda")
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
