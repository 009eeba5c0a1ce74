"""ssmkit generate: let a language model write on."""

import argparse
import sys
import time
from pathlib import Path

import torch

from ssmkit.data.vocabulary import ByteVocabulary, Vocabulary, vocabulary_of
from ssmkit.models.language import LanguageModel, load

EPILOG = """\
examples:
  ssmkit generate runs/stdlib --prompt "def main("
  ssmkit generate runs/stdlib --prompt-file start.py --tokens 500 --temperature 0.7 --top-p 0.95 --seed 1
  ssmkit generate weights/mamba-130m --prompt "State-space models are" --temperature 0
  ssmkit generate weights/mamba-130m --prompt "Once" --batch 4 --top-k 50

RUN_OR_WEIGHTS is a run folder of `ssmkit train language`, or a folder of weights as state-spaces or transformers lay them
out (config.json beside model.safetensors or pytorch_model.bin), with the model's tokenizer.json in it. Nothing is
downloaded. Text goes to standard output as it comes, the speed to standard error."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.epilog = EPILOG
    parser.add_argument("source", metavar="RUN_OR_WEIGHTS", help="run folder, checkpoint file, or folder of weights")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json, if it is not in the folder of weights")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument(
        "--prompt", default="", metavar="TEXT", help="what to go on from (default: the start of a text)"
    )
    prompt.add_argument("--prompt-file", metavar="FILE", help="the same from a file; - is standard input")
    parser.add_argument("--tokens", type=int, default=200, help="how many to write at most (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest (default: %(default)s)")
    parser.add_argument(
        "--top-k", type=int, default=0, help="choose among the k likeliest; 0: all (default: %(default)s)"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="choose among the likeliest that make up this share (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="fixes the choices (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="continuations at once (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where the model runs: cpu, cuda, ... (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="(%(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Write, then say how fast."""
    for name in ("tokens", "batch"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    prompt = prompt_of(arguments)
    model, vocabulary = open_model(arguments.source, arguments.tokenizer, getattr(torch, arguments.dtype))
    tokens = vocabulary.encode(prompt)
    if max(tokens) >= model.config.vocab_size:
        raise ValueError(
            f"the tokenizer gives token {max(tokens)}, the model has {model.config.vocab_size}; take the model's own"
        )
    model.to(arguments.device)
    ids = torch.tensor([tokens] * arguments.batch, device=arguments.device)
    began = time.perf_counter()
    written, first = write(model, vocabulary, ids, arguments)
    rest = time.perf_counter() - first
    print(
        f"{ids.shape[1]} tokens read in {first - began:.2f} s; "
        f"{arguments.batch} x {written} written, {arguments.batch * (written - 1) / max(rest, 1e-9):,.1f} tokens/s",
        file=sys.stderr,
    )
    return 0


def prompt_of(arguments: argparse.Namespace) -> str:
    """The prompt, from wherever it is."""
    if arguments.prompt_file == "-":
        return sys.stdin.read()
    if arguments.prompt_file is None:
        return str(arguments.prompt)
    path = Path(arguments.prompt_file)
    if not path.is_file():
        raise FileNotFoundError(f"no prompt at {path}")
    return path.read_text("utf-8", "surrogateescape")


def open_model(
    source: str, tokenizer: str | None, dtype: torch.dtype = torch.float32
) -> tuple[LanguageModel, Vocabulary]:
    """The model of a run of ours, or of a folder of weights, and its vocabulary."""
    path = Path(source)
    if path.suffix == ".ckpt" or (path / "checkpoints").is_dir():
        from ssmkit.train.language import load_model

        return load_model(path, dtype)[0], ByteVocabulary()
    if not path.exists():
        raise FileNotFoundError(f"no run and no weights at {path}")
    model = load(path, dtype=dtype)
    return model, vocabulary_of(path if path.is_dir() else path.parent, model.config.vocab_size, tokenizer)


def write(
    model: LanguageModel, vocabulary: Vocabulary, ids: torch.Tensor, arguments: argparse.Namespace
) -> tuple[int, float]:
    """Print continuations: one as it comes, several when they are done. How many tokens came, and when the first did."""
    prompt = ids[0].tolist()
    decoders = [vocabulary.decoder(prompt) for _ in ids]
    texts = [""] * len(ids)
    running = set(range(len(ids)))
    written, first = 0, 0.0
    tokens = model.stream(
        ids,
        arguments.tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        eos_token_id=sorted(vocabulary.end),
        generator=torch.Generator(device=ids.device).manual_seed(arguments.seed),
    )
    for step in tokens:
        first = first or time.perf_counter()
        written += 1
        for row, token in enumerate(step.tolist()):
            if token in vocabulary.end:
                running.discard(row)
            if row in running:
                new = decoders[row].push(token)
                texts[row] += new
                if len(ids) == 1:
                    print(new, end="", flush=True)
    rests = [decoder.flush() for decoder in decoders]
    if len(ids) == 1:
        print(rests[0])
    else:
        for row, (text, rest) in enumerate(zip(texts, rests, strict=True), start=1):
            print(f"--- {row}\n{text}{rest}")
    return written, first or time.perf_counter()
