"""Train the demo model: a Llama of 24 million weights, from random weights, in minutes on one GPU.

    python -m benchmarks.demo_model train corpus.json.gz tokenizer-directory output-directory --minutes 8

Batches are dialogues, made on the way, and a share of documents that falls. The schedule follows the time that has
passed (or the steps, with --steps, for a run that can be repeated exactly), so that it always ends where it should.
The defaults are what ended best after 20 seconds on one H200, by the loss of held-out wordings: Muon at a rate of 4e-3
0.771, at 2e-3 1.322, AdamW at 2e-3 2.502.
Training processes start through the package's `__main__`, so that those which make dialogues do not import torch.
Writes the model every minute and at the end, and train.json with the losses and some answers.
"""

import argparse
import json
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.demo_model import corpus, windows
from benchmarks.demo_model.dialogues import Dialogues
from benchmarks.demo_model.model import Llama, save, token_loss
from benchmarks.demo_model.prompts import PROMPTS
from benchmarks.demo_model.tokenizer import END, ROLES, render

SEED = 20261124
WARMUP = 0.02
LAST_RATE = 0.01  # of the highest learning rate
DOCUMENTS = (0.35, 0.04)  # share of a batch at the beginning, and from half of the run on
SAVE_EVERY_S = 60.0
EVALUATE_EVERY = 0.1  # of the run
ANSWER_TOKENS = 96


@dataclass(slots=True)
class Run:
    """What train.json holds."""

    settings: dict[str, Any]
    losses: list[dict[str, float]] = field(default_factory=list)
    held_out: list[dict[str, float]] = field(default_factory=list)
    answers: list[list[dict[str, str]]] = field(default_factory=list)
    num_steps: int = 0
    num_tokens: int = 0
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        content = {name: getattr(self, name) for name in self.__slots__}
        (path / "train.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


class Trainer:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.stream = windows.ShardStream(args.corpus, args.tokenizer / "tokenizer.json", args.processes)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.set_float32_matmul_precision("high")
        content = corpus.load(args.corpus)
        self.tokenizer = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
        self.documents = windows.document_rows(content, self.tokenizer, held_out=False)
        self.checks = self._checks(content)
        self.model = Llama(torch.Generator().manual_seed(SEED)).to(self.device)
        self.loss = token_loss
        if self.device.type == "cuda":
            _use_cudnn_attention(alone=args.attention == "cudnn")
            for layer in self.model.layers:
                layer.compile()
            self.loss = torch.compile(token_loss)
        self.optimizers = _optimizers(self.model, args.rate, muon=args.optimizer == "muon")
        self.rng = np.random.default_rng(SEED)
        self.run = Run({name: str(value) for name, value in vars(args).items()})

    def train(self) -> Run:
        args, run = self.args, self.run
        self._step(0.0)  # compiles; outside the schedule
        began = saved = time.monotonic()
        checked = 0.0
        while True:
            elapsed = time.monotonic() - began
            progress = run.num_steps / args.steps if args.steps else elapsed / (60 * args.minutes)
            if progress >= 1:
                break
            loss = self._step(progress)
            run.num_steps += 1
            run.num_tokens += args.rows * windows.WINDOW
            if run.num_steps % 50 == 1:
                run.losses.append({"progress": progress, "step": run.num_steps, "loss": loss.item()})
            if progress - checked >= EVALUATE_EVERY:
                checked = progress
                self._evaluate(progress, elapsed)
            if time.monotonic() - saved > SAVE_EVERY_S:
                saved = time.monotonic()
                self._write()
        run.seconds = time.monotonic() - began
        self._evaluate(1.0, run.seconds)
        self.stream.close()
        self._write()
        _use_cudnn_attention(alone=False)  # it plans anew for every length
        if not args.no_answers:
            run.answers = [self._talk(place) for place in range(len(PROMPTS))]
            run.save(args.output)
        return run

    def _step(self, progress: float) -> Tensor:
        share = DOCUMENTS[0] + (DOCUMENTS[1] - DOCUMENTS[0]) * min(1.0, 2 * progress)
        num_documents = round(self.args.rows * share)
        rows = np.concatenate(
            [
                self.documents[self.rng.integers(len(self.documents), size=num_documents)],
                self.stream.take(self.args.rows - num_documents),
            ]
        )
        loss = self._loss(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        rate = rate_at(progress)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["highest"] * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _loss(self, rows: windows.Rows) -> Tensor:
        marked = torch.from_numpy(rows.astype(np.int32))
        if self.device.type == "cuda":
            marked = marked.pin_memory().to(self.device, non_blocking=True)
        ids = (marked & (windows.LEARNT - 1)).long()
        targets = torch.where(marked >= windows.LEARNT, ids, -1).roll(-1, dims=1)
        targets[:, -1] = -1
        with torch.autocast(self.device.type, torch.bfloat16):
            return self.loss(self.model(ids), self.model.embed_tokens.weight, targets)

    def _checks(self, content: dict[str, Any]) -> dict[str, windows.Rows]:
        """Rows that training never sees: other documents, wordings never used, new dialogues of known wordings."""
        dialogues, num_rows = Dialogues(content), self.args.rows
        return {
            "documents": windows.document_rows(content, self.tokenizer, held_out=True)[:num_rows],
            "held-out wordings": windows.dialogue_rows(dialogues, self.tokenizer, -1, num_rows, held_out=True),
            "known wordings": windows.dialogue_rows(dialogues, self.tokenizer, -2, num_rows),
        }

    def _evaluate(self, progress: float, elapsed: float) -> None:
        # With gradients, though none are used: what is compiled for training serves, and nothing else is compiled.
        losses = {name: self._loss(rows).item() for name, rows in self.checks.items()}
        self.run.held_out.append({"progress": progress, **losses})
        rate = self.run.num_tokens / max(elapsed, 1e-9)
        shown = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        train = self.run.losses[-1]["loss"] if self.run.losses else math.nan
        print(f"{progress:4.0%} {elapsed:4.0f} s {self.run.num_steps:6} steps {rate / 1e6:.2f} M tokens/s", flush=True)
        print(f"     training {train:.3f}, {shown}", flush=True)

    def _write(self) -> None:
        save(self.model, self.args.output)
        self.run.save(self.args.output)

    @torch.no_grad()
    def _talk(self, place: int) -> list[dict[str, str]]:
        """Greedy answers to a fixed conversation, the whole of it computed again for each token."""
        prompt = PROMPTS[place]
        end = self.tokenizer.token_to_id(END)
        messages = [{"role": "system", "content": prompt.system}] if prompt.system else []
        for question in prompt.questions:
            messages.append({"role": "user", "content": question})
            text = render(messages) + ROLES["assistant"]
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
            start = len(ids)
            while len(ids) < start + ANSWER_TOKENS and (len(ids) == start or ids[-1] != end):
                with torch.autocast(self.device.type, torch.bfloat16):
                    hidden = _eager(self.model, torch.tensor([ids], device=self.device))
                    ids.append(int((hidden[0, -1] @ self.model.embed_tokens.weight.T).argmax()))
            closed = "" if ids[-1] == end else "..."
            messages.append({"role": "assistant", "content": self.tokenizer.decode(ids[start:]) + closed})
            print(f"> {question}\n{messages[-1]['content']}", flush=True)
        return messages


def _eager(model: Llama, ids: Tensor) -> Tensor:
    """Without the compiled layers, whose shapes are fixed."""
    x = model.embed_tokens(ids)
    for layer in model.layers:
        x = type(layer).forward(layer, x, model.cos[: ids.shape[1]], model.sin[: ids.shape[1]])
    return model.norm(x)


def _use_cudnn_attention(*, alone: bool) -> None:
    torch.backends.cuda.enable_flash_sdp(not alone)
    torch.backends.cuda.enable_mem_efficient_sdp(not alone)
    torch.backends.cuda.enable_math_sdp(not alone)


def rate_at(progress: float) -> float:
    """Share of the highest learning rate: a short rise, then a cosine."""
    if progress < WARMUP:
        return max(progress, 1e-3) / WARMUP
    through = (progress - WARMUP) / (1 - WARMUP)
    return LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * min(through, 1.0)))


