"""Greedy decoding with llama.cpp: tokens a second and CPU seconds a token as JSON, one line for each round.

decode.py GGUF THREADS TOKENS ROUNDS
"""

import json
import sys
import time
from pathlib import Path

from llama_cpp import Llama


def main() -> None:
    path, threads, tokens, rounds = sys.argv[1], *map(int, sys.argv[2:5])
    # The repacking for AMX crashes in decoding; without it, nothing is taken away.
    repack = "amx_int8" not in Path("/proc/cpuinfo").read_text()
    model = Llama(path, n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False, use_extra_bufts=repack)
    prompt = model.tokenize(b"The capital of France is", add_bos=False)
    for _ in range(rounds):
        model.reset()
        stream = model.generate(prompt, temp=0.0)
        next(stream)
        begun, used = time.perf_counter(), time.process_time()
        for _ in range(tokens):
            next(stream)
        lasted = time.perf_counter() - begun
        print(json.dumps([tokens / lasted, (time.process_time() - used) / tokens]), flush=True)


main()
