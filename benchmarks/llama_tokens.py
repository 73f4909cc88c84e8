"""SmolLM2-135M's GGUF file, imported, exported again, and run by llama.cpp: are the tokens the same, and is it as small in memory?

    python benchmarks/llama_tokens.py

It needs llama-cpp-python, takes some minutes, and writes ``benchmarks/results/llama_tokens.json`` and the table of docs/import.md.
Greedy decoding of each prompt by llama.cpp on the file, by llama.cpp on our export of the imported model, and by the imported model
itself, which is asked for its logits wherever it parts from llama.cpp.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import gguf
import smollm2
import torch
from cpu.llama import Greedy
from page import replace
from torch import Tensor

import kbit_inductor as kbit
from kbit_inductor.models.surgery import packed_matrices

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE, RESULTS = REPOSITORY / "docs" / "import.md", REPOSITORY / "benchmarks" / "results" / "llama_tokens.json"
PROMPTS = ("Gravity is", "The capital of France is", "Once upon a time", "To bake bread, you need")
NEW_TOKENS, LENGTH = 32, 128


def greedy(model: Any, ids: list[int]) -> tuple[list[int], list[Tensor]]:
    """Tokens of the imported model after ``ids``, and the logits that each was chosen by."""
    tokens, logits = list(ids), []
    for _ in range(NEW_TOKENS):
        logits.append(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].float())
        tokens.append(int(logits[-1].argmax()))
    return tokens[len(ids) :], logits


def by_llama(path: Path, prompts: list[list[int]]) -> list[list[int]]:
    """llama.cpp's tokens after each prompt."""
    generator = Greedy(path, LENGTH, torch.get_num_threads())
    return [generator(ids, NEW_TOKENS) for ids in prompts]


def compared(prompt: str, ours: list[int], logits: list[Tensor], theirs: list[int]) -> dict[str, Any]:
    """Where ``ours`` part from llama.cpp's, and by how much our logits prefer the one to the other there, of their range."""
    parts = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
    if parts is None:
        return {"prompt": prompt, "same": NEW_TOKENS, "of": NEW_TOKENS}
    found = logits[parts]
    margin = float(found[ours[parts]] - found[theirs[parts]]) / float(found.max() - found.min())
    return {"prompt": prompt, "same": parts, "of": NEW_TOKENS, "margin_of_range": margin}


def same_tensors(one: Path, other: Path) -> dict[str, int]:
    """How many tensors of two files have the same bytes, and how many there are."""
    first, second = ({tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors} for path in (one, other))
    alike = sum(name in second and tensor.data.tobytes() == second[name].data.tobytes() for name, tensor in first.items())
    return {"same": alike, "of": len(first)}


@torch.no_grad()
def main() -> None:
    """Run all of it, and write it down."""
    smollm2.silence()
    file, tokenizer = smollm2.gguf_file(), smollm2.read_tokenizer()
    model: Any = kbit.from_gguf(file)
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "exported.gguf"
        kbit.to_gguf(model, exported, like=file)
        tensors, size = same_tensors(file, exported), exported.stat().st_size
        theirs, again = (
            [Greedy(path, 128, torch.get_num_threads())(ids, NEW_TOKENS) for ids in prompts] for path in (file, exported)
        )
    rows = [compared(prompt, *greedy(model, ids), wanted) for prompt, ids, wanted in zip(PROMPTS, prompts, theirs, strict=True)]
    packed = sum(matrix.packed.nbytes for matrix in packed_matrices(model))
    floats = sum(parameter.nbytes for parameter in model.parameters())
    results = {
        "file_bytes": file.stat().st_size, "exported_bytes": size, "packed_bytes": packed, "float_bytes": floats,
        "tensors": tensors, "exported_tokens_same": theirs == again, "prompts": rows,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    replace(PAGE, "llama", table(results))
    print(json.dumps(results, indent=1))


def table(results: dict[str, Any]) -> list[str]:
    """The results in Markdown."""
    sizes = [f"{results[name] / 1e6:.1f} MB" for name in ("file_bytes", "packed_bytes", "float_bytes", "exported_bytes")]
    tensors = results["tensors"]
    lines = [
        f"The file has {sizes[0]}; in memory the model has {sizes[1]} of packed weights and {sizes[2]} of others; our export has "
        f"{sizes[3]}, with {tensors['same']} of {tensors['of']} tensors the same bytes. llama.cpp's tokens on the export are "
        f"{'those' if results['exported_tokens_same'] else 'not those'} on the file.",
        "",
        "| prompt | tokens as llama.cpp's | where they part, our logits differ by |",
        "|---|---:|---|",
    ]
    for row in results["prompts"]:
        margin = f"{row['margin_of_range']:.2%} of their range" if "margin_of_range" in row else "they do not"
        lines.append(f"| {row['prompt']} | {row['same']} of {row['of']} | {margin} |")
    return lines


if __name__ == "__main__":
    main()