def _optimizers(model: Llama, rate: float, *, muon: bool) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon (https://kellerjordan.github.io/posts/muon/) for the matrices of the layers."""
    matrices = [weight for weight in model.layers.parameters() if weight.ndim == 2]
    others = [weight for weight in model.parameters() if weight.ndim < 2]
    fused = next(model.parameters()).is_cuda
    decayed = [model.embed_tokens.weight] if muon else [model.embed_tokens.weight, *matrices]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, rate, (0.9, 0.95), fused=fused)]
    if muon:
        found.append(torch.optim.Muon(matrices, rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))
    for optimizer in found:
        for group in optimizer.param_groups:
            group["highest"] = rate
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="written by benchmarks.demo_model.corpus")
    parser.add_argument("tokenizer", type=Path, help="directory written by benchmarks.demo_model.tokenizer")
    parser.add_argument("output", type=Path)
    parser.add_argument("--minutes", type=float, default=8.0, help="of training, compiling not counted")
    parser.add_argument("--steps", type=int, default=0, help="instead of minutes")
    parser.add_argument("--rows", type=int, default=64, help=f"rows of {windows.WINDOW} tokens in a batch")
    parser.add_argument("--rate", type=float, default=4e-3, help="highest learning rate")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="muon")
    parser.add_argument("--attention", choices=("flash", "cudnn"), default="cudnn")
    parser.add_argument("--no-answers", action="store_true", help="to the fixed prompts, at the end")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 3))
    run = Trainer(parser.parse_args()).train()
    print(f"{run.num_steps} steps, {run.num_tokens / 1e6:.0f} M tokens in {run.seconds:.0f} s")
