"""Serve an upcycled model with vLLM and ask it a question as any OpenAI client does.

    python examples/serve.py FOLDER ["A question?"]

FOLDER is one of `save_pretrained`, with its tokenizer: `iha upcycle smollm2 FOLDER`.
"""

import importlib.util
import socket
import subprocess
import sys
import time

missing = [name for name in ("vllm", "openai") if importlib.util.find_spec(name) is None]
if missing:
    print(f"Nothing is served: install {' and '.join(missing)} first (docs/serving.md says how).")
    sys.exit()
if len(sys.argv) < 2:
    print("Nothing is served: name the folder of an upcycled model.")
    sys.exit()

import openai  # noqa: E402  # pyright: ignore[reportMissingImports]  # only where it is installed

folder = sys.argv[1]
question = sys.argv[2] if len(sys.argv) > 2 else "What is the capital of France?"
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]

# What the command `vllm serve` starts. IHA needs no option: vLLM finds it by its entry point.
command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
options = ["--port", str(port), "--host", "127.0.0.1", "--max-model-len", "1024"]
options += ["--kv-cache-memory-bytes", "1G"]
with subprocess.Popen(command + options) as server:
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        while True:
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                if server.poll() is not None:
                    sys.exit("vLLM did not start; its last lines above say why.")
                time.sleep(1)
        answer = client.chat.completions.create(
            model=folder,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=48,
        )
        print(f"{question}\n{answer.choices[0].message.content}")
    finally:
        server.terminate()
