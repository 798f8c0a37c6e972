"""Make Baton's demo model: python -m benchmarks.demo_model {corpus,tokenizer,train,evaluate,card} ..., in order.

Of a checkout and its environment:

    python -m benchmarks.demo_model corpus build/corpus.json.gz
    python -m benchmarks.demo_model tokenizer build/corpus.json.gz build/model
    python -m benchmarks.demo_model train build/corpus.json.gz build/model build/model   # needs a GPU, 9 minutes
    python -m benchmarks.demo_model evaluate build/corpus.json.gz build/model build/evaluation.json
    python -m benchmarks.demo_model card build/corpus.json.gz build/model/train.json build/evaluation.json build/model

Training needs torch, tokenizers and safetensors, and no part of Baton.
"""

import importlib
import sys

COMMANDS = ("corpus", "tokenizer", "train", "evaluate", "card")

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.exit(__doc__)
    command = sys.argv.pop(1)
    sys.argv[0] = f"benchmarks.demo_model {command}"
    importlib.import_module(f"benchmarks.demo_model.{command}").main()
