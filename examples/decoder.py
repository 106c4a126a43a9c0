"""A Llama-shaped decoder: attention heads and MLP channels go, and it goes on generating.

    python examples/decoder.py --params 0.8

The network is made small from a config, and trained for a moment to count: give yours by AutoModelForCausalLM.
"""

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastscore
from fastscore.integrations.transformers import forward

VOCABULARY, LENGTH = 24, 16


def texts(count: int) -> list[dict[str, torch.Tensor]]:
    """Batches of 16 sequences that count upwards by a step of their own, modulo the vocabulary."""
    start, step = torch.randint(0, VOCABULARY, (count, 1)), torch.randint(1, 3, (count, 1))
    ids = (start + step * torch.arange(LENGTH)) % VOCABULARY
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(16)]


def main(params: float = 0.8, steps: int = 150) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """Returns the dense and the smaller network."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch in texts(16 * steps):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()

    # Each token is a sample (sample_dims=2); padding, told by attention_mask, counts for nothing.
    batches = texts(128)
    scores = fastscore.score(model, batches, sample_dims=2, ablation="mean", forward=forward, progress=False)
    result = fastscore.prune(model, scores, batches[0], params=params, calibration=batches, forward=forward)
    print(result.report)

    prompt = torch.tensor([[3, 4, 5, 6], [2, 4, 6, 8]])
    for name, each in (("dense", model), ("pruned", result.model)):
        print(f"{name:7}", each.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6,
                                         do_sample=False, pad_token_id=0).tolist())
    return model, result.model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=float, default=0.8, help="share that remains (default: %(default)s)")
    main(parser.parse_args().params)
