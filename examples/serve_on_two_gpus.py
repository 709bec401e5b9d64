"""Serve a rosaq checkpoint with vLLM on two GPUs and ask it something through the OpenAI client.

    python examples/serve_on_two_gpus.py DIR "Once upon a time" [arguments for `vllm serve`]

It needs vllm, openai and rosaq (`pip install .` in a clone of it). vLLM finds rosaq by itself, so that
`vllm serve DIR --tensor-parallel-size 2` is all there is to it.
"""

import subprocess
import sys
import time
import urllib.request

import openai

import rosaq

directory, prompt, *arguments = sys.argv[1:]
allowed = rosaq.read_config(directory).tp_sizes
if allowed and 2 not in allowed:
    sys.exit(f"{directory}: cannot be cut between 2 GPUs, only between {allowed}")

command = ["vllm", "serve", directory, "--tensor-parallel-size", "2", "--host", "127.0.0.1", "--port", "8321"]
server = subprocess.Popen([*command, *arguments])
try:
    while server.poll() is None:  # until it answers
        try:
            urllib.request.urlopen("http://127.0.0.1:8321/health", timeout=5)
            break
        except OSError:
            time.sleep(1)
    client = openai.OpenAI(base_url="http://127.0.0.1:8321/v1", api_key="none")
    for chunk in client.completions.create(model=directory, prompt=prompt, max_tokens=32, stream=True):
        print(chunk.choices[0].text, end="", flush=True)
    print()
finally:
    server.terminate()
    server.wait()
